"""Searches for calls that are slower than torch's, with random shapes and with small shapes."""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache

import cases
import torch
from cases import ACTIVATIONS, DTYPES, EMBEDDINGS, OPS, SOFTMAX, Case
from report import machine, machine_info, measured, tabulated, times_cells
from rich.progress import track
from timing import Timer, Times, interleaved, plan, ratios, settle_allocator, timers_of

import pyfused.functional

Shape = tuple[int, ...]
LARGEST = 1 << 24  # elements of a call
LARGEST_CHECKED = 1 << 22  # checking the results of larger calls takes seconds
ALLOWED = 0.6e-3  # milliseconds by which a call that runs torch's operator may be slower
LONGER = (1, 3, 9)  # factors of the time, for measurements after those that appear slower
OF_CLASSES = ("cross_entropy", "nll_loss")
STRIDED = [name for name in cases.LAYOUTS if name]
VECTORS = torch.backends.cpu.get_cpu_capability()
# Ranges of row lengths in attention, detection, segmentation and language models.
LENGTHS = ((64, 4096), (80, 1200), (19, 150), (2, 64), (10_000, 130_000))


@lru_cache(maxsize=1)
def drawn_and_checked(case: Case) -> cases.Arguments:
    arguments = cases.draw(case)
    if case.elements <= LARGEST_CHECKED:
        cases.assert_correct(case, arguments)
    return arguments


def timers_of_both(case: Case, mode: str) -> list[Timer]:
    """Returns a timer of torch's operator, and one of pyfused's."""
    arguments = drawn_and_checked(case)
    both = cases.TORCH, pyfused.functional
    return timers_of([cases.step(each, case, arguments, mode) for each in both])


def backend_of(case: Case, arguments: cases.Arguments, mode: str = cases.TRAINING) -> str:
    """Returns "torch" or "a kernel", whichever the call runs."""
    leaf = arguments.input.detach().requires_grad_(mode == cases.TRAINING)
    explanation = pyfused.explain(case.op, leaf, *arguments.others, **arguments.options)
    return "torch" if explanation.backend == "torch" else "a kernel"


# ---- the calls -----------------------------------------------------------------------------------


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


