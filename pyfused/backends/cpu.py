"""The C++ kernels: the one place where tensors become addresses and strides.

The extension is built once for each instruction set. The best one that this CPU runs is loaded at
import; the environment variable ``PYFUSED_CPU_CAPABILITY`` names another. An installation with
``PYFUSED_NO_EXTENSION=1`` has none, and calls on CPUs take torch's operators.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyfused import checks
from pyfused.formulas.program import Program
from pyfused.layout import (
    Strides,
    accumulate_dtype,
    along,
    contiguous_in,
    converts_in,
    dense,
    empty_viewed,
    feature_rows,
    in_rows,
    is_dense,
    loss_shape,
    order_of,
    row_sizes,
    strides_of,
    viewed,
)
from pyfused.torch_internals import has_amx, has_avx512_bf16
from pyfused.types import (
    ClassRange,
    CrossEntropyOptions,
    DivergenceOptions,
    EmbeddingOptions,
    Gradients,
    Kernels,
    MarginOptions,
    NllOptions,
    Outputs,
    RowOptions,
)

if TYPE_CHECKING:
    from pyfused.formulas.kernel import Kernel

_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if _X86 else ("generic",)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ASYNCHRONOUS = False
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def load(isa: str) -> ModuleType:
    """Returns the extension module built for the instruction set ``isa``.

    Raises:
        ImportError: It was not built, or does not load.
    """
    name = "pyfused._cpu_" + isa.replace("-", "_")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"pyfused's compiled module {name} cannot be loaded ({error}). The installation is "
            "broken or was never built: run 'pip install --force-reinstall pyfused', or "
            "'pip install .' in a checkout, with a C++17 compiler at hand.",
            name=name,
        ) from error


def _choose() -> str:
    asked = os.environ.get("PYFUSED_CPU_CAPABILITY")
    if not asked:
        return supported[-1]
    if asked not in supported:
        raise ImportError(
            f"PYFUSED_CPU_CAPABILITY: expected one of {', '.join(supported)}, which is what this "
            f"CPU runs, got {asked!r}"
        )
    return asked


_FOLDERS = [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]
MISSING: str | None = None  # why there are no kernels
if any(file for folder in _FOLDERS for file in folder.glob("_cpu_*")):
    # The module for the least instruction set says which of the others are safe to load.
    supported = tuple(isa for isa in ISAS if load(ISAS[0]).runs_here(isa))
    capability = _choose()
    native: Any = load(capability)
else:
    MISSING = "pyfused was installed without its CPU kernels"
    supported, capability = (), "none"
    native = SimpleNamespace(compiler="none", runtime_file="")
    if any((folder.parent / "csrc").is_dir() for folder in _FOLDERS):
        logging.getLogger("pyfused").warning(
            "pyfused is imported from its source folder, whose CPU kernels are not built: calls "
            "on CPUs take torch's operators. Run 'pip install .' or 'make build' in %s.",
            _FOLDERS[0].parent,
        )
RECYCLES = hasattr(native, "recycled")  # where the system has what it takes

if not (native.runtime_file or MISSING):
    logging.getLogger("pyfused").warning(
        "torch has loaded no OpenMP runtime that is known here; the kernels run on one thread"
    )


# ---- tensors as the kernels see them -------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# What a new scalar is like: torch.empty takes twice as long to read a shape and a dtype.
_SCALARS = {
    dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)
}
_NO_VIEW = (0, 0, 0, 0)
_NO_OPERAND = (0, 0, 0)


# From this many bytes on, outputs come from recycled memory. glibc keeps smaller blocks by itself,
# and to surrender their pages costs more than it saves: 0.7 to 1 times the speed at 2 to 31 MiB,
# 1.3 to 2 from here on.
RECYCLED_BYTES = 32 << 20


def empty(
    shape: Sequence[int],
    dtype: torch.dtype,
    like: Tensor | None = None,  # noqa: ARG001 of any device; this one is the CPU
    strides: Sequence[int] | None = None,
) -> Tensor:
    """``torch.empty`` or ``empty_strided``, in recycled memory where it is large.

    See ``pyfused.memory``. Where there is no such memory, torch allocates and raises. The device is
    named, because torch's default may be another.
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
    """``torch.empty_like``, in recycled memory where it is large."""
    if like.numel() * like.element_size() < RECYCLED_BYTES:
        return torch.empty_like(like, memory_format=memory_format)
    plan = torch.empty_like(like, device="meta", memory_format=memory_format)
    return empty(plan.shape, like.dtype, strides=plan.stride())


