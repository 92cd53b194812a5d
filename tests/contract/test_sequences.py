"""Random sequences of calls that share operators and layouts, compared with torch.

Plans are cached across calls, so a plan that wrongly keeps state of an earlier call gives wrong
results. ``python tests/contract/test_sequences.py 100000`` runs 100,000 calls.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from catalogue import EXAMPLES, Call, Example, ours, parameters, reference, result_of
from conftest import fused_always
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from pyfused.dispatch import sizes

ERRORS = (IndexError, RuntimeError, TypeError, ValueError)
# Operators with several results, or with other rounding.
LEFT_OUT = ("inplace", "with_metrics", "filter_eps", "dtype", "loss_dtype")


class Sequence:
    """Draws calls and compares each with torch."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seed, self.calls = random.Random(seed), seed, 0
        self.examples = [e for e in EXAMPLES.values() if not {*LEFT_OUT} & {*e.options}]
        self.raised = 0

    def step(self) -> None:
        rng = self.rng
        self.calls += 1
        example = rng.choice(self.examples)
        call = self.call(example)
        modes = [rng.choice([*[torch.enable_grad] * 4, torch.no_grad, inference_with_grad])]
        if rng.random() < 0.05:
            modes.append(save_on_cpu)
        halves = rng.random() < 0.2
        if halves:
            modes.append(lambda: torch.autocast("cpu", torch.bfloat16))
        kinds = {name: rng.randrange(6) for name in call.tensors}
        # Neither NaN in rows that do not count, unless torch computes the call, nor a change after
        # the call affects the results.
        nan = rng.random() < 0.3 and sizes.FORCED is not None
        changed = rng.random() < 0.3 and save_on_cpu not in modes
        expected = outcome(call, reference, modes, kinds, 0.25 if nan else None)
        found = outcome(call, ours, modes, kinds, torch.nan if nan else None, changed)
        try:
            self.compare(found, expected, 0.1 if halves else 2e-4)
        except AssertionError as error:
            note = f"seed {self.seed}, call {self.calls}: {call}, modes {modes}, kinds {kinds}, "
            note += f"nan {nan}, changed {changed}"
            raise AssertionError(f"{note}: {error}") from error

    def call(self, example: Example) -> Call:
        rng = self.rng
        call = self.with_rows(example.call())
        for name, x in call.tensors.items():
            if x.is_floating_point() and name in example.options:
                x.mul_(rng.choice([1.0, 2.0]))
            elif x.is_floating_point():  # other values with the same layout and bounds
                x.data = (x * rng.choice([0.25, 0.5, 1.0])).detach()
                x.requires_grad_(x.requires_grad and rng.random() < 0.7)
        given = call.given
        for name, value in given.items():
            if type(value) is float:
                given[name] = self.number(value * rng.choice([0.5, 1.0]))
        return replace(call, given=given)

    def with_rows(self, call: Call) -> Call:
        """Draws another number of rows, where all tensors of the input's rows have it."""
        first = next(iter(call.tensors.values()))
        if first.dim() < 2 or self.rng.random() < 0.5:
            return call
        rows = torch.randint(len(first), (self.rng.randrange(1, 12),))
        given = dict(call.given)
        for operand in call.op.all_operands:
            x = given.get(operand.name)
            if isinstance(x, Tensor) and operand.has_rows and x.dim() and len(x) == len(first):
                given[operand.name] = x.detach()[rows].requires_grad_(x.requires_grad)
        return replace(call, given=given)

    def number(self, value: float) -> Any:
        kind = self.rng.randrange(12)
        if kind == 0 and value.is_integer():
            return int(value)
        if kind == 1:
            return torch.tensor(value, dtype=torch.float64)
        if kind == 2:
            return torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return {3: np.float64(value), 4: np.float32(value)}.get(kind, value)

    def compare(self, found: Any, expected: Any, tolerance: float) -> None:
        if isinstance(expected, ERRORS) or isinstance(found, ERRORS):
            self.raised += 1
            # A number that requires grad: one raises, and the other may differentiate.
            refused = "requires grad" in str(found) or "requires grad" in str(expected)
            refused = refused or "modified by an inplace operation" in str(found)
            assert refused or (isinstance(found, ERRORS) and isinstance(expected, ERRORS)), (
                f"found {found!r}, expected {expected!r}"
            )
            return
        assert len(found) == len(expected)
        for got, of_torch in zip(found, expected, strict=True):
            assert (got is None) == (of_torch is None), (found, expected)
            if got is not None:
                scale = of_torch.abs().nan_to_num().max() if of_torch.numel() else 0
                torch.testing.assert_close(
                    got.double(),
                    of_torch.double(),
                    rtol=tolerance,
                    atol=tolerance * float(scale) + 1e-6,
                    equal_nan=True,
                )


