"""Calls the C++ kernels; ``protocol.py`` describes the functions.

The extension is built once for each instruction set. At import, the best one that this CPU supports
is loaded; the environment variable ``PYFUSED_CPU_CAPABILITY`` selects another. If pyfused was
installed with ``PYFUSED_NO_EXTENSION=1``, there is none, and calls on CPUs use torch's operators.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import platform
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyfused import checks
from pyfused.backends.protocol import LossResult, Options
from pyfused.formula_compiler.program import OPERANDS, Program
from pyfused.layout import (
    accumulate_dtype,
    along,
    class_layout,
    contiguous_in,
    feature_rows,
    loss_shape,
    row_sizes,
)
from pyfused.locks import fork_safe_lock
from pyfused.torch_internals import default_state
from pyfused.types import EmbeddingOptions, Outputs, RowBlock

if TYPE_CHECKING:
    from pyfused.formula_compiler.kernel import Kernel

_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if _X86 else ("generic",)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ASYNCHRONOUS = False
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # at::Reduction


def load(isa: str) -> ModuleType:
    """Returns the extension module built for the instruction set ``isa``.

    Raises:
        ImportError: The module was not built, or cannot be loaded.
    """
    name = "pyfused._cpu_" + isa.replace("-", "_")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"pyfused's compiled module {name} cannot be loaded ({error}). The installation is "
            "broken or was never built: run 'pip install --force-reinstall pyfused', or "
            "'pip install .' in a checkout, which needs a C++17 compiler.",
            name=name,
        ) from error


def _choose() -> str:
    requested = os.environ.get("PYFUSED_CPU_CAPABILITY")
    if not supported:
        raise ImportError(
            f"pyfused was built for {', '.join(BUILT)} only, which this CPU does not support; "
            "run 'pip install .' in a checkout on this machine"
        )
    if not requested:
        return supported[-1]
    if requested not in supported:
        raise ImportError(
            f"PYFUSED_CPU_CAPABILITY: expected one of {', '.join(supported)}, which are built and "
            f"run on this CPU, got {requested!r}"
        )
    return requested


_FOLDERS = [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]
MISSING: str | None = None  # why the kernels are unavailable
_FILES = {file.name.partition(".")[0] for folder in _FOLDERS for file in folder.glob("_cpu_*")}
BUILT = [isa for isa in ISAS if f"_cpu_{isa.replace('-', '_')}" in _FILES]
if BUILT:
    # The module for the oldest instruction set checks which others this CPU supports.
    supported = [isa for isa in BUILT if load(BUILT[0]).runs_here(isa)]
    capability = _choose()
    native: Any = load(capability)
else:
    MISSING = "pyfused was installed without its CPU kernels"
    supported, capability = [], "none"
    native = SimpleNamespace(compiler="none", runtime_file="")
    if (_FOLDERS[0].parent / "csrc").is_dir():
        MISSING = (
            "pyfused is imported from its source folder, whose CPU kernels are not built; run "
            f"'make build' in {_FOLDERS[0].parent}, or use an installed pyfused in another folder"
        )
        logging.getLogger("pyfused").warning("calls on CPUs run torch's operators: %s", MISSING)
RECYCLES = hasattr(native, "recycled")  # Linux only

if not (native.runtime_file or MISSING):
    logging.getLogger("pyfused").warning(
        "torch has loaded no known OpenMP runtime; the kernels run on one thread"
    )


# ---- addresses and allocation --------------------------------------------------------------------

# A scalar of the accumulation dtype for each dtype. Losses are allocated by empty_like, because
# torch.empty takes twice as long to parse a shape and a dtype.
_SCALARS = {dtype: torch.empty((), dtype=accumulate_dtype(dtype), device="cpu") for dtype in DTYPES}
_NO_VIEW = (0, 0, 0, 0)
_NO_OPERAND = (0, 0, 0)
_NO_TENSOR = (0, 0)
_NO_METRICS = (0, 0, 0, 0, 0)
_NO_NUMBERS = (0.0, 0.0, 0.0, 1.0)  # label_smoothing, gamma, z_loss and scale of `nll_loss`


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """Returns the address of a tensor and the stride of its rows."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


