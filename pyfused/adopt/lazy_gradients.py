"""Gradients of lazy logits, given by the gradients of the head's hidden states, weight and bias.

The backward pass of a fused loss returns a `LazyGrad`. Autograd passes it through the nodes of
views, casts, scales and caps, adds the gradients of other losses and readers, and calls hooks, as
it does with any gradient. The node of the head takes the gradients of its inputs out of it. An
operator that is not linear reads the gradient, which is then computed by torch's loss.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import torch_internals
from pyfused.ops.heads import KeptGradient
from pyfused.torch_internals import (
    PLAIN,
    DisableTorchFunctionSubclass,
    is_mutable,
    tree_leaves,
    tree_map_only,
)

aten: Any = torch.ops.aten
COST = "This takes time, and memory for all logits."


def name_of(function: Any) -> str:
    """Returns the name of a function, or of an operator of ATen, in messages."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        return function.__self__.__name__  # type: ignore[no-any-return]
    return name.partition(".")[0].strip("_")


class LazyValue:
    """Describes how a lazy tensor is computed.

    Attributes:
        call: The call of the head.
        example: A meta tensor of the same shape, strides and dtype.
        real: The computed values, without an autograd graph.
    """

    call: Any
    example: Tensor
    real: Tensor

    def compute(self) -> Tensor:
        """Returns the values."""
        raise NotImplementedError

    def compute_dense(self) -> Tensor:
        """Returns the values that an operator of a dense gradient takes."""
        return self.compute()

    def read(self, reader: str) -> Tensor:
        """Returns the values for an operator, which a warning names."""
        raise NotImplementedError


class LazyTensor(Tensor):
    """A tensor without memory."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        if name == "__tensor_flatten__":  # Dynamo asks whether it can trace the operators
            torch_internals.leave_traced_frame()
        return object.__getattribute__(self, name)  # raises the error

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows what is known, so that print and a debugger do not compute the tensor."""
        if (real := vars(self.value).get("real")) is not None:
            return repr(real)
        description = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}"
        return f"{type(self).__name__}({description}, not computed)"

    __format__ = object.__format__


def lazy_tensor(kind: type[LazyTensor], value: LazyValue) -> Any:
    """Returns a lazy tensor with this value."""
    x = value.example
    tensor: Any = torch_internals.make_wrapper_subclass(
        kind, x.shape, strides=x.stride(), dtype=x.dtype, device=value.call.device
    )
    torch_internals.throw_on_data_ptr(tensor)
    tensor.value = value
    return tensor


def values_of(args: Any, reader: str) -> Any:
    """Returns the arguments of an operator with the values of lazy tensors."""
    return tree_map_only(LazyTensor, lambda x: x.value.read(reader), args)


# Operators without values whose results are not new tensors.
_OF_METADATA = "is_same_size", "is_pinned", "dense_dim", "sparse_dim"


def metadata(function: Any, args: Any, kwargs: Any) -> Any:
    """Returns the result of an operator that needs no values, None for any other operator."""
    name = name_of(function)
    is_new = name.startswith("new_") or name.endswith("_like")
    if not (is_new or name in _OF_METADATA):
        return None
    device = {"device": args[0].device} if is_new else {}
    args = tree_map_only(LazyTensor, lambda x: x.value.example, args)
    return function(*args, **device | kwargs)


# Functions that access memory without an operator of ATen.
_OF_MEMORY = (
    "numpy tolist data_ptr const_data_ptr storage untyped_storage share_memory_"
    " __array__ __dlpack__ __deepcopy__ __reduce_ex__"
)
OF_MEMORY = {getattr(Tensor, x, None) for x in _OF_MEMORY.split()}


# ---- gradients of the head's inputs --------------------------------------------------------------


