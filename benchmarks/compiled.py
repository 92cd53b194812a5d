"""Time compiled code with pyfused's operators beside the same code with torch's.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --only cross_entropy --seconds 10

The rows of `mse_loss` and `relu` are of operators made here: pyfused leaves the two to Inductor, and
these rows are the reason (`COMPILED_BELOW` in pyfused/ops/dispatch.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import BF16, Arguments, Case, M, draw
from measure import Step, plan, quartiles, ratios, settle_allocator, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Want, cpu
from pyfused.ops.dispatch import COMPILED_BELOW

Operator = Callable[..., Tensor]


def mse_of(input: Tensor, target: Tensor, want: Want, upstream: Tensor | None = None) -> Any:
    size = float(input.numel())
    return cpu.pointwise_loss(
        "squared_error", input, target, None, "mean", size, want, upstream
    )


def define(name: str, forward: Operator, backward: Operator, shape: Operator, save: Any) -> None:
    """A custom operator `walled::name` as cross-entropy's is, with one gradient."""
    signature = "(Tensor input, Tensor target) -> Tensor" if name == "mse_loss" else "(Tensor input) -> Tensor"
    torch.library.define(f"walled::{name}", signature)
    torch.library.define(f"walled::{name}_backward", "(Tensor upstream, Tensor[] saved) -> Tensor")
    for operator, kernel, fake in (
        (f"walled::{name}", forward, shape),
        (f"walled::{name}_backward", backward, lambda _, saved: torch.empty_like(saved[0])),
    ):
        torch.library.impl(operator, "cpu", kernel)
        torch.library.register_fake(operator, fake)
    gradient = getattr(torch.ops.walled, f"{name}_backward")
    torch.library.register_autograd(
        f"walled::{name}",
        lambda ctx, upstream: (gradient(upstream, list(ctx.saved_tensors)), *[None] * (len(ctx.saved_tensors) - 1)),
        setup_context=save,
    )
