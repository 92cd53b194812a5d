"""A target gives the results of an int64 target in the shape of the losses, on every path."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from compare import flattened
from torch import Tensor

from pyfused import functional as fused

DRAWS = int(os.environ.get("PYFUSED_TEST_TARGETS", "1" if interpreter.ON else "40"))
SOFTCAP: dict[str, Any] = {"softcap": 2.0}
RESULTS: dict[str, Any] = {"return_entropy": True, "return_lse": True, "return_metrics": True}
LOSSES: list[tuple[str, dict[str, Any]]] = [
    *[("cross_entropy", x) for x in ({}, SOFTCAP, {"label_smoothing": 0.1}, {"z_loss": 0.1})],
    ("cross_entropy", {"loss_dtype": torch.float64}),
    *[("cross_entropy_with_metrics", x) for x in ({}, SOFTCAP, {"temperature": 2.0})],
    ("nll_loss", {}),
    *[("log_probs", x) for x in ({}, SOFTCAP, RESULTS)],
    *[("linear_cross_entropy", x) for x in ({}, SOFTCAP, {"memory_budget": 1}, {"z_loss": 0.1})],
    *[("linear_cross_entropy_with_metrics", x) for x in ({}, {"memory_budget": 1})],
    *[("linear_log_probs", x) for x in ({}, RESULTS, RESULTS | {"memory_budget": 1})],
]


def leaves_of(function: str, rng: random.Random, classes: int) -> tuple[list[Tensor], list[int]]:
    """Returns logits, or the input and the weight of a layer, and the shape of the losses."""
    rows = rng.choice([[], [1], [3], [2, 2]])
    if "linear" in function:
        shapes = [[*rows, 4], [classes, 4]]
    else:
        shapes = [[*rows[:1], classes, *rows[1:]]]
    return [torch.randn(shape, requires_grad=True) for shape in shapes], rows


def outcome(call: Callable[..., Any], leaves: list[Tensor], target: Tensor) -> list[Tensor]:
    """Returns the results and the gradients of the leaves."""
    results = flattened(call(*leaves, target))
    first = results[0]
    slopes = torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).reshape(first.shape)
    return [*results, *torch.autograd.grad(first, leaves, slopes)]


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LOSSES[:: 3 if interpreter.ON else 1], ids=str)
def test_dtypes_and_shapes(case: tuple[str, dict[str, Any]]) -> None:
    """uint8 holds 156, which is -100 if it is compared with an int8; (1,) stands for ()."""
    (name, options), rng = case, random.Random(str(case))
    for _ in range(DRAWS):
        classes, ignored = rng.choice([5, 70, 200]), rng.choice([-100, 255, 4, 156])
        leaves, shape = leaves_of(name, rng, classes)
        given = options | {"ignore_index": ignored}
        if name == "log_probs":
            given["dim"] = min(len(shape), 1)
        elif "log_probs" not in name:
            given["reduction"] = rng.choice(["mean", "sum", "none"])
            if name != "nll_loss" and rng.random() < 0.3:
                given["token_weight"] = torch.rand(shape)
        call = partial(getattr(fused, name), **given)
        valid = [min(x, classes - 1) for x in (0, 4, 156)] + [ignored] * (ignored in (4, 255))
        target = torch.tensor([rng.choice(valid) for _ in range(torch.Size(shape).numel())])
        target = target.reshape(shape)
        expected = outcome(call, leaves, target)
        accepted = [target if shape else target.view(1)]
        # torch refuses uint8 for images and with label smoothing.
        if "linear" in name or "log_probs" in name or (len(shape) < 2 and "label" not in str(case)):
            accepted.append(target.to(torch.uint8))
        for other in accepted:
            torch.testing.assert_close(
                outcome(call, leaves, other), expected, rtol=1e-6, atol=1e-7, equal_nan=True
            )


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_probs"])
def test_compiled(name: str, compiled_always: None) -> None:
    call, target = getattr(fused, name), torch.tensor(156)
    for rows, other in (([3], target.to(torch.uint8).expand(3)), ([], target.view(1))):
        leaves = [torch.randn(*n, 4, requires_grad=True) for n in (rows, [200])]
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        expected = outcome(call, leaves, target.expand(rows))
        torch.testing.assert_close(outcome(compiled, leaves, other), expected)
