"""Raises all argument errors, with the types that torch raises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from traceback import walk_tb
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from pyfused.layout import loss_shape
from pyfused.torch_internals import dispatch_modes, is_functorch_wrapped
from pyfused.types import (
    OPTIONS,
    TENSORS,
    CrossEntropyOptions,
    DivergenceOptions,
    DynamicSize,
    Head,
    LogProbsOptions,
    ModuleOptions,
    Number,
    Scalar,
    TensorSpec,
)

Keywords = TypeVar("Keywords", bound=Mapping[str, object])
# A tensor may hold 0, because it is not read on GPUs: the mean is NaN then.
_DENOMINATOR = Scalar("denominator", low=0.0, error=ValueError)


def _error(name: str, expected: str, got: Any, error: type[Exception] = RuntimeError) -> Exception:
    got = tuple(got) if isinstance(got, torch.Size) else got
    return error(f"{name}: expected {expected}, got {got}")


def raised(error: Exception) -> bool:
    """Returns whether this module raised an error; its traceback does not help users."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals is globals()


def tensor(name: str, value: Any, or_float: bool = False) -> None:
    if not isinstance(value, TENSORS) and not (or_float and isinstance(value, float)):
        is_layer = isinstance(value, torch.nn.Linear) and name.endswith("weight")
        hint = f" {value!r}" if or_float else "; pass head.weight" if is_layer else ""
        expected = "a Tensor or a float" if or_float else "a Tensor"
        raise _error(name, expected, f"{type(value).__name__}{hint}", TypeError)


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise _error(name, "an int", f"{type(value).__name__} {value!r}", TypeError)


def one_number(name: str, value: Any, error: type[Exception] = ValueError) -> None:
    if not isinstance(value, (*TENSORS, float, Real)):
        raise _error(name, "a float", f"{type(value).__name__} {value!r}", TypeError)
    if isinstance(value, TENSORS) and value.numel() != 1:
        raise _error(name, "one number", f"shape {tuple(value.shape)}", error)


def bounded(scalar: Scalar, value: Any) -> None:
    """Checks the bounds of a number, unless reading a tensor would synchronise a device."""
    if isinstance(value, Number) or (value is None and scalar.optional):
        return  # a Number was checked before the call was planned
    name, low, high, error = scalar.name, scalar.low, scalar.high, scalar.error
    one_number(name, value, error)
    if isinstance(value, TENSORS) and not _can_be_read(value):
        return
    fits = not value > high if scalar.clamped else low <= value <= high
    if not fits or (scalar.positive and not value > 0):
        upper = f"a number in [{low}, {high}]" if high < math.inf else f"a number of at least {low}"
        raise _error(name, "a positive number" if scalar.positive else upper, float(value), error)


