"""Compile every kernel in every row of the launch tables, ahead of time and without a GPU.

    python tests/gpu/ahead.py                       # what `make gpu-compile` runs
    python tests/gpu/ahead.py --targets sm_90 --match "cross_entropy bfloat16"

The backend is called as users call it, but with tensors without memory and a driver that compiles
for a GPU that is not there: what is compiled is what would be launched. Exits with 1 where a kernel
spills more than `SPILLED`, or where the main loop of one for contiguous bfloat16 or float32
does not load most of its bits 128 at a time, or two elements where positions lie side by side.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import nvidia
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyfused.backends import (
    Among,
    CrossEntropyOptions,
    MarginOptions,
    Measures,
    NllOptions,
    Want,
)
from pyfused.backends import triton as backend
from pyfused.kernels import launch, tiles
from pyfused.kernels.activation import FORMULAS as ACTIVATIONS
from pyfused.kernels.cross_entropy_launch import planned
from pyfused.kernels.pointwise_loss import FORMULAS as LOSSES
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
VECTORS = (torch.bfloat16, torch.float32)  # loads of 128 bits are asked of these
# Bytes of a lane, at most: some registers at a kernel's ends. Of cross-entropy more, once a block
# of positions, of which a lane has a hundred elements: more registers would leave room for fewer
# programs, which by the model costs more.
SPILLED = 16
SPILLED_OF = dict.fromkeys(("one_read_kernel", "two_read_kernel", "split_kernel"), 96)
# Kernels that read next to nothing, or beside little of a row what others found, in such cases.
READ_LITTLE = {"count_kernel": "", "two_read_kernel": "2x262144"}


@dataclass(frozen=True)
class Case:
    """A call of the backend on tensors without memory."""

    name: str
    dtype: torch.dtype
    run: Callable[[], object]
    bits: int = 128  # that a lane is to load at a time


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    spills: int  # bytes of stack, or registers on AMD
    shared: int  # bytes
    load: int  # bits, the widest of a lane in the main loop
    wide: int  # percentage of the bits that are loaded there as many at a time as a case wants
    store: int  # bits
    wrong: str = ""


# ---- the calls ----------------------------------------------------------------------------------


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy_case(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Case:
    x = empty(dtype, *shape)
    indices = empty(torch.int64, shape[0], *shape[2:])
    weight = empty(dtype, shape[1])
    smoothing, gamma = (0.1 if "smoothing" in kind else 0.0), (2.0 if "focal" in kind else 0.0)
    options = CrossEntropyOptions(-100, "mean", smoothing, gamma)
    upstream = None
    if "upstream" in kind:
        options, upstream = options._replace(reduction="none"), empty(dtype, *indices.shape)
    among = None
    if "squares" in kind:
        token_weight = empty(torch.float32, *indices.shape)
        options = options._replace(z_loss=0.1, token_weight=token_weight)
    measures, each = None, empty(torch.float64, indices.numel())
    if "block" in kind:  # whose log-sum-exp is asked, or that of all classes given
        forward = "forward" in kind
        among = Among(1 << 16, 1 << 20, None if forward else each)  # at a multiple of a tile
        measures = Measures(each) if forward else None
        weight = empty(dtype, among.classes)
    if "measured" in kind:
        measures = Measures(each, each, empty(torch.int64, indices.numel()))
    target = x if "probabilities" in kind else indices
    gradients = "forward" not in kind, target is x
    want = Want("upstream" not in kind, gradients, "inplace" in kind, measures)
    arguments = (x, target, weight if "weight" in kind else None, options, want, upstream, among)
    name = f"cross_entropy {str(dtype)[6:]} {'x'.join(map(str, shape))} {kind}".strip()
    bits = 128 if len(shape) == 2 else 16 * dtype.itemsize
    if "weight" in kind and shape[1] * dtype.itemsize % 16:
        bits = 8 * dtype.itemsize  # the weights of rows that begin anywhere
    return Case(name, dtype, lambda: backend.cross_entropy(*arguments), bits)


def cross_entropy_cases(dtype: torch.dtype) -> Iterator[Case]:
    kinds = ("", "forward", "upstream", "inplace")
    dense = ("weight smoothing", "probabilities weight smoothing")
    size = dtype.itemsize
    sparse_rows = {row.most: row for row in launch.CLASSES_INNER[size] + launch.CLUSTERED[size]}
    dense_rows = launch.DENSE_CLASSES_INNER[size]
    held = (*kinds, "smoothing")
    for row, kind in (*product(sparse_rows.values(), held), *product(dense_rows, dense)):
        classes = 300_032 if row.most == launch.ANY else int(row.most)
        yield cross_entropy_case((4096, classes), dtype, kind)
    blocks = "forward block", "block upstream inplace", "block upstream weight smoothing"
    measured = "measured", "forward measured"
    for kind in (*kinds, "focal", "squares", *measured, *blocks, *dense):
        yield cross_entropy_case((4096, 16), dtype, kind)
        yield cross_entropy_case((4096, 1000), dtype, kind)  # a multiple of 8, not of 16
        yield cross_entropy_case((8, 21, 1000), dtype, kind)
        yield cross_entropy_case((2, 262_144), dtype, kind)  # several programs a position
    for row, kind in product(sparse_rows.values(), ("", "smoothing")):  # rows that begin anywhere
        classes = 300_001 if row.most == launch.ANY else int(row.most) - 9
        yield cross_entropy_case((4096, classes), dtype, kind)
    for kind in (*kinds, *measured, *blocks, *dense):
        yield cross_entropy_case((4096, 1013), dtype, kind)
    for row, kind in product(launch.POSITIONS_INNER[size], (*kinds, *dense)):
        classes = 1000 if row.most == launch.ANY else int(row.most)
        yield cross_entropy_case((8, classes, 4096), dtype, kind)


def class_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Softmax, and the losses of class indices but for cross-entropy."""
    kind = str(dtype)[6:]
    for shape in ((4096, 1000), (4096, 32_000), (4096, 50_257), (8, 21, 4096)):
        x, name = empty(dtype, *shape), "x".join(map(str, shape))
        bits = 128 if len(shape) == 2 else 16 * dtype.itemsize
        for op in ("softmax", "log_softmax"):
            forward = partial(backend.softmax, op, x, 1)
            backward = partial(backend.softmax_backward, op, x, x, 1)
            yield Case(f"{op} {kind} {name}", dtype, forward, bits)
            yield Case(f"{op} {kind} {name} backward", dtype, backward, bits)
        target, want = empty(torch.int64, shape[0], *shape[2:]), Want(True, (True, False))
        nll = partial(backend.nll_loss, x, target, None, NllOptions(-100, "mean"), want)
        yield Case(f"nll_loss {kind} {name}", dtype, nll)
        if len(shape) == 2:
            for p in (1, 2):
                options = MarginOptions(p, 1.0, "mean")
                margin = partial(backend.multi_margin_loss, x, target, None, options, want)
                yield Case(f"multi_margin_loss {kind} {name} p {p}", dtype, margin)


