"""Small language models: one with a plain head, and one of every class of transformers."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyfused
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.dispatch import reasons

# ---- a model with a head -------------------------------------------------------------------------

X, TARGET = torch.arange(64).view(4, 16) % 50, torch.arange(64) % 40
PLACES = TARGET.view(4, 16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 40)
        self.bias = nn.Buffer(torch.linspace(-1, 1, 40)[None])

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        self.hidden: Tensor = 1 * self.emb(x)
        logits = self.head(self.hidden)
        return logits if target is None else (logits, F.cross_entropy(logits.flatten(0, 1), target))


def converted(**options: Any) -> Any:
    return pyfused.convert(Model(), head="head", **options)


def stepped(model: Any, **options: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.01, **options).step()
    model.zero_grad()


# ---- models of transformers ----------------------------------------------------------------------

# Sizes by the names that configurations use; unknown names are ignored.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 300),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "mamba_n_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "encoder_layers"), 1),
    "num_experts_per_tok": 2,
    "attention_type": "original_full",  # BigBird changes the other type for short sequences
    "mamba_d_head": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOST_PARAMETERS = 30_000_000  # the limit for models whose sizes cannot be set


def names() -> list[str]:
    import transformers

    ends = "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "MTModel"
    listed = [n for n in dir(transformers) if n.endswith(ends) and "PreTrainedModel" not in n]
    return [n for n in listed if not n.startswith(("Auto", "FSMTModel", "PretrainedFSMT"))]


def sizes_of(known: Any) -> dict[str, Any]:
    """Returns the arguments of a configuration like this one, and of its inner configurations."""
    given = {key: value for key, value in SIZES.items() if hasattr(known, key)}
    parts = {key: getattr(known, key, None) for key in known.sub_configs}
    return given | {key: sizes_of(part) for key, part in parts.items() if part is not None}


def tiny(name: str, **more: Any) -> Any:
    """Returns a model of this class with random weights, and with more options.

    Raises:
        Exception: The configuration does not accept these sizes.
    """
    import transformers

    kind = getattr(transformers, name)
    of_config, given = kind.config_class, sizes_of(kind.config_class()) | more
    config = of_config(**given)
    for types in ("layer_types", "mlp_layer_types"):
        if len(getattr(config, types, None) or (0, 0)) != 2:
            with contextlib.suppress(Exception):
                config = of_config(**given, **{types: list(getattr(config, types))[:2]})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size >> 20} million parameters")
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    return kind(config).train()


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, ::4] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Returns the loss and the gradients of a batch, and whether its logits were computed."""
    torch.manual_seed(0)  # for dropout
    output = model(**batch() | inputs)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.loss, [*leaves.values()], allow_unused=True)
    gradients = {name: x for name, x in zip(leaves, found, strict=True) if x is not None}
    return output.loss.detach(), gradients, are_computed(output["logits"])


def assert_same_steps(found: Any, expected: Any, computed: bool = False) -> None:
    assert found[2] == computed
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max() + 1e-6 * largest, f"{name}: {float(error)}"


def are_computed(logits: Any) -> bool:
    """Returns whether logits are in memory, because they are not lazy or something read them."""
    return not isinstance(logits, LazyLogits) or logits.value.operation is None


def conversion(name: str) -> str:
    """Returns ``converted`` if converting does not change loss and gradients, else the reason."""
    try:
        model = tiny(name)
        expected = step(model, use_cache=False)
    except Exception as error:
        return f"not tried: the tiny model raises {type(error).__name__}"
    plan = pyfused.plan_conversion(model)
    if "." not in plan.swapped:
        told = [left.reason for left in plan.left if left.name == "."]
        return f"left: {told[0] if told else 'it has no head of logits'}"
    pyfused.convert(model)
    reasons._reported.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        found = step(model, use_cache=False)
    told = [str(w.message).partition(" all of its logits: ")[2] for w in warned]
    if any(told):
        return f"left: {next(filter(None, told)).partition('. ')[0]}"  # without the advice
    assert_same_steps(found, expected)
    return "converted"


if __name__ == "__main__":
    for each in sys.argv[1:] or names():
        print(f"| `{each}` | {conversion(each)} |", flush=True)