def scalar(scalar: Scalar, value: Any) -> None:
    """Checks the type and the bounds of a numeric argument."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        raise _error(scalar.name, "a float", "a Tensor that requires grad", TypeError)
    got, error = "", scalar.error
    if isinstance(value, (list, tuple)):
        got, error = f"{type(value).__name__} {value!r}", TypeError
    elif isinstance(value, TENSORS) and value.numel() > 1:
        got = f"shape {tuple(value.shape)}"
    if got:
        way = (
            f"a formula of @pyfused.loss or @pyfused.activation can take {scalar.name} as a tensor"
        )
        raise _error(scalar.name, "one number", f"{got}; {way}", error)
    bounded(scalar, value)


def devices(tensors: Mapping[str, Tensor], error: Exception) -> None:
    """Raises if tensors are on different devices, after torch has raised; scalars may differ."""
    for name, value in tensors.items():
        device = next(iter(tensors.values())).device
        if value.device != device and value.dim():
            raise _error(name, f"the input's device {device}", value.device, type(error))


def floating(tensors: Mapping[str, Tensor], excluded: Sequence[str], error: Exception) -> None:
    """Raises if the dtype of a tensor that is not excluded is not floating, after torch raised."""
    input, *others = tensors.values()
    for name, value in tensors.items():
        if name not in excluded:
            hint = _are_swapped(input, others[0]) if others else ""
            if input.is_floating_point() and not value.is_complex():
                cast = "float()" if input.dtype is torch.float32 else f"to({input.dtype})"
                hint = f". Pass {name}.{cast}"
            _floating(name, value, hint, type(error))


def _floating(
    name: str, value: Tensor, hint: str = "", error: type[Exception] = RuntimeError
) -> None:
    if not value.is_floating_point():
        raise _error(name, "a floating dtype", f"{value.dtype}{hint}", error)


_INDICES = "class indices of dtype torch.int64 or torch.uint8"
_SCORES = "shape (C), (N, C) or (N, C, d1, ...)"
_OTHER_INTEGERS = (torch.int8, torch.int16, torch.int32)


def _pass_long(target: Tensor) -> str:
    castable = target.dtype in _OTHER_INTEGERS or target.is_floating_point()
    return ". Pass target.long()" if castable else ""


def _are_swapped(input: Tensor, target: Tensor) -> str:
    swapped = target.is_floating_point() and not input.is_floating_point()
    return ". Are input and target swapped?" if swapped else ""


def one_of(
    name: str, value: Any, words: Sequence[str], error: type[Exception] = ValueError
) -> None:
    if value not in words:
        *others, last = map(repr, words)
        raise _error(name, f"{', '.join(others)} or {last}", repr(value), error)


def reduction(value: Any) -> None:
    one_of("reduction", value, ("none", "mean", "sum"))


def keywords(function: str, options: Keywords) -> Keywords:
    unknown = options.keys() - ModuleOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
    return options


def dim(value: Any, input: Tensor) -> None:
    if value is not None:
        integer("dim", value)
        most = max(input.dim(), 1)
        if not -most <= value < most:
            expected = f"{-most} to {most - 1} for an input of shape {tuple(input.shape)}"
            raise _error("dim", expected, value, IndexError)


# ---- losses over classes -------------------------------------------------------------------------

# Functions named after an operator check shapes, dtypes and options. Types are checked by
# `Operator.check_tensors`, and class indices by kernels or by `class_indices`.


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
) -> None:
    integer("ignore_index", options.ignore_index)
    _loss_options(token_weight, denominator, options, loss_shape(input, "none"), input)
    probabilities = target.is_floating_point()
    if input.dim() == 0:
        expected = "logits of shape (C), (N, C) or (N, C, d1, ...)"
        raise _error("input", expected, "()", IndexError if probabilities else RuntimeError)
    if probabilities and target.shape == input.shape:
        if options.ignore_index >= 0:
            expected = "a negative number with class probabilities as target"
            raise _error("ignore_index", expected, options.ignore_index)
    else:
        _class_index_target(input, target)
    dtype: Any = options.loss_dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise _error("loss_dtype", "a floating dtype or None", dtype, ValueError)
    _class_weight(input, weight, dtype, same_dtype=not probabilities)
    if options.gamma != 0 and (probabilities or options.label_smoothing > 0):
        expected = "0.0 with class probabilities or label smoothing"
        raise _error("gamma", expected, "a positive number", ValueError)


def _vocab_options(options: Any) -> None:
    """Checks the numbers and the memory budget of a function over a vocabulary."""
    for name, value in zip(options._fields, options, strict=True):
        if name in OPTIONS:
            bounded(OPTIONS[name], value)
    memory_budget(options.memory_budget)


def _loss_options(
    token_weight: Any, denominator: Any, options: Any, losses: Sequence[int], input: Tensor
) -> None:
    """Checks the options of a loss over a vocabulary, and the tensors that belong to them.

    Args:
        losses: The shape of the unreduced losses.
    """
    reduction(options.reduction)
    _vocab_options(options)
    if denominator is not None:
        bounded(_DENOMINATOR, denominator)
    if not denominator is options.denominator is None and options.reduction != "mean":
        got = "a number" if denominator is None else "a tensor"
        raise _error("denominator", f"None with reduction {options.reduction!r}", got, ValueError)
    same_device(input, denominator=denominator)
    if token_weight is not None:
        tensor("token_weight", token_weight)
        _shape("token_weight", token_weight, losses, "one factor for each loss", ValueError)
        values("token_weight", token_weight, 0.0, math.inf, ValueError)


def factors(token_weight: Any, denominator: Any) -> None:
    """Checks the values of token_weight and denominator, if they are tensors."""
    if isinstance(token_weight, Tensor):
        values("token_weight", token_weight, 0.0, math.inf, ValueError)
    if isinstance(denominator, Tensor):
        bounded(_DENOMINATOR, denominator)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
    classes: int | None = None,
) -> None:
    """Checks shapes, dtypes and options.

    Args:
        classes: The number of all classes if the layer is a shard of them.
    """
    head = Head(input, linear_weight, linear_bias, target, weight)
    logits, target, token_weight = _logits(head, token_weight, classes is None, classes)
    if classes is not None:
        _class_index_target(logits, target, probabilities=False)
    cross_entropy(logits, target, weight, token_weight, denominator, options)


def _logits(
    head: Head, token_weight: Tensor | None, probabilities: bool, classes: int | None
) -> tuple[Any, Any, Any]:
    """Checks a layer; returns its logits, the target and the weights, with one dimension of rows.

    Args:
        probabilities: Whether the target may hold class probabilities.
        classes: As in `linear_cross_entropy`.
    """
    input, linear_weight, linear_bias, target, _ = head
    _vectors("input", input)
    linear_layer(input, linear_weight, linear_bias)
    features, shape = input.shape[-1], linear_weight.shape[:-1]
    if classes is not None and len(shape) > 1:
        raise _error("linear_weight", f"shape (C, {features}) with a shard", linear_weight.shape)
    if input.dim() == 1 and len(shape) > 1:
        of_weight = f"linear_weight of shape {tuple(linear_weight.shape)}"
        raise _error("input", f"shape (N, {features}) with {of_weight}", input.shape)
    if not target.is_floating_point():
        _index_dtype(target)
    elif not probabilities or target.dim() < input.dim():
        alternative = ", or class probabilities for each row" * probabilities
        got = f"{target.dtype} of shape {tuple(target.shape)}. Pass target.long()"
        raise _error("target", f"{_INDICES}{alternative}", got)
    leading: tuple[int, ...] = input.shape[:-1]
    if input.dim() == 2 and target.dim() == 1 and leading != target.shape == shape:
        hint = ". Pass input, linear_weight, target in this order"
        got = f"{tuple(target.shape)}, one for each row of linear_weight{hint}"
        raise _error("target", f"class indices of shape {tuple(leading)}", got, ValueError)
    if input.dim() > 2:
        what = "with the input's leading dimensions"
        of_target = shape if target.is_floating_point() else shape[1:]
        _shape("target", target, (*leading, *of_target), what, RuntimeError)
        if token_weight is not None:
            tensor("token_weight", token_weight)
            _shape("token_weight", token_weight, (*leading, *shape[1:]), what, ValueError)
            values("token_weight", token_weight, 0.0, math.inf, ValueError)
        leading = (math.prod(input.shape[:-1]),)
        target = _with_shape(target, (*leading, *of_target))
        if token_weight is not None:
            token_weight = _with_shape(token_weight, (*leading, *shape[1:]))
    logits = _with_shape(input, (*leading, shape[0] if classes is None else classes, *shape[1:]))
    return logits, target, token_weight


def _with_shape(tensor: Any, shape: Sequence[int]) -> Any:
    """Returns the spec of a tensor with another shape."""
    return TensorSpec(tensor.dtype, tuple(shape), (), tensor.device, tensor.requires_grad)


def _index_dtype(target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise _error("target", _INDICES, f"{target.dtype}{_pass_long(target)}")


def memory_budget(value: Any) -> None:
    if value is not None:
        integer("memory_budget", value)
        if value <= 0:
            raise _error("memory_budget", "a positive number of bytes", value, ValueError)


def linear_layer(input: Tensor, weight: Tensor, bias: Any, prefix: str = "") -> None:
    """Checks shapes, devices and dtypes.

    Args:
        prefix: Precedes the tensors' names in messages.
    """
    features, shape = input.shape[-1], weight.shape[:-1]
    if weight.dim() < 2 or weight.shape[-1] != features:
        swapped = weight.dim() == 2 and weight.shape[0] == features
        hint = f". Is it transposed, or are the {prefix}input logits?" * swapped
        of_input = f"the {prefix}input of shape {tuple(input.shape)}"
        expected = f"shape (C, ..., {features}) for {of_input}"
        raise _error(f"{prefix}linear_weight", expected, f"{tuple(weight.shape)}{hint}")
    if bias is not None:
        _shape(f"{prefix}linear_bias", bias, shape)
    autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    parameters = {"linear_weight": weight, "linear_bias": bias}
    same_device(input, prefix, **parameters)
    for name, value in parameters.items():
        if value is None or value.dtype is input.dtype:
            continue
        if not autocast or torch.float64 in (value.dtype, input.dtype):  # autocast keeps float64
            raise _error(f"{prefix}{name}", f"the {prefix}input's dtype {input.dtype}", value.dtype)


def same_device(input: Tensor, prefix: str = "", **parameters: Any) -> None:
    """Raises for tensors on another device, as torch reads invalid memory for a meta weight."""
    for name, value in parameters.items():
        if isinstance(value, TENSORS) and value.device != input.device:
            expected = f"the {prefix}input's device {input.device}"
            raise _error(f"{prefix}{name}", expected, value.device)


def contrastive_loss(a: Tensor, b: Tensor, bias: Any, scale: Any, options: Any) -> None:
    for name, number in (("scale", scale), ("bias", bias)):
        if not isinstance(number, Number) and not (name == "bias" and number is None):
            one_number(name, number)
    if a.dim() != 2:
        raise _error("a", "shape (N, D)", a.shape)
    _floating("a", a)
    if b.shape != a.shape:
        hint = ". For more candidates, call linear_cross_entropy(scale * a, b, target)"
        fits = _sizes_are_known(a, b) and b.dim() == 2 and b.shape[1:] == a.shape[1:]
        hint *= fits and len(b) > len(a)
        raise _error("b", f"the shape of a, {tuple(a.shape)}", f"{tuple(b.shape)}{hint}")
    autocast = not a.is_meta and torch.is_autocast_enabled(a.device.type)
    same_dtype = b.dtype is a.dtype or (autocast and torch.float64 not in (a.dtype, b.dtype))
    if b.device != a.device or not same_dtype:
        expected = f"the dtype and device of a, {a.dtype} on {a.device}"
        raise _error("b", expected, f"{b.dtype} on {b.device}")
    reduction(options.reduction)
    memory_budget(options.memory_budget)


def kl_div_with_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> None:
    _vectors("logits", logits)
    _vectors("teacher_logits", teacher_logits)
    _shape("teacher_logits", teacher_logits, logits.shape, "the shape of logits")
    _divergence(token_weight, denominator, options, logits)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor,
    teacher_linear_bias: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> None:
    _head(input, linear_weight, linear_bias)
    _head(teacher_input, teacher_linear_weight, teacher_linear_bias, "teacher_")
    features = teacher_input.shape[-1]
    shape = len(linear_weight), features
    _shape("teacher_linear_weight", teacher_linear_weight, shape, "with the student's classes")
    _shape(
        "teacher_input", teacher_input, (*input.shape[:-1], features), "with the student's tokens"
    )
    _divergence(token_weight, denominator, options, input)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> None:
    _head(input, linear_weight, linear_bias)
    _vectors("teacher_log_probs", teacher_log_probs)
    if teacher_indices.dtype is not torch.int64:
        raise _error("teacher_indices", "torch.int64", teacher_indices.dtype)
    classes, k = len(linear_weight), teacher_log_probs.shape[-1]
    if not 0 < k <= classes:
        raise _error("teacher_log_probs", f"1 to {classes} classes", k)
    shape = *input.shape[:-1], k
    _shape("teacher_log_probs", teacher_log_probs, shape, "with the student's tokens")
    _shape("teacher_indices", teacher_indices, shape, "the shape of teacher_log_probs")
    one_of("remainder", options.remainder, ("bucket", "ignore"))
    if options.remainder == "ignore" and options.beta != 0:
        raise _error("beta", "0.0 with remainder 'ignore'", "a positive number", ValueError)
    _divergence(token_weight, denominator, options, input)


def _divergence(
    token_weight: Any, denominator: Any, options: DivergenceOptions, input: Tensor
) -> None:
    beta: Any = options.beta
    if isinstance(beta, Tensor) and beta.requires_grad and not 0 < beta < 1:
        raise _error("beta", "a number in (0.0, 1.0) to be learned", beta.item(), ValueError)
    _loss_options(token_weight, denominator, options, input.shape[:-1], input)


def topk_indices(indices: Tensor, classes: int) -> Tensor:
    """Returns whether each row of (N, k) has an invalid or repeated index; raises on CPUs."""
    indices = indices.sort(-1).values
    outside = (indices < 0) | (indices >= classes)
    twice = torch.zeros_like(outside)
    twice[:, 1:] = indices[:, 1:] == indices[:, :-1]
    if _can_be_read(indices):
        for invalid, error, expected, got in (
            (outside, IndexError, f"class indices in [0, {classes})", ""),
            (twice, ValueError, "each class once in a row", " twice"),
        ):
            if invalid.any():
                row, column = invalid.nonzero()[0].tolist()
                value = int(indices[row, column])
                raise error(f"teacher_indices: expected {expected}, got {value}{got} in row {row}")
    return (outside | twice).any(-1)


def topk_log_probs(log_probs: Tensor) -> None:
    """Raises if rows (..., k) on CPUs are not log-probabilities, up to rounding to bfloat16."""
    if not _can_be_read(log_probs):
        return
    logs = log_probs.detach().double()
    p = logs.exp()
    # A relative error of 2 ** -8 in log p changes the sum by 2 ** -8 * p * |log p|.
    most = 1 + 2**-8 * (1 + (p * logs.abs()).where(p != 0, 0).sum(-1))
    total = p.sum(-1)
    invalid = (total > most) | (logs > 1).any(-1)
    if invalid.any():
        row = int(invalid.flatten().nonzero()[0])
        raise ValueError(
            "teacher_log_probs: expected logarithms of probabilities that add up to at most 1, got "
            f"a sum of {float(total.flatten()[row]):.4g} in row {row}, whose largest logarithm is "
            f"{float(logs.flatten(0, -2)[row].max()):.4g}"
        )


def _vectors(name: str, value: Tensor) -> None:
    if not value.dim():
        raise _error(name, "one dimension or more", "shape ()")
    if not value.is_floating_point():  # without a Python call in the common case
        _floating(name, value)


def _head(input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    _vectors(f"{prefix}input", input)
    if weight.dim() != 2:
        raise _error(f"{prefix}linear_weight", f"shape (C, {input.shape[-1]})", weight.shape)
    linear_layer(input, weight, bias, prefix)


def _shape(
    name: str,
    value: Tensor,
    expected: Sequence[int],
    what: str = "",
    error: type[Exception] = RuntimeError,
) -> None:
    if value.shape != tuple(expected):
        described = f", {what}" if what else ""
        raise _error(name, f"shape {tuple(expected)}{described}", value.shape, error)


def log_probs(logits: Tensor, target: Tensor, options: LogProbsOptions) -> None:
    if logits.dim() == 0:
        raise _error("logits", _SCORES, "()")
    _floating("logits", logits, _are_swapped(logits, target))
    _class_index_target(logits, target, probabilities=False)
    integer("ignore_index", options.ignore_index)
    _vocab_options(options)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    options: LogProbsOptions,
    classes: int | None = None,
) -> None:
    head = Head(input, linear_weight, linear_bias, target, None)
    logits, target, _ = _logits(head, None, False, classes)
    log_probs(logits, target, options)


def classes_at(where: int, name: str, logits: Tensor, class_dim: int | None) -> Tensor:
    """Moves the dimension of the classes to the index that an operator expects.

    Args:
        where: The index.
        class_dim: The ``dim`` of the call; required for more than two dimensions.
    """
    if not isinstance(logits, Tensor) or (class_dim is None and logits.dim() < 3):
        return logits
    if class_dim is None:
        expected = f"the dimension of the classes for {name} of shape {tuple(logits.shape)}"
        got = (
            f"None. Pass dim=-1 for {logits.shape[-1]} classes (a language model's logits) or "
            f"dim=1 for {logits.shape[1]} classes (the layout of torch's cross_entropy)"
        )
        raise _error("dim", expected, got, ValueError)
    dim(class_dim, logits)
    dims = max(logits.dim(), 1)
    where = min(where, dims - 1)
    return logits if (class_dim - where) % dims == 0 else logits.movedim(class_dim, where)


def additive_margin(input: Tensor, target: Tensor, margin: float, kind: str) -> None:
    """Checks types, shapes and options; class indices may be out of range."""
    tensor("input", input)
    tensor("target", target)
    bounded(Scalar("margin", low=0.0, error=ValueError), margin)
    one_of("kind", kind, ("cosface", "arcface"))
    if target.is_floating_point():
        raise _error("target", "class indices", target.dtype, ValueError)
    _class_index_target(input, target, probabilities=False)


def _class_weight(
    input: Tensor,
    weight: Tensor | None,
    loss_dtype: torch.dtype | None = None,
    same_dtype: bool = True,
) -> None:
    if weight is None:
        return
    _shape("weight", weight, (classes_of(input),), "one factor for each class")
    casts = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    casts = casts and torch.float64 not in (weight.dtype, input.dtype)  # autocast keeps float64
    if not same_dtype or weight.dtype is input.dtype or casts:
        return
    expected = f"the input's dtype {input.dtype}"
    if loss_dtype is not None:
        wide = torch.promote_types(input.dtype, weight.dtype)
        if wide is weight.dtype and torch.promote_types(wide, loss_dtype) is loss_dtype:
            return
        expected += f", or a wider one up to loss_dtype {loss_dtype}"
    raise _error("weight", expected, weight.dtype)


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: Any) -> None:
    reduction(options.reduction)
    integer("ignore_index", options.ignore_index)
    if input.dim() == 0:
        raise _error("input", _SCORES, "()", ValueError)
    _index_shape(input, target)
    _index_dtype(target)
    _class_weight(input, weight)


def _class_index_target(input: Tensor, target: Tensor, probabilities: bool = True) -> None:
    if target.dtype is torch.int64 and target.shape == input.shape[:1] and input.dim() == 2:
        return  # the common case
    expected, shape = loss_shape(input, "none"), tuple(input.shape)
    fits = not probabilities or target.shape == expected or _is_single(input, target)
    if target.shape == input.shape or (target.dtype not in (torch.int64, torch.uint8) and fits):
        alternative = f", or class probabilities of a floating dtype and the input's shape {shape}"
        indices = f"{_INDICES} and shape {tuple(expected)}{alternative * probabilities}"
        got = f"{target.dtype} of shape {tuple(target.shape)}{_pass_long(target)}"
        raise _error("target", indices, got)
    _index_shape(input, target, probabilities)
    if input.dim() > 2 and input.shape[1] == 0 and target.numel():
        raise _error("input", "one class or more", f"shape {shape}")


def _index_shape(input: Tensor, target: Tensor, probabilities: bool = False) -> None:
    """Checks the shape of class indices; torch's error is a ValueError if batch sizes differ."""
    expected = loss_shape(input, "none")
    if target.shape == expected or _is_single(input, target):
        return
    batch = target.shape[:1] != input.shape[:1]
    if input.dim() == 1:
        batch = target.dim() == 1 and not target.is_floating_point()
    error = ValueError if batch else RuntimeError
    alternative = f" or class probabilities of the input's shape {tuple(input.shape)}"
    indices = f"class indices of shape {tuple(expected)}{alternative * probabilities}"
    got = f"shape {tuple(target.shape)}{_hint(input, target)}"
    raise _error("target", indices, got, error)


