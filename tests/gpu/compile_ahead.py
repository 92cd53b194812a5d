"""Calls of all operators with fake tensors, which test_compile_ahead.py compiles for GPUs.

The calls run with a fake driver for another GPU, so the compiled kernels are those that would be
launched. They need no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from catalogue import EXAMPLES, Example
from compare import parameters
from conftest import fused_always
from samples import has_classes, is_divergence
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyfused import backends, functional
from pyfused.backends import triton as backend
from pyfused.dispatch import reasons
from pyfused.kernels import launch
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.ops.softmax import Softmax

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
    "cross_entropy float32 8x21x1000", "softmax bfloat16 4096x32000",
    "triplet_margin_loss-swap=True bfloat16 4096x4096", "cosine_embedding_loss float32 4096x128",
    "binary_cross_entropy float32 4096x4096", "gelu bfloat16 4096x4096",
)  # fmt: skip


class Case(NamedTuple):
    """A step with fake tensors."""

    name: str
    dtype: torch.dtype
    run: Callable[[], object]
    targets: Sequence[str] = SOME
    launches: int = 1000  # see `launches_of`


# ---- the calls -----------------------------------------------------------------------------------

CLASSES = (10, 16, 100, 1000, 1013, 4096, 8192, 16_384, 32_000, 50_257, 128_256, 262_144)
SHAPES = *((4096, n) for n in CLASSES), (8, 21, 1000), (8, 150, 4096), (16, 21, 512, 512)
OF_ROWS = (4096, 1000), (4096, 32_000), (4096, 50_257), (8, 21, 4096)
OF_EMBEDDINGS = (4096, 128), (4096, 4096), (4096, 16_384)


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def differentiate(value: Tensor) -> None:
    value.backward(torch.empty_like(value))


def step(example: Example, dtype: torch.dtype, shape: tuple[int, ...], **options: Any) -> None:
    """Makes an example's call without gradients, and with its backward pass."""
    with torch.device("meta"):
        call = example.call(dtype, shape)
    for name, x in call.given.items():
        call.given[name] = x.to("meta") if name not in call.leaves and name in call.tensors else x
    with torch.no_grad():
        call.ours(**options)
    differentiate(call.ours(**options))


def shapes_of(example: Example) -> Sequence[tuple[int, ...]]:
    if isinstance(example.op, EmbeddingLoss):
        return OF_EMBEDDINGS
    if is_divergence(example.op):
        return OF_ROWS[:3]
    if has_classes(example.op) or isinstance(example.op, Softmax):
        return SHAPES if example.id == "cross_entropy" else OF_ROWS
    return ((4096, 4096),)


def launches_of(example: Example, dtype: torch.dtype) -> int:
    """Returns the maximum number of launches of a step, without those that scale gradients."""
    op, given = example.op, example.options
    reduction = given.get("reduction", parameters(op).get("reduction", "none"))
    passes = 3 if reduction == "none" or dtype is F16 else 2  # others compute gradients ahead
    if op is CROSS_ENTROPY:  # counts the targets, and computes the metrics
        return passes * (2 + ("with_metrics" in given))
    return passes * (1 + is_divergence(op) * sum("softcap" in name for name in given) * 2)


def examples() -> Iterator[Case]:
    """Yields the cases of all examples: half precision and float32 with all of their shapes."""
    for example in EXAMPLES.values():
        if example.op.is_linear or example.op.name == "nll_loss":  # torch's on GPUs
            continue
        for dtype in (BF16, F32, F16, F64):
            for shape in shapes_of(example)[: None if dtype in (BF16, F32) else 4]:
                common = example.name in ("", "none") and dtype in (BF16, F32)
                name = f"{example.id} {str(dtype)[6:]} {'x'.join(map(str, shape))}"
                run = partial(step, example, dtype, shape)
                targets = ALL if common else SOME
                yield Case(name, dtype, run, targets, launches_of(example, dtype))


HEADS = "linear_cross_entropy", "linear_cross_entropy-everything", "linear_log_probs-everything"


def others() -> Iterator[Case]:
    """Yields heads in blocks of classes, a broadcast operand, and formulas."""
    for dtype in (BF16, F32, F16, F64):
        new = partial(Case, dtype=dtype)
        for name in HEADS:
            run = partial(step, EXAMPLES[name], dtype, (16, 32_000), memory_budget=1 << 16)
            yield new(f"{name} {str(dtype)[6:]} in blocks", run=run)
        rows = empty(dtype, 4096, 4096).requires_grad_(), empty(dtype, 4096).expand(4096, 4096)
        run = partial(lambda *x: differentiate(functional.mse_loss(*x)), *rows)
        yield new(f"mse_loss {str(dtype)[6:]} broadcast", run=run)
        for name, formula in FORMULAS.items():
            x = [empty(dtype, 4096, 4096).requires_grad_() for _ in formula.op.variables]
            run = partial(lambda f, *x: differentiate(f(*x)), formula, *x)
            yield new(f"formula {name} {str(dtype)[6:]}", run=run)


@cache
def cases() -> dict[str, Case]:
    return {case.name: case for case in (*examples(), *others())}


# ---- compiling -----------------------------------------------------------------------------------


def forget_gpu() -> None:
    """Clears the choices that are cached for the active GPU, because the target changes."""
    of_backend = [x for x in vars(backend).values() if hasattr(x, "cache_clear")]
    for cached in (launch.resources, launch.backend, *of_backend):
        cached.cache_clear()


@contextmanager
def on_fake_gpu(fake: Any) -> Iterator[None]:
    """Runs kernels of all sizes for fake tensors, with a fake driver."""
    with ExitStack() as patches, fused_always():
        for module in (backends, reasons):
            patches.enter_context(patch.object(module, "unsupported_device", lambda *_: None))
        patches.enter_context(patch.object(torch, "is_autocast_enabled", lambda _: False))
        driver.set_active(fake)
        forget_gpu()
        try:
            yield
        finally:
            driver.set_active(None)  # reset to the real driver
            forget_gpu()


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
    with patch.object(JITFunction, "run", compile_only), on_fake_gpu(named):
        yield launched


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
    count = sum(kernel.name != "scale_kernel" for kernel in launched)
    found = [f"{count} launches, not {case.launches}"] * (count > case.launches)
    for kernel in {id(kernel): kernel for kernel in launched}.values():
        spilled, name = spilled_by(kernel), kernel.name
        allowed = max(n for key, n in MAY_SPILL.items() if key in ("", name) or key in case.name)
        if spilled > allowed and case.dtype is not F64:
            found.append(f"{name} spills {spilled} bytes")
    return found