def random_calls(
    op: str, dtype: torch.dtype, count: int, draw: random.Random, layouts: bool = False
) -> Iterator[Case]:
    """Yields calls of random shapes, reductions and values, and of random layouts on request."""
    for _ in range(count):
        elements, options = between(1 << 6, LARGEST, draw), {}
        options["spread"] = draw.choice((1.0, 1.0, 20.0))
        if op in (*SOFTMAX, *ACTIVATIONS, "cross_entropy"):
            options["spread"] = draw.choice((1.0, 1.0, 20.0, 100.0))
        if op in (*SOFTMAX, "cross_entropy"):
            options["masked"] = draw.choice((None, None, None, -math.inf, -1e4, -95.0))
        if op not in (*SOFTMAX, *ACTIVATIONS):
            options["reduction"] = draw.choice(("mean", "mean", "none"))
        length = between(*draw.choice(LENGTHS), draw)
        rows = max(1, elements // length)
        if op in EMBEDDINGS:
            features = between(2, 4096, draw)
            shape: Shape = (max(1, elements // features), features)
        elif op in SOFTMAX:
            shape = (*split(rows, draw.randint(1, 3), draw), length)
            if len(shape) > 2 and draw.random() < 0.5:
                shape, options["dim"] = (shape[0], length, *shape[1:-1]), 1
        elif op == "cross_entropy" and draw.random() < 0.3:
            n = between(1, 16, draw)
            shape = (n, length, max(1, rows // n))
        elif op in OF_CLASSES:
            shape = (rows, length)
        else:
            shape = split(elements, draw.randint(1, 4), draw)
        if layouts and len(shape) > 1:
            options["layouts"] = draw.choice(STRIDED), draw.choice([*cases.LAYOUTS])
        yield Case(op, shape, dtype, **options)


def long_dimensions(op: str, dtype: torch.dtype, count: int, draw: random.Random) -> Iterator[Case]:
    """Yields calls with few positions beside the classes, and with few rows of many classes."""
    for number in range(count):
        options = {"dim": 1 if op in SOFTMAX else -1}
        if number % 2:
            classes = between(100_000, 10_000_000, draw)
            shape: Shape = (max(1, min(between(1, 16, draw), LARGEST // 4 // classes)), classes)
            options["layouts"] = (draw.choice(("", "transposed")),) * 2
        else:
            beside = split(between(1, 50, draw), draw.randint(1, 2), draw)
            outer = draw.choice((1, between(1, 64, draw)))
            elements = between(1 << 10, LARGEST, draw)
            shape = (outer, max(2, elements // outer // math.prod(beside)), *beside)
            if op in SOFTMAX and outer == 1:
                shape, options["dim"] = shape[1:], 0
        values = [{}, {}, {"spread": 20.0}, {"masked": -math.inf}, {"padded": True}]
        if op == "cross_entropy":
            kinds = {}, {"smoothing": 0.1}, {"probabilities": True}, {"reduction": "none"}
            options |= draw.choice(kinds)
        if op == "nll_loss" or {"smoothing", "probabilities"} & {*options}:
            values = values[:3]  # others have infinite losses
        yield Case(op, shape, dtype, **options, **draw.choice(values))


def edges(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the smallest calls that run kernels, which benefit least."""
    has_rows, activates = op in (*SOFTMAX, *OF_CLASSES), op in (*SOFTMAX, *ACTIVATIONS)
    row_lengths = (1000, 7) if has_rows else (128,) if op in EMBEDDINGS else (1,)
    reductions = ("mean",) if activates else ("mean", "none")
    for length, reduction in itertools.product(row_lengths, reductions):
        for exponent in range(8, 25):
            rows = -(-(1 << exponent) // length)
            shape = (rows, length) if length > 1 else (rows,)
            case = Case(op, shape, dtype, reduction=reduction)
            if backend_of(case, cases.draw(case)) == "a kernel":
                yield case
                break


# ---- the search ----------------------------------------------------------------------------------


def slower(times: Times, margin: float) -> bool:
    """Returns whether pyfused is slower by quartiles and by minima, and by more than ALLOWED."""
    theirs, ours = (min(each) for each in times)
    return ratios(*times)[2] < margin and ours > max(theirs / margin, theirs + ALLOWED)


def times_of(timers: list[Timer], seconds: float, margin: float) -> Times:
    """Measures both timers, for longer while the second one appears slower."""
    for factor in LONGER:
        times = interleaved(timers, *plan(timers, factor * seconds, fewest=4))
        if ratios(*times)[2] >= margin:
            break
    return times


def sweep(options: Namespace) -> None:
    """Times calls of random shapes, and prints calls that are slower than torch's."""
    settle_allocator()
    seed = random.randrange(1 << 16) if options.seed is None else options.seed
    info = machine_info() | {"threads": " and ".join(map(str, options.threads))}
    print(f"--seed {seed}: {machine(measured(info))}, torch on {VECTORS}")
    draw, count, points = random.Random(seed), options.shapes, []
    for op, name in itertools.product(options.op or OPS, options.dtype or ("float32", "bfloat16")):
        dtype = DTYPES[name]
        chosen = [*random_calls(op, dtype, count, draw, options.layouts)]
        if not options.layouts:
            chosen += edges(op, dtype)
        if op in (*SOFTMAX, *OF_CLASSES):
            chosen += long_dimensions(op, dtype, 2 * count, draw)
        points += itertools.product(chosen, cases.MODES, options.threads)
    draw.shuffle(points)  # spreads the effect of a noisy minute over all operators
    found = []
    until = time.perf_counter() + options.minutes * 60
    for case, mode, threads in track(points, "Measuring", transient=True):
        if time.perf_counter() > until:
            print(f"out of time after {len(found)} of {len(points)} calls")
            break
        torch.set_num_threads(threads)
        try:
            times = times_of(timers_of_both(case, mode), options.seconds, options.margin)
        except NotImplementedError:  # torch lacks the operator for this dtype
            continue
        backend = backend_of(case, drawn_and_checked(case), mode)
        found.append((case, mode, threads, times, backend))
    found.sort(key=lambda each: ratios(*each[3])[1])
    rows = [
        [case.name, mode, str(threads), backend, *times_cells(times)]
        for case, mode, threads, times, backend in found
        if slower(times, options.margin)
    ]
    names = ["case", "mode", "threads", "run by", "torch, ms", "pyfused, ms", "ratio"]
    print(tabulated(names, rows, names=2))
    print(f"{len(rows)} of {len(found)} calls are slower than torch's")
    sys.exit(bool(rows))
