"""Logits that are computed when something else than their loss is asked.

The layer that makes a model's logits returns a tensor without memory, of a subclass that sees every
operator through ``__torch_function__``. A short list of reads is noted: views that keep rows whole,
slices of rows, a cast to float32, a positive factor, a cap by tanh. The cross-entropy of what comes
of these is ``linear_cross_entropy``. Any other operator computes the logits, and with them all that
was noted, by the same operators of torch, in the grad mode and under the autocast of then. The
tensors without memory then become these tensors, by ``torch.utils.swap_tensors``: views are views,
changes in place are seen through them, and nothing is imitated any longer. The choice fell on that,
and against a class that has a tensor's methods, as the list of what has to be right is short.

torch exchanges no tensor that C++ holds, such as an argument of an ``autograd.Function``. That one
passes operators on to the computed logits, and has a gradient of its own.

A compiler gets logits with memory, of a subclass with the same ``__torch_function__``: what nobody
reads of them is dead code of its program.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn import functional as F

from pyfused.functional import linear_cross_entropy

LOSS = "its loss"
_PLAIN = (Tensor, Parameter)
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size),
    *(Tensor.__len__, Tensor.__hash__, Tensor.get_device),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf")
        + ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized")
    ),
}
# Each keeps the elements' order, and so the rows, if the last dimension stays as long as it is.
_VIEWS = {
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
    *(Tensor.contiguous, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze),
}
_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}
_QUOTIENTS = {Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide}
_OF_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}


class Family:
    """All that follows from one call of a head.

    Attributes:
        inputs: The hidden states, the head's weight and its bias.
        uses: What their cross-entropy, and what else, was asked for, by name.
        computed: Whether the logits have been computed.
    """

    def __init__(self, call: Any, inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
        self.call, self.inputs = call, inputs
        self.uses: list[str] = []
        self.computed = False
        self.nodes: list[_Node] = []
        self.traced = is_dynamo_compiling()
        self.context = context(inputs[0].device.type)
        self.versions = None if self.traced else _versions(inputs)

    def logits(self) -> Any:
        """Returns the head's output, which is not computed yet."""
        hidden, weight, bias = self.inputs
        if self.traced:
            example = F.linear(hidden, weight, bias)
        else:
            enabled, dtype = self.context[1:3]
            shape = *hidden.shape[:-1], len(weight)
            example = torch.empty(shape, dtype=dtype if enabled else hidden.dtype, device="meta")
        return _Node(self, None, None, hidden, None, 1.0, None).tensor(example)

    def is_lazy(self) -> bool:
        """Returns whether a read can be noted: all is as it was when the head was called."""
        return not self.computed and self.context == context(self.inputs[0].device.type)

    def compute(self, reader: str) -> None:
        """Computes the logits and what was noted of them, once, and notes who asked."""
        self.uses.append(reader)
        if self.computed or self.traced:
            self.computed = True
            return
        with self.restored():
            for node in self.nodes:
                if node.reference() is not None:
                    node.compute()
        for node in self.nodes:
            node.real = node.real if node.passes_on else None
        self.computed = True
        self.nodes.clear()

    def is_kept(self) -> bool:
        """Returns whether anybody still has what is not computed."""
        return not self.computed and any(node.reference() is not None for node in self.nodes)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Grad mode and autocast as they were when the head was called.

        Raises:
            RuntimeError: Its input or parameters have been changed in place since.
        """
        if _versions(self.inputs) != self.versions:
            raise RuntimeError(
                "pyfused.convert: expected a head whose input, weight and bias stay the same until "
                "its logits are read, got one changed in place. Revert the model, or read the "
                "logits before"
            )
        _, enabled, dtype, _ = self.context
        cast = torch.autocast(self.inputs[0].device.type, dtype if enabled else None, enabled)
        with torch.inference_mode(False), torch.enable_grad(), cast:
            # A checkpoint would find that another moment has come when it recomputes.
            with nullcontext() if hooks() is None else saved_here():
                yield


def saved_here() -> saved_tensors_hooks:
    """Keeps tensors that are saved for backward from the hooks that are in effect."""
    return saved_tensors_hooks(_saved, _unpacked)


def _saved(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _unpacked(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor that backward needs has been changed in place")
    return tensor


def context(device: str) -> tuple[Any, ...]:
    """Returns what a call of torch depends on beside its arguments."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), enabled, dtype, hooks()