def differentiated(formula: str) -> tuple[bool, ...]:
    """Of which operands there is a gradient, as the operator declares that the formula is of."""
    name = max((name for name in OPERATORS if formula.startswith(name)), key=len)
    op = OPERATORS[name]
    assert isinstance(op, PointwiseLoss)
    return tuple(operand.differentiated for operand in op.variables)


def pointwise_cases(dtype: torch.dtype) -> Iterator[Case]:
    n = 1 << 24
    x, rows, total = empty(dtype, n), empty(dtype, 4096, 4096), empty(torch.float64)
    row = empty(dtype, 4096).expand(4096, 4096)
    name = f"mse_loss {str(dtype)[6:]}"
    ahead, after = Want(True, (True, True)), Want(False, (True, True))

    def mse_loss(*operands: Tensor, weight: Tensor | None = None) -> Callable[..., object]:
        return partial(backend.pointwise_loss, "mse_loss", operands, (), weight)

    calls: dict[str, Callable[[], object]] = {
        f"{name} forward": partial(mse_loss(x, x), "sum", 1.0, Want()),
        f"{name} weight": partial(mse_loss(x, x, weight=x), "mean", total, ahead),
        f"{name} none": partial(mse_loss(x, x), "none", 1.0, Want()),
        f"{name} upstream": partial(mse_loss(x, x), "none", 1.0, after, x),
        f"{name} broadcast": partial(mse_loss(rows, row), "mean", 1.0 * n, ahead),
        f"scale {str(dtype)[6:]}": lambda: backend.scale_(x, total),
    }
    for op in ACTIVATIONS:
        forward = partial(backend.activation, op, x)
        backward = partial(backend.activation_backward, op, x, x)
        name = f"{op} {str(dtype)[6:]}"
        calls |= {name: forward, f"{name} backward": backward}
    for formula, kernels in LOSSES.items():
        count = kernels.value.fn.__code__.co_argcount - 3  # parameters
        operands, want = (x,) * count, Want(True, differentiated(formula)[:count])
        calls[f"{formula} {str(dtype)[6:]}"] = partial(
            backend.pointwise_loss, formula, operands, (1.0, 1.0, 1.0), None, "mean", 1.0 * n, want
        )
    for case, run in calls.items():
        yield Case(case, dtype, run)


