"""Compiles the Triton kernels for GPUs, without a GPU, and checks their machine code.

    python tests/gpu/compile_ahead.py                       # same as `make gpu-compile`
    python tests/gpu/compile_ahead.py --targets sm_90 --match "cross_entropy bfloat16" --all

The backend is called with fake tensors and a fake driver for another GPU, so the compiled kernels
are those that would be launched. Exits with 1 if a kernel

- does not compile, or spills more than `SPILLED` bytes per thread (except float64);
- has narrow loads or stores of aligned rows: most bits in accesses below 128 bits, or 64 bits for
  contiguous positions, in the loops that load most, or in the kernel if it has no loop;
- needs more instructions per element than `INSTRUCTIONS` allows;

or if a call needs more launches than its case allows.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyfused.backends import triton as backend
from pyfused.formula_compiler.kernel import Kernel
from pyfused.kernels import launch
from pyfused.layout import accumulate_dtype
from pyfused.ops.activation import Activation
from pyfused.ops.elementwise import OPERATORS, PointwiseLoss
from pyfused.ops.operators import COSINE_EMBEDDING_LOSS, TRIPLET_MARGIN_LOSS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from formulas import FORMULAS

from pyfused.types import (
    METRICS_FIELDS,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    ClassRange,
    CrossEntropyOptions,
    DivergenceOptions,
    EmbeddingOptions,
    Outputs,
    RowOptions,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SOME = ("sm_90", "gfx942")  # for rare cases: one GPU of each vendor
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SPILLED = 16  # bytes per thread
# At 32,000 classes, softmax spills, but two passes would take 1.3 times as long on an H100.
# The sine of large numbers needs many digits of pi.
MAY_SPILL = {"": SPILLED, "softmax_backward_kernel": 80, "formula snake": 40}
# Instructions per element of cross-entropy with class indices and its gradient, on sm_90.
INSTRUCTIONS = {
    **{(c, BF16): 21 for c in (1000, 16_384)},
    (4096, BF16): 23,  # 22.8 with Triton 3.7.1
    **{(c, F32): 28 for c in (1000, 4096, 16_384)},
    **{(c, BF16): 26 for c in (32_000, 128_256)},
    **{(c, F32): 40 for c in (32_000, 128_256)},
    (50_257, BF16): 27,
    (50_257, F32): 41,
    (21, 512, 512, F32): 52,  # 21 classes need three tiles of 8
}
# A case of each kind, which tests compile.
QUICK = (
    "cross_entropy bfloat16 4096x1000",
    "cross_entropy bfloat16 4096x32000",
    "cross_entropy float32 8x21x1000",
    "softmax bfloat16 4096x32000 backward",
    "triplet_margin_loss bfloat16 4096x4096 p 2 swap",
    "cosine_embedding_loss float32 4096x128",
    "binary_cross_entropy float32",
    "gelu bfloat16 backward",
)
READ_LITTLE = ("count_kernel",)  # 8 bytes per row
WRITE_LITTLE = ("row_state_kernel",)
# The least percentage of wide loads. In rows of 64 bytes, class indices are many of the loads.
WIDE_LOADS = {"": 50, "gfx942 cross_entropy float32 4096x16": 44}


@dataclass(frozen=True)
class Case:
    """A call of the backend with fake tensors."""

    name: str
    dtype: torch.dtype
    elements: int  # the number of elements of the input
    run: Callable[[], object]
    targets: Sequence[str] = tuple(TARGETS)
    vector: int = 128  # the required vector width in bits; 0: not checked
    launches: int = 1  # the maximum number of launches
    instructions: int = 0  # the maximum per element; 0: not checked


# ---- the calls -----------------------------------------------------------------------------------


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(
    op: str, dtype: torch.dtype, shape: tuple[int, ...], run: Any, kind: str = "", **fields: Any
) -> Case:
    """Returns a case; vectors have 128 bits for aligned rows, or 64 for contiguous positions."""
    contiguous = math.prod(shape[2:]) if len(shape) > 2 else shape[-1]
    vector = 0 if contiguous * dtype.itemsize % 16 else 64 if len(shape) > 2 else 128
    size = "x".join(map(str, shape)) if len(shape) > 1 else ""
    name = " ".join(filter(None, (op, str(dtype)[6:], size, kind)))
    return Case(name, dtype, math.prod(shape), run, **{"vector": vector, **fields})


def run_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: CrossEntropyOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> None:
    """Prepares and launches the kernel for the current target."""
    tensors = x, target, weight, token_weight, None
    launch = backend.cross_entropy(tensors, options, outputs, grad_output)
    launch(tensors, options, grad_output)


def cross_entropy(
    dtype: torch.dtype, shape: tuple[int, ...], kind: str = "", **fields: Any
) -> Case:
    """Returns the case of a mean with its gradient; `kind` lists variations."""
    words = kind.split()
    x, indices = empty(dtype, *shape), empty(torch.int64, shape[0], *shape[2:])
    n, classes, target = indices.numel(), shape[1], x if "probabilities" in words else indices
    elements, launches = math.prod(shape), 1
    many = elements > backend.HOST_BOUND or n > backend.COUNTED_BY_PROGRAMS
    if target is not x and many:  # a separate kernel counts the class indices
        launches = 2
    names = {"label_smoothing": "smoothing", "gamma": "focal", "z_loss": "z_loss"}
    coefficients = {name: 0.1 * (word in words) for name, word in names.items()}
    scale = 16.0 if "scale" in words else 1.0
    options = CrossEntropyOptions(scale=scale, **coefficients)
    outputs = Outputs(True, ("forward" not in words, target is x), "inplace" in words)
    grad_output = None
    token_weight = empty(F32, *indices.shape) if "z_loss" in words else None
    if "grad_output" in words:
        options = options._replace(reduction="none")
        outputs, launches = outputs._replace(loss=False), 1
        grad_output = empty(dtype, *indices.shape)
    fields["instructions"] = 0 if kind else INSTRUCTIONS.get((*shape[1:], dtype), 0)
    if classes == 50_257 and dtype is not F64:
        fields["vector"] = 128  # aligned vectors of unaligned rows
    weight = empty(dtype, classes) if "weight" in words else None
    tensors = x, target, weight, token_weight
    run = partial(run_cross_entropy, *tensors, options, outputs, grad_output)
    return case("cross_entropy", dtype, shape, run, kind, launches=launches, **fields)


CLASSES = (10, 16, 100, 1000, 1013, 4096, 8192, 16_384, 32_000, 50_257, 128_256, 262_144)
SHAPES = *((4096, n) for n in CLASSES), (8, 21, 1000), (8, 150, 4096), (16, 21, 512, 512)
KINDS = (
    *("forward", "grad_output", "inplace", "smoothing", "weight", "weight smoothing"),
    *("focal", "z_loss", "scale", "probabilities", "probabilities weight smoothing"),
)


def cross_entropy_cases() -> Iterator[Case]:
    """Yields every shape for all targets, and every kind at three shapes for some targets."""
    for dtype, shape in product((BF16, F32, F16, F64), SHAPES):
        targets = tuple(TARGETS) if dtype in (BF16, F32) else SOME
        yield cross_entropy(dtype, shape, targets=targets)
    shapes = (4096, 1000), (4096, 32_000), (8, 21, 1000)
    for dtype, kind, shape in product((BF16, F32), KINDS, shapes):
        yield cross_entropy(dtype, shape, kind, targets=SOME)
    for dtype, kind in product((F16, F64), KINDS):
        yield cross_entropy(dtype, (4096, 1000), kind, targets=SOME[:1])


def class_cases() -> Iterator[Case]:
    """Yields softmax, and losses of class indices other than cross-entropy."""
    shapes = (4096, 1000), (4096, 32_000), (4096, 50_257), (8, 21, 4096)
    for dtype, shape in product((BF16, F32, F16, F64), shapes):
        x, target = empty(dtype, *shape), empty(torch.int64, shape[0], *shape[2:])
        common = shape[1] == 32_000 and dtype in (BF16, F32)
        of, fields = (dtype, shape), {"targets": tuple(TARGETS) if common else SOME}
        for op in ("softmax", "log_softmax"):
            forward = partial(backend.softmax(op, x, 1)[0], x, ())
            backward = partial(backend.softmax(op, x, 1)[1], x, x, ())
            yield case(op, *of, forward, **fields)
            yield case(op, *of, backward, "backward", **fields)
        # A thread may load more bits of the state than of 16-bit logits.
        few = {"vector": 0} if dtype.itemsize == 2 else {}
        for cap in (None, 30.0) if len(shape) == 2 else ():
            kind, rows = "softcap" * bool(cap), RowOptions(softcap=cap, temperature=0.7)
            range_, weight = ClassRange(0, shape[1]), empty(accumulate_dtype(dtype), shape[1])
            state = empty(F64, STATE_FIELDS, shape[0])
            results = empty(accumulate_dtype(dtype), 3, shape[0])
            run = partial(backend.row_state, rows, x, target, None, state, range_, results)
            run = partial(run, continues=cap is not None)
            yield case("row_state", *of, run, kind, **fields, **(few if cap else {}))
            if cap is None:
                state = empty(F64, METRICS_FIELDS, shape[0])
                run = partial(backend.row_state, rows, x, target, None, state, range_)
                yield case("row_state", *of, run, "metrics")
            state = empty(F64, SMOOTHING_FIELDS, shape[0])
            run = partial(backend.row_state, rows, x, target, weight, state, range_, continues=True)
            yield case("row_state", *of, run, f"all {kind}".strip(), **fields, **few)
            for grads, factors, word in ((results, None, ""), (state[:4], weight, "smoothing")):
                tensors = x, target, factors, state, range_, grads, x
                run = partial(backend.row_gradients, rows, *tensors)
                words = " ".join(filter(None, ("backward", word, kind)))
                yield case("row_state", *of, run, words, **fields, **few)
        for beta in (0.0, 0.5) if len(shape) == 2 else ():
            options = DivergenceOptions(reduction="sum", temperature=2.0, beta=beta)
            given = (x, x, None, None), options, Outputs(True, (True,))
            run = partial(backend.kl_div_with_logits(*given), given[0], options)
            yield case("kl_div_with_logits", *of, run, f"beta {beta}", **fields)


def embedding_cases() -> Iterator[Case]:
    for dtype, shape in product((BF16, F32, F16, F64), ((4096, 128), (4096, 4096), (4096, 16_384))):
        x, target = empty(dtype, *shape), empty(accumulate_dtype(dtype), shape[0], 1)
        targets = SOME if dtype in (F16, F64) else tuple(TARGETS)
        if shape[1] == 128:  # too short for 16 bytes per thread in a warp of 64
            targets = tuple(target for target in targets if target != "gfx942")
        fields: Any = {"targets": targets}
        for euclidean, swap in product((True, False), (False, True)):
            options = EmbeddingOptions(euclidean, swap)
            given: Any = "triplet_margin_loss", (x, x, x), options, "mean"
            outputs = Outputs(True, (True,) * 3)
            kernel = backend.embedding_loss(*given, outputs, len)
            given = TRIPLET_MARGIN_LOSS.options(
                margin=1.0, p=2.0, eps=1e-6, swap=swap, reduction="mean"
            )
            run = partial(kernel, (x, x, x), given)
            kind = f"p {2 if euclidean else 1}{' swap' * swap}"
            yield case("triplet_margin_loss", dtype, shape, run, kind, **fields)
        given = "cosine_embedding_loss", (x, x, target), EmbeddingOptions(), "mean"
        outputs = Outputs(True, (True, True, False))
        kernel = backend.embedding_loss(*given, outputs, len)
        given = COSINE_EMBEDDING_LOSS.options(margin=0.5, reduction="mean")
        run = partial(kernel, (x, x, target), given)
        yield case("cosine_embedding_loss", dtype, shape, run, **fields)


def pointwise_loss(
    formula: Any,
    operands: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    weight: Tensor | None,
    reduction: str,
    divisor: Any,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> None:
    tensors, total = (operands, weight, grad_output), None
    if isinstance(divisor, Tensor):
        total, divisor = divisor, None
    run = backend.pointwise_loss(formula, tensors, tuple, reduction, outputs, divisor)
    run((*operands, weight, total), numbers, grad_output)


def pointwise_cases() -> Iterator[Case]:
    n = 1 << 24
    for dtype in (BF16, F32, F16, F64):
        x, rows, total = empty(dtype, n), empty(dtype, 4096, 4096), empty(F64)
        row = empty(dtype, 4096).expand(4096, 4096)
        of, fields = (dtype, (n,)), {"targets": tuple(TARGETS) if dtype in (BF16, F32) else SOME}
        both, after = Outputs(True, (True, True)), Outputs(False, (True, True))
        calls: dict[str, tuple[int, tuple[Any, ...]]] = {
            "mse_loss forward": (1, ((x, x), (), None, "sum", None, Outputs())),
            "mse_loss weight": (1, ((x, x), (), x, "mean", total, both)),
            "mse_loss none": (1, ((x, x), (), None, "none", None, Outputs())),
            "mse_loss grad_output": (1, ((x, x), (), None, "none", None, after, x)),
            "mse_loss broadcast": (1, ((rows, row), (), None, "mean", Tensor.numel, both)),
        }
        kernels: dict[str, Kernel] = {}
        for op in OPERATORS:
            if isinstance(op, Activation):
                for name, kernel in op.kernels.items():
                    forward, backward = backend.activation(kernel, x)
                    yield case(name, *of, partial(forward, x, ()), **fields)
                    yield case(name, *of, partial(backward, x, x, ()), "backward", **fields)
            elif isinstance(op, PointwiseLoss):
                kernels |= op.kernels
                for name, kernel in op.kernels.items():
                    variables = op.variables[: len(kernel.methods[0].operands)]
                    outputs = Outputs(True, tuple(v.differentiated for v in variables))
                    given = (
                        (x,) * len(variables),
                        (1.0, 1.0, 1.0),
                        None,
                        "mean",
                        Tensor.numel,
                        outputs,
                    )
                    calls[name] = 1, given
        for name, (launches, arguments) in calls.items():
            loss, _, kind = name.partition(" ")
            run = partial(pointwise_loss, kernels[loss], *arguments)
            yield case(loss, *of, run, kind, launches=launches, **fields)
        for name, formula in FORMULAS.items():
            count = len(formula.op.variables)
            outputs = Outputs(True, (True,) * count)
            numbers = tuple(formula.defaults.values())
            program, parameters = formula.op.kernel(formula.op.cases(numbers), count, outputs)
            given = program, (x,) * count, parameters(numbers), None, "mean", Tensor.numel, outputs
            run = partial(pointwise_loss, *given)
            yield case(f"formula {name}", *of, run, **fields)
        yield case("scale", *of, partial(backend.scale_, x, total), **fields)


def all_cases() -> list[Case]:
    return [*pointwise_cases(), *cross_entropy_cases(), *class_cases(), *embedding_cases()]


# ---- compiling -----------------------------------------------------------------------------------


class Launched(NamedTuple):
    name: str
    kernel: Any  # Triton's CompiledKernel
    programs: int


def forget_gpu() -> None:
    """Clears the choices that are cached for the active GPU, because the target changes."""
    for cached in (launch.warp_size, launch.backend, launch.prepared, backend._tile):
        cached.cache_clear()


@contextmanager
def compiling(target: str) -> Iterator[list[Launched]]:
    """Compiles kernels for a target in this context, without launching them."""
    gpu, run, launched = TARGETS[target], JITFunction.run, []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        programs = math.prod(grid(kwargs) if callable(grid) else grid)
        launched.append(Launched(kernel.fn.__name__, found, programs))

    named = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: str(gpu.arch),
        get_current_stream=lambda _: 0,
    )
    with patch.object(JITFunction, "run", compile_only):
        driver.set_active(named)
        forget_gpu()
        try:
            yield launched
        finally:
            driver.set_active(None)  # reset to the real driver
            forget_gpu()


# ---- machine code --------------------------------------------------------------------------------

LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;|^\t([a-z]\w*(?:\s.*)?)$")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)|^s_c?branch\w*\s+(\.L\w+)")
ATOMIC = re.compile(r"\bATOMG?\b|^(?:global|flat)_atomic")
ENDS = re.compile(r"^(EXIT|s_endpgm)")
LOAD = re.compile(r"\bLDG(?:STS)?(\.\S*)|^(?:global|buffer|flat)_load_(\w+)")
STORE = re.compile(r"\bSTG(\.\S*)|^(?:global|buffer|flat)_store_(\w+)")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b|dwordx(\d)|(byte)|(short)")


class Code(NamedTuple):
    """A kernel's instructions, and the first and last instruction of each innermost loop."""

    instructions: list[str]
    loops: list[tuple[int, int]]

    @classmethod
    def read(cls, text: str) -> Code:
        found: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(found)
            elif instruction := INSTRUCTION.match(line):
                found.append(instruction[1] or instruction[2])
                if ATOMIC.search(found[-1]):
                    break  # the rest adds up partial sums, in one program only
        loops = []
        for i, branch in enumerate(map(BRANCH.search, found)):
            first = labels.get(branch[1] or branch[2], i) if branch else i
            # A backward branch after the program's end returns from an out-of-line block. A loop
            # that ends here is innermost if no other loop begins in it.
            ends = any(map(ENDS.match, found[first:i]))
            if first < i and not ends and not any(first <= begun for begun, _ in loops):
                loops.append((first, i))
        return cls(found, loops)

    def body(self, loop: tuple[int, int]) -> list[str]:
        return self.instructions[loop[0] : loop[1] + 1]