class Part(NamedTuple):
    """Gradients of the inputs of a head, each of which is multiplied by a factor.

    Attributes:
        rows: The indices of rows, and the gradients (n, D) of their hidden states.
        weight, bias: (C, D) and (C).
        kept: The indices of rows, and the gradients (n, C) of their logits, whose products with
            the inputs are not computed yet.

    A gradient is None, and `rows` is empty, if the input needs no gradient.
    """

    factor: float
    rows: tuple[tuple[Any, Tensor], ...] = ()
    weight: Tensor | None = None
    bias: Tensor | None = None
    kept: tuple[tuple[Any, KeptGradient], ...] = ()

    def times(self, factor: float) -> Part:
        return self._replace(factor=self.factor * factor)

    def multiplied(self) -> Part:
        """Returns the same part with the factor 1, from which rounding may have moved it."""
        if math.isclose(self.factor, 1, rel_tol=1e-14):
            return self._replace(factor=1.0)
        factor, rows, weight, bias, kept = self
        return Part(
            1.0,
            tuple([(i, x * factor) for i, x in rows]),
            None if weight is None else weight * factor,
            None if bias is None else bias * factor,
            tuple([(i, x._replace(memory=x.memory * factor)) for i, x in kept]),
        )

    def plus(self, other: Part) -> Part:
        """Returns the sum, so that parts do not have a gradient of the weight each."""
        a, b = self.multiplied(), other.multiplied()
        weight, bias = _sum(a.weight, b.weight), _sum(a.bias, b.bias)
        return Part(1.0, a.rows + b.rows, weight, bias, a.kept + b.kept)

    def with_products(self) -> Part:
        """Returns the same part without kept gradients of logits."""
        part = self._replace(kept=())
        for index, kept in self.kept:
            rows, weight, bias, *_ = kept.products()
            pairs = () if rows is None else ((index, rows),)
            part = part.plus(Part(self.factor, pairs, weight, bias))
        return part


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y


def input_gradients(part: Part, count: int) -> Sequence[Tensor | None]:
    """Returns the gradients of the hidden states (count, D), the weight and the bias."""
    _, rows, weight, bias, _ = part.with_products().multiplied()
    sums = [_spread(index, x, count) for index, x in rows]
    return (reduce(torch.add, sums) if sums else None), weight, bias


def with_kept(dense: Tensor, part: Part, owns_dense: bool) -> tuple[Tensor, Part]:
    """Adds the kept gradients of logits to a dense gradient, which then needs one pair of products.

    Returns the sum, and the rest of the part.

    Args:
        owns_dense: Whether the dense gradient may be overwritten.
    """
    if not part.kept:
        return dense, part
    part, total = part.multiplied(), dense.flatten(0, -2)
    total = total if owns_dense else total.clone()
    for index, kept in part.kept:
        selected, gradient = kept.rows()
        if selected is not None:
            all_rows = torch.arange(len(total), device=total.device)
            index = all_rows[index][selected]
        if type(index) is slice:
            total[index] += gradient
        else:
            total.index_add_(0, index.to(total.device), gradient.to(total.dtype))
    return total.view(dense.shape), part._replace(kept=())


def _spread(index: Any, rows: Tensor, count: int) -> Tensor:
    """Returns the gradients of all rows, given those of some, of which a row may have several."""
    if type(index) is not slice:
        index = index.to(rows.device, non_blocking=True)
        return aten.embedding_dense_backward(rows, index, count, -1, False)  # type: ignore[no-any-return]
    if len(rows) == count:
        return rows
    spread = rows.new_zeros(count, rows.shape[1])
    spread[index] = rows
    return spread


# ---- lazy gradients ------------------------------------------------------------------------------


@dataclass(eq=False)
class Gradient(LazyValue):
    """The sum of a part and a dense gradient.

    Attributes:
        call, example: See `LazyValue`.
        alive: Weak references to all gradients of a backward pass of a loss.
        operation: Returns the gradient.
        part: The part that losses have computed, None for 0.
        dense: The sum of the gradients of operators that have read the logits, None for 0.
        owns_dense: Whether nothing else refers to the memory of the dense gradient.
        base: The gradient of which this one is a view, None if it has its own memory.
        written: Whether a function may have changed the computed gradient in place.
    """

    call: Any
    example: Tensor
    alive: list[weakref.ref[Gradient]]
    operation: Callable[[], Tensor]
    part: Part | None = None
    dense: Tensor | None = None
    owns_dense: bool = False
    base: Gradient | None = None
    written: bool = False

    def tensor(self) -> Any:
        """Returns a lazy tensor with this value."""
        self.alive.append(weakref.ref(self))
        return lazy_tensor(LazyGrad, self)

    def compute(self) -> Tensor:
        if "real" not in vars(self):
            with torch.no_grad(), DisableTorchFunctionSubclass():
                real = self.operation()
            self.real = real if self.base is not None else real.contiguous()
        return self.real

    def read(self, reader: str) -> Tensor:
        if "real" not in vars(self):
            self.call.options.warn(f"the gradient of its logits is read by {reader}. {COST}")
        return self.compute()

    def is_known(self) -> bool:
        """Returns whether the gradient is dense, and has been computed."""
        return self.terms()[0] is None and "real" in vars(self)

    @property
    def root(self) -> Gradient:
        """The gradient whose memory this one shares."""
        return self if self.base is None else self.base.root

    def terms(self) -> tuple[Part | None, Tensor | None]:
        """Returns the part and the dense gradient."""
        return (None, self.compute()) if self.root.written else (self.part, self.dense)

    def compute_dense(self) -> Tensor:
        dense = self.terms()[1]
        return torch.zeros_like(self.example, device=self.call.device) if dense is None else dense


