"""Logits that are computed only when something other than their cross-entropy reads them.

The head of a converted model returns `LazyLogits`, a tensor without memory. Its cross-entropy is
``linear_cross_entropy`` of the hidden states. The results of a few operators are lazy as well,
because they follow from the hidden states: views that keep rows whole, selections of rows, a cast
to float32, a constant bias, a positive factor, a cap by tanh, log_softmax. Any other operator makes
torch compute the logits, in the grad mode and autocast of the head's call: the tensor then becomes
a plain tensor of torch, with its gradient.

C++ code does not see ``__torch_function__``. It gets the values by ``__torch_dispatch__``, and its
gradients pass through the node that `_Node` has given to the tensor.

While torch.compile traces a program, the tensor holds logits, which the compiler removes if nothing
reads them.
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.dispatch.signature import PLAIN
from pyfused.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from pyfused.torch_internals import DisableTorchFunctionSubclass, tree_map, version_of

_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(
        torch.is_floating_point,
        Tensor.is_floating_point,
        Tensor.element_size,
        Tensor.get_device,
        Tensor.__hash__,
    ),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "_base")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_sparse", "is_meta")),
    getattr(Tensor, "is_nested").__get__,  # noqa: B009
}
_OF_GRADIENTS = {
    *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
    *(getattr(Tensor, name).__get__ for name in ("grad", "grad_fn")),
}
_WRAPPERS_USE = {Tensor.register_hook, getattr(Tensor, "grad_fn").__get__}  # noqa: B009
_INDEX_DTYPES = (torch.bool, torch.int64)


def tell(model: str, reason: str) -> None:
    """Warns once that a converted model computes its logits."""
    message = f"pyfused.convert: {model} computes all of its logits: {reason}"
    if is_dynamo_compiling():
        _warn_while_tracing(message)
    elif reasons.first_time("convert", message):
        warnings.warn(message, RuntimeWarning, stacklevel=reasons.stacklevel())


@torch_internals.run_while_tracing  # the compiler breaks the graph at a warning
def _warn_while_tracing(message: str) -> None:
    if reasons.first_time("convert", message):
        warnings.warn(message, RuntimeWarning, stacklevel=reasons.stacklevel())


def _id_of_hooks() -> int:
    """Returns a number for the active hooks of saved tensors, for example a checkpoint's."""
    return hash(torch_internals.saved_tensors_hooks(True))


def _without_hooks() -> AbstractContextManager[Any]:
    """Hides tensors that are saved for backward from active hooks, for example a checkpoint's."""
    if torch_internals.saved_tensors_hooks(True) is None:
        return nullcontext()

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if version_of(tensor) != version:
            raise RuntimeError(
                "pyfused.convert: expected the tensors saved for the backward pass of logits to "
                "stay the same, got one changed in place"
            )
        return tensor

    return saved_tensors_hooks(lambda tensor: (tensor.detach(), version_of(tensor)), unpack)


