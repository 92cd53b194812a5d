"""Calls of the Triton kernels, which test_compile_ahead.py compiles for GPUs, without a GPU.

The backend is called with fake tensors and a fake driver for another GPU, so the compiled kernels
are those that would be launched.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyfused import types
from pyfused.backends import triton as backend
from pyfused.formula_compiler.kernel import Kernel
from pyfused.kernels import launch
from pyfused.layout import accumulate_dtype
from pyfused.ops.activation import Activation
from pyfused.ops.elementwise import OPERATORS, PointwiseLoss
from pyfused.types import Outputs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from formulas import FORMULAS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALL, SOME = tuple(TARGETS), ("sm_90", "gfx942")  # for rare cases: one GPU of each vendor
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# The bytes per thread that a kernel may spill.
# At 32,000 classes, softmax spills, but two passes would take 1.3 times as long on an H100.
# The sine of large numbers needs many digits of pi.
MAY_SPILL = {"": 16, "softmax_backward_kernel": 80, "formula snake": 40}
# A case of each kind, which tests compile.
QUICK = (
    "cross_entropy bfloat16 4096x1000", "cross_entropy bfloat16 4096x32000",
    "cross_entropy float32 8x21x1000", "softmax bfloat16 4096x32000 backward",
    "triplet_margin_loss bfloat16 4096x4096 p 2 swap", "cosine_embedding_loss float32 4096x128",
    "binary_cross_entropy float32", "gelu bfloat16 backward",
)  # fmt: skip


class Case(NamedTuple):
    """A call of the backend with fake tensors."""

    name: str
    dtype: torch.dtype
    run: Callable[[], object]
    targets: Sequence[str] = ALL
    launches: int = 1  # the maximum number of launches


# ---- the calls -----------------------------------------------------------------------------------


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(op: str, x: Tensor, run: Any, kind: str = "", **fields: Any) -> Case:
    """Returns a case of an operator whose input is x, named by its dtype, shape and kind."""
    size = "x".join(map(str, x.shape)) if x.dim() > 1 else ""
    name = " ".join(filter(None, (op, str(x.dtype)[6:], size, kind)))
    return Case(name, x.dtype, run, **fields)


def run_cross_entropy(options: Any, outputs: Outputs, grad_output: Any, *tensors: Any) -> None:
    tensors = (*tensors, *[None] * (5 - len(tensors)))
    backend.cross_entropy(tensors, options, outputs, grad_output)


def cross_entropy(
    dtype: torch.dtype, shape: tuple[int, ...], kind: str = "", targets: Sequence[str] = SOME
) -> Case:
    """Returns the case of a mean with its gradient; `kind` lists variations."""
    words = kind.split()
    x, indices = empty(dtype, *shape), empty(torch.int64, shape[0], *shape[2:])
    target, launches = x if "probabilities" in words else indices, 1
    many = x.numel() > backend.HOST_BOUND or indices.numel() > backend.COUNTED_BY_PROGRAMS
    if target is not x and many and "grad_output" not in words:
        launches = 2  # a separate kernel counts the class indices
    names = {"smoothing": "label_smoothing", "focal": "gamma", "z_loss": "z_loss"}
    coefficients = {names[word]: 0.1 for word in words if word in names}
    options = types.CrossEntropyOptions(scale=16.0 if "scale" in words else 1.0, **coefficients)
    outputs, grad_output = Outputs(True, ("forward" not in words, target is x)), None
    outputs = outputs._replace(inplace="inplace" in words)
    token_weight = empty(F32, *indices.shape) if "z_loss" in words else None
    if "grad_output" in words:
        options, outputs = options._replace(reduction="none"), outputs._replace(loss=False)
        grad_output = empty(dtype, *indices.shape)
    weight = empty(dtype, shape[1]) if "weight" in words else None
    run = partial(run_cross_entropy, options, outputs, grad_output, x, target, weight, token_weight)
    return case("cross_entropy", x, run, kind, targets=targets, launches=launches)


CLASSES = (10, 16, 100, 1000, 1013, 4096, 8192, 16_384, 32_000, 50_257, 128_256, 262_144)
SHAPES = *((4096, n) for n in CLASSES), (8, 21, 1000), (8, 150, 4096), (16, 21, 512, 512)
KINDS = "forward", "grad_output", "inplace", "smoothing", "weight", "weight smoothing", "focal"
KINDS += "z_loss", "scale", "probabilities", "probabilities weight smoothing"


def cross_entropy_cases() -> Iterator[Case]:
    """Yields every shape for all targets, and every kind at three shapes for some targets."""
    for dtype, shape in product((BF16, F32, F16, F64), SHAPES):
        yield cross_entropy(dtype, shape, targets=ALL if dtype in (BF16, F32) else SOME)
    shapes = (4096, 1000), (4096, 32_000), (8, 21, 1000)
    for dtype, kind, shape in product((BF16, F32), KINDS, shapes):
        yield cross_entropy(dtype, shape, kind)
    for dtype, kind in product((F16, F64), KINDS):
        yield cross_entropy(dtype, (4096, 1000), kind, SOME[:1])


def class_cases() -> Iterator[Case]:
    """Yields softmax, and losses of class indices other than cross-entropy."""
    shapes = (4096, 1000), (4096, 32_000), (4096, 50_257), (8, 21, 4096)
    for dtype, shape in product((BF16, F32, F16, F64), shapes):
        x, target = empty(dtype, *shape), empty(torch.int64, shape[0], *shape[2:])
        common = shape[1] == 32_000 and dtype in (BF16, F32)
        new = partial(case, targets=ALL if common else SOME)
        for op in ("softmax", "log_softmax"):
            yield new(op, x, partial(backend.softmax, op, x, 1))
            yield new(op, x, partial(backend.softmax_backward, op, x, x, 1), "backward")
        if len(shape) > 2:
            continue
        range_, wide = types.ClassRange(0, shape[1]), accumulate_dtype(dtype)
        weight, results = empty(wide, shape[1]), empty(wide, 3, shape[0])
        fields = types.STATE_FIELDS, types.METRICS_FIELDS, types.SMOOTHING_FIELDS
        few, metrics, smooth = (empty(F64, count, shape[0]) for count in fields)
        for cap in (None, 30.0):
            kind, rows = "softcap" * bool(cap), types.RowOptions(softcap=cap, temperature=0.7)
            plain, weighted = (types.RowBlock(x, target, w, rows, range_) for w in (None, weight))
            state = backend.row_state
            first = partial(state, plain, few, results, continues=cap is not None)
            yield new("row_state", x, first, kind)
            if cap is None:
                yield case("row_state", x, partial(state, plain, metrics), "metrics")
            every = partial(state, weighted, smooth, continues=True)
            yield new("row_state", x, every, f"all {kind}".strip())
            for word, *call in (
                ("", plain, few, results, x),
                ("smoothing", weighted, smooth, smooth[:4], x),
            ):
                words = " ".join(filter(None, ("backward", word, kind)))
                yield new("row_state", x, partial(backend.row_gradients, *call), words)
        for beta in (0.0, 0.5):
            options = types.DivergenceOptions(reduction="sum", temperature=2.0, beta=beta)
            given = (x, x, None, None), options, Outputs(True, (True,))
            run = partial(backend.kl_div_with_logits, *given)
            yield new("kl_div_with_logits", x, run, f"beta {beta}")


def embedding_cases() -> Iterator[Case]:
    for dtype, shape in product((BF16, F32, F16, F64), ((4096, 128), (4096, 4096), (4096, 16_384))):
        x, target = empty(dtype, *shape), empty(accumulate_dtype(dtype), shape[0], 1)
        new = partial(case, targets=ALL if dtype in (BF16, F32) else SOME)
        for euclidean, swap in product((True, False), (False, True)):
            options = types.EmbeddingOptions(euclidean, swap)
            given: Any = "triplet_margin_loss", (x, x, x), (1.0, 1e-6), options, "mean"
            run = partial(backend.embedding_loss, *given, Outputs(True, (True,) * 3), len(x))
            kind = f"p {2 if euclidean else 1}{' swap' * swap}"
            yield new("triplet_margin_loss", x, run, kind)
        given = (
            "cosine_embedding_loss",
            (x, x, target),
            (0.5, 0.0),
            types.EmbeddingOptions(),
            "mean",
        )
        outputs = Outputs(True, (True, True, False))
        yield new(
            "cosine_embedding_loss", x, partial(backend.embedding_loss, *given, outputs, len(x))
        )


def pointwise_loss(kernel: Any, operands: tuple[Tensor, ...], numbers: Any, *given: Any) -> None:
    weight, reduction, divisor, outputs, grad_output = (*given, None)[:5]
    arguments = operands, weight, numbers, reduction, outputs, divisor, grad_output
    backend.pointwise_loss(kernel, *arguments)


def pointwise_cases() -> Iterator[Case]:
    for dtype in (BF16, F32, F16, F64):
        x, rows, total = empty(dtype, 1 << 24), empty(dtype, 4096, 4096), empty(F64)
        row = empty(dtype, 4096).expand(4096, 4096)
        new = partial(case, targets=ALL if dtype in (BF16, F32) else SOME)
        both, after = Outputs(True, (True, True)), Outputs(False, (True, True))
        mean = None, "mean", x.numel()
        calls: dict[str, tuple[Any, ...]] = {
            "mse_loss forward": ((x, x), (), None, "sum", None, Outputs()),
            "mse_loss weight": ((x, x), (), x, "mean", total, both),
            "mse_loss none": ((x, x), (), None, "none", None, Outputs()),
            "mse_loss grad_output": ((x, x), (), None, "none", None, after, x),
            "mse_loss broadcast": ((rows, row), (), *mean, both),
        }
        kernels: dict[str, Kernel] = {}
        for op in OPERATORS:
            if isinstance(op, Activation):
                for name, kernel in op.kernels.items():
                    yield new(name, x, partial(backend.activation, kernel, x, ()))
                    backward = partial(backend.activation_backward, kernel, x, x, ())
                    yield new(name, x, backward, "backward")
            elif isinstance(op, PointwiseLoss):
                kernels |= op.kernels
                for name, kernel in op.kernels.items():
                    variables = op.variables[: len(kernel.methods[0].operands)]
                    outputs = Outputs(True, tuple(v.differentiated for v in variables))
                    calls[name] = (x,) * len(variables), (1.0, 1.0, 1.0), *mean, outputs
        for name, arguments in calls.items():
            loss, _, kind = name.partition(" ")
            yield new(loss, x, partial(pointwise_loss, kernels[loss], *arguments), kind)
        for name, formula in FORMULAS.items():
            count, numbers = len(formula.op.variables), tuple(formula.defaults.values())
            outputs = Outputs(True, (True,) * count)
            program, parameters = formula.op.kernel(formula.op.cases_of(numbers), count, outputs)
            given = program, (x,) * count, parameters(numbers), *mean, outputs
            yield new(f"formula {name}", x, partial(pointwise_loss, *given))
        yield new("scale", x, partial(backend.scale_, x, total))


@cache
def cases() -> dict[str, Case]:
    found = *pointwise_cases(), *cross_entropy_cases(), *class_cases(), *embedding_cases()
    return {case.name: case for case in found}


# ---- compiling -----------------------------------------------------------------------------------


def forget_gpu() -> None:
    """Clears the choices that are cached for the active GPU, because the target changes."""
    of_backend = [x for x in vars(backend).values() if hasattr(x, "cache_clear")]
    for cached in (launch.warp_size, launch.backend, *of_backend):
        cached.cache_clear()


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Compiles kernels for a target in this context, without launching them, and yields them."""
    gpu, run, launched = TARGETS[target], JITFunction.run, list[Any]()

    def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(run(kernel, *args, warmup=True, **kwargs))

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


# ---- checks --------------------------------------------------------------------------------------


def spilled_by(kernel: Any) -> int:
    """Returns the bytes that a thread spills."""
    if text := kernel.asm.get("amdgcn"):
        # Scalar registers are spilled to vector registers, not to memory.
        return 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    with tempfile.TemporaryDirectory() as folder:  # for a CUDA tool that is part of Triton
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file]
        usage = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def problems(case: Case, target: str) -> list[str]:
    """Compiles the kernels of a case for a target, and returns what is wrong with them."""
    with compiling(target) as launched:
        case.run()
    allowed = case.launches
    found = [f"{len(launched)} launches, not {allowed}"] if len(launched) > allowed else []
    for kernel in launched:
        spilled, name = spilled_by(kernel), kernel.name
        allowed = max(n for key, n in MAY_SPILL.items() if key in ("", name) or key in case.name)
        if spilled > allowed and case.dtype is not F64:
            found.append(f"{name} spills {spilled} bytes")
    return found
