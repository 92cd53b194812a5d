"""Searches for calls that are slower than torch's, with random shapes and with small shapes."""

from __future__ import annotations

import math
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache, partial

import cases
import torch
from cases import ACTIVATIONS, DTYPES, EMBEDDINGS, OPS, SOFTMAX, Case, ratios
from pairs import cells
from report import machine, machine_info, measured, tabulated
from rich.progress import track
from torch.nn import functional as F

import pyfused.functional
from pyfused.dispatch.sizes import ALWAYS, FEW, NEVER, limits
from pyfused.ops.operators import OPERATORS

Shape = tuple[int, ...]
LARGEST = 1 << 24  # elements of a call
LARGEST_CHECKED = 1 << 22  # checking the results of larger calls takes seconds
ALLOWED = 0.6e-3  # milliseconds by which a call that runs torch's operator may be slower
OF_CLASSES = ("cross_entropy", "nll_loss")
STRIDED = [name for name in cases.LAYOUTS if name]
VECTORS = torch.backends.cpu.get_cpu_capability()
CALLED, PATCHED = "called", "patched"


@lru_cache(maxsize=1)
def drawn_and_checked(case: Case) -> cases.Arguments:
    arguments = cases.draw(case)
    if case.elements <= LARGEST_CHECKED:
        cases.assert_correct(case, arguments)
    return arguments


def timers_of_both(case: Case, mode: str, how: str = CALLED) -> list[cases.Timer]:
    """Returns a timer of torch's operator, and one of pyfused's."""
    arguments, operators = drawn_and_checked(case), (cases.TORCH, pyfused.functional)
    if how == PATCHED:
        with pyfused.patch():
            ours = cases.step(cases.Torch(), case, arguments, mode)
        (theirs,) = cases.timers_of([cases.step(cases.TORCH, case, arguments, mode)])
        return [theirs, partial(timed_patched, ours)]
    return cases.timers_of([cases.step(each, case, arguments, mode) for each in operators])


def backend_of(case: Case, mode: str) -> str:
    """Returns "torch" or "a kernel", whichever the call runs."""
    arguments = drawn_and_checked(case)
    leaf = arguments.input.detach().requires_grad_(mode == cases.TRAINING)
    explanation = pyfused.explain(case.op, leaf, *arguments.others, **arguments.options)
    return "torch" if explanation.backend == "torch" else "a kernel"


def timed_patched(step: cases.Step, calls: int) -> float:
    with pyfused.patch():
        step()  # the first call after a patch fills the interpreter's caches
        return cases.timed(step, calls)


# ---- sweep ---------------------------------------------------------------------------------------


# Ranges of row lengths in attention, detection, segmentation and language models.
LENGTHS = ((64, 4096), (80, 1200), (19, 150), (2, 64), (10_000, 130_000))


