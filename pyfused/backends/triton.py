"""Prepares and launches the Triton kernels; imported when the first GPU tensor needs one.

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

from pyfused.backends.protocol import Divisor, LossKernel, LossResult, Options, Parameters
from pyfused.backends.versions import triton_version
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
    prepared,
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
    converts_in,
    dense,
    dense_operand,
    feature_rows,
    in_rows,
    loss_shape,
    row_sizes,
    softmax_layout,
)
from pyfused.types import (
    ClassRange,
    EmbeddingOptions,
    Kernels,
    Outputs,
)

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


def describe(input: Tensor, strategy: str) -> tuple[str, str, None, None]:  # noqa: ARG001
    return "triton", f"kernels on {input.device}, Triton {triton_version()}", None, None


def predicts(logits: Tensor) -> bool:  # noqa: ARG001
    return False


def supports_rows(logits: Tensor) -> bool:  # noqa: ARG001
    return True


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
    each: bool = False,
) -> None:
    """Launches a kernel that stores the loss of each row, or adds up the losses of elements.

    The last of at most MOST_ARRIVALS programs adds up the partial sums; otherwise torch does.

    Args:
        inputs, outputs: The kernel's arguments before and after the loss.
    """
    if loss is None or each:
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


def _loss_allocator(
    reduction: str, outputs: Outputs, dtype: torch.dtype
) -> Callable[[Tensor], Tensor | None]:
    """Returns the function that allocates the loss of logits, if it is needed.

    Args:
        dtype: The dtype of the logits.
    """
    dtype = accumulate_dtype(dtype) if outputs.loss_dtype is None else outputs.loss_dtype

    def new_loss(input: Tensor) -> Tensor | None:
        return input.new_empty(loss_shape(input, reduction), dtype=dtype) if outputs.loss else None

    return new_loss


def _divisor(
    options: Options, indices: bool, classes: int, elements: int = 1
) -> Callable[..., Tensor | int | None]:
    """Prepares the divisor of the sum of the losses, in the form that the kernels read.

    Args:
        indices: Whether targets are class indices; otherwise each row counts.
        elements: The number of elements that a kernel reads for each row.

    Returns:
        A function of the logits, the number of rows, the targets of the kernels, and the
        denominator, as a tensor or as a number; both may be None.
    """
    is_mean = options.reduction == "mean"

    def divisor(
        logits: Tensor,
        n: int,
        targets: tuple[Any, ...],
        denominator: Tensor | None = None,
        number: float | None = None,
    ) -> Any:
        if not is_mean:
            return None
        if denominator is not None:
            return denominator.to(torch.float64)
        if number is not None:
            if number < 2**63 and float(number).is_integer():
                return int(number)  # Triton passes floats as float32
            return logits.new_full((), number, dtype=torch.float64)
        if not indices:
            return n if targets[2] is None else targets[2].sum(dtype=torch.float64)
        if n <= COUNTED_BY_PROGRAMS and n * elements <= HOST_BOUND:
            return targets[0]
        total = logits.new_empty((), dtype=torch.float64)
        programs = min(-(-n // (2 * COUNT.choice.block)), 256)
        _run(COUNT, programs, (targets,), total, (n, classes))
        return total

    return divisor


# ---- losses over classes -------------------------------------------------------------------------


def check_class_indices(target: Tensor, classes: int, ignore_index: int) -> None:
    """Does nothing, because reading the indices would synchronise with the GPU."""


def cross_entropy(
    tensors: Sequence[Any],
    options: Options,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> LossKernel:
    input, target, weight, token_weight, _ = tensors
    of_indices, reduction = target.dtype is torch.int64, options.reduction
    grad_of_input, grad_of_target = outputs.gradients or (False, False)
    copies, strides, grad_format, grad_strides = class_layout(input, outputs.inplace)
    copies_target, target_strides, grad_target_strides = True, NO_STRIDES, NO_STRIDES
    if not grad_of_input:
        grad_strides = NO_STRIDES
    if not of_indices:
        copies_target, target_strides, target_format, grad_target_strides = class_layout(target)
        if not grad_of_target:
            grad_target_strides = NO_STRIDES
    all_strides = strides, grad_strides, target_strides, grad_target_strides
    outer, inner, classes = sizes = _with_one_outer(row_sizes(input), all_strides)
    one_outer = type(outer) is int and outer == 1
    accumulate, smooth = accumulate_dtype(input.dtype), options.label_smoothing != 0
    weighted = not of_indices or (smooth and weight is not None)  # q is dense
    tiles, once = (2, False) if weighted else (1, not grad_of_input)
    itemsize = input.element_size()
    choice = _tiling(sizes, itemsize, *all_strides, tensors=tiles, once=once)
    each, most_programs = reduction == "none", sys.maxsize
    contiguous = one_outer and strides[2] == 1 and grad_strides[2] in (0, 1)
    unaligned = choice.units[1] * itemsize < 8
    shared_stride = choice.rows == 1 and grad_strides[1] in (strides[1], 0)
    function = two_pass_kernel
    if choice.whole_row and contiguous and not weighted:
        function = row_kernel
        if choice.stages > 1:
            most_programs = resources()[0]
    elif of_indices and contiguous and not smooth and unaligned and shared_stride:
        choice = choice._replace(vector=16 // itemsize)
    scaled = options.scale != 1 or options.temperature != 1
    focal, squared, encodes = options.gamma != 0, options.z_loss != 0, input.dtype is torch.float64
    kernel = prepared(function, choice, EACH=each)
    new_loss = _loss_allocator(reduction, outputs, input.dtype)
    fixed = classes, sum(all_strides[: 2 if of_indices else 4], ())
    divisor, ignore_index = _divisor(options, of_indices, classes, classes), options.ignore_index
    converts = converts_in(accumulate, weight, token_weight, grad_output)

    def launch(
        tensors: Sequence[Any], options: Options, grad_output: Tensor | None = None
    ) -> LossResult:
        input, target, weight, token_weight, denominator = tensors
        logits = input.contiguous() if copies else input
        target = target.contiguous() if copies_target else target
        if converts:
            weight, token_weight, grad_output = contiguous_in(
                accumulate, weight, token_weight, grad_output
            )
        grad = grad_target = None
        if grad_of_input:
            grad = logits.detach()
            if not outputs.inplace:
                grad = torch.empty_like(logits, memory_format=grad_format)
        if grad_of_target:
            grad_target = torch.empty_like(target, memory_format=target_format)
        n = input.numel() // classes
        inners = n if one_outer else inner
        programs = min(n // inners * -(-inners // choice.rows), most_programs)
        floats: Any = (
            max(0.0, options.label_smoothing) if smooth else None,
            options.gamma if focal else None,
            options.z_loss if squared else None,
            options.scale / options.temperature if scaled else None,
        )
        if encodes:
            floats = encoded(floats)
        indices, probabilities = (target, None) if of_indices else (None, target)
        targets, gradients = (indices, weight, token_weight, ignore_index), (grad, grad_target)
        by = divisor(logits, n, targets, denominator, options.denominator)
        loss = new_loss(input)
        inputs = (logits, probabilities), targets, by, grad_output
        _run(kernel, programs, inputs, loss, (gradients, inners, *fixed, floats), each)
        return loss, gradients

    return launch


def _with_one_outer(sizes: Sizes, strides: tuple[Strides, ...]) -> Sizes:
    """Merges the outer and inner index if each tensor has one stride for all rows."""
    outer, inner, classes = sizes
    if all(stride[0] == inner * stride[1] for stride in strides):
        return 1, outer * inner, classes
    return sizes


def _tiling(sizes: Sizes, itemsize: int, *strides: Strides, **options: Any) -> Choice:
    """Returns the tile of a kernel of `rows.py`."""
    _, inner, classes = sizes
    # The tile of contiguous classes does not depend on the number of rows.
    inner = 1 if strides[0][2] == 1 else inner
    return _tile(inner, classes, itemsize, *strides, **options)


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
    options: EmbeddingOptions,
    reduction: str,
    outputs: Outputs,
    divisor: Divisor | None,
) -> LossKernel:
    triplet, each = name == "triplet_margin_loss", reduction == "none"
    function, count = (triplet_margin_kernel, 3) if triplet else (cosine_embedding_kernel, 2)
    meta: dict[str, Any] = {"INCLUSIVE": options.inclusive}
    if triplet:
        meta |= {"EUCLIDEAN": options.euclidean, "SWAP": options.swap}
    views = [feature_rows(x) for x in inputs]
    copies = any(view is not x for view, x in zip(views, inputs, strict=True))
    features = views[0].shape[1]
    strides = tuple([view.stride(0) for view in views])
    rows: list[Strides] = [(0, stride, 1) for stride in (*strides[:count], features)]
    itemsize, accumulate = inputs[0].element_size(), accumulate_dtype(inputs[0].dtype)
    choice = _tiling((1, 1, features), itemsize, *rows, tensors=2)
    kernel = prepared(function, choice, EACH=each, **meta)
    loss_dtype, fixed = outputs.loss_dtype or accumulate, (features, strides)
    encodes = accumulate is torch.float64
    needs_grad = outputs.gradients or (False,) * len(inputs)
    tensor_count = len(inputs)

    def launch(
        tensors: Sequence[Any], options: Options, grad_output: Tensor | None = None
    ) -> LossResult:
        inputs = tuple(tensors[:tensor_count])
        first, shape = inputs[0], inputs[0].shape
        n = math.prod(shape[:-1])
        views = tuple([feature_rows(x) for x in inputs]) if copies else inputs
        if grad_output is not None:
            grad_output = grad_output.to(accumulate).contiguous()
        gradients = tuple([first.new_empty(shape) if needed else None for needed in needs_grad])
        floats: Any = options.margin, getattr(options, "eps", 0.0)  # the cosine loss has none
        if encodes:
            floats = encoded(floats)
        by, loss = None if divisor is None else divisor(first), None
        if outputs.loss:
            loss = first.new_empty(shape[:-1] if each else (), dtype=loss_dtype)
        inputs, outs = (views, grad_output, by), (gradients, n, *fixed, floats)
        _run(kernel, -(-n // choice.rows), inputs, loss, outs, each)
        return loss, gradients

    return launch


def row_state(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    classes: ClassRange,
    results: Tensor | None = None,
    continues: bool = False,
) -> None:
    count = 0 if results is None else 1 if results.dim() < state.dim() else len(results)
    constants = ("FIELDS", len(state)), ("RESULTS", count), ("CONTINUES", continues)
    tensors, strides = (target, weight, state, results), (logits.stride(0), state.stride(0))
    _run_rows("state", constants, options, logits, tensors, strides, classes)


def row_gradients(
    options: Options,
    logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    classes: ClassRange,
    grad_results: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    out = logits.new_empty(logits.shape) if out is None else out
    tensors = target, weight, state, grad_results, out
    steps = logits.stride(0), state.stride(0), *(0, *grad_results.stride())[-2:], out.stride(0)
    constants = (("RESULTS", 1 if grad_results.dim() == 1 else len(grad_results)),)
    _run_rows("gradients", constants, options, logits, tensors, steps, classes)
    return out


def _run_rows(
    name: str,
    constants: tuple[tuple[str, int], ...],
    options: Options,
    logits: Tensor,
    tensors: tuple[Any, ...],
    strides: tuple[int, ...],
    classes: ClassRange,
) -> None:
    target, weight, *outputs = tensors
    n, columns = logits.shape
    kernel = _row_kernel(name, logits.element_size(), columns, strides[0], constants)
    cap, temperature = options.softcap, options.temperature
    scale = None if temperature == 1 else 1 / temperature
    floats: Any = (None, None, scale) if cap is None else (cap, cap / temperature, scale)
    if logits.dtype is torch.float64:
        floats = encoded(floats)
    targets = target, weight, None, options.ignore_index
    sizes = n, columns, strides, *classes
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
) -> LossKernel:
    input, teacher, token_weight, *_ = tensors
    student_rows, teacher_rows = feature_rows(input), feature_rows(teacher)
    copies = student_rows is not input or teacher_rows is not teacher
    classes, reduction = student_rows.shape[1], options.reduction
    accumulate, needs_grad = accumulate_dtype(input.dtype), any(outputs.gradients)
    converts, each = converts_in(accumulate, token_weight, grad_output), reduction == "none"
    stride = student_rows.stride(0)
    grad_stride = 0 if not needs_grad else stride if outputs.inplace else classes
    strides = stride, teacher_rows.stride(0), grad_stride
    rows = [(0, stride, 1) for stride in strides]
    choice = _tiling((1, 1, classes), input.element_size(), *rows, tensors=2)
    kind = {0.0: FORWARD, 1.0: REVERSE}.get(options.beta, MIXTURE)
    scaled, encodes = options.temperature != 1, input.dtype is torch.float64
    new_loss = _loss_allocator(reduction, outputs, input.dtype)
    kernel = prepared(kl_div_kernel, choice, KIND=kind, EACH=each)
    divisor = _divisor(options, False, classes)

    def launch(
        tensors: Sequence[Any], options: Options, grad_output: Tensor | None = None
    ) -> LossResult:
        input, teacher, token_weight, denominator, *_ = tensors
        if copies:
            input, teacher = feature_rows(input), feature_rows(teacher)
        if converts:
            token_weight, grad_output = contiguous_in(accumulate, token_weight, grad_output)
        grad, n = None, input.shape[0]
        if needs_grad:
            grad = input.detach() if outputs.inplace else input.new_empty((n, classes))
        by = divisor(input, n, (None, None, token_weight), denominator, options.denominator)
        inputs = input, teacher, token_weight, by, grad_output
        floats: Any = options.beta, 1 / options.temperature if scaled else None
        if encodes:
            floats = encoded(floats)
        loss, outs = new_loss(input), (grad, n, classes, strides, floats)
        _run(kernel, -(-n // choice.rows), inputs, loss, outs, each)
        return loss, (grad,)

    return launch


def softmax(formula: str, input: Tensor, dim: int) -> Kernels:
    copies, sizes, strides, output_strides = softmax_layout(input, dim)
    length, inner = input.shape[dim], math.prod(input.shape[dim + 1 :])

    def prepare(kernel: Any, *strides: Strides) -> Launch:
        most = {"most_threads": SOFTMAX_THREADS}
        choice = _tiling(sizes, input.element_size(), *strides, **most)
        return Launch(kernel, choice, LOGARITHM=formula == "log_softmax")

    def sizes_of(kernel: Launch, tensor: Tensor) -> tuple[int, int]:
        """Returns the number of programs, and of inner rows."""
        rows = tensor.numel() // length
        inners = rows if inner == 1 else inner
        return rows // inners * -(-inners // kernel.choice.rows), inners

    forward_kernel = prepare(softmax_kernel, strides, output_strides)
    backward_kernel = prepare(softmax_backward_kernel, output_strides)

    def forward(input: Tensor, _: Options) -> Tensor:
        output = torch.empty_like(input, memory_format=torch.contiguous_format)
        x = along(input, dim)[0] if copies else input
        programs, inners = sizes_of(forward_kernel, output)
        forward_kernel(programs, x, output, inners, length, strides, output_strides)
        return output

    def backward(grad_output: Tensor, output: Tensor, _: Options) -> Tensor:
        grad_output, output = grad_output.contiguous(), output.contiguous()
        grad_input = torch.empty_like(output)
        tensors = grad_output, output, grad_input
        programs, inners = sizes_of(backward_kernel, output)
        backward_kernel(programs, *tensors, inners, length, output_strides)
        return grad_input

    return forward, backward


# ---- elementwise kernels -------------------------------------------------------------------------


def pointwise_loss(
    formula: Kernel | Program,
    tensors: tuple[tuple[Tensor, ...], Tensor | None, Tensor | None],
    parameters: Parameters,
    reduction: str,
    outputs: Outputs,
    divisor: Divisor | None = None,
    on_nan: Callable[..., Any] | None = None,  # noqa: ARG001 a NaN loss is not read
) -> LossKernel:
    operands, weight, grad_output = tensors
    count, (order, index) = len(operands), dense_operand(operands)
    choice, each = choose(order.element_size()), reduction == "none"
    needs_grad = outputs.gradients or (False,) * len(operands)
    padding = (None,) * (OPERANDS - len(operands))
    copied, columns, strides = in_rows(order, [*operands, *padding, weight, grad_output])
    program = formula if isinstance(formula, Program) else formula.programs[0]
    function = program.kernel("triton", formula_of)
    exact = order.element_size() > 2
    kernel = Launch(elementwise_kernel, choice, FORMULA=function, EACH=each, EXACT=exact)
    loss_dtype = outputs.loss_dtype or accumulate_dtype(order.dtype)

    def launch(
        tensors: Sequence[Any], options: Options, grad_output: Tensor | None = None
    ) -> LossResult:
        operands = tensors[:count]
        weight, denominator, *_ = *tensors[count:], None, None
        like = operands[0].contiguous() if index is None else operands[index]
        gradients = tuple([torch.empty_like(like) if needed else None for needed in needs_grad])
        views = [*operands, *padding, weight, grad_output]
        for i in copied:
            views[i] = torch.empty_like(like, dtype=views[i].dtype).copy_(views[i])
        inputs = tuple(views[:OPERANDS]), *views[OPERANDS:]
        n, by, loss = like.numel(), denominator, None
        programs = -(-n // choice.block)
        if by is None and divisor is not None:
            by = divisor(like)
        if outputs.loss and each:
            loss = torch.empty_like(like)
        elif outputs.loss:
            loss = torch.empty((), dtype=loss_dtype, device=like.device)
            programs = min(max(programs, 1), MOST_PROGRAMS)  # an empty sum needs one program
        values = parameters(options)
        floats = *(*values, 0.0, 0.0, 0.0)[:NUMBERS], parts_of(values[NUMBERS:])
        outs, in_row = (*gradients, *padding), n if columns == 0 else columns
        _run(kernel, programs, inputs, loss, (outs, n, in_row, strides, *floats, by), each)
        return loss, gradients

    return launch


def activation(formula: Kernel, input: Tensor) -> Kernels:
    choice, padding = choose(input.element_size()), (None,) * OPERANDS
    count = len(formula.parameters)
    constants = {"EACH": True, "EXACT": input.element_size() > 2}
    forward_kernel, backward_kernel = (
        Launch(elementwise_kernel, choice, FORMULA=p.kernel("triton", formula_of), **constants)
        for p in formula.programs
    )
    order = input if input.is_contiguous() else torch.empty_like(input, device="meta")
    copies, columns, strides = in_rows(order, [input])

    def forward(input: Tensor, options: Options) -> Tensor:
        output, n = torch.empty_like(input), input.numel()
        programs = -(-n // choice.block)
        x = torch.empty_like(output).copy_(input) if copies else input
        tensors = (x, *padding[1:]), None, None, output, padding
        parameters = (*options[:count], 0.0, 0.0, 0.0)[:NUMBERS]
        forward_kernel(programs, *tensors, n, columns, strides, *parameters, (), None)
        return output

    def backward(grad_output: Tensor, saved: Tensor, options: Options) -> Tensor:
        saved, n = dense(saved), saved.numel()
        programs, grad_input = -(-n // choice.block), torch.empty_like(saved)
        copies, columns, strides = in_rows(grad_input, [grad_output, saved])
        columns = n if columns == 0 else columns
        if copies:
            grad_output = torch.empty_like(saved).copy_(grad_output)
        tensors = (grad_output, saved, *padding[2:]), None, None, grad_input, padding
        parameters = (*options[:count], 0.0, 0.0, 0.0)[:NUMBERS]
        backward_kernel(programs, *tensors, n, columns, strides, *parameters, (), None)
        return grad_input

    return forward, backward


def scale_(tensor: Tensor, factor: Tensor) -> None:
    n, scale = tensor.numel(), SCALE[tensor.element_size()]
    scale(min(-(-n // scale.choice.block), SCALE_PROGRAMS), tensor, factor, n)
