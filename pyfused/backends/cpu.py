"""The C++ kernels: the one place where tensors become addresses and strides.

The extension is built once for each instruction set. The best one that this CPU runs is loaded at
import; the environment variable ``PYFUSED_CPU_CAPABILITY`` names another.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import platform
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyfused import checks
from pyfused.layout import (
    accumulate_dtype,
    along,
    contiguous_in,
    dense,
    empty_viewed,
    loss_shape,
    order_of,
    row_sizes,
    strides_of,
    viewed,
)
from pyfused.types import (
    CrossEntropyOptions,
    DivergenceOptions,
    Gradients,
    LogProbsOptions,
    MarginOptions,
    NllOptions,
    VocabShard,
    Want,
)

if TYPE_CHECKING:
    from pyfused.ops.program import Program

_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if _X86 else ("generic",)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ASYNCHRONOUS = False
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def load(isa: str) -> ModuleType:
    """The extension module built for the instruction set ``isa``.

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


# The module for the least instruction set says which of the others are safe to load.
supported = tuple(isa for isa in ISAS if load(ISAS[0]).runs_here(isa))
capability = _choose()
native = load(capability)
RECYCLES = hasattr(native, "recycled")  # where the system has what it takes

if not native.runtime_file:
    logging.getLogger("pyfused").warning(
        "torch has loaded no OpenMP runtime that is known here; the kernels run on one thread"
    )


# ---- tensors as the kernels see them -------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# What a new scalar is like: torch.empty takes twice as long to read a shape and a dtype.
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in (torch.float32, torch.float64)}
_NO_VIEW = (0, 0, 0, 0)
_NO_OPERAND = (0, 0)
_NO_STATISTICS = (0, 0, 0)


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

    See ``pyfused.memory``. Where there is no such memory, torch allocates and raises.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= RECYCLED_BYTES and RECYCLES:
        strides = strides or torch.empty(shape, device="meta").stride()
        capsule = native.recycled(DTYPES[dtype], size, shape, strides)
        if capsule is not None:
            return from_dlpack(capsule)
    if strides is None:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_strided(shape, strides, dtype=dtype)


