"""transformers, Lightning and skorch give the same losses with and without pyfused.

tests/README.md has the command. The tests download nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import language_models
import pytest
import torch
from conftest import KernelCalls
from language_models import are_computed
from torch import Tensor

import pyfused
import pyfused.nn
from pyfused.dispatch import reasons

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # raised by these libraries
]
STEPS = 12


@pytest.fixture(autouse=True)
def examples_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def assert_equal_and_falling(losses: list[float], expected: list[float]) -> None:
    assert len(losses) >= STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_transformers_trainer(name: str, kernel_calls: KernelCalls) -> None:
    train = example("with_transformers").train
    expected = train(name, STEPS)
    assert not kernel_calls
    with pyfused.patch():
        losses = train(name, STEPS)
    assert_equal_and_falling(losses, expected)
    assert kernel_calls["cross_entropy"] >= STEPS


def test_lightning_trainer(kernel_calls: KernelCalls) -> None:
    train = example("with_lightning").train
    expected = train(False, STEPS)
    assert not kernel_calls
    assert_equal_and_falling(train(True, STEPS), expected)
    assert kernel_calls["cross_entropy"] >= STEPS
    assert kernel_calls["relu"] >= STEPS


def test_skorch_net(kernel_calls: KernelCalls) -> None:
    train = example("with_skorch").train
    expected = train(torch.nn, 2)
    assert not kernel_calls
    assert_equal_and_falling(train(pyfused.nn, 2), expected)
    assert kernel_calls["cross_entropy"] >= STEPS


# ---- language models with a fused head -----------------------------------------------------------

DROPOUTS = "resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob attention_probs_dropout_prob"
NO_DROPOUT = dict.fromkeys(DROPOUTS.split(), 0.0)


llama = partial(language_models.tiny, "LlamaForCausalLM")


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 300, (8, 40), generator=generator)  # above the size limit
    labels = tokens.clone()
    labels[:, ::4] = -100
    return {"input_ids": tokens, "labels": labels}


def bert_pretraining() -> tuple[Any, dict[str, Any]]:
    model = language_models.tiny("BertForPreTraining", **NO_DROPOUT)
    return model, batch() | {"next_sentence_label": torch.arange(8) % 2}


def bert_to_bert() -> tuple[Any, dict[str, Any]]:
    import transformers

    sizes = language_models.sizes_of(transformers.BertConfig()) | NO_DROPOUT
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes),
        transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True),
    )
    both.pad_token_id, both.decoder_start_token_id = 0, 1
    return transformers.EncoderDecoderModel(both).train(), batch()


def causal(name: str, items: Any = None, **more: Any) -> tuple[Any, dict[str, Any]]:
    inputs = batch() if items is None else batch() | {"num_items_in_batch": items}
    return language_models.tiny(name, **more), inputs


GEMMA: dict[str, Any] = {"final_logit_softcapping": 2.0, "tie_word_embeddings": True}
LANGUAGE_MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Llama": partial(causal, "LlamaForCausalLM", torch.tensor(9)),
    "Mixtral": partial(causal, "MixtralForCausalLM", 7, output_router_logits=True),
    "Gemma2": partial(causal, "Gemma2ForCausalLM", 7, **GEMMA),
    "BERT": bert_pretraining,
    "two BERTs": bert_to_bert,
}


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Returns the loss, the gradients by name, and whether the logits were computed."""
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    output = model(**inputs or batch())
    output.loss.backward()
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    logits = getattr(output, "logits", None)
    logits = output.prediction_logits if logits is None else logits
    return output.loss.detach(), gradients, are_computed(logits)


def assert_same_steps(found: Any, expected: Any, logits: bool = False) -> None:
    assert found[2] == logits
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name: str, kernel_calls: KernelCalls) -> None:
    model, inputs = LANGUAGE_MODELS[name]()
    expected = step(model, **inputs)
    pyfused.convert(model)
    kernel_calls.clear()
    assert_same_steps(step(model, **inputs), expected)
    assert kernel_calls["cross_entropy"] > 0
    pyfused.revert(model)
    assert_same_steps(step(model, **inputs), expected, logits=True)


def test_language_models_that_return_logits() -> None:
    model = llama()
    pyfused.convert(model)
    assert not are_computed(model(input_ids=batch()["input_ids"]).logits)  # without a loss
    assert model(batch()["input_ids"], logits_to_keep=2).logits.shape[1] == 2
    output = model(batch()["input_ids"], None, None, None, None, batch()["labels"])
    assert not are_computed(output.logits)
    assert output.logits.argmax(-1).shape == batch()["labels"].shape
    assert model(**batch(), return_dict=False)[1].argmax(-1).shape == batch()["labels"].shape
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert are_computed(model(**batch()).logits)
    hook.remove()
    assert not are_computed(model(**batch()).logits)
    assert model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape == (8, 42)
    model.eval()
    assert are_computed(model(**batch()).logits)