def compute_alive(alive: list[weakref.ref[Gradient]]) -> None:
    """Computes gradients that outlive a backward pass, as the inputs of the head may then change.

    They were returned by ``autograd.grad``, or kept by ``retain_grad`` or a hook.
    """
    for gradient in [each() for each in alive]:
        if gradient is not None:
            real = gradient.read("retain_grad, autograd.grad or a hook")
            gradient.part, gradient.dense = None, real


_PRODUCTS = aten.mul.Tensor, aten.mul.Scalar
_QUOTIENTS = aten.div.Tensor, aten.div.Scalar
_COPIES = aten.clone.default, aten._to_copy.default
_VIEWS = (
    *(aten.alias.default, aten.detach.default),
    *(aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default),
    *(aten.permute.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim),
    aten.squeeze.dims,
)
# The backward passes of operators of elements. The part of a loss contains their derivatives.
_OF_ELEMENTS = aten.tanh_backward.default, aten._log_softmax_backward_data.default
_OF_ROWS = aten.slice_backward.default, aten.select_backward.default
_JOINS = aten.cat.default, aten.stack.default
_calls_of_user = threading.local()


class LazyGrad(LazyTensor):
    """A gradient of lazy logits."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of a hook or of another autograd function, as autograd calls none."""
        kwargs = kwargs or {}
        before, _calls_of_user.active = _is_call_of_user(), True
        try:
            with DisableTorchFunctionSubclass():
                if function in OF_MEMORY:
                    args = _written(args, name_of(function))
                return function(*args, **kwargs)
        finally:
            _calls_of_user.active = before

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(function)
        result = None if rule is None else _linear(rule, function, args, kwargs)
        if result is None:
            result = metadata(function, args, kwargs)
        if result is not None:
            return result
        shares = any(x.alias_info is not None for x in function._schema.returns)
        values = (_written if shares else values_of)(args, name_of(function))
        result = function(*values, **values_of(kwargs, name_of(function)))
        return args[0] if values and result is values[0] else result


def _written(args: Any, reader: str) -> Any:
    """Returns the values for a function that changes them, or returns views of them."""
    for x in tree_leaves(args):
        if isinstance(x, LazyGrad):
            x.value.read(reader)
            x.value.root.written = True
    return values_of(args, reader)


def _is_call_of_user() -> bool:
    return getattr(_calls_of_user, "active", False)


# ---- linear operators ----------------------------------------------------------------------------

# A rule takes the gradient, an operator of ATen and its arguments. It returns the factor by which
# the operator multiplies the gradient and a meta tensor like the result, or None if the operator
# reads the gradient.