def hooks() -> Any:
    """Returns the hooks for saved tensors.

    torch has no public name for that. Without it, a checkpoint within a model whose logits are read
    there raises, as it finds other tensors saved when it recomputes.
    """
    if is_dynamo_compiling():
        return None
    return getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, int]]:
    return [(x._version, x.data_ptr()) for x in tensors if x is not None]


class _Node:
    """One tensor of a family: the head's output, or an operator of an earlier one.

    It is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, of ``x = linear(rows, weight,
    bias)``.

    Attributes:
        operation: The operator of torch with its further arguments.
        cast: The dtype that x was cast to, if it was.
        example: A tensor of the same shape, strides and dtype: on meta, or the compiler's own.
        real: The computed tensor, while someone needs it here.
    """

    def __init__(
        self,
        family: Family,
        parent: _Node | None,
        operation: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] | None,
        rows: Tensor,
        cast: torch.dtype | None,
        scale: float,
        cap: float | None,
    ) -> None:
        self.family, self.parent, self.operation, self.rows = family, parent, operation, rows
        self.cast, self.scale, self.cap = cast, scale, cap
        self.example: Any = None
        self.real: Tensor | None = None
        self.reference: Callable[[], Any] = lambda: None
        self.passes_on = False

    def tensor(self, example: Tensor) -> Any:
        """Returns the tensor that stands for it."""
        self.example = example
        if self.family.traced:
            traced: Any = example.as_subclass(TracedLogits)
            traced._node = self
            return traced
        tensor: Any = _Deferral.apply(self, *self.family.inputs)  # type: ignore[no-untyped-call]
        tensor._node = self
        self.family.nodes.append(self)
        self.reference = weakref.ref(tensor)
        return tensor

    def compute(self) -> Tensor:
        """Returns the computed tensor, which is the very tensor that stood for it, if possible."""
        if self.real is None:
            real = self.replay(_Node.compute)
            if LOSS in self.family.uses:
                vars(real).update(register_hook=_refuse, retain_grad=_refuse)
            tensor, self.reference = self.reference(), lambda: None
            self.real = tensor if _becomes(tensor, real) else real
            self.version = self.real._version
            self.passes_on = type(tensor) is DeferredLogits
        return self.real

    def replay(self, of: Callable[[_Node], Tensor]) -> Tensor:
        """Returns the tensor, computed by torch from what its parent is by a function."""
        if self.parent is None or self.operation is None:
            return F.linear(*self.family.inputs)
        function, args, kwargs = self.operation
        return function(of(self.parent), *args, **kwargs)

    def anew(self) -> Tensor:
        """Returns another such tensor, computed from the head's input."""
        return self.replay(_Node.anew)

    def read(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator that can be noted, or None of any other."""
        if function is F.cross_entropy:
            return self.cross_entropy(*args, **kwargs)
        example = self.example
        rows, cast, scale, cap = self.rows, self.cast, self.scale, self.cap
        given = *args, *kwargs.values()
        if function in _VIEWS:
            if not all(map(_is_size, given)):
                return None
            result = function(example, *args, **kwargs)
            if result.dim() == 0 or result.shape[-1] != example.shape[-1]:
                return None
            rows = rows.reshape(*result.shape[:-1], rows.shape[-1])
        elif function is Tensor.__getitem__:
            if not _keeps_rows(args[0], example.dim()):
                return None
            result, rows = function(example, *args), rows[args[0]]
        elif function is Tensor.to and len(given) == 1 and type(given[0]) is torch.device:
            return tensor if given[0] == rows.device else None
        elif function is Tensor.float or (
            function is Tensor.to and len(given) == 1 and given[0] is torch.float32
        ):
            if example.dtype is torch.float64:
                return None
            cast, result = torch.float32, function(example, *args, **kwargs)
        elif function in _PRODUCTS or function in _QUOTIENTS:
            number: Any = args[0] if len(given) == 1 and args else None
            if type(number) not in (int, float) or not 0 < number < math.inf:
                return None
            scale *= number if function in _PRODUCTS else 1 / number
            scale = 1.0 if math.isclose(scale, 1.0) else scale
            result = function(example, number)
            if not 0 < scale < math.inf:
                return None
        elif function in (Tensor.tanh, torch.tanh) and not given and cap is None:
            cap, result = 1 / scale, function(example)
        else:
            return None
        if result is example:
            return tensor
        operation = function, args, kwargs
        return _Node(self.family, self, operation, rows, cast, scale, cap).tensor(result)

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Any = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """Returns what torch's function of this name returns, or None where it has to do it."""
        legacy = weight is not None or size_average is not None or reduce is not None
        plain = self.family.traced or type(target) in _PLAIN
        if legacy or not plain or target.is_floating_point() or self.rows.dim() != 2:
            return None
        options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if not self.family.traced:
            with self.family.restored():
                if not self.family.call.accepts(self, target, options):
                    return None
        self.family.uses.append(LOSS)
        return self.loss(self.rows, target, options)

    def loss(self, rows: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        _, weight, bias = self.family.inputs
        return linear_cross_entropy(
            rows,
            weight,
            target,
            linear_bias=bias,
            softcap=self.cap,
            scale=self.scale,
            loss_dtype=self.cast,
            **options,
        )

    def logits_of(self, rows: Tensor) -> Tensor:
        """Returns the logits of some rows, by torch's operators in the order of the calls."""
        if self.parent is None or self.operation is None:
            return F.linear(rows, *self.family.inputs[1:])
        logits = self.parent.logits_of(rows)
        function, args, kwargs = self.operation
        if function in _VIEWS or function is Tensor.__getitem__:
            return logits
        return function(logits, *args, **kwargs)


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, (tuple, list)) and all(map(_is_size, value)))