def offloaded(whole: bool, folder: Path, model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if whole:
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    places = {"model": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, offload_dir=folder, main_device="cpu")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whole", [True, False])
def test_offloaded_language_models(whole: bool, when: str, tmp_path: Path) -> None:
    """accelerate replaces the head's forward, and moves its weight to meta."""
    expected = offloaded(whole, tmp_path / "expected", llama())
    model = llama()
    if when == "before":
        offloaded(whole, tmp_path / "model", model)
        left = pyfused.plan_conversion(model).left
        assert left[0].reason.startswith("the forward of its head was replaced")
        pyfused.convert(model)
    else:
        reasons._reported.clear()
        assert not are_computed(pyfused.convert(model)(**batch()).logits)
        offloaded(whole, tmp_path / "model", model)
        with pytest.warns(RuntimeWarning, match="forward of its head was replaced"):
            model(**batch())
    output = model(**batch())
    torch.testing.assert_close(output.loss, expected(**batch()).loss)
    assert are_computed(output.logits)


def test_outputs_of_language_models() -> None:
    """The output has the plain model's entries, in the same order."""
    plain, model = llama(), pyfused.convert(llama())
    expected, output = plain(**batch()), model(**batch())
    assert list(output) == list(expected)
    torch.testing.assert_close(output[:2], expected[:2])
    torch.testing.assert_close(pickle.loads(pickle.dumps(output)).logits, expected.logits)


COMPILED = "LlamaForCausalLM", "BertForMaskedLM"


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_language_models(name: str) -> None:
    """A compiled model computes its logits, with as many graphs as before its conversion."""
    from torch._dynamo.utils import counters

    found = []
    for convert in (False, True):
        model = language_models.tiny(name, dropout_rate=0.0, **NO_DROPOUT)
        model = pyfused.convert(model) if convert else model
        torch.compiler.reset()
        counters.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = language_models.step(torch.compile(model, backend="aot_eager"))
        assert "pyfused" not in str([str(w.message) for w in warned])
        found.append((*result, len(counters["graph_break"]), counters["stats"]["unique_graphs"]))
    assert found[1][2:] == found[0][2:]
    assert found[1][2]
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-4, atol=1e-5)


def test_a_converted_language_model_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = pyfused.convert(llama())
    model.save_pretrained(tmp_path)
    again = type(llama()).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert inspect.signature(model.forward) == inspect.signature(again.forward)


def test_calls_with_shifted_labels_and_kept_logits() -> None:
    plain, model = llama(), pyfused.convert(llama())
    tokens, labels = batch().values()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    last, keep = shifted[:, -9:].contiguous(), {"logits_to_keep": 9}
    for options in (
        {"labels": labels, "shift_labels": shifted},
        {"labels": labels[:, -9:], "shift_labels": last, **keep},
        {"labels": labels[:, :7], "logits_to_keep": torch.arange(7)},
    ):
        options["input_ids"] = tokens
        assert_same_steps(step(model, **options), step(plain, **options))


def trainer(model: Any = None, kind: Any = None, **options: Any) -> Any:
    import transformers

    model = llama(vocab_size=512) if model is None else model
    texts = example("with_transformers").Texts()
    arguments = transformers.TrainingArguments(
        "unused", max_steps=3, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_eval_batch_size=8, **options,
    )  # fmt: skip
    return (kind or transformers.Trainer)(model, arguments, train_dataset=texts, eval_dataset=texts)


def losses(train: Any) -> list[float]:
    train.train()
    return [entry["loss"] for entry in train.state.log_history if "loss" in entry]


def test_evaluation_and_metrics_with_trainer() -> None:
    import transformers

    class Accuracy(transformers.Trainer):  # as in docs/transformers.md
        def log(self, logs: dict[str, float], *args: Any) -> None:
            metrics = self.model.pyfused_metrics
            if "loss" in logs and metrics is not None:
                valid = metrics.prediction != -100
                logs["accuracy"] = float(metrics.correct.sum() / valid.sum())
            super().log(logs, *args)

    plain = trainer()
    expected = plain.evaluate()["eval_loss"]
    train = trainer(pyfused.convert(plain.model, evaluation=True, metrics=True), Accuracy)
    assert train.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert train.model.pyfused_metrics.correct.shape == (8 * 32,)
    assert len(losses(train)) == 3
    found = [entry["accuracy"] for entry in train.state.log_history if "loss" in entry]
    assert [0 <= accuracy <= 1 for accuracy in found] == [True] * 3


