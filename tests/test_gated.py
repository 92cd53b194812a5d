"""Gated activations: values, gradients and saved tensors."""

from __future__ import annotations

import torch
from compare import evaluate
from grid import grid
from samples import GATED
from torch_reference import torch_function

from pyfused import functional
from pyfused.ops.pointwise_loss import Gated

close = torch.testing.assert_close
INF, NAN = float("inf"), float("nan")


@grid(op=GATED)
def test_special_values_match_torch(op: Gated) -> None:
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -2.0, 200.0, -200.0]).double()
    gate, up = special.repeat(9), special.repeat_interleave(9)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    ours = evaluate(getattr(functional, op.name), *leaves)
    expected = evaluate(torch_function(op), *leaves)
    close(ours.value, expected.value, equal_nan=True)
    close(ours.gradients, expected.gradients, equal_nan=True)


@grid(op=GATED)
def test_only_inputs_are_saved(op: Gated) -> None:
    gate, up = (torch.randn(50, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(functional, op.name)(gate, up)
    assert {tensor.data_ptr() for tensor in saved} == {gate.data_ptr(), up.data_ptr()}