def between(low: float, high: float, draw: random.Random) -> int:
    """Draws a log-uniform integer."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def split(elements: int, dims: int, draw: random.Random) -> Shape:
    """Draws a shape with the number of dimensions and about the number of elements."""
    sizes = []
    for _ in range(dims - 1):
        sizes.append(between(1, max(2, elements), draw))
        elements = max(1, elements // sizes[-1])
    return (*sizes, elements)


def drawn(
    op: str, dtype: torch.dtype, count: int, draw: random.Random, layouts: bool = False
) -> Iterator[Case]:
    """Yields calls of random shapes, reductions and values, and of random layouts on request."""
    for _ in range(count):
        elements, reduction = between(1 << 6, LARGEST, draw), "mean"
        spread, masked, dim = draw.choice((1.0, 1.0, 20.0)), None, -1
        if op in (*SOFTMAX, *ACTIVATIONS, "cross_entropy"):
            spread = draw.choice((1.0, 1.0, 20.0, 100.0))
        if op in (*SOFTMAX, "cross_entropy"):
            masked = draw.choice((None, None, None, -math.inf, -1e4, -95.0))
        shape = split(elements, draw.randint(1, 4), draw)
        if op in EMBEDDINGS:
            features = between(2, 4096, draw)
            shape = (max(1, elements // features), features)
        if op in (*SOFTMAX, *OF_CLASSES):
            length = between(*draw.choice(LENGTHS), draw)
            rows = max(1, elements // length)
            shape = (*split(rows, draw.randint(1, 3), draw), length)
            if op not in SOFTMAX:
                shape = (rows, length)
            if op == "cross_entropy" and draw.random() < 0.3:
                n = between(1, 16, draw)
                shape = (n, length, max(1, rows // n))
            if op in SOFTMAX and len(shape) > 2 and draw.random() < 0.5:
                shape, dim = (shape[0], length, *shape[1:-1]), 1
        if op not in (*SOFTMAX, *ACTIVATIONS):
            reduction = draw.choice(("mean", "mean", "none"))
        pair = draw.choice(STRIDED), draw.choice([*cases.LAYOUTS])
        kind = {"layouts": pair} if layouts and len(shape) > 1 else {}
        yield Case(
            op, shape, dtype, reduction=reduction, masked=masked, spread=spread, dim=dim, **kind
        )


def long_dimensions(op: str, dtype: torch.dtype, count: int, draw: random.Random) -> Iterator[Case]:
    """Yields calls with few positions beside the classes, and with few rows of many classes."""
    for number in range(count):
        kind, dim, layout = {}, 1 if op in SOFTMAX else -1, ""
        if number % 2:
            classes = between(100_000, 10_000_000, draw)
            shape = (max(1, min(between(1, 16, draw), LARGEST // 4 // classes)), classes)
            layout = draw.choice(("", "transposed"))
        else:
            beside = split(between(1, 50, draw), draw.randint(1, 2), draw)
            outer, elements = (
                draw.choice((1, between(1, 64, draw))),
                between(1 << 10, LARGEST, draw),
            )
            shape = (outer, max(2, elements // outer // math.prod(beside)), *beside)
            if op in SOFTMAX and outer == 1:
                shape, dim = shape[1:], 0
        if op == "cross_entropy":
            options = ({}, {"smoothing": 0.1}, {"probabilities": True}, {"reduction": "none"})
            kind = draw.choice(options)
        values = ({}, {}, {"spread": 20.0}, {"masked": -math.inf}, {"padded": True})
        if op == "nll_loss" or {"smoothing", "probabilities"} & {*kind}:
            values = values[:3]  # others have infinite losses
        yield Case(
            op, shape, dtype, dim=dim, layouts=(layout, layout), **kind, **draw.choice(values)
        )


def edges(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the smallest calls that run kernels, which benefit least."""
    found = limits(OPERATORS[op], torch.get_num_threads(), dtype)
    for column in ("from_elements", "few_classes", "unreduced"):
        elements = getattr(found, column)
        if elements in (None, ALWAYS, NEVER):
            continue
        if op in (*SOFTMAX, *OF_CLASSES):
            classes = FEW if column == "few_classes" else 1000
            yield Case(op, (-(-elements // classes), classes), dtype)
        else:
            shape = (elements // 128, 128) if op in EMBEDDINGS else (elements,)
            yield Case(op, shape, dtype, reduction="none" if column == "unreduced" else "mean")


def slower(times: cases.Times, margin: float) -> bool:
    """Returns whether pyfused is slower by quartiles and by minima, and by more than ALLOWED."""
    theirs, ours = (min(each) for each in times)
    return ratios(*times)[2] < margin and ours > max(theirs / margin, theirs + ALLOWED)


def sweep(options: Namespace) -> None:
    """Times calls of random shapes, and prints calls that are slower than torch's."""
    cases.settle_allocator()
    how = options.how
    ops = [op for op in options.op or OPS if how != PATCHED or hasattr(F, op)]
    seed = random.randrange(1 << 16) if options.seed is None else options.seed
    info = machine_info() | {"threads": " and ".join(map(str, options.threads))}
    print(f"--seed {seed}: {machine(measured(info))}, torch on {VECTORS}")
    draw = random.Random(seed)
    long = partial(long_dimensions, count=2 * options.shapes, draw=draw)
    points = [
        (case, mode, threads)
        for op in ops
        for name in options.dtype or ("float32", "bfloat16")
        for case in (
            *drawn(op, DTYPES[name], options.shapes, draw, options.layouts),
            *(() if options.layouts else edges(op, DTYPES[name])),
            *(long(op, DTYPES[name]) if op in (*SOFTMAX, *OF_CLASSES) else ()),
        )
        for mode in cases.MODES
        for threads in options.threads
    ]
    draw.shuffle(points)  # spreads the effect of a noisy minute over all operators
    found = []
    until = time.perf_counter() + options.minutes * 60
    for case, mode, threads in track(points, "Measuring", transient=True):
        if time.perf_counter() > until:
            print(f"out of time after {len(found)} of {len(points)} calls")
            break
        torch.set_num_threads(threads)
        try:
            timers = timers_of_both(case, mode, how)
            times = cases.remeasured(timers, options.seconds, options.margin, fewest=4)
        except NotImplementedError:  # torch lacks the operator for this dtype
            continue
        found.append((case, mode, threads, times, backend_of(case, mode)))
    found.sort(key=lambda each: ratios(*each[3])[1])
    rows = [
        [
            *(case.name, mode, str(threads), backend, *cells(times)),
            f"{min(times[0]) / min(times[1]):.2f}",
        ]
        for case, mode, threads, times, backend in found
        if slower(times, options.margin)
    ]
    names = ["case", "mode", "threads", "run by", "torch, ms", "pyfused, ms"]
    print(tabulated([*names, "ratio", "ratio of minima"], rows, names=2))
    for name in dict.fromkeys(backend for *_, backend in found):
        all_times = [times for *_, times, backend in found if backend == name]
        counts = [sum(slower(times, margin) for times in all_times) for margin in (0.95, 0.85)]
        print(
            f"run by {name}: {len(all_times)} calls, of which {counts[0]} are slower than torch's "
            f"by 5 % beyond the spread, and {counts[1]} by 15 %"
        )
    sys.exit(bool(rows))