def widths(access: re.Pattern[str], instructions: Sequence[str]) -> list[int]:
    """Returns the bits of each global memory access."""
    found = []
    for each in filter(None, map(access.search, instructions)):
        width = WIDTH.search(each[1] or each[2])
        bits, words, byte, short = width.groups() if width else (None,) * 4
        found.append(int(bits or 32 * int(words or 0) or (byte and 8) or (short and 16) or 32))
    return found


def wide(bits: Sequence[int], vector: int) -> int:
    """Returns the percentage of the bits in accesses of at least `vector` bits."""
    return 100 * sum(b for b in bits if b >= vector) // max(1, sum(bits))


def wide_loads(code: Code, vector: int) -> int:
    """Returns the lowest percentage of loops that load much, or of other code if it loads more."""
    loaded = [widths(LOAD, code.body(loop)) for loop in code.loops]
    within = {i for first, last in code.loops for i in range(first, last + 1)}
    rest = widths(LOAD, [x for i, x in enumerate(code.instructions) if i not in within])
    most = max(map(sum, loaded), default=0)
    loaded = [rest] if sum(rest) > most else [bits for bits in loaded if 2 * sum(bits) >= most]
    return min(wide(bits, vector) for bits in loaded)


def per_element(code: Code, case: Case, launched: Launched) -> float:
    """Returns the number of instructions that a thread executes per element.

    Instructions in a loop are multiplied by the iterations needed to load all elements of a thread;
    others count once, even if branches skip them. This is correct if loops only load logits.
    """
    threads = 32 * launched.kernel.metadata.num_warps
    elements = case.elements / launched.programs / threads
    issued = [i for i, text in enumerate(code.instructions) if text != "NOP"]
    executed = len(issued)
    for first, last in code.loops:
        bits = sum(widths(LOAD, code.body((first, last))))
        times = math.ceil(elements * 8 * case.dtype.itemsize / bits) if bits else 1
        executed += (times - 1) * sum(first <= i <= last for i in issued)
    return executed / elements