def _scale(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Multiplies or divides by a number that is known without synchronising."""
    number: Any = -1.0
    if len(args) > 1:
        of_grad = isinstance(args[0], LazyGrad)
        if not of_grad and function in _QUOTIENTS:
            return None
        number = args[1] if of_grad else args[0]
    if isinstance(number, Tensor):
        if type(number) not in PLAIN or number.dim() or not number.is_cpu or number.is_complex():
            return None
        number = number.item()
    if type(number) not in (int, float) or not math.isfinite(number):
        return None
    if function in _QUOTIENTS:
        number = 1 / number if number else math.inf
    return (number, grad.example) if math.isfinite(number) else None


def _add(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Adds a gradient of the same shape and dtype."""
    x, device = grad.example, grad.call.device
    like = [isinstance(y, Tensor) and (y.shape, y.dtype) == (x.shape, x.dtype) for y in args]
    same = all(like) and all(y.device == device for y in args)
    return (1.0, x) if same and not kwargs else None


def _copy(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Copies or casts the gradient on the same device."""
    device = grad.call.device
    if (kwargs.get("device") or device) != device or kwargs.get("pin_memory"):
        return None
    if not (kwargs.get("dtype") or grad.example.dtype).is_floating_point:
        return None
    options = {name: x for name, x in kwargs.items() if name in ("dtype", "memory_format")}
    return 1.0, function(grad.example, **options)


def _view(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    return 1.0, function(grad.example, *args[1:])


def _rows(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Returns the gradient of a tensor of which an operator has selected rows."""
    return 1.0, torch.empty(args[1], dtype=grad.example.dtype, device="meta")


def _zeros(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Returns zeros, to which `_indices` adds the gradient of selected rows."""
    return 1.0, torch.empty(args[1], dtype=grad.example.dtype, device="meta")


def _indices(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    added = args[2] if function is aten.index_put.default else args[3]
    are_zeros = isinstance(args[0], LazyGrad) and grad.terms() == (None, None)
    return (1.0, grad.example) if are_zeros and isinstance(added, LazyGrad) else None


def _join(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Joins the gradients of the results of split or unbind."""
    (tensors, dim), sizes = (*args, 0)[:2], list(grad.example.shape)
    if function is aten.stack.default:
        sizes.insert(dim % (len(sizes) + 1), len(tensors))
    else:
        sizes[dim] = sum(x.shape[dim] for x in tensors)
    return 1.0, torch.empty(sizes, dtype=grad.example.dtype, device="meta")


def _is_zero(x: Tensor) -> bool:
    """Returns whether a gradient is known to be 0, without synchronising."""
    return x.is_cpu and not (x.numel() and (x[(0,) * x.dim()] or x.any()))


def _element(grad: Gradient, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    return 1.0, grad.example


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((*_PRODUCTS, *_QUOTIENTS, aten.neg.default), _scale),
    **dict.fromkeys(_COPIES, _copy),
    aten.add.Tensor: _add,
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_OF_ROWS, _rows),
    aten.new_zeros.default: _zeros,
    **dict.fromkeys((aten.index_put.default, aten.index_add_.default), _indices),
    **dict.fromkeys(_JOINS, _join),
    **dict.fromkeys(_OF_ELEMENTS, _element),
}
# The rules for functions of users. Others could move rows, or round on purpose.
_OF_USERS = {*_PRODUCTS, *_QUOTIENTS, aten.neg.default, aten.add.Tensor, aten.clone.default}


def _linear(rule: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Returns the lazy result of a linear operator, None if the operator reads the gradient."""
    grads = [x.value for x in tree_leaves(args) if isinstance(x, LazyGrad)]
    grad = grads[0]
    if _is_call_of_user() and function not in _OF_USERS:
        return None
    if any(x.call is not grad.call or x.is_known() for x in grads):
        return None
    if (found := rule(grad, function, args, kwargs)) is None:
        return None
    factor, example = found
    if rule is _zeros:
        zeros = partial(torch.zeros, example.shape, dtype=example.dtype, device=grad.call.device)
        return Gradient(grad.call, example, grad.alive, zeros).tensor()
    options = {name: x for name, x in kwargs.items() if name in ("dtype", "memory_format")}
    bound, is_in_place = tree_map_only(LazyTensor, lambda x: x.value, args), is_mutable(function)
    function = aten.index_add.default if is_in_place else function

    def operation(method: str = "compute") -> Tensor:
        return function(*tree_map_only(LazyValue, methodcaller(method), bound), **options)  # type: ignore[no-any-return]

    terms = [x.terms() for x in grads]
    parts = [part.times(factor) for part, _ in terms if part is not None]
    known = [dense for _, dense in terms if dense is not None]
    if rule is _add:
        known += [x for x in args if not isinstance(x, LazyGrad)]
        dense, owns_dense = reduce(torch.add, known) if known else None, len(known) > 1
    else:
        if rule is _join:  # autograd passes zeros for undefined gradients
            plain = [x for x in args[0] if not isinstance(x, LazyGrad)]
            known += [x for x in plain if not _is_zero(x)]
        dense = operation("compute_dense") if known else None
        owns_dense = grad.owns_dense or rule is not _view
    part = reduce(Part.plus, parts) if parts else None
    base = grad if rule is _view else None
    result = Gradient(grad.call, example, grad.alive, operation, part, dense, owns_dense, base)
    if is_in_place:
        args[0].value = result
        grad.alive.append(weakref.ref(result))
        return args[0]
    return result.tensor()
