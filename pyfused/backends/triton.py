"""The Triton kernels for GPU tensors: the functions of ``cpu.py``, imported when a tensor asks.

Nothing here waits for the GPU: no value of a tensor decides what is launched, so that calls can be
captured in CUDA graphs. A class index out of range is no error but a loss of NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyfused.kernels as native
from pyfused.backends import (
    Among,
    CrossEntropyOptions,
    Gradients,
    MarginOptions,
    NllOptions,
    Want,
)
from pyfused.backends.layout import (
    accumulate_dtype,
    along,
    contiguous_in,
    empty_viewed,
    loss_shape,
    order_of,
    positions,
    viewed,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    want: Want,
    grad_output: Tensor | None = None,
    among: Among | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss, and gradients of input and target, each where wanted; see ``cpu.cross_entropy``.

    A class index out of range makes the loss of its position NaN and its gradient zero.
    """
    accumulate = accumulate_dtype(input.dtype)
    indices = probabilities = None
    if target.dtype is torch.int64:
        indices = target.contiguous()
    else:
        probabilities = viewed(target)
    of_input, of_target = want.gradients or (False, False)
    grad_input = grad_target = None
    loss = _loss_of(input, options.reduction, want)
    weight, grad_output, token_weight = contiguous_in(
        accumulate, weight, grad_output, options.token_weight
    )
    logits = viewed(input)
    if of_input:
        grad_input = logits if want.inplace else empty_viewed(logits[0])
    if of_target:
        assert probabilities is not None
        grad_target = empty_viewed(probabilities[0])
    with torch.cuda.device_of(input):
        native.cross_entropy(
            positions(input),
            logits,
            indices,
            probabilities,
            weight,
            token_weight,
            options,
            among or Among(0, positions(input)[2]),
            grad_output,
            loss,
            grad_input,
            grad_target,
            want.measures,
        )
    return loss, (
        None if grad_input is None else grad_input[0].detach(),
        None if grad_target is None else grad_target[0],
    )


Operands = list[tuple[Tensor, int, int] | None]


def _operands(order: Tensor, tensors: list[Tensor | None]) -> tuple[int | None, Operands]:
    """Tensors as rows x columns, in the order in memory of ``order``, which is dense.

    Returns:
        The number of columns, None where one row will do; and each tensor with its two strides,
        copied if it takes more than two.
    """
    stride = order.stride()
    if all(tensor is None or tensor.stride() == stride for tensor in tensors):
        return None, [tensor if tensor is None else (tensor, 0, 1) for tensor in tensors]
    given = [tensor for tensor in tensors if tensor is not None]
    groups: list[tuple[int, list[int]]] = []  # a size, and each tensor's stride
    for dim in sorted(range(order.dim()), key=order.stride, reverse=True):
        size, strides = order.shape[dim], [tensor.stride(dim) for tensor in given]
        if size == 1:
            continue
        if groups and groups[-1][1] == [step * size for step in strides]:
            size *= groups.pop()[0]
        groups.append((size, strides))
    if len(groups) > 2:
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.stride() != stride:
                tensors[i] = torch.empty_like(order, dtype=tensor.dtype).copy_(tensor)
        return _operands(order, tensors)
    groups = groups or [(1, [0] * len(given))]
    (columns, inner), (_, outer) = groups[-1], groups[0]
    steps = iter(zip(outer, inner, strict=True))
    operands = [tensor if tensor is None else (tensor, *next(steps)) for tensor in tensors]
    return (columns if len(groups) == 2 else None), operands


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
    view = viewed(input)
    grad_input = empty_viewed(view[0]) if any(want.gradients) else None
    loss = _loss_of(input, options.reduction, want)
    weight, grad_output = contiguous_in(accumulate, weight, grad_output)
    with torch.cuda.device_of(input):
        native.nll_loss(
            positions(input),
            view,
            target.contiguous(),
            weight,
            options,
            grad_output,
            loss,
            grad_input,
        )
    return loss, (None if grad_input is None else grad_input[0], None)


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
    grad_input = torch.empty_like(input) if any(want.gradients) else None
    loss = _loss_of(input, options.reduction, want)
    weight, grad_output = contiguous_in(accumulate, weight, grad_output)
    with torch.cuda.device_of(input):
        native.multi_margin_loss(
            input, target.contiguous(), weight, options, grad_output, loss, grad_input
        )
    return loss, (grad_input, None)


def _loss_of(input: Tensor, reduction: str, want: Want) -> Tensor | None:
    """A new tensor for the loss of (N, C, d1, ..., dk), None where none is wanted."""
    if not want.loss:
        return None
    return input.new_empty(loss_shape(input, reduction), dtype=accumulate_dtype(input.dtype))


def pointwise_loss(
    formula: str,
    operands: tuple[Tensor, ...],
    parameters: tuple[float, ...],
    weight: Tensor | None,
    reduction: str,
    denominator: float | Tensor,
    want: Want,
    grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss, and a gradient of each operand, each where wanted; see ``cpu.pointwise_loss``.

    A parameter may be a tensor of one element, which only the GPU reads.
    """
    order = order_of(operands)
    columns, views = _operands(order, [*operands, weight, grad_output])
    each = loss = None
    if want.loss and reduction == "none":
        each = torch.empty_like(order)
    elif want.loss:
        loss = order.new_empty((), dtype=accumulate_dtype(order.dtype))
    wanted = want.gradients or (False,) * len(operands)
    gradients = tuple([torch.empty_like(order) if w else None for w in wanted])
    with torch.cuda.device_of(order):
        native.pointwise_loss(
            formula, columns, views, parameters, denominator, each, loss, gradients
        )
    return loss if each is None else each, gradients


def softmax(formula: str, input: Tensor, dim: int) -> Tensor:
    """``"softmax"`` or ``"log_softmax"`` along a dimension, counted from 0; contiguous."""
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return _softmax(formula, dim, input, None, output)


def softmax_backward(formula: str, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    """The input's gradient, from the output; contiguous."""
    grad_input = torch.empty_like(output, memory_format=torch.contiguous_format)
    return _softmax(formula, dim, output, grad_output.contiguous(), grad_input)


def _softmax(
    formula: str, dim: int, input: Tensor, grad_output: Tensor | None, output: Tensor
) -> Tensor:
    view, sizes, strides = along(input, dim)
    out, _, out_strides = along(output, dim)
    upstream = None
    if grad_output is not None:
        of_grad, _, grad_strides = along(grad_output, dim)
        upstream = of_grad, grad_strides
    with torch.cuda.device_of(input):
        native.softmax(
            formula == "log_softmax", sizes, (view, strides), upstream, (out, out_strides)
        )
    return output


def activation(
    formula: str,
    input: Tensor,
    parameter: float = 0.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """``formula`` of each element; ``inplace`` needs a dense input."""
    output = input if inplace else torch.empty_like(input)
    columns, operands = _operands(output, [input])
    with torch.cuda.device_of(input):
        native.activation(formula, columns, parameter, operands, output)
    return output


def activation_backward(
    formula: str,
    grad_output: Tensor,
    saved: Tensor,
    parameter: float = 0.0,
) -> Tensor:
    """The input's gradient, from what the formula saves: its output or its input, dense."""
    grad_input = torch.empty_like(saved)
    columns, operands = _operands(saved, [grad_output, saved])
    with torch.cuda.device_of(saved):
        native.activation(formula, columns, parameter, operands, grad_input)
    return grad_input


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies a dense tensor in place by a tensor of one element, which only the GPU reads."""
    with torch.cuda.device_of(tensor):
        native.scale(tensor, factor)
