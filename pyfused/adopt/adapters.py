"""Heads that PEFT has wrapped: linear layers with LoRA adapters, and trainable copies.

The logits of a head with the active adapters i are

    linear(x, W, b) + sum_i scaling_i * linear(linear(dropout_i(x), A_i), B_i)
    = linear(x, W, b) + linear(u, B),  u = [scaling_i * linear(dropout_i(x), A_i)],  B = [B_i]

PEFT's classes are recognised without importing it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def is_lora(head: Any) -> bool:
    """Returns whether a head is PEFT's linear layer with LoRA adapters, fused or not."""
    kind = type(head)
    return getattr(kind, "_unfused", kind) is _class("peft.tuners.lora.layer", "Linear")


def called_head(head: Any) -> Any:
    """Returns the module that computes logits: a wrapper's active copy, or the head itself."""
    if type(head) is not _class("peft.utils.other", "ModulesToSaveWrapper"):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    if head.disable_adapters or not active:
        return head.original_module
    return head.modules_to_save[active[0]]


def _active(head: Any) -> list[str]:
    """Returns the names of the adapters that a LoRA layer adds."""
    return [name for name in head.active_adapters if name in head.lora_A]


def layers(head: Any) -> list[tuple[str, Any]]:
    """Returns the layers whose weights determine the logits, and what to call them."""
    if not is_lora(head):
        return [("its head", head)]
    adapters = [(f"the adapter {name!r} of its head", head.lora_B[name]) for name in _active(head)]
    return [("the base layer of its head", head.base_layer), *adapters]


def reason_to_compute(head: Any, hidden: Tensor | None) -> str | None:
    """Returns why a LoRA layer has to compute its output itself, None if `low_rank` is known.

    Args:
        hidden: The layer's input, None before a call.
    """
    if not hasattr(head, "lora_variant"):
        return "its head is a LoRA layer of another version of PEFT"
    if head.disable_adapters or head.merged or not _active(head):
        return "the LoRA adapters of its head are disabled, merged or inactive"
    for name in _active(head):
        layer = head.lora_B[name]
        if name in head.lora_variant:
            return f"the adapter {name!r} of its head is a variant of LoRA, such as DoRA"
        if layer.bias is not None:
            return f"the adapter {name!r} of its head has a bias"
        dtypes = {tensor.dtype for tensor in (hidden, layer.weight) if tensor is not None}
        if len(dtypes) > 1 and torch.float64 in dtypes:
            return f"the adapter {name!r} of its head and its input differ in dtype"
    return None


def low_rank(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u of shape (..., r) and B of shape (C, r), whose product the adapters add.

    It draws the dropout of a call.
    """
    x, inputs, weights = hidden, [], []
    for name in _active(head):
        down = head.lora_A[name]
        x = x.to(down.weight.dtype) if head.cast_input_dtype_enabled else x
        inputs.append(down(head.lora_dropout[name](x)) * head.scaling[name])
        weights.append(head.lora_B[name].weight)
    return torch.cat(inputs, -1), torch.cat(weights, -1) if len(weights) > 1 else weights[0]


def difference(head: Any, hidden: Tensor) -> str | None:
    """Returns how a LoRA layer's output differs from PEFT's for these rows, None if it does not.

    Gradients are compared, too, because B is 0 before training.
    """

    def formula(head: Any, x: Tensor) -> Tensor:
        base, (u, weight) = head.base_layer, low_rank(head, x)
        logits = F.linear(x, base.weight, base.bias)
        return logits + F.linear(u.to(weight.dtype), weight).to(logits.dtype)

    x, results = hidden.detach().requires_grad_(), []
    weights = [layer[name].weight for name in _active(head) for layer in (head.lora_A, head.lora_B)]
    leaves = [x, *[weight for weight in weights if weight.requires_grad]]
    for forward in (type(head)._unfused.forward, formula):
        with torch.random.fork_rng([x.device] * x.is_cuda):  # both draw the same dropout
            logits = forward(head, x)
        ramp = torch.linspace(1, 2, logits.numel(), device=x.device).view_as(logits)
        gradients = torch.autograd.grad((logits * ramp).sum(), leaves, materialize_grads=True)
        results.append((logits.detach(), *gradients))
    tolerance = max(1e-3, 16 * torch.finfo(logits.dtype).eps)
    for expected, found in zip(*results, strict=True):
        if not (found - expected).norm() <= tolerance * expected.norm():
            return "LoRA layer adds something other than scaling * B A x"
    return None