class HeadCall:
    """One call of a converted head, whose logits are lazy.

    Attributes:
        head: The head, which receives the metrics.
        inputs: The hidden states, of shape (..., D), the weight (C, D), and the bias (C) or None.
        autocast: The dtype of autocast, None if it was disabled.
        hooks: A number for the active hooks of saved tensors.
        traced: Whether torch.compile traces the call.
        computed: Whether an operator has read the logits.
        bypassed: Whether gradients pass around the logits: in their loss, or in C++ code.
        tensors: Weak references to the lazy tensors of this call.
        watched: Tensors that must not change until the logits are read, with their versions.
    """

    def __init__(self, head: Any, autocast: torch.dtype | None, traced: bool, *inputs: Any) -> None:
        if traced:  # the compiler removes the copies if nothing changes the tensors
            inputs = tuple([x if x is None else x.clone() for x in inputs])
        hidden, weight, bias = inputs
        self.head, self.inputs, self.autocast, self.traced = head, inputs, autocast, traced
        self.has_gradients = torch.is_grad_enabled()
        self.needs_grad = self.has_gradients and (
            hidden.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        )
        self.computed = self.bypassed = False
        self.tensors: list[Callable[[], Any]] = []
        self.watched: list[tuple[Tensor, int]] = []
        if not traced:
            self.is_inference = torch.is_inference_mode_enabled()
            self.address = weight.data_ptr()
            self.hooks = _id_of_hooks()
            self.watched = [(weight, version_of(weight))]
            if not hidden.is_inference():
                self.watched.append((hidden, version_of(hidden)))
            if bias is not None:
                self.watched.append((bias, version_of(bias)))

    def logits(self) -> Any:
        """Returns the lazy output of the head."""
        hidden, weight, _ = self.inputs
        if self.traced:
            return _Value(self, hidden, F.linear(*self.inputs), needs_grad=self.needs_grad).tensor()
        shape = *hidden.shape[:-1], weight.shape[0]
        example = torch.empty(shape, dtype=self.autocast or hidden.dtype, device="meta")
        return _Value(self, hidden, example, needs_grad=self.needs_grad).tensor()

    def check(self) -> None:
        """Checks that the tensors from which the logits are computed have not changed.

        Raises:
            RuntimeError: One has been changed in place, or FSDP has freed the weight.
        """
        unchanged = self.traced or self.inputs[1].data_ptr() == self.address
        for tensor, version in self.watched:
            unchanged = unchanged and version_of(tensor) == version
        if not unchanged:
            raise RuntimeError(
                "pyfused.convert: expected the head's input, weight and bias, and tensors that are "
                "added to its logits or select their rows, to stay the same until the logits are "
                "read, got one changed. Read the logits before the change, or call "
                "pyfused.revert(model)"
            )

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Restores the modes of the head's call."""
        device = self.inputs[0].device.type
        cast = torch.autocast(device, self.autocast, self.autocast is not None)
        mode = torch.inference_mode(self.is_inference)  # must precede grad mode, which it sets
        with mode, torch.set_grad_enabled(self.has_gradients), cast, _without_hooks():
            yield

    def compute(self, reader: str) -> None:
        """Computes all lazy tensors of this call, because an operator reads one of them."""
        if self.computed:
            return
        if self.traced:
            tell(self.head.model_name, f"its logits are read by {reader}")
            self.computed = True
            return
        self.check()
        if self.bypassed:
            reason = f"they are read by {reader} after their loss, which has not computed them. "
            reason += "For the accuracy of training steps pass metrics=True to convert; or call "
            tell(self.head.model_name, f"{reason}pyfused.revert(model)")
        elif self.needs_grad:
            tell(self.head.model_name, f"its logits are read by {reader}")
        self.computed = True
        with DisableTorchFunctionSubclass(), self.modes():
            for reference in self.tensors:  # parents precede the results of their operators
                tensor = reference()
                if type(tensor) is LazyLogits:
                    tensor.value.settle(tensor)

    def loss(self, value: _Value, target: Tensor, options: dict[str, Any]) -> Any:
        """Returns the cross-entropy of the rows of a value."""
        self.check()
        (_, weight, bias), shift = self.inputs, value.shift
        options["linear_bias"] = bias if shift is None else shift if bias is None else bias + shift
        options["softcap"], options["scale"] = value.cap, value.scale
        options["loss_dtype"] = value.cast
        self.bypassed = True
        if self.head.metrics:
            loss, self.head.pyfused_metrics = linear_cross_entropy_with_metrics(
                value.rows, weight, target, **options
            )
            return loss
        return linear_cross_entropy(value.rows, weight, target, **options)