def tool(name: str, option: str, cubin: bytes) -> str:
    """Runs a CUDA tool, which is part of Triton, on machine code; returns its output."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [getattr(knobs.nvidia, name).path, option, file]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def disassembled(kernel: Any) -> tuple[Code, int, int]:
    """Returns the code, the number of registers, and the bytes that a thread spills."""
    if text := kernel.asm.get("amdgcn"):
        used = {key: int(n) for key, n in re.findall(r"\.(vgpr\w*count):\s+(\d+)", text)}
        # Scalar registers are spilled to vector registers, not to memory.
        return Code.read(text), used["vgpr_count"], 4 * used["vgpr_spill_count"]
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"(\w+):(\d+)", tool("cuobjdump", "-res-usage", cubin)))
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return Code.read(tool("nvdisasm", "-c", cubin)), int(usage["REG"]), spilled


# ---- checks --------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The result of a kernel of a case."""

    target: str
    case: str
    kernel: str = ""
    warps: int = 0
    registers: int = 0
    spilled: int = 0  # bytes per thread
    loads: int = 0  # the percentage with the required width
    stores: int = 0
    instructions: float = 0  # per element, if there is a limit
    wrong: str = ""


def inspect(target: str, case: Case, launched: Launched) -> Found:
    code, registers, spilled = disassembled(launched.kernel)
    name, warps = launched.name, launched.kernel.metadata.num_warps
    stored, vector = widths(STORE, code.instructions), case.vector or 128
    loads, stores = wide_loads(code, vector), wide(stored, vector)
    little, rounded = name in READ_LITTLE, case.dtype is not F64
    counted = target == "sm_90" and case.instructions and not little
    instructions = per_element(code, case, launched) if counted else 0
    judged = case.vector and rounded and not little
    much = sum(stored) > vector and name not in WRITE_LITTLE  # stores more than losses
    may_spill = max(
        most for key, most in MAY_SPILL.items() if key in ("", name) or key in case.name
    )
    wrong = {
        "spills": spilled > may_spill and rounded,
        "narrow loads": judged and loads < WIDE_LOADS.get(f"{target} {case.name}", WIDE_LOADS[""]),
        "narrow stores": judged and stores < 50 and much,
        f"more than {case.instructions} instructions": instructions > case.instructions,
    }
    words = ", ".join(words for words, holds in wrong.items() if holds)
    numbers = warps, registers, spilled, loads, stores, instructions
    return Found(target, case.name, name, *numbers, words)


