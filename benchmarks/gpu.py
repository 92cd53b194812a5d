"""Compares the Triton kernels with torch, torch.compile and other packages on a GPU.

Each measurement writes its file after every row, in case of a later failure. Calls are interleaved
and timed with CUDA events; the L2 cache is overwritten before each call. A copy moves the minimum
number of bytes that the call has to read and write: its time divided by pyfused's is the fraction
of the copy's bandwidth that pyfused reaches.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import product
from statistics import median
from types import SimpleNamespace
from typing import Any

import cases
import torch
from cases import BF16, F32, MODES, POINTWISE, Case, M, step
from report import Row, machine, markdown, measured, peer, row, save, spread, tabulated
from timing import Step, Timer, interleaved, ratios, repeat
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn import functional as F

import pyfused
from pyfused import functional as fused
from pyfused.dispatch.sizes import every_size

ROUNDS, FEW_ROUNDS, WARM_UP = 30, 9, 3
SMALL, CALLS = 1 << 20, 100  # below SMALL elements, overhead dominates: time CALLS calls at once
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU only to test this file
Rows = list[list[str]]


def write(
    options: Namespace,
    description: str,
    columns: Sequence[str],
    names: int,
    measurements: dict[str, Callable[[], Rows]],
) -> None:
    """Writes the rows of measurements, or their errors, into a table, after each of them."""
    head, rows = f"{machine(measured(info()))}. {description}", Rows()
    until = time.perf_counter() + options.seconds
    for name, measurement in measurements.items():
        try:
            if time.perf_counter() > until:
                raise TimeoutError("out of time")
            found = measurement()
        except Exception as error:  # continue with the other rows
            found = [[name, described(error), *[""] * (len(columns) - 2)]]
        rows += found
        table = tabulated(columns, rows, names=names)
        options.file.write_text(f"{head}\n\n{table}\n", encoding="utf-8")
        for cells in found:
            print(" | ".join(cells), flush=True)


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def info() -> dict[str, Any]:
    versions = {found.name: found.version for found in metadata.distributions()}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    on_gpu = DEVICE == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "driver": subprocess.check_output(command, text=True).split()[0] if on_gpu else "none",
        "torch": torch.__version__,
        "triton": versions.get("triton", "not installed"),
        "liger": versions.get("liger-kernel", "not installed"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


# ---- time and memory of a call -------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times calls: large ones one by one with events after flushing L2, small ones as a batch."""

    SLEEP = 2_000_000  # cycles (1 ms) in which the host queues the launches of a call

    def __init__(self) -> None:
        if DEVICE == "cuda":
            size = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def timer(self, call: Step, small: bool = False) -> Timer:
        return partial(self.at_once if small or DEVICE == "cpu" else self.by_events, call)

    def by_events(self, call: Step, calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.SLEEP)  # without it, the GPU would idle between launches
            self.flushed.zero_()
            started.record()
            call()
            ended.record()
            ended.synchronize()
            seconds += started.elapsed_time(ended) / 1e3
        return seconds

    def at_once(self, call: Step, calls: int) -> float:
        synchronize()
        started = time.perf_counter()
        repeat(call, calls)
        synchronize()
        return time.perf_counter() - started


def peak(call: Step) -> int:
    """Returns the peak GPU memory of a call in bytes, without its arguments."""
    if DEVICE == "cpu":
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- the cases of a report -----------------------------------------------------------------------