@dataclass(eq=False)
class _Value:
    """Describes how a lazy tensor is computed.

    It is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias) + shift``.

    Attributes:
        call: The head's call.
        rows: The hidden states, in the shape of the tensor.
        example: A meta tensor of the same shape, strides and dtype; in a traced call, the logits.
        parent: The value from which an operator has made this one, None for the head's output.
        operation: torch's operator, and its arguments and keyword arguments after the parent.
        needs_grad: Whether gradients pass through the tensor.
        shift: A tensor of one number for each class, None without an addition.
        cast: The dtype that x was cast to, None without a cast.
        scale, cap: The numbers in the equation above.
        log: Whether log_softmax has been applied.
        hooked: Whether FSDP has hooks on the tensor's node, through which gradients then pass.
        real: The computed tensor.
    """

    call: HeadCall
    rows: Tensor
    example: Any
    parent: _Value | None = None
    operation: tuple[Any, Any, Any] = (None, (), {})
    needs_grad: bool = False
    shift: Tensor | None = None
    cast: torch.dtype | None = None
    scale: float = 1.0
    cap: float | None = None
    log: bool = False
    hooked: bool = False
    real: Any = None

    def tensor(self) -> Any:
        """Returns the lazy tensor with this value."""
        call = self.call
        if call.traced:
            tensor = self.example.as_subclass(Logits)
        else:
            tensor = _attached(self, *call.inputs) if self.needs_grad else _without_memory(self)
            call.tensors.append(weakref.ref(tensor))
        tensor.value = self
        return tensor

    def compute(self) -> Any:
        """Returns the tensor, computed by torch in the graph of the head's inputs."""
        if self.real is not None:
            return self.real
        if self.parent is None:
            self.real = F.linear(*self.call.inputs)
        else:
            function, args, kwargs = self.operation
            self.real = function(self.parent.compute(), *args, **kwargs)
        return self.real

    def compute_from(self, inputs: Any) -> Any:
        """Returns the tensor for other hidden states, weight and bias."""
        if self.parent is None:
            return F.linear(*inputs)
        function, args, kwargs = self.operation
        return function(self.parent.compute_from(inputs), *args, **kwargs)

    def settle(self, tensor: Any) -> None:
        """Computes a lazy tensor, and makes it plain unless its gradients may pass elsewhere."""
        if self.is_elsewhere(tensor):
            with torch.inference_mode(False), torch.enable_grad():
                self.real = tensor.clone()  # passes gradients to its node
        real = self.compute()
        if not self.call.bypassed:
            if torch_internals.becomes(tensor, real):
                self.real = tensor
            else:
                self.call.bypassed = True  # C++ code uses the tensor

    def is_elsewhere(self, tensor: Any) -> bool:
        """Returns whether C++ code has given a tensor another node of the graph."""
        if tensor.is_inference():
            return False
        is_other = tensor.requires_grad != self.needs_grad or version_of(tensor)
        return bool(self.hooked or is_other)

    def apply(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator if it is known without the logits, or else None."""
        if not self.call.traced and self.is_elsewhere(tensor):
            return None
        if function is (F.nll_loss if self.log else F.cross_entropy):
            return self.cross_entropy(*args, **kwargs)
        rule = _RULES.get(function)
        if rule is None or (self.log and rule not in _MOVES):
            return None
        if rule not in _WITHOUT_GRADIENTS and self.needs_grad and not torch.is_grad_enabled():
            return None
        changes = rule(self, function, args, kwargs)
        if changes is None:
            return None
        changes = {"operation": (function, args, kwargs)} | changes
        if "example" not in changes:
            changes["example"] = function(self.example, *args, **kwargs)
        if changes["example"] is self.example and "needs_grad" not in changes:
            return tensor
        return replace(self, parent=self, **changes).tensor()

    def is_constant(self, tensor: Any, dtype: torch.dtype) -> bool:
        """Returns whether a tensor has a number for each class, in a dtype."""
        if not isinstance(tensor, Tensor) or not (self.call.traced or type(tensor) in PLAIN):
            return False
        classes = len(self.call.inputs[1])
        shaped = tensor.numel() == classes and tensor.shape[-1:] == (classes,)
        fits = tensor.dtype is dtype and tensor.device == self.rows.device
        return bool(shaped and fits and not tensor.requires_grad)

    def cross_entropy(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """Returns the result of torch's function if it can be fused, or else None."""
        call = self.call
        plain = isinstance(target, Tensor) and (call.traced or type(target) in PLAIN)
        legacy = size_average is not None or reduce is not None or type(ignore_index) is not int
        if legacy or not plain or target.dtype is not torch.int64:
            return None
        if self.rows.dim() != 2 or target.shape != self.rows.shape[:1]:
            return None
        if reduction not in ("none", "mean", "sum"):
            return None
        if not call.traced and call.hooks != _id_of_hooks():  # a checkpoint of the loss alone
            return None
        if weight is not None and not self.is_constant(weight, self.dtype_of_loss()):
            return None
        options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        device, gradients = self.rows.device.type, torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if autocast == call.autocast and (self.needs_grad or not gradients):
            return call.loss(self, target, options)
        dtype = self.dtype_of_loss()
        cast = torch.autocast(device, call.autocast, call.autocast is not None)
        with cast, torch.set_grad_enabled(gradients and self.needs_grad):
            return call.loss(self, target, options).to(dtype)

    def dtype_of_loss(self) -> torch.dtype:
        """Returns the dtype of torch's loss, which autocast computes in float32."""
        dtype: torch.dtype = self.example.dtype
        is_cast = dtype is not torch.float64 and torch.is_autocast_enabled(self.rows.device.type)
        return torch.float32 if is_cast else dtype


# ---- operators that keep logits lazy -------------------------------------------------------------

# A rule returns the attributes of a value that an operator changes, and its example if it is not
# the operator's result on the example. It returns None if the operator reads the logits.


def _operand(args: Any, kwargs: Any) -> Any:
    """Returns the other operand of a binary operator, None if there are more arguments."""
    values = (*args, *kwargs.values())
    return values[0] if len(values) == 1 and kwargs.keys() <= {"other"} else None


def _view(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """Views in the same order keep rows whole if they keep the last dimension."""
    example = function(value.example, *args, **kwargs)
    if example.shape[-1:] != value.example.shape[-1:] or example.dtype is not value.example.dtype:
        return None
    rows = value.rows.reshape(*example.shape[:-1], value.rows.shape[-1])
    return {"example": example, "rows": rows}


def _index(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Slices of rows, or a selection of rows by masks or int64 tensors."""
    (index,), dimensions, call = args, value.example.dim(), value.call
    parts = index if type(index) is tuple else (index,)
    if _keeps_rows(parts, dimensions):
        return {"rows": value.rows[parts]}
    if call.traced or not _selects_rows(parts, dimensions):
        return None
    call.check()  # the selected rows are a copy
    rows = value.rows[parts]
    call.watched += [(part, version_of(part)) for part in parts]
    shape = *rows.shape[:-1], value.example.shape[-1]
    return {"rows": rows, "example": value.example.new_empty(shape)}


def _keeps_rows(parts: tuple[Any, ...], dimensions: int) -> bool:
    """Returns whether an index of numbers and slices keeps the last dimension whole."""
    slices = [part for part in parts if type(part) is slice]
    bounds = [x for part in slices for x in (part.start, part.stop, part.step) if x is not None]
    known = {type(x) for x in (*parts, *bounds)} <= {int, slice, EllipsisType}
    if not known or parts.count(...) > 1:
        return False
    indexed = len(parts) - parts.count(...)
    leads = indexed == len(parts) or parts[-1] is ...
    return parts[-1:] == (slice(None),) or (leads and indexed < dimensions)


def _selects_rows(parts: tuple[Any, ...], dimensions: int) -> bool:
    """Returns whether an index consists of masks and int64 tensors for the leading dimensions."""
    if not parts or not all(type(x) in PLAIN and x.dtype in _INDEX_DTYPES for x in parts):
        return False
    if any(x.is_inference() for x in parts):
        return False
    return sum(x.dim() if x.dtype is torch.bool else 1 for x in parts) < dimensions


def _log_softmax(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """A log_softmax over the classes whose result has the dtype of its input."""
    dim, *others = args or (kwargs.get("dim"),)
    is_last = type(dim) is int and dim in (-1, value.example.dim() - 1)
    keeps_dtype = value.dtype_of_loss() is value.example.dtype
    if others or not is_last or not keeps_dtype or kwargs.get("dtype") is not None:
        return None
    return {"log": True, "operation": (function, (), {"dim": -1})}


def _add(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """The sum with a constant bias, which autocast would round."""
    bias, call = _operand(args, kwargs), value.call
    if value.scale != 1 or value.cap is not None or call.autocast or value.cast:
        return None
    if not value.is_constant(bias, value.rows.dtype) or bias.dim() > value.example.dim():
        return None
    if call.traced:
        bias = bias.clone()  # it may change before the loss; the compiler removes other copies
    elif bias.is_inference():
        return None
    else:
        call.watched.append((bias, version_of(bias)))
    bias = bias.reshape(-1)
    example = function(value.example, bias.to(value.example.device))
    shift = bias if value.shift is None else value.shift + bias
    return {"shift": shift, "example": example, "operation": (function, (bias,), {})}


def _cast(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """A cast to float32, or to the tensor's own dtype and device."""
    before, device = value.example.dtype, value.rows.device
    dtype = torch.float32 if function is Tensor.float else before
    for option in (*args, *(x for name, x in kwargs.items() if name != "non_blocking")):
        if isinstance(option, torch.dtype):
            dtype = option
        elif not isinstance(option, (str, torch.device)) or torch.device(option) != device:
            return None
    if dtype is before:
        return {"example": value.example}
    if dtype is not torch.float32 or before is torch.float64:
        return None
    return {"cast": dtype, "example": value.example.float(), "operation": (Tensor.float, (), {})}


def _scale(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    number = _operand(args, kwargs)
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = value.scale / number if function in _QUOTIENTS else value.scale * number
    if not 0 < scale < math.inf:
        return None
    return {"scale": 1.0 if math.isclose(scale, 1.0) else scale}


def _tanh(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    return None if value.cap or args or kwargs else {"cap": 1 / value.scale}


def _detach(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    return None if args or kwargs or value.call.traced else {"needs_grad": False}


def _clone(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A copy without a gradient, as DistributedDataParallel makes of a model's outputs."""
    if args or kwargs or value.call.traced or torch.is_grad_enabled():
        return None
    return {"needs_grad": False, "operation": (lambda x: x.detach().clone(), (), {})}


_MOVES = (_view, _index)
_WITHOUT_GRADIENTS = (_detach, _clone)
_QUOTIENTS = Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten, Tensor.unsqueeze, torch.unsqueeze), _view),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _view),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _add),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scale),
    **dict.fromkeys(_QUOTIENTS, _scale),
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.detach, torch.detach), _detach),
    **dict.fromkeys((Tensor.clone, torch.clone), _clone),
    Tensor.__getitem__: _index,
}