def all_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from pointwise_cases(dtype)
        yield from cross_entropy_cases(dtype)
        yield from class_cases(dtype)


# ---- compiling ----------------------------------------------------------------------------------


class Driver:
    """Tells Triton of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, _: object) -> int:
        return 0


class Recorder:
    """While entered, kernels are compiled for a target where they would be launched."""

    def __init__(self, target: GPUTarget, multiprocessors: int = 132) -> None:
        self.target = target
        self.multiprocessors = multiprocessors
        self.launched: list[tuple[str, Any]] = []
        self.programs: list[int] = []  # of each launch
        self.turns: list[int] = []  # at most, of each of them

    def __enter__(self) -> list[tuple[str, Any]]:
        self.run, self.counted = JITFunction.run, launch.multiprocessors
        run, launched = self.run, self.launched

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            found = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            launched.append((kernel.fn.__name__, found))
            programs = math.prod(grid(kwargs) if callable(grid) else grid)
            blocks = dict(zip(kernel.arg_names, args, strict=False)).get("blocks", programs)
            self.programs.append(programs)
            self.turns.append(-(-blocks // programs))

        JITFunction.run = compile_only
        launch.multiprocessors = lambda _: self.multiprocessors
        driver.set_active(Driver(self.target))
        launch._warp_size.cache_clear()
        tiles.layout.cache_clear()
        planned.cache_clear()
        return launched

    def __exit__(self, *_: object) -> None:
        JITFunction.run, launch.multiprocessors = self.run, self.counted
        driver.set_active(None)  # the next to ask finds the real one
        launch._warp_size.cache_clear()
        tiles.layout.cache_clear()
        planned.cache_clear()


def compile_cases(target: str, names: Sequence[str]) -> list[Compiled]:
    """What the kernels of some cases come to; one that several cases launch is told of once."""
    found, seen = [], set()
    for case in all_cases():
        if case.name not in names:
            continue
        with Recorder(TARGETS[target]) as launched:
            case.run()
        for name, kernel in launched:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                found.append(inspect(target, case, name, kernel))
    return found


# ---- looking at what came out -------------------------------------------------------------------


LABEL = re.compile(r"^([.$]L\w+):", re.MULTILINE)
BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+([.$]L\w+)")


def loops(assembly: str) -> list[str]:
    """What lies between each label and the last branch back to it.

    A branch from behind the program's end is none: it returns from a block put out of the way.
    """
    starts = {label[1]: label.start() for label in LABEL.finditer(assembly)}
    found = {}
    for branch in BRANCH.finditer(assembly):
        loop = assembly[starts[branch[1]] : branch.end()]
        if loop and "s_endpgm" not in loop:
            found[branch[1]] = loop
    return list(found.values())


def widths(access: str, assembly: str) -> list[int]:
    """The bits of every access: the pattern's groups are a count, and bits or a unit of so many."""
    units = {"dword": 32, "short": 16, "byte": 8}
    found = re.findall(access, assembly)
    return [int(count or 1) * int(units.get(bits, bits)) for count, bits in found]


