"""What the autograd functions of all families share."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch computes a loss in: CPU autocast widens the half precisions."""
    halves = (torch.bfloat16, torch.float16)
    return torch.float32 if dtype in halves and torch.is_autocast_enabled("cpu") else dtype


def scale(gradients: tuple[Tensor | None, ...], grad_output: Tensor) -> None:
    """Multiplies gradients that nobody else holds by a scalar upstream gradient."""
    if grad_output.item() != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_output)


def differentiate(
    loss: Tensor, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the wanted inputs, themselves differentiable; None for the others."""
    pairs = zip(inputs, wanted, strict=False)
    found = iter(
        torch.autograd.grad(
            loss, [input for input, want in pairs if want], grad_output, create_graph=True
        )
    )
    return tuple(next(found) if want else None for _, want in zip(inputs, wanted, strict=False))
