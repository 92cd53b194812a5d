"""Train tiny, randomly initialised language models with transformers' Trainer.

    python examples/with_transformers.py

pyfused.patch() replaces the losses inside of the library. pyfused.convert() fuses the head and the
loss of a language model, without materialising logits. Needs `pip install '.[integrations]'`.
"""

from __future__ import annotations

import contextlib
import tempfile

import torch
from common import require_equal
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import pyfused

STEPS, VOCABULARY, LENGTH = 20, 512, 32
TOLERANCE = 1e-4


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    )


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, intermediate_size=64, **sizes))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=64, **sizes))


MODELS = {"GPT-2": gpt2, "BERT": bert, "Llama": llama}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random walks through the vocabulary; every fourth token is ignored."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(5, (LENGTH,), generator=generator).cumsum(0) % VOCABULARY
        labels = tokens.clone()
        labels[::4] = -100
        return {"input_ids": tokens, "labels": labels}


def train(name: str, steps: int, accumulate: int = 1, convert: bool = False) -> list[float]:
    """Trains on 8 texts per step, in micro-batches; returns the losses."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if convert:
        print(pyfused.plan_conversion(model))
        pyfused.convert(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Texts())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    for name in MODELS:
        curves = []
        for patched in (contextlib.nullcontext, pyfused.patch):
            with patched():
                curves.append(train(name, STEPS))
        if name == "Llama":
            curves[1] = train(name, STEPS, accumulate=4, convert=True)
        print(f"{name}: last loss {curves[1][-1]:.4f}")
        require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