def describe(input: Tensor, strategy: str) -> tuple[str, str, str, int]:  # noqa: ARG001
    return "cpu", strategy, capability, torch.get_num_threads()


def supports_rows(logits: Tensor) -> bool:
    views = [strides_of(tensor) for tensor in (logits, empty_viewed(logits)[0])]
    enough = row_sizes(logits)[2] >= native.row_classes[DTYPES[logits.dtype]]
    return enough and all(view is not None and view[2] == 1 for view in views)


def _operand(tensor: Tensor, like: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Returns the tensor in the order of ``like``, copied if need be, and its operand."""
    if tensor.stride() == like.stride():
        return tensor, (tensor.data_ptr(), 1)
    if not any(tensor.stride()):
        return tensor, (tensor.data_ptr(), 0)
    tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor, (tensor.data_ptr(), 1)


# ---- matrix products -----------------------------------------------------------------------------

# A CPU without instructions for half precision multiplies it 3 to 250 times slower than float32.
HAS_AMX = bool(has_amx())
MULTIPLIES_BFLOAT16 = HAS_AMX or bool(has_avx512_bf16())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype is torch.float16 or (dtype is torch.bfloat16 and not MULTIPLIES_BFLOAT16):
        return torch.float32
    return dtype


# Rows of a product in half precision that is added to float32: so many stay in cache, which takes
# half as long as to write all and to read them again.
PRODUCT_ROWS = 2048


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
        return
    for first in range(0, len(out), PRODUCT_ROWS):
        here = slice(first, first + PRODUCT_ROWS)
        product = torch.mm(a[here], b)
        out[here].add_(product) if beta else out[here].copy_(product)


# ---- kernels -------------------------------------------------------------------------------------


def check_class_indices(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises an IndexError for the first of int64 class indices that is out of range."""
    target = target.contiguous()
    position = native.invalid_class_index(target.data_ptr(), target.numel(), classes, ignore_index)
    if position >= 0:
        raise checks.target_out_of_range(classes, target, ignore_index, position)


def all_in_range(target: Tensor, classes: int) -> bool:
    """Returns whether contiguous int64 class indices are all in [0, classes)."""
    if MISSING:
        return bool(((target >= 0) & (target < classes)).all())
    address, count, first = target.data_ptr(), target.numel(), 0
    return bool(native.invalid_class_index(address, count, classes, first) < 0)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> Callable[..., tuple[Tensor | None, Gradients]]:
    """Prepares the loss, and gradients of input and target, each where wanted.

    Args:
        input: Logits of shape (C), (N, C) or (N, C, d1, ..., dk), of a dtype in ``DTYPES``.
        target: int64 class indices, or probabilities of the input's shape and dtype.
        weight: (C), or None.
        options: Of its tensors only the layout counts.
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.

    Returns:
        A function of tensors of these layouts (the input, the target, the weight, token_weight and
        the denominator, None where that is a number or not given) and of grad_output. It returns
        the loss, in the accumulation dtype, and the gradients. It raises an IndexError for a class
        index that is out of range, and has computed nothing then.
    """
    dtype, accumulate = DTYPES[input.dtype], accumulate_dtype(input.dtype)
    sizes, indices = row_sizes(input), target.dtype is torch.int64
    logits, logits_strides = viewed(input)
    targets, target_strides = (target.contiguous(), (0, 0, 0)) if indices else viewed(target)
    copies, copies_target = logits is not input, targets is not target
    converts = converts_in(accumulate, weight, options.token_weight, grad_output)
    of_input, of_target = outputs.gradients or (False, False)
    gradient_strides = logits_strides
    if of_input and not outputs.inplace:
        new_gradient, gradient_strides = _viewed_like(logits)
    if of_target:
        new_target_gradient, target_gradient_strides = _viewed_like(targets)
    new_loss = _new_loss(loss_shape(input, options.reduction), accumulate)
    ignore_index, reduction = options.ignore_index, _REDUCTIONS[options.reduction]
    numbers = options.label_smoothing, options.gamma, options.z_loss, options.scale
    native_options = native.CrossEntropyOptions(ignore_index, reduction, *numbers)
    number = None if isinstance(options.denominator, Tensor) else options.denominator

    def launch(
        tensors: Sequence[Any], grad_output: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients]:
        input, target, weight, token_weight, denominator = tensors
        denominator = number if denominator is None else denominator
        logits = input.contiguous() if copies else input
        targets = target.contiguous() if copies_target else target
        if converts:
            weight, grad_output, token_weight = contiguous_in(
                accumulate, weight, grad_output, token_weight
            )
        loss = grad_input = grad_target = None
        if outputs.loss:
            loss = new_loss()
        grad_input_view = grad_target_view = _NO_VIEW
        if of_input:
            grad_input = logits.detach() if outputs.inplace else new_gradient()
            grad_input_view = (grad_input.data_ptr(), *gradient_strides)
        if of_target:
            grad_target = new_target_gradient()
            grad_target_view = (grad_target.data_ptr(), *target_gradient_strides)
        address = targets.data_ptr()
        out_of_range = native.cross_entropy(
            dtype,
            sizes,
            (logits.data_ptr(), *logits_strides),
            address if indices else 0,
            _NO_VIEW if indices else (address, *target_strides),
            0 if weight is None else weight.data_ptr(),
            native_options,
            0 if token_weight is None else token_weight.data_ptr(),
            None if denominator is None else float(denominator),
            0 if grad_output is None else grad_output.data_ptr(),
            0 if loss is None else loss.data_ptr(),
            (grad_input_view, grad_target_view),
            torch.get_num_threads(),
        )
        if out_of_range >= 0:
            raise checks.target_out_of_range(
                checks.classes_of(input), target, ignore_index, out_of_range
            )
        return loss, (grad_input, grad_target)

    return launch


def _viewed_like(tensor: Tensor) -> tuple[Callable[[], Tensor], Strides]:
    """Returns what allocates gradients in a tensor's layout, where that fits, and their strides."""
    layout, strides = empty_viewed(tensor, partial(torch.empty_like, device="meta"))
    return _allocation(layout), strides


def _allocation(layout: Tensor) -> Callable[[], Tensor]:
    """Returns what allocates tensors of a layout, large ones in recycled memory."""
    if layout.numel() * layout.element_size() < RECYCLED_BYTES:
        return partial(
            torch.empty_strided, layout.shape, layout.stride(), dtype=layout.dtype, device="cpu"
        )
    return partial(empty, layout.shape, layout.dtype, strides=layout.stride())


def nll_loss(
    input: Tensor,
    target: Tensor,  # noqa: ARG001 nothing follows from its layout
    weight: Tensor | None,  # noqa: ARG001
    options: NllOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,  # noqa: ARG001
) -> Callable[..., tuple[Tensor | None, Gradients]]:
    """Prepares the loss of log-probabilities and class indices; otherwise as ``cross_entropy``."""
    dtype, accumulate = DTYPES[input.dtype], accumulate_dtype(input.dtype)
    sizes, (view, view_strides) = row_sizes(input), viewed(input)
    copies = view is not input
    new_gradient, gradient_strides = _viewed_like(view)
    new_loss = _new_loss(loss_shape(input, options.reduction), accumulate)
    reduction, ignore_index = _REDUCTIONS[options.reduction], options.ignore_index
    needs_gradient = any(outputs.gradients)

    def launch(
        tensors: Sequence[Any], grad_output: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients]:
        input, target, weight, *_ = tensors
        view = input.contiguous() if copies else input
        indices = target.contiguous()
        weight, grad_output = contiguous_in(accumulate, weight, grad_output)
        loss, gradient = new_loss() if outputs.loss else None, None
        gradient_view = _NO_VIEW
        if needs_gradient:
            gradient = new_gradient()
            gradient_view = (gradient.data_ptr(), *gradient_strides)
        out_of_range = native.nll_loss(
            dtype,
            sizes,
            (view.data_ptr(), *view_strides),
            indices.data_ptr(),
            _address(weight),
            ignore_index,
            reduction,
            _address(grad_output),
            _address(loss),
            gradient_view,
            torch.get_num_threads(),
        )
        if out_of_range >= 0:
            raise checks.target_out_of_range(
                checks.classes_of(input), target, ignore_index, out_of_range
            )
        return loss, (gradient, None)

    return launch


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,  # noqa: ARG001 nothing follows from its layout
    options: MarginOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,  # noqa: ARG001
) -> Callable[..., tuple[Tensor | None, Gradients]]:
    """Prepares the loss of scores (N, C) and class indices; otherwise as ``cross_entropy``.

    With class indices (N, C) a row has several targets, which end at the first -1.
    """
    multilabel = target.dim() == 2
    dtype, accumulate, shape = DTYPES[input.dtype], accumulate_dtype(input.dtype), input.shape
    new_loss = _new_loss(loss_shape(input, options.reduction), accumulate)
    needs_gradient = any(outputs.gradients)
    reduction, squared, margin = _REDUCTIONS[options.reduction], options.p == 2, options.margin

    def launch(
        tensors: Sequence[Any], grad_output: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients]:
        input, target, weight, *_ = tensors
        input, indices = input.contiguous(), target.contiguous()
        weight, grad_output = contiguous_in(accumulate, weight, grad_output)
        loss = new_loss() if outputs.loss else None
        gradient = empty_like(input) if needs_gradient else None
        out_of_range = native.multi_margin_loss(
            dtype,
            shape,
            input.data_ptr(),
            indices.data_ptr(),
            multilabel,
            _address(weight),
            squared,
            margin,
            reduction,
            _address(grad_output),
            _address(loss),
            _address(gradient),
            torch.get_num_threads(),
        )
        if out_of_range >= 0:
            least = -1 if multilabel else 0
            raise checks.target_out_of_range(shape[1], target, None, out_of_range, least)
        return loss, (gradient, None)

    return launch