def compile_cases(target: str, cases: Sequence[Case]) -> list[Found]:
    """Compiles the kernels of cases; a kernel that several cases launch is checked once."""
    found: list[Found] = []
    seen = set()
    for case in cases:
        try:
            with compiling(target) as launched, warnings.catch_warnings():
                warnings.simplefilter("error")
                case.run()
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            found.append(Found(target, case.name, wrong=wrong))
            continue
        if len(launched) > case.launches:
            found.append(
                Found(target, case.name, wrong=f"{len(launched)} launches, not {case.launches}")
            )
        for each in launched:
            if (key := (each.kernel.hash, case.vector, case.instructions)) not in seen:
                seen.add(key)
                found.append(inspect(target, case, each))
    return found


def compile_piece(target: str, names: Sequence[str]) -> list[Found]:
    """Compiles cases, given by name because they cannot be pickled, in a worker process."""
    return compile_cases(target, [case for case in all_cases() if case.name in names])


def show(found: Sequence[Found]) -> None:
    columns = "warps", "registers", "spilled", "wide loads", "wide stores", "instructions"
    print(f"{'Triton ' + triton.__version__:88}", *columns)
    for f in found:
        case = f"{f.target:8}{f.case:60}{f.kernel:20}"
        numbers = f"{f.warps:5} {f.registers:9} {f.spilled:7} {f.loads:9}% {f.stores:10}%"
        print(case, numbers, f"{f.instructions:12.1f}" if f.instructions else 12 * " ", f.wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases whose name contains these words")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    parser.add_argument("--all", action="store_true", help="print every kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    started, words = time.perf_counter(), arguments.match.split()
    pieces = []
    for target in arguments.targets:
        names = [c.name for c in all_cases() if target in c.targets]
        names = [name for name in names if set(words) <= set(name.split())][:: arguments.every]
        pieces += [(target, names[i::8]) for i in range(8)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        found = [f for piece in pool.map(compile_piece, *zip(*pieces, strict=True)) for f in piece]
    found.sort(key=lambda f: (arguments.targets.index(f.target), f.case, f.kernel))
    wrong = [f for f in found if f.wrong]
    show(found if arguments.all else [f for f in found if f.wrong or f.instructions])
    seconds = time.perf_counter() - started
    print(f"{len(found)} kernels in {seconds:.0f} s, {len(wrong)} with problems")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
