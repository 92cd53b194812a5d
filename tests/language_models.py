"""Builds a tiny model of every language model of transformers, and converts it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

import torch

import pyfused
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.dispatch import reasons

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


def step(model: Any) -> tuple[torch.Tensor, list[torch.Tensor | None], bool]:
    """Returns the loss and the gradients of a batch, and whether its logits were computed."""
    tokens = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, ::4] = -100
    torch.manual_seed(0)  # for dropout
    output = model(input_ids=tokens, labels=labels, use_cache=False)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    return output.loss.detach(), list(gradients), are_computed(output.logits)


def are_computed(logits: Any) -> bool:
    """Returns whether logits are in memory, because they are not lazy or something read them."""
    return not isinstance(logits, LazyLogits) or logits.value.operation is None


def conversion(name: str) -> str:
    """Returns ``converted`` if converting does not change loss and gradients, else the reason."""
    try:
        model = tiny(name)
        expected = step(model)
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
        got = step(model)
    told = [str(w.message).partition(" all of its logits: ")[2] for w in warned]
    if any(told):
        return f"left: {next(filter(None, told)).partition('. ')[0]}"  # without the advice
    assert not got[2], f"{name} has logits"
    torch.testing.assert_close(got[0], expected[0], msg=lambda text: f"{name}: {text}")
    largest = max(float(x.abs().max()) for x in expected[1] if x is not None)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            off = (ours - theirs).abs().max()
            assert off <= 1e-4 * theirs.abs().max() + 1e-6 * largest, f"{name}: {float(off)}"
    return "converted"


if __name__ == "__main__":
    for each in sys.argv[1:] or names():
        print(f"| `{each}` | {conversion(each)} |", flush=True)