def _is_single(input: Tensor, target: Tensor) -> bool:
    """Returns whether the class index of one row has shape (1), which torch takes as a scalar."""
    return input.dim() == 1 and target.shape == (1,)


def _hint(input: Tensor, target: Tensor) -> str:
    """Returns a hint for a common mistake in the target's shape, else ""."""
    if not _sizes_are_known(input, target):
        return ""
    if input.dim() > 2 and target.shape == input.shape[:-1]:
        return (
            ". Dimension 1 of the input has to be the classes: pass input.movedim(-1, 1), or "
            "input.flatten(0, -2) and target.flatten()"
        )
    rows = math.prod(input.shape[:-1])  # the shape of a spec is a tuple
    if not target.is_floating_point() and target.numel() == rows and input.dim() > 1:
        return f". Pass {'target.flatten()' if input.dim() == 2 else 'input.flatten(0, -2)'}"
    return _are_swapped(input, target)


def _sizes_are_known(*tensors: Tensor) -> bool:
    """Returns whether a hint may compare sizes; planning a call does not know all of them."""
    return not any(isinstance(size, DynamicSize) for x in tensors for size in x.shape)


def classes_of(input: Tensor) -> int:
    return input.shape[0 if input.dim() == 1 else 1]


def raise_out_of_range(classes: int, target: Tensor, ignore_index: int, position: int) -> NoReturn:
    """Raises for the class index at ``position`` in the flattened target."""
    flat = torch.tensor(position, device="cpu")
    index = tuple(int(i) for i in torch.unravel_index(flat, target.shape))
    raise IndexError(
        f"target: expected class indices in [0, {classes}) or ignore_index = {ignore_index}, got "
        f"{target[index].item()} at position {index}"
    )


