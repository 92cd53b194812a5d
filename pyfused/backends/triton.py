"""Launches the Triton kernels; imported when the first GPU tensor needs one.

``protocol.py`` describes the functions. None of them synchronises with the GPU. Launches do not
depend on values of tensors, so calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyfused.backends.protocol import LossResult, Options
from pyfused.formula_compiler.program import OPERANDS, Program
from pyfused.kernels import reductions
from pyfused.kernels.cross_entropy import row_kernel, two_pass_kernel
from pyfused.kernels.elementwise import elementwise_kernel
from pyfused.kernels.embedding_loss import cosine_embedding_kernel, triplet_margin_kernel
from pyfused.kernels.kl_div_with_logits import FORWARD, MIXTURE, REVERSE, kl_div_kernel
from pyfused.kernels.launch import (
    Choice,
    Launch,
    choose,
    encoded,
    on_default_stream,
    resources,
)
from pyfused.kernels.program import NUMBERS, formula_of, parts_of
from pyfused.kernels.reductions import count_kernel, scale_kernel
from pyfused.kernels.row_state import row_gradients_kernel, row_state_kernel
from pyfused.kernels.softmax import softmax_backward_kernel, softmax_kernel
from pyfused.layout import (
    Strides,
    accumulate_dtype,
    along,
    class_layout,
    contiguous_in,
    dense_operand,
    feature_rows,
    in_rows,
    loss_shape,
    row_sizes,
)
from pyfused.types import SMOOTH, EmbeddingOptions, Outputs, RowBlock

if TYPE_CHECKING:
    from pyfused.formula_compiler.kernel import Kernel

ASYNCHRONOUS = True
Sizes = tuple[int, int, int]  # outer, inner, classes
NO_STRIDES = (0, 0, 0)
# Calls of at most this many elements are bound by launch overhead. In these, each program counts
# the valid targets itself if there are at most COUNTED_BY_PROGRAMS, which saves a launch.
HOST_BOUND, COUNTED_BY_PROGRAMS = 1 << 24, 2048
MOST_ARRIVALS = 1 << 14  # with more programs, torch adds up the partial sums
# Programs of a grid-stride loop with a sum: several waves on any GPU, but few partial sums.
MOST_PROGRAMS = 4096
GROUP = reductions.GROUP.value
SCALE_PROGRAMS = 512  # few, because in most calls the factor is 1 and programs exit at once
# Threads that keep a whole row in registers: 0.76 times the time of two passes at 32,000 classes.
SOFTMAX_THREADS = 1024
COUNT = Launch(count_kernel, Choice(1, 1024, 256))
SCALE = {itemsize: Launch(scale_kernel, choose(itemsize)) for itemsize in (2, 4, 8)}


def predicts(logits: Tensor) -> bool:  # noqa: ARG001
    return False


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, out=out)
    else:  # CPU tensors under TRITON_INTERPRET=1, for which torch lacks addmm.dtype_out
        out.copy_(out * beta + torch.mm(a, b) if beta else torch.mm(a, b))


# ---- sums ----------------------------------------------------------------------------------------


def _run(
    kernel: Launch,
    programs: int,
    inputs: tuple[Any, ...],
    loss: Tensor | None,
    outputs: tuple[Any, ...],
    unreduced: bool = False,
) -> None:
    """Launches a kernel that stores the loss of each row, or adds up the losses of elements.

    The last of at most MOST_ARRIVALS programs adds up the partial sums; otherwise torch does.

    Args:
        inputs, outputs: The kernel's arguments before and after the loss.
    """
    if loss is None or unreduced:
        kernel(programs, *inputs, loss, *outputs)
    elif programs == 1:
        kernel(programs, *inputs, (loss,), *outputs)
    elif 0 < programs <= MOST_ARRIVALS:
        parts = loss.new_empty(programs - (-programs // GROUP), dtype=torch.float64)
        kernel(programs, *inputs, (loss, parts, _counters(loss.device)), *outputs)
    else:
        parts = loss.new_empty(programs, dtype=torch.float64)
        kernel(programs, *inputs, (loss, parts), *outputs)
        loss.copy_(parts.sum())


def _counters(device: torch.device) -> Tensor:
    """Returns the counters of `add_up`, which are 0 before and after each kernel.

    Kernels on a device's default stream run one after another, so they share counters. Kernels on
    other streams get new counters: CUDA graphs are captured there, may run concurrently, and own
    their memory.
    """
    counters = _shared_counters if on_default_stream(device) else _new_counters
    return counters(device)


def _new_counters(device: torch.device) -> Tensor:
    return torch.zeros(1 + -(-MOST_ARRIVALS // GROUP), dtype=torch.int32, device=device)


_shared_counters = cache(_new_counters)


def _new_loss(input: Tensor, reduction: str, outputs: Outputs) -> Tensor | None:
    """Allocates the loss of logits, if it is needed."""
    if not outputs.loss:
        return None
    dtype = outputs.loss_dtype or accumulate_dtype(input.dtype)
    return input.new_empty(loss_shape(input, reduction), dtype=dtype)


def _divisor(
    options: Options,
    logits: Tensor,
    n: int,
    targets: tuple[Any, ...],
    denominator: Tensor | None,
    classes: int = 0,
) -> Any:
    """Returns the divisor of the sum of the losses, in the form that the kernels read.

    Args:
        n: The number of rows.
        targets: The targets of the kernels.
        denominator: The divisor as a tensor, or None.
        classes: The number of classes if targets are class indices, else 0: each row counts.
    """
    if options.reduction != "mean":
        return None
    if denominator is not None:
        return denominator.to(torch.float64)
    number = options.denominator
    if number is not None:
        if number < 2**63 and float(number).is_integer():
            return int(number)  # Triton passes floats as float32
        return logits.new_full((), number, dtype=torch.float64)
    if not classes:
        return n if targets[2] is None else targets[2].sum(dtype=torch.float64)
    if n <= COUNTED_BY_PROGRAMS and n * classes <= HOST_BOUND:
        return targets[0]
    total = logits.new_empty((), dtype=torch.float64)
    programs = min(-(-n // (2 * COUNT.choice.block)), 256)
    _run(COUNT, programs, (targets,), total, (n, classes))
    return total


# ---- losses over classes -------------------------------------------------------------------------


def check_class_indices(target: Tensor, classes: int, ignore_index: int) -> None:
    """Does nothing, because reading the indices would synchronise with the GPU."""


def cross_entropy(
    tensors: Sequence[Any],
    options: Options,
    outputs: Outputs,
    grad_output: Tensor | None = None,
    prediction: Tensor | None = None,  # noqa: ARG001
    metrics: Sequence[Tensor] = (),  # noqa: ARG001
) -> LossResult:
    input, target, weight, token_weight, denominator = tensors
    has_indices, unreduced = target.dtype is torch.int64, options.reduction == "none"
    grad_of_input, grad_of_target = outputs.gradients or (False, False)
    accumulate, itemsize = accumulate_dtype(input.dtype), input.element_size()
    logits, strides, grad_format, grad_strides = class_layout(input)
    grad = grad_target = None
    target_strides = grad_target_strides = NO_STRIDES
    if has_indices:
        target = target.contiguous()
    else:
        target, target_strides, target_format, grad_target_strides = class_layout(target)
    if grad_of_input:
        if outputs.inplace:
            grad, grad_strides = logits.detach(), strides
        else:
            grad = torch.empty_like(logits, memory_format=grad_format)
    if grad_of_target:
        grad_target = torch.empty_like(target, memory_format=target_format)
    all_strides = (
        strides,
        grad_strides if grad_of_input else NO_STRIDES,
        target_strides,
        grad_target_strides if grad_of_target else NO_STRIDES,
    )
    outer, inner, classes = _with_one_outer(row_sizes(input), all_strides)
    smooth = options.label_smoothing != 0
    weighted = not has_indices or (smooth and weight is not None)  # q is dense
    flags = outer == 1, has_indices, smooth, weighted, not grad_of_input, unreduced
    inner_of_tile = _inner_of_tile(inner, strides)
    gpu = resources(logits.get_device())
    kernel, most = _class_kernel(gpu, inner_of_tile, classes, itemsize, all_strides, *flags)
    programs = min(outer * -(-inner // kernel.choice.rows), most)
    weight, token_weight, grad_output = contiguous_in(accumulate, weight, token_weight, grad_output)
    floats: Any = (
        max(0.0, options.label_smoothing) if smooth else None,
        options.gamma if options.gamma != 0 else None,
        options.z_loss if options.z_loss != 0 else None,
        options.scale / options.temperature
        if options.scale != 1 or options.temperature != 1
        else None,
    )
    if input.dtype is torch.float64:
        floats = encoded(floats)
    n = outer * inner
    indices, probabilities = (target, None) if has_indices else (None, target)
    targets, gradients = (indices, weight, token_weight, options.ignore_index), (grad, grad_target)
    by = _divisor(options, logits, n, targets, denominator, classes if has_indices else 0)
    loss = _new_loss(input, options.reduction, outputs)
    inputs = (logits, probabilities), targets, by, grad_output
    fixed = inner, classes, sum(all_strides[: 2 if has_indices else 4], ())
    _run(kernel, programs, inputs, loss, (gradients, *fixed, floats), unreduced)
    return loss, gradients


@lru_cache(maxsize=4096)
def _class_kernel(
    gpu: tuple[int, int],
    inner: int,
    classes: int,
    itemsize: int,
    strides: tuple[Strides, ...],
    one_outer: bool,
    has_indices: bool,
    smooth: bool,
    weighted: bool,
    without_gradient: bool,
    unreduced: bool,
) -> tuple[Launch, int]:
    """Returns the kernel of cross-entropy, and the largest number of its programs.

    Args:
        gpu: The multiprocessors and the shared memory of the device; see `resources`.
    """
    multiprocessors, shared = gpu
    tiles, once = (2, False) if weighted else (1, without_gradient)
    choice = _tile(inner, classes, itemsize, *strides, tensors=tiles, once=once, shared=shared)
    input_strides, grad_strides, *_ = strides
    contiguous = one_outer and input_strides[2] == 1 and grad_strides[2] in (0, 1)
    unaligned = choice.units[1] * itemsize < 8
    shared_stride = choice.rows == 1 and grad_strides[1] in (input_strides[1], 0)
    function, most = two_pass_kernel, sys.maxsize
    if choice.whole_row and contiguous and not weighted:
        function = row_kernel
        if choice.stages > 1:  # a persistent kernel
            most = multiprocessors
    elif has_indices and contiguous and not smooth and unaligned and shared_stride:
        choice = choice._replace(vector=16 // itemsize)
    return Launch(function, choice, UNREDUCED=unreduced), most


def _with_one_outer(sizes: Sizes, strides: tuple[Strides, ...]) -> Sizes:
    """Merges the outer and inner index if each tensor has one stride for all rows."""
    outer, inner, classes = sizes
    if all(stride[0] == inner * stride[1] for stride in strides):
        return 1, outer * inner, classes
    return sizes


def _inner_of_tile(inner: int, strides: Strides) -> int:
    """Returns the inner rows of a tile; that of contiguous classes does not depend on them."""
    return 1 if strides[2] == 1 else inner


@lru_cache(maxsize=4096)
def _tile(inner: int, classes: int, itemsize: int, *strides: Strides, **options: Any) -> Choice:
    dim = 2 if strides[0][2] == 1 else 1  # the contiguous dimension
    choice = choose(itemsize, classes, inner, inner_contiguous=dim == 1, **options)
    others = [s for each in strides for i, s in enumerate(each) if i != dim or s != 1]
    unit = math.gcd(16, (inner, classes)[dim - 1], *others)
    return choice._replace(units=(1, unit) if dim == 2 else (unit, 1))


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
    first, shape, unreduced = inputs[0], inputs[0].shape, reduction == "none"
    accumulate, loss = accumulate_dtype(first.dtype), None
    views = tuple([feature_rows(x) for x in inputs])
    features, strides = views[0].shape[1], tuple([view.stride(0) for view in views])
    kernel = _embedding_kernel(name, first.element_size(), features, strides, options, unreduced)
    if grad_output is not None:
        grad_output = grad_output.to(accumulate).contiguous()
    needs = outputs.gradients or (False,) * len(inputs)
    gradients = tuple([first.new_empty(shape) if needed else None for needed in needs])
    floats: Any = encoded(numbers) if accumulate is torch.float64 else numbers
    if outputs.loss:
        loss = first.new_empty(shape[:-1] if unreduced else (), dtype=accumulate)
    n = math.prod(shape[:-1])
    outs = gradients, n, features, strides, floats
    programs = -(-n // kernel.choice.rows)
    _run(kernel, programs, (views, grad_output, divisor), loss, outs, unreduced)
    return loss, gradients


@lru_cache(maxsize=4096)
def _embedding_kernel(
    name: str,
    itemsize: int,
    features: int,
    strides: tuple[int, ...],
    options: EmbeddingOptions,
    unreduced: bool,
) -> Launch:
    meta: dict[str, Any] = {"INCLUSIVE": options.inclusive}
    function, count = cosine_embedding_kernel, 2
    if name == "triplet_margin_loss":
        function, count = triplet_margin_kernel, 3
        meta |= {"EUCLIDEAN": options.euclidean, "SWAP": options.swap}
    rows: list[Strides] = [(0, stride, 1) for stride in (*strides[:count], features)]
    meta["UNREDUCED"] = unreduced
    return Launch(function, _tile(1, features, itemsize, *rows, tensors=2), **meta)


def row_state(
    block: RowBlock, state: Tensor, results: Tensor | None = None, preceding: int = 0
) -> None:
    count = 0 if results is None else 1 if results.dim() < state.dim() else len(results)
    constants = ("FIELDS", len(state)), ("RESULTS", count)
    strides = block.logits.stride(0), state.stride(0)
    before: Any = preceding or None
    if preceding and block.weight is not None and len(state) > SMOOTH:
        first = block.classes.first
        before = block.weight[first - preceding : first].sum(dtype=torch.float64)
    _run_rows("state", constants, block, (state, results, before), strides)


def row_gradients(
    block: RowBlock, state: Tensor, grad_results: Tensor, out: Tensor | None = None
) -> Tensor:
    logits = block.logits
    out = logits.new_empty(logits.shape) if out is None else out
    steps = logits.stride(0), state.stride(0), *(0, *grad_results.stride())[-2:], out.stride(0)
    constants = (("RESULTS", 1 if grad_results.dim() == 1 else len(grad_results)),)
    _run_rows("gradients", constants, block, (state, grad_results, out), steps)
    return out


def _run_rows(
    name: str,
    constants: tuple[tuple[str, int], ...],
    block: RowBlock,
    outputs: tuple[Any, ...],
    strides: tuple[int, ...],
) -> None:
    logits, options, (n, columns) = block.logits, block.options, block.logits.shape
    kernel = _row_kernel(name, logits.element_size(), columns, strides[0], constants)
    scale = None if options.scale == 1 else options.scale
    floats: Any = None, None, scale
    if options.softcap is not None:  # as a subnormal number, it would be 0
        cap = max(options.softcap, torch.finfo(accumulate_dtype(logits.dtype)).tiny)
        floats = cap, cap * options.scale, scale
    if logits.dtype is torch.float64:
        floats = encoded(floats)
    targets = block.target, block.weight, None, options.ignore_index
    sizes = n, columns, strides, *block.classes
    kernel(-(-n // kernel.choice.rows), logits, targets, *outputs, *sizes, floats)


@lru_cache(maxsize=4096)  # by name, because Triton's hash of a kernel takes longer
def _row_kernel(
    name: str, itemsize: int, classes: int, stride: int, constants: tuple[tuple[str, int], ...]
) -> Launch:
    choice = _tile(1, classes, itemsize, (0, stride, 1), tensors=2)
    kernel = row_state_kernel if name == "state" else row_gradients_kernel
    return Launch(kernel, choice, **dict(constants))


def kl_div_with_logits(
    tensors: Sequence[Any],
    options: Options,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> LossResult:
    input, teacher, token_weight, denominator, *_ = tensors
    input, teacher = feature_rows(input), feature_rows(teacher)
    (n, classes), unreduced, grad = input.shape, options.reduction == "none", None
    token_weight, grad_output = contiguous_in(
        accumulate_dtype(input.dtype), token_weight, grad_output
    )
    if any(outputs.gradients):
        grad = input.detach() if outputs.inplace else input.new_empty((n, classes))
    strides = input.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0)
    kind = {0.0: FORWARD, 1.0: REVERSE}.get(options.beta, MIXTURE)
    kernel = _divergence_kernel(input.element_size(), classes, strides, kind, unreduced)
    by = _divisor(options, input, n, (None, None, token_weight), denominator)
    floats: Any = options.beta, None if options.temperature == 1 else 1 / options.temperature
    if input.dtype is torch.float64:
        floats = encoded(floats)
    loss = _new_loss(input, options.reduction, outputs)
    inputs, outs = (input, teacher, token_weight, by, grad_output), (grad, n, classes)
    _run(kernel, -(-n // kernel.choice.rows), inputs, loss, (*outs, strides, floats), unreduced)
    return loss, (grad,)


@lru_cache(maxsize=4096)
def _divergence_kernel(
    itemsize: int, classes: int, strides: tuple[int, ...], kind: Any, unreduced: bool
) -> Launch:
    rows = [(0, stride, 1) for stride in strides]
    return Launch(
        kl_div_kernel, _tile(1, classes, itemsize, *rows, tensors=2), KIND=kind, UNREDUCED=unreduced
    )


def softmax(formula: str, input: Tensor, dim: int) -> Tensor:
    x, (outer, inner, classes), strides = along(input, dim)
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    output_strides = strides if x is input else along(output, dim)[2]
    inner_of_tile, all_strides = _inner_of_tile(inner, strides), (strides, output_strides)
    arguments = formula, inner_of_tile, classes, input.element_size(), *all_strides
    kernel = _softmax_kernel(False, *arguments)
    kernel(outer * -(-inner // kernel.choice.rows), x, output, inner, classes, *all_strides)
    return output


def softmax_backward(formula: str, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    grad_output, output = grad_output.contiguous(), output.contiguous()
    grad_input = torch.empty_like(output)
    _, (outer, inner, classes), strides = along(output, dim)
    arguments = formula, _inner_of_tile(inner, strides), classes, output.element_size(), strides
    kernel = _softmax_kernel(True, *arguments)
    tensors = grad_output, output, grad_input
    kernel(outer * -(-inner // kernel.choice.rows), *tensors, inner, classes, strides)
    return grad_input


@lru_cache(maxsize=4096)
def _softmax_kernel(
    backward: bool, formula: str, inner: int, classes: int, itemsize: int, *strides: Strides
) -> Launch:
    choice = _tile(inner, classes, itemsize, *strides, most_threads=SOFTMAX_THREADS)
    kernel = softmax_backward_kernel if backward else softmax_kernel
    return Launch(kernel, choice, LOGARITHM=formula == "log_softmax")


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
    on_nan: Callable[[], Any] | None = None,  # noqa: ARG001 a NaN loss is not read
) -> LossResult:
    like = dense_operand(operands)
    padding, unreduced = (None,) * (OPERANDS - len(operands)), reduction == "none"
    views, columns, strides = in_rows(like, [*operands, *padding, weight, grad_output])
    program = formula if isinstance(formula, Program) else formula.programs[0]
    kernel = _elementwise_kernel(program, like.element_size(), unreduced)
    needs = outputs.gradients or (False,) * len(operands)
    gradients = tuple([torch.empty_like(like) if needed else None for needed in needs])
    n, loss = like.numel(), None
    programs = -(-n // kernel.choice.block)
    if outputs.loss and unreduced:
        loss = torch.empty_like(like)
    elif outputs.loss:
        dtype = outputs.loss_dtype or accumulate_dtype(like.dtype)
        loss = torch.empty((), dtype=dtype, device=like.device)
        programs = min(max(programs, 1), MOST_PROGRAMS)  # an empty sum needs one program
    floats = *(*parameters, 0.0, 0.0, 0.0)[:NUMBERS], parts_of(parameters[NUMBERS:])
    inputs, outs = (tuple(views[:OPERANDS]), *views[OPERANDS:]), (*gradients, *padding)
    _run(kernel, programs, inputs, loss, (outs, n, columns, strides, *floats, divisor), unreduced)
    return loss, gradients


def _elementwise_kernel(program: Program, itemsize: int, unreduced: bool) -> Launch:
    """Returns the kernel of a program, which keeps it."""
    kernel: Launch = program.kernel(
        (itemsize, unreduced), lambda _: _new_elementwise_kernel(program, itemsize, unreduced)
    )
    return kernel


def _new_elementwise_kernel(program: Program, itemsize: int, unreduced: bool) -> Launch:
    function = program.kernel("triton", formula_of)
    constants = {"FORMULA": function, "UNREDUCED": unreduced, "EXACT": itemsize > 2}
    return Launch(elementwise_kernel, choose(itemsize), **constants)


def activation(
    formula: Kernel, input: Tensor, options: Options, out: Tensor | None = None
) -> Tensor:
    output = torch.empty_like(input) if out is None else out
    _run_activation(formula, 0, [input], output, options)
    return output


def activation_backward(
    formula: Kernel, grad_output: Tensor, saved: Tensor, options: Options, out: Tensor | None = None
) -> Tensor:
    saved = dense_operand([saved])
    grad_input = torch.empty_like(saved) if out is None else out
    _run_activation(formula, 1, [grad_output, saved], grad_input, options)
    return grad_input


def _run_activation(
    formula: Kernel, method: int, inputs: list[Tensor], output: Tensor, options: Options
) -> None:
    """Computes the forward or the backward method of an activation."""
    views, columns, strides = in_rows(output, inputs)
    kernel = _elementwise_kernel(formula.programs[method], output.element_size(), True)
    padding, n = (None,) * OPERANDS, output.numel()
    tensors = (*views, *padding[len(views) :]), None, None, output, padding
    parameters = (*options[: len(formula.parameters)], 0.0, 0.0, 0.0)[:NUMBERS]
    kernel(-(-n // kernel.choice.block), *tensors, n, columns, strides, *parameters, (), None)


def scale_(gradient: Tensor, factor: Tensor) -> bool:
    n, scale = gradient.numel(), SCALE[gradient.element_size()]
    scale(min(-(-n // scale.choice.block), SCALE_PROGRAMS), gradient, factor, n)
    return True
