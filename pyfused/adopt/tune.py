"""Measures the sizes from which kernels are faster than torch: ``python -m pyfused tune``.

On CPUs, it measures this size for each operator; on GPUs, two numbers from which all sizes follow.
"""

from __future__ import annotations

import json
import math
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import pad

from pyfused import functional
from pyfused.backends.versions import unsupported_triton
from pyfused.dispatch import sizes
from pyfused.dispatch.operator import Operand, Operator
from pyfused.dispatch.originals import redirected
from pyfused.dispatch.run import by_torch
from pyfused.ops.activation import Activation
from pyfused.ops.class_loss import NllLoss
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import Gated
from pyfused.ops.softmax import Softmax

SMALLEST, LARGEST = 10, 24  # the range of sizes, as powers of 2
_SECONDS = 0.03  # spent on the calls of one size
_ROUNDS = 7
_CALLS = 50  # their launches fit into the GPU's queue
_COPIED = 1 << 28  # bytes, more than caches hold
_MANY = 1000  # classes
_FEATURES = 128  # of an embedding
_WIN = 0.95  # a kernel wins if it takes less than this fraction of torch's time


def call_of(op: Operator, elements: int, second: bool) -> Callable[[Any], None]:
    """Returns a training step of an operator, with random operands within bounds.

    Args:
        second: Whether the second limit of the table applies to the call.
    """
    classes = any(operand.indices for operand in op.operands) or isinstance(op, Softmax)
    embeddings = isinstance(op, EmbeddingLoss)
    forward = second and isinstance(op, (Activation, Gated, NllLoss))  # without a gradient
    few = second and not forward
    columns = _FEATURES if embeddings else (sizes.FEW if few else _MANY) if classes else 1
    shape = (max(1, elements // columns), columns) if classes or embeddings else (elements,)
    shapes = {"weight": (1,)}  # the learned slope of prelu
    if embeddings:
        shapes["target"] = shape[:1]
    operands = [_drawn(o, shapes.get(o.name, shape)) for o in op.operands if not o.optional]
    input = operands[0].requires_grad_(not forward)
    options: dict[str, Any] = op.required | ({"dim": 1} if isinstance(op, Softmax) else {})
    if second and (embeddings or not classes) and "reduction" in op.names:
        options["reduction"] = "none"

    def step(function: Callable[..., Tensor]) -> None:
        result = function(*operands, **options)
        if not forward:
            grad(result, input, torch.ones_like(result))

    return step


def _drawn(operand: Operand, shape: tuple[int, ...]) -> Tensor:
    if operand.sign:
        return torch.randn(shape).sign()
    if operand.indices:
        target = torch.randint(shape[1], shape[:1])
        ended = (0, shape[1] - 1)  # one label in each row
        return pad(target[:, None], ended, value=-1) if operand.labels else target
    if math.isinf(operand.low):
        return torch.randn(shape)
    return operand.low + min(operand.high - operand.low, 2.0) * torch.rand(shape)


def torch_function(op: Operator) -> Callable[..., Tensor]:
    if op.in_torch:
        return getattr(torch.nn.functional, op.name)  # type: ignore[no-any-return]
    return redirected(getattr(functional, op.name), run=by_torch)  # type: ignore[no-any-return]


def wins(op: Operator, elements: int, second: bool) -> bool:
    """Returns whether the kernel is clearly faster, from the median ratio of interleaved calls."""
    step = call_of(op, elements, second)
    functions = torch_function(op), getattr(functional, op.name)
    calls = max(1, round(_SECONDS / _ROUNDS / 2 / _seconds(step, functions[0], 2)))
    ratios = []
    for _ in range(_ROUNDS):
        theirs, ours = (_seconds(step, function, calls) for function in functions)
        ratios.append(ours / theirs)
    return median(ratios) < _WIN


def _seconds(step: Callable[[Any], None], function: Any, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step(function)
    return (time.perf_counter() - start) / calls


def limit(op: Operator, second: bool) -> int:
    """Returns the smallest power of two from which the kernel wins, by bisection."""
    powers = [1 << n for n in range(SMALLEST, LARGEST + 2)]
    return powers[bisect_left(powers[:-1], True, key=lambda size: wins(op, size, second))]


@contextmanager
def every_size() -> Iterator[None]:
    """Runs kernels for all sizes in this context."""
    forced, sizes.FORCED = sizes.FORCED, "every size"
    try:
        yield
    finally:
        sizes.FORCED = forced


@every_size()
def tune(names: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Measures the limits of operators on this machine's CPU, with torch's number of threads.

    Args:
        names: The operators; by default all that have limits.

    Returns:
        The two limits of each operator in ``pyfused.dispatch.sizes``, in elements.
    """
    limits_of = {}
    candidates = [n for n in sizes.ON_CPU if n in OPERATORS and n not in sizes.LINEAR]
    names = names or [n for n in candidates if any(sizes.limits(OPERATORS[n], cpu=True))]
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", end=": ", file=sys.stderr, flush=True)
        op = OPERATORS[name]
        has_second = len(set(sizes.limits(op, cpu=True))) > 1
        first = limit(op, second=False)
        limits_of[name] = first, limit(op, second=True) if has_second else first
        print(f"{limits_of[name][0]:,} and {limits_of[name][1]:,}", file=sys.stderr)
    return limits_of


@every_size()
def tune_gpu(
    device: str = "cuda",
    synchronize: Callable[[], None] = torch.cuda.synchronize,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[int, int]:
    """Measures the two numbers of ``pyfused.dispatch.sizes.Gpu``."""
    input, target = torch.randn(2, 1 << SMALLEST, device=device)
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    input.requires_grad_()

    def seconds(step: Callable[[], object], wait: Callable[[], None]) -> float:
        step()  # compiles
        times = []
        for _ in range(_ROUNDS):
            synchronize()
            start = now()
            for _ in range(_CALLS):
                step()
            wait()
            times.append((now() - start) / _CALLS)
        return median(times)

    host = seconds(lambda: grad(functional.mse_loss(input, target), input), lambda: None)
    copy = seconds(lambda: copied.copy_(source), synchronize)
    return max(1, round(1e6 * host)), max(1, round(2e-9 * _COPIED / copy))


def main(names: Sequence[str]) -> None:
    """Measures CPU and GPU, and saves the results for later processes."""
    measured = {sizes.MACHINE: tune(names)}
    if torch.cuda.is_available() and unsupported_triton() is None:
        host_us, gb_per_s = numbers = tune_gpu()
        measured[sizes.gpu_machine()] = {"gpu": numbers}
        print(f"GPU: {host_us} us for a call on the host, {gb_per_s:,} GB/s", file=sys.stderr)
    file = sizes.tuned_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = sizes.tuned_machines()
    for machine, results in measured.items():
        saved[machine] = sizes.tuned(machine) | results
    file.write_text(json.dumps(saved), encoding="utf-8")
    print(f"Saved to {file}. Processes started from now on use these limits.")