# Loads past L1 (cg, nt) are of what other programs found, and not the main loop's.
def main_loops(load: str, assembly: str, wanted: int) -> dict[str, int]:
    """Of the loops that load, the least: the widest load, and the percentage as wide as wanted.

    A kernel without any is one that reads once, and looked at as a whole.
    """
    loaded = [bits for bits in (widths(load, loop) for loop in loops(assembly)) if bits]
    loaded = loaded or [widths(load, assembly)]
    most = max(map(sum, loaded))  # what a block loads beside its tiles is no main loop
    loaded = [bits for bits in loaded if 2 * sum(bits) >= most]
    wide = [100 * sum(b for b in bits if b >= wanted) // sum(bits) for bits in loaded]
    return {"load": min(max(bits) for bits in loaded), "wide": min(wide)}


def on_nvidia(kernel: Any, bits: int) -> dict[str, int]:
    access = r"\b{}\.global(?!\.cg)(?:\.\w+?)*?(?:\.v(\d))?\.[bfsu](\d+)"
    return {
        **nvidia.usage(kernel.asm["cubin"]),
        **main_loops(access.format("ld"), kernel.asm["ptx"], bits),
        "store": max(widths(access.format("st"), kernel.asm["ptx"])),
    }


def on_amd(kernel: Any, bits: int) -> dict[str, int]:
    assembly = kernel.asm["amdgcn"]
    used = {key: int(n) for key, n in re.findall(r"\.([vs]gpr\w*count):\s+(\d+)", assembly)}
    access = r"\b(?:global|buffer|flat)_{}_[us]?(?=(?:dwordx(\d))?)(dword|short|byte)(?!.*\bnt\b)"
    return {
        "registers": used["vgpr_count"],
        "spills": used["vgpr_spill_count"],  # scalar ones go to vector registers, not to memory
        **main_loops(access.format("load"), assembly, bits),
        "store": max(widths(access.format("store"), assembly)),
    }


def used_by(kernel: Any, bits: int) -> dict[str, int]:
    return (on_amd if "amdgcn" in kernel.asm else on_nvidia)(kernel, bits)


def inspect(target: str, case: Case, name: str, kernel: Any) -> Compiled:
    found = used_by(kernel, case.bits)
    wrong = []
    if found["spills"] > SPILLED_OF.get(name, SPILLED):
        wrong.append("spills")
    little = name in READ_LITTLE and READ_LITTLE[name] in case.name
    if case.dtype in VECTORS and not little and found["wide"] < 50:
        wrong.append("narrow loads")
    metadata = kernel.metadata
    return Compiled(
        target=target,
        case=case.name,
        kernel=name,
        warps=metadata.num_warps,
        shared=metadata.shared,
        wrong=", ".join(wrong),
        **found,
    )


def show(found: Sequence[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "case", "kernel", title=f"Triton {triton.__version__}")
    for column in ("warps", "registers", "spills", "shared", "load", "wide", "store"):
        table.add_column(column, justify="right")
    table.add_column("")
    for c in found:
        numbers = c.warps, c.registers, c.spills, c.shared, c.load, c.wide, c.store
        table.add_row(c.target, c.case, c.kernel, *map(str, numbers), c.wrong)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases whose name holds these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    words = arguments.match.split()
    names = [case.name for case in all_cases() if all(word in case.name for word in words)]
    pieces = [(t, names[i::8]) for t in arguments.targets for i in range(8)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        found = [c for piece in pool.map(compile_cases, *zip(*pieces, strict=True)) for c in piece]
    found.sort(key=lambda c: (arguments.targets.index(c.target), c.case, c.kernel))
    show(found)
    wrong = [c for c in found if c.wrong]
    print(f"{len(found)} kernels, {len(wrong)} of them not as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