# ---- the tensor subclass -------------------------------------------------------------------------


class Logits(Tensor):
    """The output of a converted head, or of an operator on it; torch.compile sees this class."""

    value: Any = None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, tensor = kwargs or {}, args[0] if args else None
        with DisableTorchFunctionSubclass():
            if isinstance(tensor, Logits) and tensor.value is not None:
                value: _Value = tensor.value
                if value.real is None and function in _METADATA:
                    return function(*args, **kwargs)
                if value.call.bypassed and function in _WRAPPERS_USE and _is_of_wrapper():
                    value.hooked = value.hooked or function is Tensor.register_hook
                    return function(*args, **kwargs)
                if not value.call.computed:
                    result = value.apply(tensor, function, args[1:], kwargs)
                    if result is not None:
                        return result
        if type(tensor).__module__ == "numpy" and is_dynamo_compiling():
            args = torch.as_tensor(tensor), *args[1:]  # a NumPy scalar times logits
        _check_gradient(function, args)
        name = _name_of(function)
        args, kwargs = tree_map(lambda x: _read(x, name), (args, kwargs))
        return function(*args, **kwargs)


class LazyLogits(Logits):
    """Logits without memory."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes an operator that C++ called. Its gradient passes through `_Node`."""
        if torch_internals.is_mutable(function):
            raise RuntimeError(
                "pyfused.convert: expected no C++ operator that changes a model's logits in place, "
                f"got {function}. Call pyfused.revert(model)"
            )
        args, kwargs = tree_map(_detached, (args, kwargs or {}))
        return function(*args, **kwargs)