VOCABULARIES = tuple((2**28 // c, c) for c in (1024, 4096, 16_384, 32_000, 128_256, 262_144))
LARGE = tuple((op, (64 * M,)) for op in (*POINTWISE, "softcap"))  # others use ATen
CASES = (
    *(Case("cross_entropy", s, t, headline=True) for s in VOCABULARIES for t in (BF16, F32)),
    *(Case(op, shape, dtype, headline=True) for op, shape in LARGE for dtype in (BF16, F32)),
    Case("cross_entropy", (8, 10)),
    *(Case(op, (100,)) for op in ("mse_loss", "relu")),
    Case("cross_entropy", (8192, 32_000), BF16, weight=True, smoothing=0.1),
    Case("cross_entropy", (8192, 32_000), BF16, probabilities=True),
    Case("cross_entropy", (8192, 32_000), BF16, reduction="none"),
    Case("cross_entropy", (8192, 32_000), BF16, ignored=0.5),
    Case("cross_entropy", (16, 262_144), BF16),
    Case("cross_entropy", (8192, 50_257), BF16),
    Case("cross_entropy", (1 << 22, 10)),
    Case("cross_entropy", (16, 21, 512, 512)),
    *(Case("softmax", (2**28 // c, c), dtype) for c in (64, 4096, 32_000) for dtype in (BF16, F32)),
    Case("cross_entropy", (1 << 20, 100), BF16),
)


def peers_of(case: Case) -> dict[str, Any]:
    """Returns eager and compiled torch, and Liger if it supports the case."""
    peers: dict[str, Any] = {"torch": cases.TORCH, "torch.compile": cases.Compiled()}
    plain = case.op == "cross_entropy" and len(case.shape) == 2 and not case.probabilities
    if DEVICE == "cuda" and plain and case.reduction == "mean":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            peers["liger"] = SimpleNamespace(cross_entropy=liger_cross_entropy)
    return peers


def measure(case: Case, mode: str, clock: Clock) -> Row:
    """Times a case and its peers, and measures the peak memory of pyfused."""
    arguments = cases.draw(case, DEVICE)
    steps: dict[str, Step] = {}
    for name, operators in peers_of(case).items():
        copied = arguments
        if name == "liger":  # overwrites the logits with their gradient
            copied = replace(copied, input=copied.input.detach().clone().requires_grad_())
        steps[name] = step(operators, case, copied, mode)
    small = case.elements < SMALL
    if not small:
        steps["copy"] = cases.copy_step(case, mode, DEVICE)
    steps["pyfused"] = step(fused, case, arguments, mode)
    timers = [clock.timer(call, small) for call in steps.values()]
    interleaved(timers, 1, WARM_UP)
    times = dict(zip(steps, interleaved(timers, ROUNDS, CALLS if small else 1), strict=True))
    ours = times.pop("pyfused")
    first = step(fused, case, arguments, mode)  # a new leaf, without a gradient
    gradients = peak(first) / arguments.input.nbytes if DEVICE == "cuda" else None
    return row(case, mode, {name: peer(each, ours) for name, each in times.items()}, gradients)


def report(options: Namespace) -> None:
    """Writes results.csv, which also has torch.compile, into a folder with the GPU's name."""
    until, clock, rows = time.perf_counter() + options.seconds, Clock(), []
    for case in (each for each in CASES if any(part in each.name for part in options.k)):
        torch.compiler.reset()
        modes = MODES if case.headline else MODES[1:]
        try:
            if time.perf_counter() > until:
                raise TimeoutError("out of time")
            cases.assert_correct(case, cases.draw(case, DEVICE))
            rows += [measure(case, mode, clock) for mode in modes]
            save(rows, measured(info()), options.file)
            print(markdown(rows[-len(modes) :]), flush=True)
        except Exception as error:  # continue with the other cases
            print(f"left out: {case.name}: {described(error)}", flush=True)


# ---- calls of all sizes --------------------------------------------------------------------------

SIZES = tuple(1 << n for n in range(8, 27, 2))
CLASSES = 1000
SIZED = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div"),
    *("gaussian_nll_loss", "cross_entropy", "log_softmax"),
    *("softmax", "gelu", "silu", "tanh", "relu", "mish"),
)
MIN_SPEEDUP = 0.95  # a smaller difference is noise


def size_rows(op: str, clock: Clock) -> Rows:
    has_rows = op in (*cases.SOFTMAX, "cross_entropy")
    speedups, smallest, by_kernel = [], [], []
    for elements in SIZES:
        case = Case(op, (max(1, elements // CLASSES), CLASSES) if has_rows else (elements,))
        arguments = cases.draw(case, DEVICE)
        call = op, arguments.input, *arguments.others
        if pyfused.explain(*call, **arguments.options).backend != "torch":
            by_kernel.append(elements)
        with every_size():  # also small calls run kernels
            cases.assert_correct(case, arguments)
            steps = [step(operators, case, arguments) for operators in (cases.TORCH, fused)]
            timers = [clock.timer(each, small=True) for each in steps]
            interleaved(timers, 1, WARM_UP)
            calls = max(1, min(50, (16 * M) // elements))
            theirs, ours = map(median, interleaved(timers, FEW_ROUNDS, calls))
        speedups.append(theirs / ours)
        smallest = smallest or [f"{1e3 * each:.0f}" for each in (ours, theirs)]
    slower = [size for size, each in zip(SIZES, speedups, strict=True) if each < MIN_SPEEDUP]
    faster = [size for size in SIZES if size > max(slower, default=0)]
    limits = (
        f"2^{found[0].bit_length() - 1}" if found else "never" for found in (faster, by_kernel)
    )
    return [[op, *smallest, *limits, *(f"{each:.2f}" for each in speedups)]]


def sizes(options: Namespace) -> None:
    description = (
        "Forward and backward in float32, in a loop: microseconds of the smallest call, which the "
        "host decides, the size from which the kernel is faster, the size from which it runs by "
        "default, and torch's time divided by pyfused's for each size."
    )
    columns = ["operator", "pyfused", "torch", "faster from", "runs from"]
    columns += [f"2^{size.bit_length() - 1}" for size in SIZES]
    clock = Clock()
    write(options, description, columns, 1, {op: partial(size_rows, op, clock) for op in SIZED})


# ---- a language model's head ---------------------------------------------------------------------

HEADS = ((8192, 4096, 128_256), (8 * 1024, 1024, 151_936), (16_384, 2048, 32_000))
MAX_NORM_ERROR = 2.0**-5  # of bfloat16 gradients
BUDGETS = {"a quarter": 4, "a 16th": 16, "a 64th": 64}  # parts of all logits
OTHERS = {
    "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}
Tensors = tuple[Tensor, ...]
# A loss, or several results, of the input (N, D), the weight (C, D) and the target (N) of a head,
# and of the input and the weight of its teacher.
Loss = Callable[..., Any]
Way = Callable[[], Tensors]


def products(x: Tensor, weight: Tensor, *_: Tensor) -> Tensors:
    with torch.no_grad():
        logits = x @ weight.t()
        return logits @ weight, logits.t() @ x


def four_products(x: Tensor, weight: Tensor, _: Tensor, *teacher: Tensor) -> Tensors:
    F.linear(*teacher)
    return products(x, weight)


def gradients(loss: Loss, x: Tensor, weight: Tensor, *others: Tensor) -> Tensors:
    results = loss(x, weight, *others)
    results = results if isinstance(results, tuple) else (results,)
    factors = [torch.full_like(result, 0.5**k) for k, result in enumerate(results)]
    return torch.autograd.grad(results, (x, weight), factors)


def torch_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def cross_entropies(tokens: int, classes: int) -> dict[str, Loss]:
    linear, logits = fused.linear_cross_entropy, tokens * classes * BF16.itemsize
    half = torch.arange(tokens, device=DEVICE) % 2 == 0
    compiled = partial(torch.compile, torch_cross_entropy, dynamic=False)
    found: dict[str, Loss] = {
        "torch": torch_cross_entropy,
        "torch.compile": compiled(),
        "pyfused, cross_entropy of logits": lambda x, w, t: fused.cross_entropy(F.linear(x, w), t),
        "pyfused": linear,
        **{
            f"pyfused, memory_budget of {name}": partial(linear, memory_budget=logits // part)
            for name, part in BUDGETS.items()
        },
        "pyfused, half ignored": lambda x, w, t: linear(x, w, t.masked_fill(half, -100)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        found["torch, in chunks"] = partial(F.linear_cross_entropy, options=chunks)
    if hasattr(inductor_config, "auto_chunker"):
        enabled = {"auto_chunker.enable": True}
        found["torch.compile, auto_chunker"] = compiled(options=enabled)
    for name, (module, function) in OTHERS.items():
        with contextlib.suppress(ImportError):
            found[name] = getattr(importlib.import_module(module), function)
    return {name: lambda x, w, t, *_, f=f: f(x, w, t) for name, f in found.items()}


def torch_log_probs(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor) -> Tensors:
    logits, indices = F.linear(x, weight), target[:, None]
    log_p = logits.log_softmax(1)
    of_target = log_p.gather(1, indices)
    lse, entropy = logits.gather(1, indices) - of_target, -(log_p.exp() * log_p).sum(1)
    return of_target.squeeze(1), entropy, lse.squeeze(1)


def log_probs(x: Tensor, weight: Tensor, target: Tensor, *_: Tensor) -> Tensors:
    results = fused.linear_log_probs(x, weight, target, return_entropy=True, return_lse=True)
    return results[:3]


def torch_divergence(x: Tensor, weight: Tensor, _: Tensor, *teacher: Tensor) -> Tensor:
    log_p, log_q = (F.linear(*each).log_softmax(1) for each in ((x, weight), teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def divergence(x: Tensor, weight: Tensor, _: Tensor, *teacher: Tensor) -> Tensor:
    return fused.linear_kl_div(x, weight, *teacher)


def ways_of(loss: str, tokens: int, features: int, classes: int) -> dict[str, Way]:
    """Returns the ways to compute the gradients of a head's input and weight, by name.

    The first way computes the matrix products alone, and the second one is torch's.
    """
    randn = partial(torch.randn, dtype=BF16, device=DEVICE)
    torch.manual_seed(0)
    x, weight = (
        tensor.requires_grad_()
        for tensor in (randn(tokens, features), randn(classes, features) / features**0.5)
    )
    target = torch.randint(classes, (tokens,), device=DEVICE)
    teacher = randn(tokens, features), randn(classes, features) / features**0.5
    operands = x, weight, target, *teacher
    found: dict[str, Way] = {"three products": partial(products, *operands)}
    losses: dict[str, Loss] = {"torch": torch_log_probs, "pyfused": log_probs}
    if loss == "cross-entropy":
        losses = cross_entropies(tokens, classes)
    elif loss == "KL divergence":
        found = {"four products": partial(four_products, *operands)}
        losses = {"torch": torch_divergence, "pyfused": divergence}
    return found | {name: partial(gradients, each, *operands) for name, each in losses.items()}


def error_of(way: Way, expected: Tensors | None) -> str:
    """Runs a way; returns its error or its difference from the expected result, "" if correct."""
    try:
        results = way()
    except Exception as error:  # an error of another package, or out of memory
        return described(error)
    for result, exact in zip(results, expected or results, strict=True):
        error = float((result.float() - exact.float()).norm() / exact.float().norm())
        if not error <= MAX_NORM_ERROR:
            return f"relative error of the norm: {error:.3f}"
    return ""


def head_rows(shape: tuple[int, int, int], loss: str, clock: Clock) -> Rows:
    ways = ways_of(loss, *shape)
    expected, errors = ways["torch"](), {}
    for name, way in ways.items():
        is_comparable = "products" not in name and "ignored" not in name
        errors[name] = error_of(way, expected if is_comparable else None)
    del expected
    ways = {name: way for name, way in ways.items() if not errors[name]}
    peaks = {name: peak(way) / 2**30 for name, way in ways.items()}
    timers = [clock.timer(way) for way in ways.values()]
    interleaved(timers, 1, 1)
    times = dict(zip(ways, interleaved(timers, FEW_ROUNDS, 1), strict=True))
    of_products, of_torch, *_ = times.values()

    def cells(name: str) -> list[str]:
        if name not in times:
            return [errors[name], "", "", ""]
        relative = ratios(times[name], of_products), ratios(of_torch, times[name])
        return [f"{median(times[name]):.4g}", f"{peaks[name]:.2f}", *map(spread, relative)]

    return [[f"({', '.join(map(str, shape))})", loss, name, *cells(name)] for name in errors]


def heads(options: Namespace) -> None:
    description = "bfloat16, forward and backward. GiB: peak of the memory that a call allocates."
    columns = ["tokens, features, classes", "loss", "", "ms", "GiB", "time / products"]
    columns.append("times as fast as torch")
    losses, clock = ("cross-entropy", "log-probabilities", "KL divergence"), Clock()
    measurements = {
        f"{loss} {shape}": partial(head_rows, shape, loss, clock)
        for loss, shape in product(losses, HEADS)
    }
    write(options, description, columns, 3, measurements)


MEASUREMENTS = {f.__name__: f for f in (report, heads, sizes)}


def gpu(options: Namespace) -> None:
    MEASUREMENTS[options.name](options)