def class_indices(classes: int, target: Tensor, ignore_index: int) -> None:
    """Raises for the first class index out of range, as the kernels do."""
    if target.is_floating_point() or not target.numel() or not _can_be_read(target):
        return
    index = target.long()  # comparing a uint8 tensor with 1462 would wrap it to 182
    low, high = index.aminmax()
    if int(low) >= 0 and int(high) < classes:  # twice as fast as comparing tensors
        return
    invalid = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if invalid.any():
        first = int(invalid.flatten().nonzero()[0])
        raise_out_of_range(classes, target, ignore_index, first)


def overwritable(input: Tensor) -> None:
    """Raises for a tensor whose values may be read after the call, other than by autograd."""
    base = input._base if input._base is not None else input
    if base.is_leaf:
        what = "a leaf" if base is input else "a view of a leaf"
        got = "True, which would overwrite the leaf's values"
        raise _error("inplace", f"False for an input that is {what}", got)
    extent = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= extent:
            expected = "False for an input whose elements share memory"
            raise _error("inplace", expected, f"True with strides {input.stride()}")
        extent += stride * (size - 1)


# ---- pointwise losses ----------------------------------------------------------------------------


def _can_be_read(value: Any) -> bool:
    """Returns whether a tensor's values can be read without synchronising a device."""
    plain = type(value) in (Tensor, Parameter) and value.is_cpu
    if not plain or is_dynamo_compiling() or dispatch_modes():
        return False  # a mode may trace operators that read values
    return not is_functorch_wrapped(value)