def empty_like(like: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """``torch.empty_like``, in recycled memory where it is large."""
    if like.numel() * like.element_size() < RECYCLED_BYTES:
        return torch.empty_like(like, memory_format=memory_format)
    plan = torch.empty_like(like, device="meta", memory_format=memory_format)
    return empty(plan.shape, like.dtype, strides=plan.stride())


def describe(input: Tensor, strategy: Callable[[Tensor], str]) -> tuple[str, str, str, int]:
    return "cpu", strategy(input), capability, torch.get_num_threads()


def supports_rows(logits: Tensor) -> bool:
    views = [strides_of(tensor) for tensor in (logits, empty_viewed(logits)[0])]
    enough = row_sizes(logits)[2] >= native.row_classes[DTYPES[logits.dtype]]
    return enough and all(view is not None and view[2] == 1 for view in views)


def _operand(tensor: Tensor, like: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The tensor in the order of ``like``, copied once if it is in another, and its operand."""
    if tensor.stride() == like.stride():
        return tensor, (tensor.data_ptr(), 1)
    if not any(tensor.stride()):
        return tensor, (tensor.data_ptr(), 0)
    tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor, (tensor.data_ptr(), 1)


# ---- matrix products -----------------------------------------------------------------------------

# A CPU without instructions for half precision multiplies it 3 to 250 times slower than float32.
MULTIPLIES_BFLOAT16 = bool(
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


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


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    want: Want,
    grad_output: Tensor | None = None,
    vocab_shard: VocabShard | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss, and gradients of input and target, each where wanted.

    Args:
        input: Logits of shape (C), (N, C) or (N, C, d1, ..., dk), of a dtype in ``DTYPES``.
        target: int64 class indices, or probabilities of the input's shape and dtype.
        weight: (C), or None; of all classes where the logits' are some of them.
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
        vocab_shard: Where the logits' classes are not all classes.

    Returns:
        The loss is in the accumulation dtype.

    Raises:
        IndexError: A class index is out of range. Nothing has been computed then.
    """
    logits, logits_strides = viewed(input)
    indices, probabilities_view = None, _NO_VIEW
    weight, grad_output, token_weight = contiguous_in(
        accumulate_dtype(input.dtype), weight, grad_output, options.token_weight
    )
    given = vars(options) | {
        "reduction": _REDUCTIONS[options.reduction],
        "token_weight": _address(token_weight),
        "denominator": None if options.denominator is None else float(options.denominator),
    }
    if target.dtype is torch.int64:
        indices = target.contiguous()
    else:
        target, strides = viewed(target)
        probabilities_view = (target.data_ptr(), *strides)

    of_input, of_target = want.gradients or (False, False)
    grad_input = grad_target = None
    grad_input_view = grad_target_view = _NO_VIEW
    loss = _loss_of(input, options.reduction, want)
    if of_input:
        grad_input, strides = (
            (logits.detach(), logits_strides) if want.inplace else empty_viewed(logits, empty_like)
        )
        grad_input_view = (grad_input.data_ptr(), *strides)
    if of_target:
        grad_target, strides = empty_viewed(target, empty_like)
        grad_target_view = (grad_target.data_ptr(), *strides)
    out_of_range = native.cross_entropy(
        DTYPES[input.dtype],
        row_sizes(input),
        (logits.data_ptr(), *logits_strides),
        _address(indices),
        probabilities_view,
        _address(weight),
        given,
        _address(grad_output),
        _address(loss),
        (grad_input_view, grad_target_view),
        None if vocab_shard is None else (*vocab_shard[:2], _address(vocab_shard.lse)),
        _NO_STATISTICS if want.statistics is None else [*map(_address, want.statistics)],
        torch.get_num_threads(),
    )
    if out_of_range >= 0:
        raise checks.target_out_of_range(
            checks.classes_of(input), target, options.ignore_index, out_of_range
        )
    return loss, (grad_input, grad_target)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: NllOptions,
    want: Want,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Of log-probabilities and class indices; otherwise as ``cross_entropy``."""
    accumulate = accumulate_dtype(input.dtype)
    view, strides = viewed(input)
    indices = target.contiguous()
    weight, grad_output = contiguous_in(accumulate, weight, grad_output)
    loss, grad_input, grad_view = _loss_of(input, options.reduction, want), None, _NO_VIEW
    if any(want.gradients):
        grad_input, grad_strides = empty_viewed(view, empty_like)
        grad_view = (grad_input.data_ptr(), *grad_strides)
    out_of_range = native.nll_loss(
        DTYPES[input.dtype],
        row_sizes(input),
        (view.data_ptr(), *strides),
        indices.data_ptr(),
        _address(weight),
        options.ignore_index,
        _REDUCTIONS[options.reduction],
        _address(grad_output),
        _address(loss),
        grad_view,
        torch.get_num_threads(),
    )
    if out_of_range >= 0:
        raise checks.target_out_of_range(
            checks.classes_of(input), target, options.ignore_index, out_of_range
        )
    return loss, (grad_input, None)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: MarginOptions,
    want: Want,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Of scores of shape (N, C) and class indices; otherwise as ``cross_entropy``."""
    accumulate = accumulate_dtype(input.dtype)
    input = input.contiguous()
    indices = target.contiguous()
    weight, grad_output = contiguous_in(accumulate, weight, grad_output)
    loss = _loss_of(input, options.reduction, want)
    grad_input = empty_like(input) if any(want.gradients) else None
    out_of_range = native.multi_margin_loss(
        DTYPES[input.dtype],
        input.shape,
        input.data_ptr(),
        indices.data_ptr(),
        _address(weight),
        options.p == 2,
        options.margin,
        _REDUCTIONS[options.reduction],
        _address(grad_output),
        _address(loss),
        _address(grad_input),
        torch.get_num_threads(),
    )
    if out_of_range >= 0:
        raise checks.target_out_of_range(checks.classes_of(input), target, None, out_of_range)
    return loss, (grad_input, None)


def kl_div_with_logits(
    input: Tensor,
    teacher: Tensor,
    options: DivergenceOptions,
    want: Want,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """The divergence of each row of logits (N, C) from the teacher's, or their sum.

    Args:
        teacher: Of the input's dtype and shape.
        options: A mean is the caller's part.
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.

    Returns:
        The loss is in the accumulation dtype; the gradient is the input's.
    """
    input, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (input, teacher))
    each, grad = options.reduction == "none", None
    if any(want.gradients):
        grad = input.detach() if want.inplace else empty_like(input, torch.contiguous_format)
    token_weight, grad_output = contiguous_in(
        accumulate_dtype(input.dtype), options.token_weight, grad_output
    )
    loss = _loss_of(input, "none" if each else "sum", want)
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


def log_probs(
    logits: Tensor,
    target: Tensor,
    options: LogProbsOptions,
    values: Tensor,
    shard: VocabShard,
    continues: bool = False,
) -> None:
    """Writes the log-probability of each row's target, its entropy, its log-sum-exp, and four more.

    Args:
        logits: (N, C) with contiguous classes, of a dtype in ``DTYPES``.
        target: int64 class indices among all classes, in range or ``ignore_index``, contiguous.
        values: (7, N), float64, the rows contiguous; the results are of the classes up to these.
        shard: Which of all classes the logits' are.
        continues: From the values, which are those of a call with the classes before these.
    """
    given = _of_log_probs(logits, target, options, values, shard)
    native.log_probs(*given, continues, _rows_of(None), _rows_of(None), torch.get_num_threads())


def log_probs_backward(
    logits: Tensor,
    target: Tensor,
    options: LogProbsOptions,
    values: Tensor,
    grad_results: Tensor,
    shard: VocabShard,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits.

    Args:
        logits, target, options, shard: As in ``log_probs``.
        values: Of all classes.
        grad_results: The gradients of the first three, (3, N), float64, the rows contiguous.
        out: Of the logits' shape and dtype, with contiguous classes; it may be the logits.
    """
    given = _of_log_probs(logits, target, options, values, shard)
    gradients = (_rows_of(grad_results), _rows_of(out))
    native.log_probs(*given, False, *gradients, torch.get_num_threads())


def _of_log_probs(
    logits: Tensor, target: Tensor, options: LogProbsOptions, values: Tensor, shard: VocabShard
) -> tuple[Any, ...]:
    return (
        DTYPES[logits.dtype],
        (*logits.shape, shard.first, logits.stride(0)),
        logits.data_ptr(),
        target.data_ptr(),
        options.ignore_index,
        (1 / options.temperature, options.softcap or 0.0),
        _rows_of(values),
    )


def _rows_of(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _loss_of(input: Tensor, reduction: str, want: Want) -> Tensor | None:
    """A new tensor for the loss of (N, C, d1, ..., dk), None where none is wanted."""
    if not want.loss:
        return None
    shape, accumulate = loss_shape(input, reduction), accumulate_dtype(input.dtype)
    return empty(shape, accumulate) if shape else torch.empty_like(_SCALARS[accumulate])


def pointwise_loss(
    formula: str | Program,
    operands: tuple[Tensor, ...],
    parameters: tuple[float, ...],
    weight: Tensor | None,
    reduction: str,
    denominator: float | Tensor,
    want: Want,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss, and a gradient of each operand, each where wanted.

    Args:
        formula: The kernel's name: ``"mse_loss"``; or a program.
        operands: Input, target and what else the formula takes, of one shape (strides of 0
            included) and of one dtype in ``DTYPES``.
        parameters: The formula's numbers, at most three but of a program.
        weight: Of the operands' shape and dtype, or None.
        denominator: What the sum of the losses and the gradients are divided by.
        grad_output: The loss's gradient, of the input's shape; None stands for ones.

    Returns:
        The loss is one per element in the input's dtype, or one sum in the accumulation dtype.
    """
    order = order_of(operands)
    views = [_operand(operand, order) for operand in operands]
    weight_operand = grad_operand = _NO_OPERAND
    if weight is not None:
        weight, weight_operand = _operand(weight, order)
    if grad_output is not None:
        grad_output, grad_operand = _operand(grad_output.to(order.dtype), order)
    each = reduced = None
    if want.loss and reduction == "none":
        each = empty_like(order)
    elif want.loss:
        reduced = torch.empty_like(_SCALARS[accumulate_dtype(order.dtype)])
    gradients = tuple([empty_like(order) if wanted else None for wanted in want.gradients])
    if isinstance(formula, str):
        kernel, parameters = getattr(native, formula), (*parameters, 0.0, 0.0, 0.0)[:3]
    else:
        kernel = formula.kernel(native, _program)
    kernel(
        DTYPES[order.dtype],
        order.numel(),
        (*[view for _, view in views], *[_NO_OPERAND] * 4)[:4],
        parameters,
        weight_operand,
        float(denominator),
        grad_operand,
        _address(each),
        _address(reduced),
        (*map(_address, gradients), 0, 0, 0, 0)[:4],
        torch.get_num_threads(),
    )
    return reduced if each is None else each, gradients


def _program(program: Program) -> Callable[..., None]:
    given = program.prologue, program.body, program.constants, program.parameters
    kernel: Callable[..., None] = native.Program(*given)
    return kernel


def softmax(formula: str, input: Tensor, dim: int) -> Tensor:
    """``"softmax"`` or ``"log_softmax"`` along a dimension, counted from 0; contiguous."""
    output = empty_like(input, torch.contiguous_format)
    return _softmax(formula, dim, input, None, output)


def softmax_backward(formula: str, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    """The input's gradient, from the output; contiguous."""
    grad_input = empty_like(output, torch.contiguous_format)
    return _softmax(formula, dim, output, grad_output.contiguous(), grad_input)


def _softmax(
    formula: str, dim: int, input: Tensor, grad_output: Tensor | None, output: Tensor
) -> Tensor:
    view, sizes, strides = along(input, dim)
    out, _, out_strides = along(output, dim)
    grad_view = _NO_VIEW
    if grad_output is not None:
        of_grad, _, grad_strides = along(grad_output, dim)
        grad_view = (of_grad.data_ptr(), *grad_strides)
    native.softmax(
        formula == "log_softmax",
        DTYPES[input.dtype],
        sizes,
        (view.data_ptr(), *strides),
        grad_view,
        (out.data_ptr(), *out_strides),
        torch.get_num_threads(),
    )
    return output


def activation(
    formula: str,
    input: Tensor,
    parameters: tuple[float, ...] = (),
    *,
    inplace: bool = False,
) -> Tensor:
    """``formula`` of each element, in the input's layout; ``inplace`` needs a dense input.

    Args:
        formula: The kernel's name: ``"relu"``.
        parameters: The formula's numbers, at most three.
    """
    input = dense(input)
    output = input if inplace else empty_like(input)
    getattr(native, formula)(
        DTYPES[input.dtype],
        input.numel(),
        input.data_ptr(),
        output.data_ptr(),
        (*parameters, 0.0, 0.0, 0.0)[:3],
        torch.get_num_threads(),
    )
    return output


def activation_backward(
    formula: str,
    grad_output: Tensor,
    saved: Tensor,
    parameters: tuple[float, ...] = (),
) -> Tensor:
    """The input's gradient, from what the formula saves: its output or its input, dense."""
    grad_output, grad_operand = _operand(grad_output, saved)
    grad_input = empty_like(saved)
    getattr(native, f"{formula}_backward")(
        DTYPES[saved.dtype],
        saved.numel(),
        grad_operand,
        saved.data_ptr(),
        grad_input.data_ptr(),
        (*parameters, 0.0, 0.0, 0.0)[:3],
        torch.get_num_threads(),
    )
    return grad_input


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies a dense tensor in place by one element of the accumulation dtype."""
    native.scale(
        DTYPES[tensor.dtype],
        tensor.numel(),
        tensor.data_ptr(),
        factor.data_ptr(),
        torch.get_num_threads(),
    )