def outcome(
    call: Call,
    function: Any,
    modes: list[Any],
    kinds: dict[str, int],
    fill: float | None = None,
    changed: bool = False,
) -> list[Tensor | None] | Exception:
    """Returns the value, the gradients, and the tensors after the call.

    Args:
        fill: The value of rows that do not count, None to leave them unchanged.
        changed: Whether the arguments are modified between the call and its backward pass.
    """
    given, leaves = dict(call.given), []
    for name, value in given.items():
        if isinstance(value, Tensor):
            leaf = value.detach().clone()
            if fill is not None and name in ("input", "logits", "teacher_logits", "teacher_input"):
                leaf[not_counted(call, leaf)] = fill
            leaf.requires_grad_(value.requires_grad)
            leaves.append(leaf)
            given[name] = of_kind(leaf, kinds[name])
    before = dict(given)
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        try:
            value = result_of(function(call, **given))
            results: list[Tensor | None] = [value.detach()]
            after = [x.detach().clone() for x in before.values() if isinstance(x, Tensor)]
            if changed:
                with torch.no_grad():
                    for x in given.values():
                        if isinstance(x, Tensor) and x.is_floating_point():
                            x.fill_(0.25)
            if value.requires_grad:
                grad = torch.linspace(0.5, 2, value.numel()).view(value.shape).to(value.dtype)
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                results += torch.autograd.grad(value, wanted, grad, allow_unused=True)
        except ERRORS as error:
            pairs = zip(leaves, call.tensors.values(), strict=True)
            same = changed or fill is not None or all(torch.equal(*pair) for pair in pairs)
            return error if same else AssertionError(f"changed before {error!r}")
    return [*results, *[x if fill is None else x.nan_to_num(0.25) for x in after]]


def not_counted(call: Call, rows: Tensor) -> Any:
    """Returns the index of the rows of a tensor that do not count."""
    target, weight = call.given.get("target"), call.given.get("token_weight")
    if target is None or target.is_floating_point() or rows.dim() != 2 or target.dim() != 1:
        return slice(0)
    if "ignore_index" not in parameters(call.op):
        return slice(0)
    ignored = target == (-100 if (i := call.given.get("ignore_index")) is None else i)
    return ignored if weight is None or weight.requires_grad else ignored | (weight == 0)


@contextlib.contextmanager
def inference_with_grad() -> Iterator[None]:
    with torch.inference_mode(), torch.enable_grad():
        yield


def of_kind(leaf: Tensor, kind: int) -> Tensor:
    """Returns values as a leaf, as a result of a graph, as a view, or in other memory."""
    if kind == 0 or not leaf.is_floating_point():
        return leaf
    if kind == 1:
        return leaf.view_as(leaf)
    if kind == 2 and leaf.dim():
        memory = torch.cat([leaf[:1].detach(), leaf])
        return memory[1:]
    if kind == 3 and leaf.dim() > 1:
        return leaf.t().contiguous().t() if leaf.dim() == 2 else leaf * 1
    return leaf * 1


def run(seed: int, calls: int) -> Sequence:
    sequence = Sequence(seed)
    torch.manual_seed(seed)
    for _ in range(calls):
        sequence.step()
    return sequence


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# torch's operators run small calls.
SMALL_CALLS = [pytest.param(seed, marks=pytest.mark.thresholds) for seed in (3, 22)]


@pytest.mark.parametrize("seed", [0] if interpreter.ON else [0, 1, 2, *SMALL_CALLS])
def test_sequences_of_calls_match_torch(seed: int) -> None:
    calls = 60 if interpreter.ON else 400
    with quiet():
        assert run(seed, calls).raised < calls / 4


if __name__ == "__main__":
    total, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    torch.set_num_threads(1)
    with fused_always(), quiet():
        for begin in range(0, total, 1000):
            print(first + begin // 1000, run(first + begin // 1000, 1000).raised, flush=True)