def values(
    name: str, value: Tensor | float, low: float, high: float, error: type[Exception]
) -> None:
    """Raises for values out of bounds, without reading tensors on GPUs."""
    if isinstance(value, float):
        value = torch.tensor(value, device="cpu")
    if not _can_be_read(value) or not value.numel() or value.is_complex():
        return
    value = value.detach()
    least, most = (float(bound) for bound in value.aminmax())
    if low <= least and most <= high:
        return
    within = (value >= low) & (value <= high)
    invalid = value[~(within if high < math.inf else within | value.isnan())]
    if invalid.numel():
        are_logits = name == "input" and high == 1  # of binary_cross_entropy
        hint = ". For logits, call binary_cross_entropy_with_logits" if are_logits else ""
        raise _error(name, f"values in [{low}, {high}]", f"{invalid[0].item()}{hint}", error)


# Each function checks one rule for shapes, which operands declare. Its arguments are the operand's
# name and shape, the name of the first operand, and the shapes of the operands before it.


def broadcasts(
    name: str, shape: torch.Size, owner: str, input: torch.Size, *_: Any, expands: bool = False
) -> None:
    """Checks that a shape broadcasts with the input's, or expands to it."""
    pairs = zip(reversed(input), reversed(shape), strict=False)
    # Dynamo evaluates `b in (a, 1)` as False if only one of the sizes is symbolic.
    fits = all(b is a or b == a or b == 1 or (a == 1 and not expands) for a, b in pairs)
    if not fits or (expands and len(shape) > len(input)):
        verb = "broadcasts to" if expands else "broadcasts with"
        raise _error(name, f"a shape that {verb} {owner} of shape {tuple(input)}", shape)


