"""Heads that PEFT has wrapped: linear layers with LoRA adapters, and trainable copies.

The active adapters i of a head add sum_i scaling_i * B_i A_i dropout_i(x) to its logits. This is
linear(u, B) with u = [scaling_i * A_i dropout_i(x)] and B = [B_i], concatenated along the rank.
PEFT's classes are recognised without importing it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.dispatch.autograd import without_autocast

RANK_MULTIPLE = 16  # with MKL, products of 16 columns take two thirds of the time of 8


def is_lora(head: Any) -> bool:
    """Returns whether a head is PEFT's linear layer with LoRA adapters, fused or not."""
    layer, kind = sys.modules.get("peft.tuners.lora.layer"), type(head)
    return getattr(kind, "_unfused", kind) is getattr(layer, "Linear", None)


def called_head(head: Any) -> Any:
    """Returns the active copy of a head in PEFT's ``modules_to_save``, or else the head itself."""
    if type(head) is not getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    copies = [head.modules_to_save[name] for name in active if name in head.modules_to_save]
    return copies[0] if copies else head.original_module


def _active(head: Any) -> list[str]:
    return [name for name in head.active_adapters if name in head.lora_A]


def layers(head: Any) -> dict[str, Any]:
    """Returns a LoRA layer and the layers that determine its logits, keyed by a description."""
    adapters = {f"the adapter {name!r} of its head": head.lora_B[name] for name in _active(head)}
    return {"the base layer of its head": head.base_layer} | adapters | {"its head": head}


def reason_to_compute(head: Any, hidden: Tensor | None) -> str | None:
    """Returns why a LoRA layer has to compute its output itself, None if `with_features` can.

    Args:
        hidden: The layer's input, None before a call.
    """
    if not hasattr(head, "lora_variant"):
        return "its head is a LoRA layer of another version of PEFT"
    if head.disable_adapters or head.merged or not _active(head):
        return "the LoRA adapters of its head are disabled, merged or inactive"
    for name in _active(head):
        adapter, layer = f"the adapter {name!r} of its head", head.lora_B[name]
        if name in head.lora_variant:
            return f"{adapter} is a variant of LoRA, such as DoRA"
        if layer.bias is not None:
            return f"{adapter} has a bias"
        dtype = layer.weight.dtype if hidden is None else hidden.dtype
        if layer.weight.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
            return f"{adapter} has dtype {layer.weight.dtype}, its input {dtype}"
    return None


def with_features(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [x, u] and B for hidden states x."""
    x, features, weights = hidden, [hidden], []
    for name in _active(head):
        down, up = head.lora_A[name], head.lora_B[name].weight
        x = x.to(down.weight.dtype) if head.cast_input_dtype_enabled else x
        u, padding = down(head.lora_dropout[name](x)) * head.scaling[name], -len(down.weight)
        features.append(F.pad(u, (0, padding % RANK_MULTIPLE)).to(hidden.dtype))
        weights.append(F.pad(up, (0, padding % RANK_MULTIPLE)))
    with without_autocast(hidden.device.type):  # autocast cannot concatenate some dtypes
        return torch.cat(features, -1), torch.cat(weights, -1)


def linear(rows: Tensor, weight: Tensor, bias: Any, adapter_weight: Tensor | None) -> Tensor:
    """Returns the logits, given the results of `with_features`."""
    if adapter_weight is None:
        return F.linear(rows, weight, bias)
    hidden, features = rows.tensor_split((weight.shape[-1],), -1)
    logits = F.linear(hidden, weight, bias)
    return logits + F.linear(features, adapter_weight.to(rows.dtype)).to(logits.dtype)


def differs(head: Any, hidden: Tensor) -> bool:
    """Returns whether `linear` differs from PEFT's forward for these rows.

    Also compares gradients, because B is 0 before training.
    """

    def ours(head: Any, x: Tensor) -> Tensor:
        rows, adapter_weight = with_features(head, x)
        return linear(rows, head.weight, head.bias, adapter_weight)

    x, results = hidden.detach().clone().requires_grad_(), []
    weights = [layer[name].weight for name in _active(head) for layer in (head.lora_A, head.lora_B)]
    leaves = [x, *[weight for weight in weights if weight.requires_grad]]
    for forward in (type(head)._unfused.forward, ours):
        with torch.random.fork_rng([x.device] * x.is_cuda):  # both draw the same dropout
            logits = forward(head, x)
        ramp = torch.linspace(1, 2, logits.numel(), device=x.device).view_as(logits)
        gradients = torch.autograd.grad((logits * ramp).sum(), leaves, materialize_grads=True)
        results.append((logits, *gradients))
    return not all(agree(b, a, logits.dtype) for a, b in zip(*results, strict=True))


def agree(value: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two results that were computed in ``dtype`` differ only by rounding."""
    value, expected = value.float(), expected.float()
    tolerance = max(1e-3, 16 * torch.finfo(dtype).eps)
    return bool((value - expected).norm() <= tolerance * expected.norm())
