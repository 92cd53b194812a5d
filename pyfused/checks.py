"""Checks the arguments of calls, and raises errors for those that no kernel supports.

If torch has the function, it is called instead, and raises its own error or computes the result. If
torch lacks the function or an option, users get the error of the check, which names the argument,
what was expected and what was passed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Rational, Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from pyfused.layout import broadcast_with, loss_shape
from pyfused.torch_internals import dispatch_modes, is_functorch_wrapped
from pyfused.types import CrossEntropyOptions, DivergenceOptions, LogProbsOptions, Scalar

# What the functions of this module raise.
ERRORS = IndexError, RuntimeError, TypeError, ValueError
REDUCTIONS = ("none", "mean", "sum")
# Tensors may be 0, because tensors on GPUs are not read: the mean is then NaN.
_DENOMINATOR = Scalar("denominator", low=0.0)
_INDEX_DTYPES = (torch.int64, torch.uint8)


def reason(check: Callable[..., None], *arguments: Any) -> str | None:
    """Returns the message of the error that a check raises, or None."""
    try:
        check(*arguments)
    except ERRORS as error:
        return str(error)
    return None


def _error(name: str, expected: str, got: Any, error: type[Exception] = RuntimeError) -> Exception:
    got = tuple(got) if isinstance(got, torch.Size) else got
    return error(f"{name}: expected {expected}, got {got}")


# ---- types, numbers and words --------------------------------------------------------------------


def tensor(name: str, value: Any, or_float: bool = False) -> None:
    if not isinstance(value, Tensor) and not (or_float and isinstance(value, float)):
        is_layer = isinstance(value, torch.nn.Linear) and name.endswith("weight")
        hint = f" {value!r}" if or_float else "; pass head.weight" if is_layer else ""
        expected = "a Tensor or a float" if or_float else "a Tensor"
        raise _error(name, expected, f"{type(value).__name__}{hint}", TypeError)


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise _error(name, "an int", f"{type(value).__name__} {value!r}", TypeError)
    if not -(1 << 63) <= int(value) < 1 << 63:
        raise _error(name, "an int of 64 bits", value, ValueError)


def is_number(value: Any) -> bool:
    """Returns whether torch accepts a value as a real number, which excludes a Fraction."""
    if isinstance(value, (float, int, Integral)):
        return True
    return isinstance(value, Real) and not isinstance(value, Rational)


def bounded(scalar: Scalar, value: Any) -> None:
    """Checks the type and the bounds of a number, which may be a tensor without dimensions.

    A tensor is not read if this would synchronise a device.
    """
    if value is None and scalar.optional:
        return
    name, low, high = scalar.name, scalar.low, scalar.high
    if not isinstance(value, Tensor) and not is_number(value):
        raise _error(name, "a float", f"{type(value).__name__} {value!r}", TypeError)
    if isinstance(value, Tensor):
        if value.dim():
            expected = "a number or a tensor of shape ()"
            raise _error(name, expected, f"shape {tuple(value.shape)}", ValueError)
        if not _can_be_read(value):
            return
    if not scalar.has_bounds:
        return  # NaN is valid, too
    fits = not value > high if scalar.clamped else low <= value <= high
    if not fits or (scalar.positive and not value > 0):
        got = value.item() if isinstance(value, Tensor) else value
        raise _error(name, scalar.expected(), got, ValueError)


def one_of(
    name: str, value: Any, words: Sequence[str], error: type[Exception] = ValueError
) -> None:
    if value not in words:
        *others, last = map(repr, words)
        raise _error(name, f"{', '.join(others)} or {last}", repr(value), error)


def choice(name: str, value: Any, values: Sequence[Any]) -> None:
    """Checks that an option is one of several words, or if these are not words, a bool."""
    if isinstance(values[0], str):
        one_of(name, value, values, RuntimeError)
    elif type(value) is not bool:
        raise _error(name, "a bool", f"{type(value).__name__} {value!r}", TypeError)


def reduction(value: Any) -> None:
    if value not in REDUCTIONS:
        one_of("reduction", value, REDUCTIONS)


def memory_budget(value: Any) -> None:
    if value is not None:
        integer("memory_budget", value)
        if value <= 0:
            raise _error("memory_budget", "a positive number of bytes", value, ValueError)


def keywords(function: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raises for the names of options that a function does not take."""
    if unknown := {*options} - {*known}:
        close = difflib.get_close_matches(min(unknown), known, 1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}{hint}")