# These calls are dispatched to torch's function, whose __torch_function__ computes the fused loss.
reasons.not_logged.update(f"input is a {kind.__name__}" for kind in (Logits, LazyLogits))


def _without_memory(value: _Value) -> Any:
    example = value.example
    return torch_internals.make_wrapper_subclass(
        LazyLogits,
        example.shape,
        strides=example.stride(),
        dtype=example.dtype,
        device=value.rows.device,
    )


class _Node(torch.autograd.Function):
    """Passes gradients that C++ code computes for lazy logits to the inputs of their head."""

    @staticmethod
    def forward(ctx: Any, value: _Value, *inputs: Any) -> Any:  # noqa: ARG004
        ctx.value = value
        ctx.materialize_grads = False
        return _without_memory(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 4
        value: _Value = ctx.value
        needed, create_graph = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        value.call.check()
        with DisableTorchFunctionSubclass(), value.call.modes():
            # The hidden states may also depend on the weight: paths through them end at a view.
            inputs: list[Any] = [x if x is None else x.view_as(x) for x in value.call.inputs]
            logits = value.compute_from(inputs)
        leaves = [x for x, need in zip(inputs, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(logits, leaves, grad, create_graph=create_graph))
        return None, *(next(gradients) if need else None for need in needed)


_attached: Any = torch_internals.apply_of(_Node)


def _detached(tensor: Any) -> Any:
    """Returns the values of lazy logits for C++ code, and other arguments unchanged."""
    if not isinstance(tensor, LazyLogits):
        return tensor
    value: _Value = tensor.value
    value.call.bypassed = True
    value.call.compute("C++ code")
    with DisableTorchFunctionSubclass(), value.call.modes():
        return value.compute().detach()


def _read(tensor: Any, reader: str) -> Any:
    """Returns the computed logits for an operator that reads them; returns others unchanged."""
    if not isinstance(tensor, Logits):
        return tensor
    value: _Value | None = tensor.value
    if value is None:  # torch.compile iterates over logits without __torch_function__
        return tensor.as_subclass(Tensor)
    value.call.compute(reader)
    if value.call.traced:
        return value.example
    if type(tensor) is not LazyLogits:
        return tensor
    if value.real is None:  # an error has ended the computation
        with DisableTorchFunctionSubclass(), value.call.modes():
            value.compute()
    return value.real


def _check_gradient(function: Any, args: Any) -> None:
    """Raises for a gradient of logits, if gradients pass around them.

    Raises:
        RuntimeError: The loss was computed without the logits, so their gradient would lack it.
    """
    tensors: Any = ()
    if function in _OF_GRADIENTS:
        tensors = args[:1]
    elif function is torch.autograd.grad:
        tensors = args[1] if isinstance(args[1], (tuple, list)) else args[1:2]
    for tensor in tensors:
        if not isinstance(tensor, LazyLogits) or not tensor.value.call.bypassed:
            continue
        with DisableTorchFunctionSubclass():
            has_gradient = tensor.requires_grad  # not of a detached tensor
        if has_gradient:
            raise RuntimeError(
                "pyfused.convert: expected register_hook, retain_grad or autograd.grad of logits "
                "before their loss, got it after. Call it before the loss, or call "
                "pyfused.revert(model)"
            )


def _is_of_wrapper() -> bool:
    """Returns whether DDP or FSDP visits a model's outputs, among which is the loss."""
    if is_dynamo_compiling():
        return False
    frame: Any = sys._getframe(2)
    while frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__"))
    return name.startswith(("torch.nn.parallel.", "torch.distributed."))


def _name_of(function: Any) -> str:
    if is_dynamo_compiling():
        return "an operator"
    name = getattr(function, "__name__", str(function))
    name = function.__self__.__name__ if name in ("__get__", "__set__") else name.strip("_")
    return "indexing" if name == "getitem" else name
