"""Every argument error and its wording; the types are the ones that torch raises."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import CrossEntropyOptions

_REDUCTIONS = ("none", "mean", "sum")


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def _reduction(value: Any) -> None:
    if value not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {value!r}")


def _number(name: str, value: Any, kind: tuple[type, type], expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
) -> None:
    """Types, shapes, dtypes and options; class indices themselves are checked by the kernel."""
    _tensor("input", input)
    _tensor("target", target)
    ignore_index, reduction, label_smoothing = options
    _reduction(reduction)
    _number("ignore_index", ignore_index, (int, Integral), "an int")
    _number("label_smoothing", label_smoothing, (float, Real), "a float")
    if input.dim() == 0:
        raise RuntimeError("input: expected logits of shape (C), (N, C) or (N, C, d1, ...), got ()")
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing: expected 0.0 to 1.0, got {label_smoothing}")
    if target.shape == input.shape and target.is_floating_point():
        if ignore_index >= 0:
            raise RuntimeError(
                "ignore_index: expected none (a negative number) with class probabilities as "
                f"target, got {ignore_index}"
            )
    else:
        _class_index_target(input, target)
    if weight is not None:
        _tensor("weight", weight)
        classes = input.shape[0 if input.dim() == 1 else 1]
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight: expected shape ({classes},), one for each class, got "
                f"{tuple(weight.shape)}"
            )
        same = weight.dtype is input.dtype or torch.is_autocast_enabled(input.device.type)
        if not target.is_floating_point() and not same:
            raise RuntimeError(f"weight: expected the input's {input.dtype}, got {weight.dtype}")


def _class_index_target(input: Tensor, target: Tensor) -> None:
    expected = input.shape[:-1] if input.dim() < 3 else input.shape[:1] + input.shape[2:]
    lone = input.dim() == 1 and target.shape == (1,)  # as good as a scalar
    if target.shape == input.shape or (
        target.dtype not in (torch.int64, torch.uint8) and (target.shape == expected or lone)
    ):
        raise RuntimeError(
            "target: expected class indices of dtype torch.int64 or torch.uint8 and shape "
            f"{tuple(expected)}, or class probabilities of a floating dtype and the input's shape "
            f"{tuple(input.shape)}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.shape != expected and not lone:
        batches = (*expected[:1], 1)[0], (*target.shape[:1], 1)[0]
        raise (ValueError if batches[0] != batches[1] else RuntimeError)(
            f"target: expected class indices of shape {tuple(expected)} or class probabilities of "
            f"the input's shape {tuple(input.shape)}, got shape {tuple(target.shape)}"
        )


def target_out_of_range(
    input: Tensor, target: Tensor, ignore_index: int, position: int
) -> IndexError:
    """The error for the class index at ``position``, counted along the flattened target."""
    classes = input.shape[0 if input.dim() == 1 else 1]
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), target.shape))
    return IndexError(
        f"target: expected class indices in [0, {classes}) or ignore_index = {ignore_index}, got "
        f"{target[index].item()} at position {index}"
    )


def class_indices(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raises for the first class index out of range, as the kernel finds it."""
    classes = input.shape[0 if input.dim() == 1 else 1]
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if not target.is_floating_point() and wrong.any():
        raise target_out_of_range(input, target, ignore_index, int(wrong.flatten().nonzero()[0]))


def overwritable(input: Tensor) -> None:
    """That nobody but autograd's next node can miss what a tensor held."""
    base = input._base if input._base is not None else input
    if base.is_leaf:
        what = "a leaf" if base is input else "a view of a leaf"
        raise RuntimeError(
            f"inplace: expected False for an input that is {what}, whose values outlive the call, "
            "got True"
        )
    reach = 0  # how far the dimensions inside the current one stretch
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise RuntimeError(
                "inplace: expected False for an input with elements that share memory, got True "
                f"with strides {input.stride()}"
            )
        reach += stride * (size - 1)


def mse_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> None:
    _tensor("input", input)
    _tensor("target", target)
    _reduction(reduction)
    pairs = zip(reversed(input.shape), reversed(target.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise RuntimeError(
            f"target: expected a shape that broadcasts with the input's {tuple(input.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"weight: expected the input's shape {tuple(input.shape)}, got {tuple(weight.shape)}"
        )


def relu(input: Tensor) -> None:
    _tensor("input", input)