# ---- losses over classes -------------------------------------------------------------------------

# Functions named after an operator check shapes, dtypes and options. Types are checked by
# `Operator.check_types`, and class indices by kernels or by `class_indices`.


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
) -> None:
    _floating("input", input)
    indices = loss_shape(input, "none")
    _target(target, indices, input.shape)
    class_options(input, target, weight, classes_of(input), options)
    row_factors(input, token_weight, denominator, indices, options)


def class_options(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    options: CrossEntropyOptions,
) -> None:
    """Checks the weight of each class, and the options that class probabilities exclude."""
    probabilities = target.is_floating_point()
    if probabilities and options.ignore_index >= 0:
        expected = "a negative number with class probabilities as target"
        raise _error("ignore_index", expected, options.ignore_index)
    if weight is not None:
        _class_weight(input, classes, weight, options.loss_dtype, same_dtype=not probabilities)
    if options.gamma != 0 and probabilities:
        _raise_for_gamma()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
) -> None:
    indices, probabilities = _head_shapes(input, linear_weight, linear_bias)
    _target(target, indices, probabilities)
    class_options(input, target, weight, linear_weight.shape[0], options)
    if not token_weight is denominator is None:
        row_factors(input, token_weight, denominator, indices, options)


def _head_shapes(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Checks a linear layer; returns the shapes of its class indices and class probabilities."""
    _floating("input", input)
    linear_layer(input, weight, bias)
    leading, (classes, *positions) = tuple(input.shape[:-1]), weight.shape[:-1]
    return (*leading, *positions), (*leading, classes, *positions)


def log_probs(logits: Tensor, target: Tensor, _: LogProbsOptions) -> None:
    _floating("logits", logits)
    _target(target, loss_shape(logits, "none"))


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    _: LogProbsOptions,
) -> None:
    _target(target, _head_shapes(input, linear_weight, linear_bias)[0])


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, _: Any) -> None:
    _floating("input", input)
    _target(target, loss_shape(input, "none"))
    if weight is not None:
        _class_weight(input, classes_of(input), weight)


def additive_margin(input: Tensor, target: Tensor, margin: float, kind: str) -> None:
    """Checks types, shapes and options; class indices may be out of range."""
    tensor("input", input)
    tensor("target", target)
    bounded(Scalar("margin", low=0.0), margin)
    one_of("kind", kind, ("cosface", "arcface"))
    _floating("input", input)
    _target(target, loss_shape(input, "none"))


def _target(
    target: Tensor, indices: Sequence[int], probabilities: Sequence[int] | None = None
) -> None:
    """Checks the dtype and the shape of a target.

    Args:
        indices: The shape of class indices.
        probabilities: The shape of class probabilities, None if they are not supported.
    """
    if target.dtype is torch.int64 and target.shape == indices:
        return  # the common case
    indices, shape = tuple(indices), tuple(target.shape)
    floats = target.is_floating_point()
    if floats and probabilities is not None and shape == tuple(probabilities):
        return
    if target.dtype in _INDEX_DTYPES and (shape == indices or (not indices and shape == (1,))):
        return
    expected = f"class indices of dtype torch.int64 or torch.uint8 and shape {indices}"
    if probabilities is not None:
        expected += f", or class probabilities of shape {tuple(probabilities)}"
    if floats or target.dtype not in _INDEX_DTYPES:
        got = f"{target.dtype} of shape {shape}. Pass target.long()"
        raise _error("target", expected, got)
    hint = ". Pass target.flatten()" * (len(indices) == 1 and len(shape) > 1)
    raise _error("target", expected, f"shape {shape}{hint}", ValueError)


def _class_weight(
    input: Tensor,
    classes: int,
    weight: Tensor,
    loss_dtype: torch.dtype | None = None,
    same_dtype: bool = True,
) -> None:
    _shape("weight", weight, (classes,), "one factor for each class")
    same_device(input, weight=weight)
    if not same_dtype or _is_cast(input, weight):
        return
    expected = f"the input's dtype {input.dtype}"
    if loss_dtype is not None:
        wide = torch.promote_types(input.dtype, weight.dtype)
        if wide is weight.dtype and torch.promote_types(wide, loss_dtype) is loss_dtype:
            return
        expected += f", or a wider one up to loss_dtype {loss_dtype}"
    raise _error("weight", expected, weight.dtype)


def row_choices(options: Any) -> None:
    """Checks the options of a function of rows that are not numbers, and their combinations.

    Called for each new number, so it calls few functions.
    """
    for name, value in zip(options._fields, options, strict=True):
        if name == "reduction":
            reduction(value)
        elif name == "ignore_index":
            if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
                integer(name, value)
        elif name == "memory_budget" and value is not None:
            memory_budget(value)
        elif name == "loss_dtype":
            is_floating = isinstance(value, torch.dtype) and value.is_floating_point
            if value is not None and not is_floating:
                raise _error(name, "a floating dtype or None", value, ValueError)
    if getattr(options, "gamma", 0) != 0 and options.label_smoothing > 0:
        _raise_for_gamma()
    if getattr(options, "denominator", None) is not None and options.reduction != "mean":
        _raise_for_denominator(options, "a number")


def _raise_for_gamma() -> NoReturn:
    expected = "0.0 with class probabilities or label smoothing"
    raise _error("gamma", expected, "a positive number", ValueError)


def _raise_for_denominator(options: Any, got: str) -> NoReturn:
    raise _error("denominator", f"None with reduction {options.reduction!r}", got, ValueError)


def row_factors(
    input: Tensor, token_weight: Any, denominator: Any, losses: Sequence[int], options: Any
) -> None:
    """Checks the factor of each row and the divisor of a mean, except for their values.

    Args:
        losses: The shape of the unreduced losses.
    """
    if denominator is not None:
        if options.reduction != "mean":
            _raise_for_denominator(options, "a tensor")
        same_device(input, denominator=denominator)
    if token_weight is not None:
        tensor("token_weight", token_weight)
        _shape("token_weight", token_weight, losses, "one factor for each loss", ValueError)


def factors(token_weight: Any, denominator: Any) -> None:
    """Checks the values of token_weight and denominator, which may also be None or numbers."""
    if _can_be_read(token_weight) and token_weight.numel():
        weights = token_weight.detach()
        if not weights.min() >= 0:  # or NaN
            got = weights[~(weights >= 0)][0].item()
            raise _error("token_weight", "values of at least 0", got, ValueError)
    if isinstance(denominator, Tensor):
        bounded(_DENOMINATOR, denominator.squeeze())


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
    integer("dim", class_dim)
    dims = max(logits.dim(), 1)
    if not -dims <= class_dim < dims:
        expected = f"{-dims} to {dims - 1} for {name} of shape {tuple(logits.shape)}"
        raise _error("dim", expected, class_dim, IndexError)
    where = min(where, dims - 1)
    return logits if (class_dim - where) % dims == 0 else logits.movedim(class_dim, where)


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
    invalid = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if invalid.any():
        first = int(invalid.flatten().nonzero()[0])
        raise_out_of_range(classes, target, ignore_index, first)


# ---- linear layers and distillation --------------------------------------------------------------


def linear_layer(input: Tensor, weight: Tensor, bias: Any, prefix: str = "") -> None:
    """Checks shapes, devices and dtypes.

    Args:
        prefix: Precedes the tensors' names in messages.
    """
    features, shape = input.shape[-1], weight.shape[:-1]
    if weight.dim() < 2 or weight.shape[-1] != features:
        is_transposed = weight.dim() == 2 and weight.shape[0] == features
        hint = f". Is it transposed? Pass {prefix}linear_weight.t()" * is_transposed
        of_input = f"the {prefix}input of shape {tuple(input.shape)}"
        expected = f"shape (C, ..., {features}) for {of_input}"
        raise _error(f"{prefix}linear_weight", expected, f"{tuple(weight.shape)}{hint}")
    if input.dim() == 1 and weight.dim() > 2:
        expected = f"shape (N, {features}) with a weight of shape {tuple(weight.shape)}"
        raise _error(f"{prefix}input", expected, input.shape)
    if bias is not None:
        _shape(f"{prefix}linear_bias", bias, shape)
    for name, value in (("linear_weight", weight), ("linear_bias", bias)):
        if value is None:
            continue
        if value.device != input.device:
            same_device(input, prefix, **{name: value})
        if value.dtype is not input.dtype and not _is_cast(input, value):
            raise _error(f"{prefix}{name}", f"the {prefix}input's dtype {input.dtype}", value.dtype)


def _is_cast(input: Tensor, value: Tensor) -> bool:
    """Returns whether a tensor has the input's dtype, or autocast casts both to one dtype."""
    if value.dtype is input.dtype:
        return True
    if input.is_meta or torch.float64 in (value.dtype, input.dtype):  # autocast keeps float64
        return False
    return torch.is_autocast_enabled(input.device.type)


def same_device(input: Tensor, prefix: str = "", **parameters: Any) -> None:
    """Raises for tensors on other devices: with a meta weight, torch would read invalid memory."""
    for name, value in parameters.items():
        if isinstance(value, Tensor) and value.device != input.device:
            expected = f"the {prefix}input's device {input.device}"
            raise _error(f"{prefix}{name}", expected, value.device)


def kl_div_with_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> None:
    _floating("logits", logits)
    _floating("teacher_logits", teacher_logits)
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
    shape, tokens = (linear_weight.shape[0], features), (*input.shape[:-1], features)
    _shape("teacher_linear_weight", teacher_linear_weight, shape, "with the student's classes")
    _shape("teacher_input", teacher_input, tokens, "with the student's tokens")
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
    _floating("teacher_log_probs", teacher_log_probs)
    if teacher_indices.dtype is not torch.int64:
        raise _error("teacher_indices", "torch.int64", teacher_indices.dtype)
    classes, k = linear_weight.shape[0], teacher_log_probs.shape[-1]
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
    row_factors(input, token_weight, denominator, input.shape[:-1], options)


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


def _head(input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    _floating(f"{prefix}input", input)
    if weight.dim() != 2:
        raise _error(f"{prefix}linear_weight", f"shape (C, {input.shape[-1]})", weight.shape)
    linear_layer(input, weight, bias, prefix)


def _floating(name: str, value: Tensor) -> None:
    if not value.dim():
        raise _error(name, "one dimension or more", "shape ()")
    if not value.is_floating_point():
        raise _error(name, "a floating dtype", value.dtype)


def _shape(
    name: str,
    value: Tensor,
    expected: Sequence[int],
    what: str = "",
    error: type[Exception] = RuntimeError,
) -> None:
    if tuple(value.shape) != tuple(expected):
        described = f", {what}" if what else ""
        raise _error(name, f"shape {tuple(expected)}{described}", value.shape, error)


def _can_be_read(value: Any) -> bool:
    """Returns whether a tensor's values can be read without synchronising a device."""
    plain = type(value) in (Tensor, Parameter) and value.is_cpu
    if not plain or is_dynamo_compiling() or dispatch_modes():
        return False  # a mode may trace operators that read values
    return not is_functorch_wrapped(value)


def broadcasts(name: str, value: Tensor, owner: str, input: Tensor, expands: bool = False) -> None:
    """Checks that a shape broadcasts with the input's, or expands to it."""
    if not broadcast_with(value.shape, input.shape, expands):
        verb = "broadcasts to" if expands else "broadcasts with"
        expected = f"a shape that {verb} {owner} of shape {tuple(input.shape)}"
        raise _error(name, expected, value.shape)