@pytest.mark.parametrize("part", range(4))
def test_every_causal_language_model_of_the_list(part: int) -> None:
    """The list of converted models is correct, and gradients are equal."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    page = (results / "transformers-5.23" / "classes.md").read_text()
    listed = {
        name: reason.strip()
        for name, reason in re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    }
    assert set(listed) == set(language_models.names())
    assert sum(reason == "converted" for reason in listed.values()) >= 240
    for name in sorted(listed)[part::4]:
        assert language_models.conversion(name) == listed[name], name


def test_gradient_accumulation_with_a_fused_head() -> None:
    """Trainer passes the number of targets of all micro-batches."""
    train = example("with_transformers").train
    expected = train("Llama", STEPS, accumulate=4)
    losses = train("Llama", STEPS, accumulate=4, convert=True)
    assert_equal_and_falling(losses, expected)
    assert losses == pytest.approx(train("Llama", STEPS), rel=1e-3)


# ---- wrappers that register hooks on a model's outputs -------------------------------------------


def in_fabric(model: Any, optimizer: Any, **options: Any) -> Any:
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, **options)
    model, optimizer = fabric.setup(model, optimizer)
    return model, fabric.backward, optimizer


def in_accelerate(model: Any, optimizer: Any) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, accelerator.backward, optimizer


WRAPPERS: dict[str, Any] = {
    "Fabric": in_fabric,
    "Fabric, bf16": partial(in_fabric, precision="bf16-mixed"),
    "accelerate": in_accelerate,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_that_register_hooks(name: str) -> None:
    """Three steps have the same losses as without convert, and checks of the wrappers work."""
    found: list[list[float]] = []
    for convert in (False, True):
        model = llama(vocab_size=512)
        model = pyfused.convert(model) if convert else model
        call, backward, optimizer = WRAPPERS[name](model, torch.optim.SGD(model.parameters(), 0.1))
        found.append([])
        for _ in range(3):
            output = call(**batch())
            if name == "Fabric, bf16":
                with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
                    output.loss.backward(retain_graph=True)
            backward(output.loss)
            assert are_computed(output.logits) != convert
            optimizer.step()
            model.zero_grad()
            found[-1].append(output.loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-2 if "bf16" in name else 1e-5)
    assert found[0][2] < found[0][0]


# ---- heads that PEFT has wrapped -----------------------------------------------------------------


def with_adapters(model: Any, **options: Any) -> Any:
    """Returns a model of PEFT, whose weights are random and nonzero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).train()


@pytest.mark.parametrize("when", ["the PEFT model", "the model inside", "before get_peft_model"])
def test_a_trained_copy_of_the_head(when: str) -> None:
    pytest.importorskip("peft")
    options: Any = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    expected, inner, plain = step(with_adapters(llama(), **options)), llama(), "before" in when
    model = with_adapters(pyfused.convert(inner) if plain else inner, **options)
    if not plain:
        pyfused.convert(model if when == "the PEFT model" else model.base_model.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_same_steps(step(model), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_computes_the_logits_of_a_head_with_an_adapter(when: str) -> None:
    pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "lm_head"]}
    expected = step(with_adapters(llama(), **options))
    reason = "its head has an adapter, peft.tuners.lora.layer.Linear"
    reasons._reported.clear()
    if when == "before":
        model = with_adapters(pyfused.convert(llama()), **options)
        with pytest.warns(RuntimeWarning, match="its logits are read by add"):
            step(model)
    else:
        model = with_adapters(llama(), **options)
        inner = model.base_model.model
        assert pyfused.plan_conversion(inner).left[0].reason == reason
        with pytest.warns(RuntimeWarning, match=reason):
            pyfused.convert(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = step(model)
    assert found[2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if when == "before":  # without its adapter, the head is fused again
        plain = model.merge_and_unload()
        assert not step(plain.requires_grad_())[2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_head_whose_trained_copy_is_disabled() -> None:
    """PEFT then calls the original head, whose logits are lazy, too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    pyfused.convert(model.eval(), evaluation=True)
    copied = model.base_model.model.lm_head.modules_to_save["default"]
    tokens, losses = torch.arange(24).view(2, 12), []
    for disabled in (model.disable_adapter(), contextlib.nullcontext()):
        copied.weight.data.zero_()
        with torch.no_grad(), disabled:
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
        assert not are_computed(output.logits)
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(math.log(300))
    assert losses[0] != pytest.approx(losses[1])