multilabel_margin_loss = multi_margin_loss


def kl_div_with_logits(
    input: Tensor,
    teacher: Tensor,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Returns the divergence of each row of logits (N, C) from the teacher's, or their sum.

    Args:
        teacher: Of the input's dtype and shape.
        options: A mean is the caller's part.
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.

    Returns:
        The loss is in the accumulation dtype; the gradient is the input's.
    """
    input, teacher = feature_rows(input), feature_rows(teacher)
    each, grad = options.reduction == "none", None
    if any(outputs.gradients):
        grad = input.detach() if outputs.inplace else empty_like(input, torch.contiguous_format)
    accumulate = accumulate_dtype(input.dtype)
    token_weight, grad_output = contiguous_in(accumulate, options.token_weight, grad_output)
    loss = _new_loss(input.shape[:1] if each else (), accumulate)() if outputs.loss else None
    native.kl_div_with_logits(
        DTYPES[input.dtype],
        input.shape,
        _rows_of(input),
        _rows_of(teacher),
        options.beta,
        1 / options.temperature,
        _address(token_weight),
        each,
        _address(grad_output),
        _address(loss),
        _rows_of(grad),
        torch.get_num_threads(),
    )
    return loss, (grad,)


def embedding_loss(
    name: str,
    inputs: tuple[Tensor, ...],
    options: EmbeddingOptions,
    reduction: str,
    outputs: Outputs,
    denominator: float,
) -> Callable[..., tuple[Tensor | None, Gradients]]:
    """Prepares a loss of rows of features for tensors of these layouts.

    Args:
        name: The kernel's: ``"triplet_margin_loss"``, or ``"cosine_embedding_loss"``.
        inputs: Three tensors (..., D) of one dtype in ``DTYPES``; or two, and a target (..., 1) of
            the accumulation dtype.
        denominator: What the sum of the losses and the gradients are divided by.

    Returns:
        A function of tensors, which begin with the inputs, and of the loss's gradient, one for each
        row; None stands for ones. It returns the loss in the accumulation dtype, one for each row
        or their sum, and a gradient of each input, where wanted.
    """
    first = inputs[0]
    dtype, accumulate = DTYPES[first.dtype], accumulate_dtype(first.dtype)
    leading, features = first.shape[:-1], first.shape[-1]
    kernel, sizes, numbers = getattr(native, name), (leading.numel(), features), tuple(options)
    new_loss = _new_loss(leading if reduction == "none" else (), accumulate)
    new_gradient = _allocation(torch.empty(first.shape, dtype=first.dtype, device="meta"))
    count = len(inputs)

    def launch(
        tensors: Sequence[Any], grad_output: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients]:
        views = [feature_rows(x) for x in tensors[:count]]
        (grad_output,) = contiguous_in(accumulate, grad_output)
        loss = new_loss() if outputs.loss else None
        gradients = tuple([new_gradient() if wanted else None for wanted in outputs.gradients])
        addresses = [*map(_address, gradients), 0, 0, 0][:3]
        losses = (_address(loss), 0) if reduction == "none" else (0, _address(loss))
        kernel(
            dtype,
            sizes,
            [_rows_of(x) for x in (*views, None)[:3]],
            numbers,
            denominator,
            _address(grad_output),
            (*losses, *addresses),
            torch.get_num_threads(),
        )
        return loss, gradients

    return launch


def row_state(
    logits: Tensor,
    options: RowOptions,
    classes: ClassRange,
    fields: int,
    results: int = 0,
    continues: bool = False,
) -> Callable[..., None]:
    """Prepares the state of each row of logits.

    Args:
        logits: (N, C) with contiguous classes, of a dtype in ``DTYPES``.
        classes: Which of all classes the logits' are.
        fields: How many fields a state has.
        results: How many of its first fields are written in the accumulation dtype, too.
        continues: From the state, which is that of the classes before these.

    Returns:
        A function of logits of this layout; of the target, int64 class indices among all classes,
        in range or ``ignore_index``, contiguous, where None stands for targets that are none of the
        classes; of the weight, one factor for each of all classes, contiguous, in the accumulation
        dtype, or None; of the state (fields, ...), float64, the rows contiguous; and of results
        (results, ...), contiguous. It writes the last two. The results are of the classes up to
        these.
    """
    dtype, sizes, ignore_index, numbers = _logit_rows(logits, options, classes)
    n = len(logits)

    def launch(
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        state: Tensor,
        out: Tensor | None = None,
    ) -> None:
        native.row_state(
            dtype,
            sizes,
            logits.data_ptr(),
            0 if target is None else target.data_ptr(),
            ignore_index,
            numbers,
            0 if weight is None else weight.data_ptr(),
            (state.data_ptr(), state.stride(0), fields),
            (0, 0, 0) if out is None else (out.data_ptr(), n, results),
            continues,
            torch.get_num_threads(),
        )

    return launch


def row_gradients(
    logits: Tensor, options: RowOptions, classes: ClassRange, results: int
) -> Callable[..., Tensor]:
    """Prepares the gradient of logits, which has their shape and dtype.

    Args:
        logits, options, classes: As in ``row_state``.
        results: How many results have a gradient: the first of log-probability, entropy,
            log-sum-exp and the weighted sum of the logits; one, three or four.

    Returns:
        A function of logits, target and weight as in ``row_state``; of the state of all classes; of
        the results' gradients, (N) of one or (results, N), in the accumulation dtype or float64, of
        any strides; and of the memory of the gradient, contiguous, or the logits themselves. It
        returns the gradient, which is new memory for None.
    """
    dtype, sizes, ignore_index, numbers = _logit_rows(logits, options, classes)
    new = _allocation(torch.empty(logits.shape, dtype=logits.dtype, device="meta"))

    def launch(
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        state: Tensor,
        grad_results: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        out = new() if out is None else out
        strides = (0, *grad_results.stride())[-2:]
        native.row_gradients(
            dtype,
            sizes,
            logits.data_ptr(),
            0 if target is None else target.data_ptr(),
            ignore_index,
            numbers,
            0 if weight is None else weight.data_ptr(),
            (state.data_ptr(), state.stride(0), 0),
            (grad_results.data_ptr(), *strides, results, grad_results.itemsize),
            (out.data_ptr(), out.stride(0)),
            torch.get_num_threads(),
        )
        return out

    return launch


def _logit_rows(
    logits: Tensor, options: RowOptions, classes: ClassRange
) -> tuple[int, tuple[int, ...], int, tuple[float, float]]:
    """Returns the dtype, the sizes, the index to ignore and the numbers of both kernels."""
    sizes = *logits.shape, classes.first, logits.stride(0)
    numbers = options.scale, options.softcap or 0.0
    return DTYPES[logits.dtype], sizes, options.ignore_index, numbers


def _rows_of(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _new_loss(shape: Sequence[int], accumulate: torch.dtype) -> Callable[[], Tensor]:
    """Returns what allocates a loss of this shape, in the accumulation dtype."""
    if shape:
        return partial(empty, shape, accumulate)
    return partial(torch.empty_like, _SCALARS[accumulate])


def pointwise_loss(
    formula: Kernel | Program,
    tensors: tuple[tuple[Tensor, ...], Tensor | None, Tensor | None],
    parameters: tuple[float, ...],
    reduction: str,
    outputs: Outputs,
    divisor: float = 1.0,
    halves: int | None = None,
) -> Callable[..., tuple[Tensor | None, Gradients]]:
    """Prepares a pointwise loss for tensors of these layouts.

    Args:
        formula: The kernel of a declared formula, or a user's program.
        tensors: The operands (input, target and what else the formula takes, of one shape, strides
            of 0 included, and of one dtype in ``DTYPES``), the weight (of their shape and dtype, or
            None), and the loss's gradient (of the input's shape; None stands for ones).
        parameters: The formula's numbers, at most three but of a program.
        divisor: What the sum of the losses and the gradients are divided by, where that is a
            number.
        halves: The dimension along which the gradients of both operands become one tensor.

    Returns:
        A function of tensors (the operands, the weight, and the divisor where it is a tensor, else
        None) and of the loss's gradient. It returns the loss, one per element in the input's dtype
        or one sum in the accumulation dtype, and a gradient of each operand, where wanted.
    """
    operands, weight, grad_output = tensors
    dtype, n, count = DTYPES[operands[0].dtype], operands[0].numel(), len(operands)
    order = order_of(operands)
    dense_operand = next((i for i, operand in enumerate(operands) if operand is order), None)
    joined = first = None  # layouts of a gradient of both halves, and of the first of these
    if halves is not None and outputs.gradients:
        shape = [*order.shape[:halves], 2 * order.shape[halves], *order.shape[halves + 1 :]]
        joined = torch.empty(shape, dtype=order.dtype, device="meta")
        first = joined.narrow(halves, 0, order.shape[halves])
        second = first.shape[halves] * first.stride(halves) * first.element_size()
    steps, columns, row_step = _steps((*operands, weight, grad_output), order, first)
    if isinstance(formula, Program):
        kernel = formula.kernel(native, _program)
    else:
        kernel, parameters = getattr(native, formula.name), (*parameters, 0.0, 0.0, 0.0)[:3]
    each = outputs.loss and reduction == "none"
    scalar = _SCALARS[accumulate_dtype(order.dtype)]
    new = _allocation(order.to("meta"))
    output = _output_like(order) if dense_operand is not None else lambda _: new()
    new_joined = None if joined is None else _allocation(joined)
    no_operands, no_gradients = (_NO_OPERAND,) * (4 - count), (0,) * (4 - len(outputs.gradients))

    def launch(
        tensors: Sequence[Any], grad_output: Tensor | None = None
    ) -> tuple[Tensor | None, Gradients]:
        *operands, weight, denominator = tensors
        denominator = divisor if denominator is None else denominator
        like = operands[0 if dense_operand is None else dense_operand]
        views: list[tuple[int, int, int]] = []
        copies = []
        for tensor, step in zip((*operands, weight, grad_output), steps, strict=True):
            if tensor is None:
                views.append(_NO_OPERAND)
                continue
            if step is None:
                tensor = output(like).copy_(tensor)
                copies.append(tensor)  # until the kernel has read it
                views.append((tensor.data_ptr(), 1, columns))
            else:
                views.append((tensor.data_ptr(), *step))
        loss = None
        if outputs.loss:
            loss = output(like) if each else torch.empty_like(scalar)
        gradients: list[Tensor | None] = []
        addresses = []
        if new_joined is None:
            for wanted in outputs.gradients:
                gradient = output(like) if wanted else None
                gradients.append(gradient)
                addresses.append(0 if gradient is None else gradient.data_ptr())
        else:
            gradients.append(whole := new_joined())
            addresses += whole.data_ptr(), whole.data_ptr() + second
        address = 0 if loss is None else loss.data_ptr()
        kernel(
            dtype,
            n,
            (*views[:count], *no_operands),
            parameters,
            views[count],
            float(denominator),
            views[count + 1],
            address if each else 0,
            0 if each else address,
            (*addresses, *no_gradients),
            torch.get_num_threads(),
            (columns, row_step),
        )
        return loss, tuple(gradients)

    return launch


def _steps(
    tensors: Sequence[Tensor | None], order: Tensor, gradient: Tensor | None
) -> tuple[list[tuple[int, int] | None], int, int]:
    """Returns how a kernel reads tensors in the order in memory of a dense one.

    Args:
        gradient: A gradient that is not dense, None if all are.

    Returns:
        For each tensor its steps along columns and rows, None where a copy has to be read; the
        number of columns, 0 where there is one row; and the step of the gradient along rows.
    """
    fitting = [x if x is not None and x.dtype is order.dtype else None for x in tensors]
    fits = [x is not None for x in fitting]
    same = [x is not None and not any(x.stride()) for x in fitting]
    rows = [None if one else x for x, one in zip(fitting, same, strict=True)]
    copied, columns, strides = in_rows(order, [*rows, gradient])
    if gradient is not None and strides is not None and strides[-1] != 1:  # of halves of one column
        columns, strides = 1, tuple([x for step in strides[1::2] for x in (step, 1)])
    steps: list[tuple[int, int] | None] = []
    for i, (fit, one) in enumerate(zip(fits, same, strict=True)):
        step = (1, 0) if strides is None else (strides[2 * i + 1], strides[2 * i])
        readable = fit and i not in copied and step[0] in (0, 1)
        steps.append((0, 0) if one else step if readable else None)
    if columns is None or strides is None:
        return steps, 0, 0
    return steps, columns, 0 if gradient is None else strides[-2]


def _output_like(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Allocates tensors of one layout, large ones in recycled memory."""
    if like.numel() * like.element_size() < RECYCLED_BYTES:
        return torch.empty_like
    return empty_like