def _keeps_rows(index: Any, dimensions: int) -> bool:
    """Returns whether an index takes whole rows, and leaves the last dimension as it is."""
    given = list(index) if type(index) is tuple else [index]
    if Ellipsis in given:
        place = given.index(Ellipsis)
        given[place : place + 1] = [slice(None)] * (dimensions - len(given) + 1)
    for each in given:
        bounds = (each.start, each.stop, each.step) if type(each) is slice else (each,)
        if not all(type(i) is int or (i is None and type(each) is slice) for i in bounds):
            return False
    return len(given) < dimensions or (len(given) == dimensions and given[-1] == slice(None))


def _becomes(tensor: Any, real: Tensor) -> bool:
    """Exchanges two tensors, unless something in C++ or a weak reference has either of them."""
    if tensor is None:
        return False
    vars(real).update({name: value for name, value in vars(tensor).items() if name != "_node"})
    try:
        torch.utils.swap_tensors(tensor, real)
    except RuntimeError:
        if type(tensor) is not DeferredLogits:  # half exchanged
            raise
        return False
    return True


# ---- the tensors that stand for them -------------------------------------------------------------


class _Logits(Tensor):
    """What a head has returned."""

    _node: Any = None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, tensor = kwargs or {}, args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            if isinstance(tensor, _Logits) and tensor._node.family.is_lazy():
                result = tensor._node.read(tensor, function, args[1:], kwargs)
                if result is not None:
                    return result
            for each in _deferred((args, kwargs)):
                if not isinstance(each, _Logits):  # its family has been computed just now
                    continue
                _check_gradient(each)
                family = each._node.family
                family.compute(_name_of(function))
                if function in _OF_GRADIENTS and LOSS in family.uses:
                    _refuse()
        return function(*_mapped(computed, args), **_mapped(computed, kwargs))