# Gradients of at least this many bytes use recycled memory. glibc caches smaller blocks itself, and
# releasing their pages costs more than it saves: the speed-up was 0.7 to 1 at 2 to 31 MiB, and 1.3
# to 2 at 32 MiB or more. Results use torch's memory, whose storage users may resize.
RECYCLED_BYTES = 32 << 20


def empty(
    shape: Sequence[int],
    dtype: torch.dtype,
    like: Tensor | None = None,  # noqa: ARG001
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Allocates like ``torch.empty`` or ``empty_strided``, with recycled memory if it is large.

    See ``pyfused.memory``. If the allocation fails, torch tries it, and raises its own error. The
    device is passed explicitly, because torch's default device may be another.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= RECYCLED_BYTES and RECYCLES:
        strides = strides or torch.empty(shape, device="meta").stride()
        capsule = native.recycled(DTYPES[dtype], size, shape, strides)
        if capsule is not None:
            return from_dlpack(capsule)
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def empty_like(like: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Allocates like ``torch.empty_like``, with recycled memory if it is large."""
    if like.nbytes < RECYCLED_BYTES:
        if memory_format is torch.preserve_format:  # parsing it takes 0.2 microseconds
            return torch.empty_like(like)
        return torch.empty_like(like, memory_format=memory_format)
    layout = torch.empty_like(like, device="meta", memory_format=memory_format)
    return empty(layout.shape, like.dtype, strides=layout.stride())


def _new_loss(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if not shape:
        return torch.empty_like(_SCALARS[dtype])
    return torch.empty(shape, dtype=dtype, device="cpu")


def predicts(logits: Tensor) -> bool:
    read, strides, _, grad_strides = class_layout(logits)
    enough = row_sizes(logits)[2] >= native.row_classes[DTYPES[logits.dtype]]
    return enough and read is logits and strides[2] == grad_strides[2] == 1


# ---- matrix products -----------------------------------------------------------------------------

HALF_PRODUCTS = os.environ.get("PYFUSED_HALF_PRODUCTS") or None  # None: measured
if HALF_PRODUCTS not in (None, "half", "float32"):
    raise ImportError(f"PYFUSED_HALF_PRODUCTS: expected half or float32, got {HALF_PRODUCTS!r}")
_measured: dict[torch.dtype, torch.dtype] = {}
_lock = fork_safe_lock()  # held while products are measured


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.itemsize > 2 or MISSING or HALF_PRODUCTS == "half":
        return dtype
    if HALF_PRODUCTS == "float32":
        return torch.float32
    with _lock:
        if dtype not in _measured:
            with default_state():
                _measured[dtype] = native.on_one_thread(partial(_faster_dtype, dtype))
        return _measured[dtype]


def _faster_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 if its products take less than half of the time, otherwise the dtype.

    Processors without instructions for the dtype take 2.6 to 250 times as long as in float32, and
    those that have them 0.2 to 1.7 times. One thread's CPU time hardly depends on other processes:
    beside 12 busy ones, a ratio of 2.6 was measured as 2.2 to 3.1. Several threads wait for each
    other, which was measured as 0.3 to 2.8.
    """
    products = []
    for kind in (dtype, torch.float32):
        x, weight = (torch.ones(n, 512, dtype=kind, device="cpu") for n in (64, 512))
        products.append(partial(torch.mm, x, weight.t(), out=x.new_empty(64, 512)))
    rounds = [[least_seconds(product) for product in products] for _ in range(5)]
    half, single = map(min, zip(*rounds, strict=True))
    return torch.float32 if half > 2 * single else dtype


def least_seconds(compute: Callable[[], Any]) -> float:
    """Returns this thread's CPU time for a function, the least of two."""
    return min(timeit.repeat(compute, timer=time.thread_time, number=1, repeat=2))


# A half-precision product is added to a float32 tensor in parts of this many bytes, which stay in
# the L2 cache. A product in memory that the system maps anew takes 3 to 13 times as long to add.
PRODUCT_BYTES = 1 << 19


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
        return
    most = max(64, PRODUCT_BYTES // (b.shape[1] * b.element_size() or 1))
    memory = b.new_empty(min(most, out.shape[0]), b.shape[1])
    for part, factor in zip(out.split(most), a.split(most), strict=True):
        product = torch.mm(factor, b, out=memory[: part.shape[0]])
        part.add_(product) if beta else part.copy_(product)


# ---- losses over classes -------------------------------------------------------------------------


def check_class_indices(target: Tensor, classes: int, ignore_index: int) -> None:
    target = target.contiguous()
    position = native.invalid_class_index(target.data_ptr(), target.numel(), classes, ignore_index)
    if position >= 0:
        checks.raise_out_of_range(classes, target, ignore_index, position)


def cross_entropy(
    tensors: Sequence[Any],
    options: Options,
    outputs: Outputs,
    grad_output: Tensor | None = None,
    prediction: Tensor | None = None,
    metrics: Sequence[Tensor] = (),
    normalized: bool = False,
) -> LossResult:
    input, target, weight, token_weight, denominator = tensors
    accumulate, has_indices = accumulate_dtype(input.dtype), target.dtype is torch.int64
    grad_of_input, grad_of_target = outputs.gradients or (False, False)
    logits, sizes, strides, grad_format, grad_strides = _logits_layout(input)
    loss = grad = grad_target = None
    probabilities: Sequence[int] = _NO_VIEW
    grad_logits = grad_probabilities = probabilities
    numbers = _NO_NUMBERS
    if not normalized:
        scale = options.scale / options.temperature
        numbers = max(0.0, options.label_smoothing), options.gamma, options.z_loss, scale
        denominator = options.denominator if denominator is None else denominator
    if has_indices:
        target = target.contiguous()
    else:
        views = _probabilities(target, grad_of_target)
        target, probabilities, grad_target, grad_probabilities = views
    if not weight is token_weight is None:
        weight, token_weight = contiguous_in(accumulate, weight, token_weight)
    if grad_output is not None:
        grad_output = grad_output.to(accumulate).contiguous()
    if outputs.loss:
        loss = _new_loss(loss_shape(input, options.reduction), accumulate)
    if grad_of_input:
        grad = logits.detach() if outputs.inplace else empty_like(logits, grad_format)
        grad_logits = (grad.data_ptr(), *(strides if outputs.inplace else grad_strides))
    invalid = native.cross_entropy(
        DTYPES[input.dtype],
        sizes,
        (
            (logits.data_ptr(), *strides),
            target.data_ptr() if has_indices else 0,
            probabilities,
            0 if weight is None else weight.data_ptr(),
            0 if token_weight is None else token_weight.data_ptr(),
            0 if grad_output is None else grad_output.data_ptr(),
        ),
        (options.ignore_index, _REDUCTIONS[options.reduction], *numbers, normalized, denominator),
        (
            0 if loss is None else loss.data_ptr(),
            grad_logits,
            grad_probabilities,
            0 if prediction is None else prediction.data_ptr(),
            tuple(map(Tensor.data_ptr, metrics)) or _NO_METRICS,
        ),
        torch.get_num_threads(),
    )
    if invalid >= 0:
        checks.raise_out_of_range(sizes[2], target, options.ignore_index, invalid)
    return loss, (grad, grad_target)


def _logits_layout(input: Tensor) -> tuple[Any, ...]:
    """Returns logits, or a copy, the sizes of `row_sizes`, and the layout of `class_layout`.

    Contiguous logits, the common case, need no call of these functions.
    """
    dims = input.dim()
    classes, inner = input.shape[min(dims - 1, 1)], 1 if dims < 3 else math.prod(input.shape[2:])
    rows = input.numel() // classes
    sizes = (1, rows, classes) if inner == 1 else (rows // inner, inner, classes)
    if input.is_contiguous():
        strides = (0, classes, 1) if inner == 1 else (classes * inner, 1, inner)
        return input, sizes, strides, torch.preserve_format, strides
    logits, *layout = class_layout(input)
    return logits, sizes, *layout


def _probabilities(
    target: Tensor, needs_grad: bool
) -> tuple[Tensor, tuple[int, ...], Tensor | None, tuple[int, ...]]:
    """Returns class probabilities, or a copy, and their gradient, each with its view."""
    target, strides, grad_format, grad_strides = class_layout(target)
    view = (target.data_ptr(), *strides)
    if not needs_grad:
        return target, view, None, _NO_VIEW
    grad = empty_like(target, grad_format)
    return target, view, grad, (grad.data_ptr(), *grad_strides)


def nll_loss(
    tensors: Sequence[Any], options: Options, outputs: Outputs, grad_output: Tensor | None = None
) -> LossResult:
    return cross_entropy(tensors, options, outputs, grad_output, normalized=True)


def kl_div_with_logits(
    tensors: Sequence[Any],
    options: Options,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> LossResult:
    input, teacher, token_weight, denominator, *_ = tensors
    accumulate = accumulate_dtype(input.dtype)
    input, teacher = feature_rows(input), feature_rows(teacher)
    denominator = options.denominator if denominator is None else denominator
    grad = loss = None
    if any(outputs.gradients):
        grad = input.detach() if outputs.inplace else empty_like(input, torch.contiguous_format)
    token_weight, grad_output = contiguous_in(accumulate, token_weight, grad_output)
    if outputs.loss:
        loss = _new_loss(input.shape[:1] if options.reduction == "none" else (), accumulate)
    native.kl_div_with_logits(
        DTYPES[input.dtype],
        input.shape,
        (_rows(input), _rows(teacher), _address(token_weight), _address(grad_output)),
        (options.beta, 1 / options.temperature, _REDUCTIONS[options.reduction], denominator),
        (_address(loss), _rows(grad)),
        torch.get_num_threads(),
    )
    return loss, (grad,)


def embedding_loss(
    name: str,
    inputs: tuple[Tensor, ...],
    numbers: tuple[float, float],
    options: EmbeddingOptions,
    reduction: str,
    outputs: Outputs,
    divisor: int | None,
    grad_output: Tensor | None = None,
) -> LossResult:
    first, unreduced, loss = inputs[0], reduction == "none", None
    accumulate = accumulate_dtype(first.dtype)
    views = [feature_rows(x) for x in inputs]
    (grad_output,) = contiguous_in(accumulate, grad_output)
    if outputs.loss:
        loss = _new_loss(first.shape[:-1] if unreduced else (), accumulate)
    gradients = tuple([
        empty_like(first, torch.contiguous_format) if needed else None
        for needed in outputs.gradients
    ])  # fmt: skip
    addresses = [*map(_address, gradients), 0, 0, 0][:3]
    losses = (_address(loss), 0) if unreduced else (0, _address(loss))
    getattr(native, name)(
        DTYPES[first.dtype],
        views[0].shape,
        [_rows(x) for x in (*views, None)[:3]],
        (*numbers, *options),
        1.0 if divisor is None else float(divisor),
        _address(grad_output),
        *losses,
        addresses,
        torch.get_num_threads(),
    )
    return loss, gradients


# ---- rows of logits ------------------------------------------------------------------------------


def _row_arguments(block: RowBlock) -> tuple[Any, ...]:
    """Returns the first arguments of the kernels of row states."""
    logits, target, weight, options = block.logits, block.target, block.weight, block.options
    return (
        DTYPES[logits.dtype],
        (*logits.shape, block.classes.first, logits.stride(0)),
        logits.data_ptr(),
        0 if target is None else target.data_ptr(),
        options.ignore_index,
        (options.scale, options.softcap),
        0 if weight is None else weight.data_ptr(),
    )


def row_state(
    block: RowBlock, state: Tensor, results: Tensor | None = None, preceding: int = 0
) -> None:
    copied = _NO_OPERAND
    if results is not None:
        count = 1 if results.dim() < state.dim() else len(results)
        copied = results.data_ptr(), block.logits.shape[0], count
    native.row_state(
        *_row_arguments(block),
        (state.data_ptr(), state.stride(0), state.shape[0]),
        copied,
        preceding,
        torch.get_num_threads(),
    )


def row_gradients(
    block: RowBlock, state: Tensor, grad_results: Tensor, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = empty_like(block.logits, torch.contiguous_format)
    strides = (0, *grad_results.stride())[-2:]
    results = 1 if grad_results.dim() == 1 else grad_results.shape[0]
    native.row_gradients(
        *_row_arguments(block),
        (state.data_ptr(), state.stride(0), 0),
        (grad_results.data_ptr(), *strides, results, grad_results.itemsize),
        (out.data_ptr(), out.stride(0)),
        torch.get_num_threads(),
    )
    return out


def softmax(formula: str, input: Tensor, dim: int) -> Tensor:
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    _, sizes, out_strides = along(output, dim)
    strides = out_strides
    if not input.is_contiguous():
        input, _, strides = along(_with_a_contiguous_dimension(input, dim), dim)
    pointers = (input.data_ptr(), *strides), _NO_VIEW, (output.data_ptr(), *out_strides)
    kind = formula == "log_softmax", DTYPES[input.dtype]
    native.softmax(*kind, sizes, *pointers, torch.get_num_threads())
    return output


def softmax_backward(formula: str, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    grad_output, output = grad_output.contiguous(), output.contiguous()
    grad_input = empty_like(output)
    _, sizes, strides = along(output, dim)
    views = [(x.data_ptr(), *strides) for x in (output, grad_output, grad_input)]
    kind = formula == "log_softmax", DTYPES[output.dtype]
    native.softmax(*kind, sizes, *views, torch.get_num_threads())
    return grad_input


def _with_a_contiguous_dimension(input: Tensor, dim: int) -> Tensor:
    """Returns the input of a softmax, or a copy where reading its strides takes longer."""
    strides = input.stride()
    # With AVX2, the kernel for strided classes of bfloat16 takes 0.7 to 1.3 times torch's time.
    is_slow = capability == "x86-64-v3" and input.dtype is torch.bfloat16 and strides[dim] != 1
    return input.contiguous() if is_slow or 1 not in strides else input


# ---- elementwise kernels -------------------------------------------------------------------------


def pointwise_loss(
    formula: Kernel | Program,
    operands: Sequence[Tensor],
    weight: Tensor | None,
    parameters: Sequence[float],
    reduction: str,
    outputs: Outputs,
    divisor: Tensor | int | None = None,
    grad_output: Tensor | None = None,
    on_nan: Callable[[], Any] | None = None,
) -> LossResult:
    like = operands[0]
    dtype, missing = like.dtype, (None,) * (OPERANDS - len(operands))
    if isinstance(formula, Program):
        kernel, parameters = formula.kernel(native, _native_program), tuple(parameters)
    else:
        kernel, parameters = getattr(native, formula.name), (*parameters, 0.0, 0.0, 0.0)[:3]
    inputs: list[Any] = [*operands, *missing, weight, grad_output]
    views, strided = _convert(inputs, dtype)
    if not views[0][1]:  # expanded: take the order of the first tensor that has one
        like = next((x for x, (_, step) in zip(inputs, views, strict=True) if step), like)
    unreduced = reduced = output = None
    if outputs.loss and reduction == "none":
        unreduced = output = torch.empty_like(like)
    if outputs.loss and (unreduced is None or on_nan is not None):
        reduced = torch.empty_like(_SCALARS[dtype])  # is NaN if any loss is
    gradients: list[Any] = []
    addresses = [0, 0, 0, 0]
    for i, needed in enumerate(outputs.gradients):
        gradients.append(None)
        if needed:
            gradients[i] = output = empty_like(like)
            addresses[i] = output.data_ptr()
    kernel(
        DTYPES[dtype],
        like.numel(),
        views[:4],
        parameters,
        views[4],
        1.0 if divisor is None else float(divisor),
        views[5],
        (
            0 if unreduced is None else unreduced.data_ptr(),
            0 if reduced is None else reduced.data_ptr(),
            addresses,
        ),
        torch.get_num_threads(),
        _strides(like if output is None else output, inputs) if strided else (),
    )
    if on_nan is not None and reduced is not None and reduced.isnan():
        on_nan()
    return reduced if unreduced is None else unreduced, tuple(gradients)


def _convert(
    tensors: list[Tensor | None], dtype: torch.dtype
) -> tuple[list[tuple[int, int]], bool]:
    """Converts tensors in a list to a dtype.

    Returns:
        The address of each and its step, 0 for a scalar; and whether one has other strides.
    """
    views, strided = [], False
    for i, x in enumerate(tensors):
        step = 1
        if x is None:
            views.append(_NO_TENSOR)
            continue
        if x.dtype is not dtype:
            tensors[i] = x = x.to(dtype)
        if not x.is_contiguous():
            step = int(any(x.stride()))
            strided = strided or step == 1
        views.append((x.data_ptr(), step))
    return views, strided


def _strides(output: Tensor, tensors: Sequence[Tensor | None]) -> list[Sequence[int]]:
    """Returns the sizes of tensors of one shape, the strides of an output, and of each tensor."""
    return [output.shape, output.stride(), *[() if x is None else x.stride() for x in tensors]]


def _native_program(program: Program) -> Callable[..., None]:
    kernel: Callable[..., None] = native.Program(
        program.prologue, program.body, program.constants, program.parameters
    )
    return kernel


def activation(
    formula: Kernel, input: Tensor, options: Options, out: Tensor | None = None
) -> Tensor:
    strides: Sequence[Sequence[int]] = ()
    output = torch.empty_like(input) if out is None else out
    if not input.is_contiguous() and input.stride() != output.stride():
        strides = _strides(output, [input])
    pointers = input.data_ptr(), output.data_ptr()
    others = _parameters(formula, options), torch.get_num_threads(), strides
    getattr(native, formula.name)(DTYPES[input.dtype], input.numel(), *pointers, *others)
    return output


def activation_backward(
    formula: Kernel, grad_output: Tensor, saved: Tensor, options: Options, out: Tensor | None = None
) -> Tensor:
    strides: Sequence[Sequence[int]] = ()
    grad_input = empty_like(saved) if out is None else out
    order, step = grad_input.stride(), 1 if any(grad_output.stride()) else 0
    if saved.stride() != order or (step and grad_output.stride() != order):
        strides = _strides(grad_input, [grad_output, saved])
    pointers = (grad_output.data_ptr(), step), saved.data_ptr(), grad_input.data_ptr()
    others = _parameters(formula, options), torch.get_num_threads(), strides
    kernel = getattr(native, f"{formula.name}_backward")
    kernel(DTYPES[saved.dtype], saved.numel(), *pointers, *others)
    return grad_input


def _parameters(formula: Kernel, options: Options) -> tuple[float, ...]:
    return (*options[: len(formula.parameters)], 0.0, 0.0, 0.0)[:3]


def scale_(gradient: Tensor, factor: Tensor) -> bool:
    dtype = torch.float64 if gradient.dtype is torch.float64 else torch.float32
    if factor.dtype is not dtype:
        factor = factor.to(dtype)
    pointers, threads = (gradient.data_ptr(), factor.data_ptr()), torch.get_num_threads()
    scaled: bool = native.scale(DTYPES[gradient.dtype], gradient.numel(), *pointers, threads)
    return scaled