def expands(name: str, shape: torch.Size, owner: str, input: torch.Size, *_: Any) -> None:
    broadcasts(name, shape, owner, input, expands=True)


def equals(
    name: str,
    shape: torch.Size,
    _: str,
    input: torch.Size,
    *_others: Any,
    error: type[Exception] = ValueError,
) -> None:
    if shape != input:
        raise _error(name, f"the input's shape {tuple(input)}", shape, error)


def aligned(name: str, shape: torch.Size, owner: str, input: torch.Size, *_: Any) -> None:
    """Checks that a shape broadcasts with the input's and has as many dimensions."""
    if len(shape) != len(input):
        expected = f"as many dimensions as {owner} of shape {tuple(input)}"
        raise _error(name, expected, f"shape {tuple(shape)}")
    broadcasts(name, shape, owner, input)


def one_for_each_row(name: str, shape: torch.Size, _: str, *inputs: torch.Size) -> None:
    if len(shape) > 1 or len(inputs[0]) != len(shape) + 1:
        expected = "shape (N) for inputs of shape (N, D), or () for (D)"
        raise _error(name, expected, f"shape {tuple(shape)} for {tuple(inputs[0])}")
    for input in inputs:
        broadcasts(name, shape, "rows", input[:-1])


def variance(name: str, shape: torch.Size, _: str, input: torch.Size, *_others: Any) -> None:
    if shape == input or shape == input[:-1]:
        return
    pairs = zip(input, shape, strict=False)
    if len(shape) != len(input) or [b for a, b in pairs if a != b] != [1]:
        expected = (
            f"a float or the input's shape {tuple(input)}, where one dimension may have size 1 or "
            "the last may be missing"
        )
        raise _error(name, expected, f"shape {tuple(shape)}", ValueError)