class TracedLogits(_Logits):
    """Logits in a compiler's program, whose memory is the compiler's concern."""


class DeferredLogits(_Logits):
    """Logits without memory."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes an operator that C++ has called, of other logits of the same values."""
        if function._schema.is_mutable:
            raise RuntimeError(
                f"pyfused.convert: expected no change in place of a converted model's logits by "
                f"compiled code, got {function}. Revert the model"
            )
        return function(*_mapped(_values, args), **_mapped(_values, kwargs or {}))


class _Deferral(torch.autograd.Function):
    """Makes a tensor without memory, whose gradient goes to the head's input and parameters."""

    @staticmethod
    def forward(ctx: Any, node: _Node, *inputs: Tensor | None) -> Tensor:
        ctx.node, example = node, node.example
        assert inputs[0] is not None
        return Tensor._make_wrapper_subclass(  # as torch's page on extending it has it
            DeferredLogits,
            example.shape,
            strides=example.stride(),
            dtype=example.dtype,
            device=inputs[0].device,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        node = ctx.node
        if node.real is not None and node.real._version != node.version:
            raise RuntimeError(
                "pyfused.convert: expected logits that are not changed in place beside an "
                "autograd.Function that takes them, got such ones. Revert the model"
            )
        inputs, create_graph = node.family.inputs, torch.is_grad_enabled()
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        with node.family.restored():
            found = torch.autograd.grad(node.anew(), wanted, grad_output, create_graph=create_graph)
        gradients = iter(found)
        return None, *(next(gradients) if any(x is w for w in wanted) else None for x in inputs)


def _refuse(*_: Any, **__: Any) -> Any:
    """Raises for a hook, or a wish for a gradient, that would not see a loss."""
    raise RuntimeError(
        "pyfused.convert: expected register_hook, retain_grad or autograd.grad of logits before "
        "their loss, which has been computed without them, got it after. Call it before, or revert "
        "the model"
    )


def _check_gradient(tensor: Any) -> None:
    """Raises for a tensor that an ``autograd.Function`` has changed, and said so to torch alone."""
    if not tensor._node.family.traced and getattr(tensor.grad_fn, "node", None) is not tensor._node:
        raise RuntimeError(
            "pyfused.convert: expected no autograd.Function that changes logits in place or "
            "returns them, got one. Revert the model"
        )


def _deferred(x: Any) -> list[Any]:
    if isinstance(x, _Logits):
        return [x]
    items = x.values() if type(x) is dict else x if type(x) in (list, tuple) else ()
    return [each for item in items for each in _deferred(item)]


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, _Logits):
        return function(x)
    if type(x) is dict:
        return {key: _mapped(function, value) for key, value in x.items()}
    return type(x)(_mapped(function, item) for item in x) if type(x) in (list, tuple) else x


def computed(tensor: Any) -> Any:
    """Returns the computed logits in place of a tensor that has not become them."""
    if isinstance(tensor, TracedLogits):
        return tensor._node.example
    return tensor._node.real if isinstance(tensor, DeferredLogits) else tensor


def _values(tensor: Any) -> Tensor:
    node = tensor._node
    if node.real is not None:
        return node.real.detach()  # type: ignore[no-any-return]
    with node.family.restored(), torch.no_grad():
        return node.anew().to(node.example.dtype)  # type: ignore[no-any-return]


def _name_of(function: Any) -> str:
    if is_dynamo_compiling():
        return "an operator"
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = function.__self__.__name__
    return {"getitem": "indexing"}.get(name.strip("_"), name.strip("_"))


def is_deferred(value: Any) -> bool:
    return isinstance(value, _Logits)