def _program(program: Program) -> Callable[..., None]:
    given = program.prologue, program.body, program.constants, program.parameters
    kernel: Callable[..., None] = native.Program(*given)
    return kernel


def softmax(formula: str, input: Tensor, dim: int) -> Kernels:
    """Prepares ``"softmax"`` or ``"log_softmax"`` along a dimension, counted from 0.

    Returns:
        A function of the input, which returns the output; and a function of the output's gradient
        and of the output, which returns the input's gradient. What they return is contiguous.
    """
    logarithm, dtype = formula == "log_softmax", DTYPES[input.dtype]
    view, sizes, strides = along(input, dim)
    as_it_is = view.data_ptr() == input.data_ptr()
    output = torch.empty_like(input, device="meta", memory_format=torch.contiguous_format)
    _, _, out_strides = along(output, dim)
    new = _allocation(output)

    def forward(input: Tensor) -> Tensor:
        view = input if as_it_is else along(input, dim)[0]
        output = new()
        native.softmax(
            logarithm,
            dtype,
            sizes,
            (view.data_ptr(), *strides),
            _NO_VIEW,
            (output.data_ptr(), *out_strides),
            torch.get_num_threads(),
        )
        return output

    def backward(grad_output: Tensor, output: Tensor) -> Tensor:
        grad_output, output, grad_input = grad_output.contiguous(), output.contiguous(), new()
        native.softmax(
            logarithm,
            dtype,
            sizes,
            (output.data_ptr(), *out_strides),
            (grad_output.data_ptr(), *out_strides),
            (grad_input.data_ptr(), *out_strides),
            torch.get_num_threads(),
        )
        return grad_input

    return forward, backward


def activation(
    formula: Kernel, input: Tensor, parameters: tuple[float, ...] = (), inplace: bool = False
) -> Kernels:
    """Prepares an activation for inputs of this layout.

    Args:
        parameters: The formula's numbers, at most three.
        inplace: The output takes the input's memory, which has to be dense.

    Returns:
        A function of the input, which returns the output in the input's layout; and a function of
        the output's gradient and of what is saved (the output or the input), which returns the
        input's gradient.
    """
    name = formula.name
    kernel, backward_kernel = getattr(native, name), getattr(native, f"{name}_backward")
    dtype, n, as_it_is = DTYPES[input.dtype], input.numel(), is_dense(input)
    output_like, numbers = _output_like(input), (*parameters, 0.0, 0.0, 0.0)[:3]

    def forward(input: Tensor) -> Tensor:
        input = input if as_it_is else input.contiguous()
        output = input if inplace else output_like(input)
        threads = torch.get_num_threads()
        kernel(dtype, n, input.data_ptr(), output.data_ptr(), numbers, threads)
        return output

    def backward(grad_output: Tensor, saved: Tensor) -> Tensor:
        saved = dense(saved)
        grad_output, grad_operand = _operand(grad_output, saved)
        grad_input = output_like(saved)
        backward_kernel(
            dtype,
            grad_input.numel(),
            grad_operand,
            saved.data_ptr(),
            grad_input.data_ptr(),
            numbers,
            torch.get_num_threads(),
        )
        return grad_input

    return forward, backward


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies a dense tensor in place by one element of the accumulation dtype."""
    native.scale(
        DTYPES[tensor.dtype],
        tensor.numel(),
        tensor.data_ptr(),
        factor.data_ptr(),
        torch.get_num_threads(),
    )
