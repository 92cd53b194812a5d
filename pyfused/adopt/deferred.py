"""Logits that are computed only if an operation other than their cross-entropy reads them.

A head returns a tensor without memory, of a subclass that intercepts all operators by
``__torch_function__``. A few operators are recorded instead of computed: views that keep rows
whole, selections of rows, a cast to float32, a constant bias, a positive factor, a cap by tanh,
log_softmax. The cross-entropy of such logits is computed by ``linear_cross_entropy`` from the
hidden states. Any other operator makes torch compute the logits and all recorded operators, in the
grad mode and autocast of the head's call. ``torch.utils.swap_tensors`` then replaces the tensors
without memory by the computed ones, so views are real views and show in-place changes.

torch cannot swap a tensor that C++ holds, such as an argument of an ``autograd.Function``. Such a
tensor forwards operators to the computed logits, and `_Deferral` computes its gradient.

Under torch.compile, the logits have memory and the same ``__torch_function__``, and the compiler
removes them if they are not read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from pyfused.ops.metrics import Metrics
from pyfused.torch_internals import version_of

LOSS = "its loss"
PLAIN = (Tensor, Parameter)
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "is_cuda", "is_cpu")),
}
_INDEX_DTYPES = (torch.bool, torch.int64)
_EXACT: Any = WeakTensorKeyDictionary()  # a bias, and the dtype and version that were compared
_OF_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}


class Family:
    """The logits of one call of a head, and the operators recorded for them.

    Attributes:
        call: The model's call, whose ``accepts`` returns whether a loss may be fused.
        inputs: The hidden states, the head's weight, its bias, and the weight of an adapter, whose
            features follow the hidden states, or None.
        watched: These and the tensors of recorded operators, none of which may change in place,
            with their versions and addresses.
        finish: Receives the losses and computed logits of a unit of FSDP when its call ends.
        uses: The names of the operators that have read the logits, and LOSS for a fused loss.
        computed: Whether the logits have been computed.
        bypassed: Whether gradients bypass the computed logits: a loss is fused, or C++ has read the
            tensors without memory.
        nodes: The recorded tensors, until they are computed or the model's call ends.
    """

    def __init__(self, call: Any, *inputs: Any, finish: Any = None) -> None:
        self.call, self.inputs, self.finish = call, tuple(map(versioned, inputs)), finish
        self.results: list[Any] | None = None if finish is None else []
        self.uses: list[str] = []
        self.computed = self.bypassed = False
        self.nodes: list[_Node] = []
        self.traced = is_dynamo_compiling()
        self.modes = _modes(inputs[0].device.type)
        self.watched: list[tuple[Tensor, Any]] = []
        self.watch(*inputs)

    def watch(self, *tensors: Tensor | None) -> None:
        """Notes the versions of tensors that are read until the logits have been computed."""
        if not self.traced:
            self.watched += [(x, self.state(x)) for x in tensors if x is not None]

    def state(self, tensor: Tensor) -> Any:
        """Returns what changes if a tensor changes in place; FSDP moves the weight."""
        version, address = _state(tensor)
        return version, self.finish or address

    def logits(self) -> Any:
        """Returns the output of the head."""
        hidden, weight, *_, adapter_weight = self.inputs
        if self.traced:
            return _Node(self, hidden, self.linear(hidden, adapter_weight)).tensor()
        shape, dtype = (*hidden.shape[:-1], len(weight)), self.modes.autocast or hidden.dtype
        return _Node(self, hidden, torch.empty(shape, dtype=dtype, device="meta")).tensor()

    def linear(self, rows: Tensor, adapter_weight: Tensor | None) -> Tensor:
        """Returns the logits of rows of hidden states, computed by torch."""
        _, weight, bias, _ = self.inputs
        if adapter_weight is None:
            return F.linear(rows, weight, bias)
        hidden, features = rows.tensor_split((weight.shape[-1],), -1)
        logits = F.linear(hidden, weight, bias)
        return logits + F.linear(features, adapter_weight.to(rows.dtype)).to(logits.dtype)

    def loss(self, rows: Any, target: Any, shift: Tensor | None, options: dict[str, Any]) -> Any:
        """Returns the cross-entropy of rows of hidden states, with a shift of the head's bias."""
        (_, weight, bias, adapter_weight), call = self.inputs, self.call
        if shift is not None:
            bias = shift if bias is None else bias + shift
        options = options | {"linear_bias": bias, "adapter_weight": adapter_weight}
        if not call.with_metrics:
            return linear_cross_entropy(rows, weight, target, **options)
        loss, call.model.pyfused_metrics = linear_cross_entropy_with_metrics(
            rows, weight, target, **options
        )
        return loss

    def collect(self, *results: Any) -> None:
        if self.results is not None:
            self.results += results

    def close(self, reader: str) -> None:
        """Ends the head's call, after which its weight may change."""
        if any(node.reference() is not None for node in self.nodes):  # a tensor without memory
            self.compute(reader)
        results, self.results = self.results, None
        if results is not None:
            with torch_internals.DisableTorchFunctionSubclass():
                self.finish(results)

    def is_lazy(self) -> bool:
        """Returns whether operators can be recorded: the modes have not changed since the call."""
        return not self.computed and self.modes == _modes(self.inputs[0].device.type)

    def compute(self, reader: str) -> None:
        """Computes the logits and the recorded operators once, because an operator reads them."""
        self.uses.append(reader)
        if not self.computed and not self.traced:
            with self.restored():
                for node in self.nodes:
                    if node.reference() is not None:
                        node.compute()
            for node in self.nodes:
                if self.bypassed and node.real is not None:
                    refusing = {"register_hook": _Refusal(node.real), "retain_grad": _refuse}
                    vars(node.real).update(refusing)
                node.real = node.real if node.held else None
            self.nodes.clear()
        self.computed = True

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores grad mode and autocast of the head's call.

        Raises:
            RuntimeError: The head's input or parameters have been changed in place since the call.
        """
        if any(self.state(tensor) != state for tensor, state in self.watched):
            raise RuntimeError(
                "pyfused.convert: expected the head's input, weight and bias, and tensors that are "
                "added to its logits or select their rows, to stay the same until the logits are "
                "read, got one changed in place. Read the logits before the change, or call "
                "pyfused.revert(model)"
            )
        inference, gradients, dtype, _ = self.modes
        cast = torch.autocast(self.inputs[0].device.type, dtype, dtype is not None)
        # A checkpoint that recomputes would find these tensors saved at another point.
        saved = nullcontext() if hooks() is None else without_hooks()
        mode = torch.inference_mode(inference)  # must precede grad mode, which it sets
        with mode, torch.set_grad_enabled(gradients), cast, saved:
            yield


class ColwiseFamily(Family):
    """The logits of a head of ``ColwiseParallel``, whose input is a replicated DTensor."""

    def __init__(self, call: Any, gather: Any, hidden: Any, weight: Any, bias: Any) -> None:
        local, layout = hidden.full_tensor(), (hidden.device_mesh, hidden.placements)
        super().__init__(call, local if type(local) in PLAIN else local.clone(), weight, bias, None)
        self.gather = gather  # runs the hooks after the head's forward
        self.replicate: Any = lambda x: type(hidden).from_local(x, *layout, run_check=False)

    def linear(self, rows: Tensor, adapter_weight: Any) -> Any:  # noqa: ARG002
        return self.gather(F.linear(self.replicate(rows), *self.inputs[1:3]))

    def loss(self, rows: Any, target: Any, *options: Any) -> Any:
        loss = super().loss(self.replicate(rows), self.replicate(target), *options)
        if self.call.with_metrics:
            metrics = self.call.model.pyfused_metrics
            self.call.model.pyfused_metrics = Metrics(*(x.full_tensor() for x in metrics))
        return loss.full_tensor()

    def is_full(self) -> bool:
        """Returns whether the head returns plain logits of all rows and classes, by a few rows."""
        hidden, weight, *_ = self.inputs
        shape = [weight.device_mesh.size()] * (hidden.dim() - 1)  # any dimension can be sharded
        with torch.no_grad():
            logits = self.linear(hidden.new_zeros(*shape, hidden.shape[-1]), None)
        return type(logits) is Tensor and logits.shape == (*shape, len(weight))


def hooks() -> Any:
    """Returns the hooks for saved tensors, which detect a checkpoint."""
    return None if is_dynamo_compiling() else torch_internals.saved_tensors_hooks(True)


def without_hooks() -> saved_tensors_hooks:
    """Hides tensors that are saved for backward from the active hooks."""

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if version_of(tensor) != version:
            raise RuntimeError(
                "pyfused.convert: expected the tensors saved for the backward pass of logits to "
                "stay the same, got one changed in place"
            )
        return tensor

    return saved_tensors_hooks(lambda tensor: (tensor.detach(), version_of(tensor)), unpack)


class _Modes(NamedTuple):
    """The modes that torch's results depend on; ``autocast`` is its dtype, None if disabled."""

    inference: bool
    gradients: bool
    autocast: torch.dtype | None
    hooks: Any


def _modes(device: str) -> _Modes:
    inference = not is_dynamo_compiling() and torch.is_inference_mode_enabled()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _Modes(inference, torch.is_grad_enabled(), dtype, hooks())


def versioned(x: Any) -> Any:
    """Returns a tensor with a version counter, to detect changes in place; may be a copy."""
    if is_dynamo_compiling() or not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def _state(x: Tensor) -> tuple[int, int]:
    """Returns the version of a tensor, 0 for one of inference mode, and its address."""
    return 0 if x.is_inference() else version_of(x), x.data_ptr()


@dataclass(eq=False)
class _Node:
    """One tensor of a family: the head's output, or an operator's result.

    Its value is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias) + shift``.

    Attributes:
        rows: The hidden states, in the shape of the tensor.
        example: A tensor of the same shape, strides and dtype: on meta, or the compiler's.
        operation: torch's operator, and its arguments and keyword arguments after the parent.
        shift: A tensor of one number for each class, None without an addition.
        log: Whether the value is log_softmax of that.
        channels: Whether the classes are dimension 1, as in the cross-entropy of images; ``rows``
            then has two dimensions.
        cast: The dtype that x was cast to, None without a cast.
        real: The computed tensor.
        version: The version of ``real`` when it was computed.
        held: Whether C++ holds the tensor without memory, which then cannot be swapped.
        reference: A weak reference to the tensor without memory.
    """

    family: Family
    rows: Tensor
    example: Tensor
    parent: _Node | None = None
    operation: tuple[Any, Any, Any] = (None, None, None)
    shift: Tensor | None = None
    log: bool = False
    channels: bool = False
    cast: torch.dtype | None = None
    scale: float = 1.0
    cap: float | None = None
    real: Tensor | None = None
    version: int = 0
    held: bool = False
    reference: Callable[[], Any] = lambda: None

    def tensor(self) -> Any:
        """Returns the tensor that the user's code receives."""
        if self.family.traced:
            tensor: Any = self.example.as_subclass(_Logits)
        else:
            tensor = _Deferral.apply(self, *self.family.inputs)  # type: ignore[no-untyped-call]
            self.reference = weakref.ref(tensor)
            self.family.nodes.append(self)
        tensor._node = self
        return tensor

    def compute(self) -> Tensor:
        """Computes the tensor once, and swaps it with the one without memory if possible."""
        if self.real is None:
            real = self.apply(self.parent.compute() if self.parent else self.family.inputs[0])
            # torch cannot swap a tensor that has weak references.
            tensor, self.reference = self.reference(), lambda: None
            with torch_internals.DisableTorchFunctionSubclass():
                grad_fn = getattr(tensor, "grad_fn", None)
            grad_fn_of = (lambda: None) if grad_fn is None else weakref.ref(grad_fn)
            del grad_fn
            self.real = tensor if _becomes(tensor, real) else real
            del real
            self.version, _ = _state(self.real)
            self.held = isinstance(tensor, _Logits)
            # From torch 2.14 on, an autograd.Function only holds the grad_fn of its arguments.
            self.family.bypassed |= self.held or grad_fn_of() is not None
            self.family.collect(self.real, *[tensor] * self.held)
        return self.real

    def apply(self, input: Tensor) -> Tensor:
        """Returns the result of torch's operator for its parent's value or the hidden states."""
        if self.parent is None:
            return self.family.linear(input, self.family.inputs[-1])
        function, args, kwargs = self.operation
        result: Tensor = function(input, *args, **kwargs)
        return result

    def recompute(self, rows: Tensor | None = None) -> Tensor:
        """Returns a new tensor of the same value, or the logits of other rows."""
        if self.parent is None:
            return self.apply(self.family.inputs[0] if rows is None else rows)
        parent, moves = self.parent.recompute(rows), _RULES.get(self.operation[0]) in _MOVES
        return parent if moves and rows is not None else self.apply(parent)

    def record(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator if it can be recorded, or else None."""
        if function is (F.nll_loss if self.log else F.cross_entropy):
            return self.cross_entropy(*args, **kwargs)
        rule = _RULES.get(function)
        if rule is None or self.channels or (self.log and rule not in _MOVES):
            return None
        node = rule(self, function, args, kwargs)
        if node is None:
            return None
        if node.operation is self.operation:
            node.operation = function, args, kwargs
        if node.example is self.example:
            node.example = function(self.example, *args, **kwargs)
        node.parent = self
        return tensor if node.example is self.example else node.tensor()

    def is_constant(self, tensor: Any) -> bool:
        """Returns whether a tensor has a number for each class, in the head's dtype."""
        if not isinstance(tensor, Tensor) or not (self.family.traced or type(tensor) in PLAIN):
            return False
        classes, autocast = len(self.family.inputs[1]), self.family.modes.autocast
        dtypes = {torch.float32} if autocast else {self.rows.dtype, self.example.dtype}
        shaped = tensor.numel() == classes and tensor.shape[-1:] == (classes,)
        fits = dtypes == {tensor.dtype} and tensor.device == self.rows.device
        return bool(shaped and fits and not tensor.requires_grad)

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
        """Returns the result of torch's function of this name if it can be fused, or else None."""
        legacy = size_average is not None or reduce is not None
        plain = self.family.traced or type(target) in PLAIN
        if legacy or not plain or target.dtype is not torch.int64 or self.rows.dim() != 2:
            return None
        if weight is not None and not self.is_constant(weight):
            return None
        shape = target.shape
        if self.channels:
            if shape != (self.example.shape[:1] + self.example.shape[2:]):
                return None
            target = target.flatten()
        options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if not self.family.traced:
            with self.family.restored():
                if not self.family.call.accepts(self, target, options):
                    return None
        self.family.uses.append(LOSS)
        self.family.bypassed = True
        loss = self.loss(self.rows, target, options)
        loss = loss.view(shape) if self.channels and reduction == "none" else loss
        self.family.collect(loss)
        return loss

    def loss(self, rows: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        options = options | {"softcap": self.cap, "scale": self.scale, "loss_dtype": self.cast}
        loss: Tensor = self.family.loss(rows, target, self.shift, options)
        return loss


# ---- recorded operators --------------------------------------------------------------------------

# A rule returns a copy of a node with the attributes that an operator changes, or None if the
# operator cannot be recorded.


def _view(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records a view in the same order, which keeps rows whole if it keeps the last dimension."""
    example = function(node.example, *args, **kwargs)
    if example.shape[-1:] != node.example.shape[-1:] or example.dtype is not node.example.dtype:
        return None
    rows = node.rows.reshape(*example.shape[:-1], node.rows.shape[-1])
    return replace(node, example=example, rows=rows)


def _index(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records slices of rows, or a selection of rows by masks or int64 tensors."""
    (index,), dimensions = args, node.example.dim()
    parts = index if type(index) is tuple else (index,)
    if _keeps_rows(parts, dimensions):
        return replace(node, rows=node.rows[parts])
    if node.family.traced or not _selects_rows(parts, dimensions):
        return None
    rows = node.rows[parts]
    if not rows.is_contiguous():
        return None
    node.family.watch(*(parts := tuple(map(versioned, parts))))
    example = node.example.new_empty(*rows.shape[:-1], node.example.shape[-1])
    return replace(node, rows=rows, example=example, operation=(function, (parts,), kwargs))


def _keeps_rows(parts: tuple[Any, ...], dimensions: int) -> bool:
    """Returns whether an index of numbers and slices keeps the last dimension whole."""
    slices = [part for part in parts if type(part) is slice]
    bounds = [x for part in slices for x in (part.start, part.stop, part.step) if x is not None]
    known = all(type(x) in (int, slice, EllipsisType) for x in (*parts, *bounds))
    if not known or parts.count(...) > 1:
        return False
    if parts[-1:] == (slice(None),):
        return True
    indexed = len(parts) - parts.count(...)
    return indexed < dimensions and (indexed == len(parts) or parts[-1] is ...)


def _selects_rows(parts: tuple[Any, ...], dimensions: int) -> bool:
    """Returns whether an index consists of masks and int64 tensors for the leading dimensions."""
    if not parts or not all(type(x) in PLAIN and x.dtype in _INDEX_DTYPES for x in parts):
        return False
    return sum(x.dim() if x.dtype is torch.bool else 1 for x in parts) < dimensions


def _transpose(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records the move of the classes to dimension 1."""
    example, expected = function(node.example, *args, **kwargs), node.example.movedim(-1, 1)
    is_expected = (example.shape, example.stride()) == (expected.shape, expected.stride())
    if node.example.dim() < 3 or not is_expected:
        return None
    return replace(node, example=example, rows=node.rows.flatten(0, -2), channels=True)


def _log_softmax(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records a log_softmax over the classes whose result has the dtype of its input."""
    dim, *others = args or (kwargs.get("dim"),)
    is_last = type(dim) is int and dim in (-1, node.example.dim() - 1)
    keeps_dtype = node.family.modes.autocast is None or node.example.dtype is torch.float32
    if others or not is_last or not keeps_dtype or kwargs.get("dtype") is not None:
        return None
    return replace(node, log=True, operation=(function, (), {"dim": -1}))  # for any rows


def _add(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records the sum with a tensor that equals a bias of the head."""
    (bias,), autocast = args, node.family.modes.autocast
    sharded = isinstance(node.family, ColwiseFamily)
    if kwargs or sharded or node.scale != 1 or node.cap is not None:
        return None
    if not node.is_constant(bias) or bias.dim() > node.example.dim():
        return None
    if autocast and (node.family.traced or not _is_exact(bias, autocast)):
        return None  # autocast casts the head's bias
    bias = versioned(bias)
    node.family.watch(bias)
    bias = bias.reshape(-1)  # for any rows
    example = function(node.example, bias.to(node.example.device))
    shift = bias if node.shift is None else node.shift + bias
    return replace(node, shift=shift, example=example, operation=(function, (bias,), {}))


def _is_exact(bias: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a dtype holds a bias exactly, such as zeros; a bias is compared once."""
    if bias.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    now = dtype, *_state(bias)
    if _EXACT.get(bias) != now and torch.equal(bias.to(dtype).to(bias.dtype), bias):
        _EXACT[bias] = now
    return bool(_EXACT.get(bias) == now)


def _cast(node: _Node, _: Any, args: Any, kwargs: Any) -> _Node | None:
    is_float32 = all(dtype is torch.float32 for dtype in (*args, *kwargs.values()))
    fits = is_float32 and node.example.dtype is not torch.float64
    return replace(node, cast=torch.float32) if fits else None


def _scale(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    (number,) = args
    if kwargs or type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = node.scale / number if function in _QUOTIENTS else node.scale * number
    if not 0 < scale < math.inf:
        return None
    return replace(node, scale=1.0 if math.isclose(scale, 1.0) else scale)


def _tanh(node: _Node, _: Any, args: Any, kwargs: Any) -> _Node | None:
    return None if node.cap or args or kwargs else replace(node, cap=1 / node.scale)


_MOVES = (_view, _index, _transpose)
_QUOTIENTS = Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide
_RULES: dict[Any, Callable[..., _Node | None]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten, Tensor.unsqueeze, torch.unsqueeze), _view),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _view),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.movedim), _transpose),
    **dict.fromkeys((Tensor.permute, torch.permute), _transpose),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _add),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scale),
    **dict.fromkeys(_QUOTIENTS, _scale),
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    Tensor.__getitem__: _index,
}


# ---- computed logits -----------------------------------------------------------------------------


def _becomes(tensor: Any, real: Tensor) -> bool:
    """Swaps two tensors, and returns False if torch cannot because C++ holds one of them."""
    if tensor is None:
        return False
    vars(real).update({name: value for name, value in vars(tensor).items() if name != "_node"})
    try:
        torch.utils.swap_tensors(tensor, real)
    except RuntimeError:
        if type(tensor) is not DeferredLogits:  # half swapped
            raise
        return False
    return True


def _refuse(*_: Any, **__: Any) -> Any:
    """Raises for a hook or gradient of logits that other gradients bypass."""
    raise RuntimeError(
        "pyfused.convert: expected register_hook, retain_grad or autograd.grad of logits before "
        "their loss or an autograd.Function of them, got it after. Call it before the loss, or "
        "call pyfused.revert(model)"
    )


class _Refusal:
    """Replaces ``register_hook`` of bypassed logits; FSDP's hooks ignore the gradient."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = weakref.ref(logits)

    def __call__(self, hook: Any) -> Any:
        if torch_internals.is_distributed(getattr(hook, "func", hook)):  # FSDP1 passes a partial
            logits: Any = self.logits()
            return Tensor.register_hook(logits, hook)  # type: ignore[no-untyped-call]
        return _refuse()

    def __reduce__(self) -> Any:
        return partial, (_refuse,)


# ---- tensor subclasses ---------------------------------------------------------------------------


class _Logits(Tensor):
    """The output of a converted head or of a recorded operator; torch.compile sees this class."""

    _node: Any = None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, tensor = kwargs or {}, args[0] if args else None
        with torch_internals.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            if isinstance(tensor, _Logits) and tensor._node.family.is_lazy():
                result = tensor._node.record(tensor, function, args[1:], kwargs)
                if result is not None:
                    return result
            args, kwargs = _mapped(partial(_compute, function=function), (args, kwargs))
        return function(*args, **kwargs)


class DeferredLogits(_Logits):
    """Logits without memory."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes an operator that C++ called, from recomputed logits."""
        if torch_internals.is_mutable(function):
            raise RuntimeError(
                "pyfused.convert: expected no in-place operator on a converted model's logits in "
                f"compiled code, got {function}. Call pyfused.revert(model)"
            )
        args, kwargs = _mapped(_values, (args, kwargs or {}))
        return function(*args, **kwargs)


# These calls are dispatched to torch's function, whose __torch_function__ computes the fused loss.
reasons.not_logged.add(f"input is a {DeferredLogits.__name__}")


class _Deferral(torch.autograd.Function):
    """Creates a tensor without memory, and computes the gradient of the head from its gradient."""

    @staticmethod
    def forward(ctx: Any, node: _Node, hidden: Tensor, *_: Any) -> Tensor:
        ctx.node, example = node, node.example
        return torch_internals.make_wrapper_subclass(
            DeferredLogits,
            example.shape,
            strides=example.stride(),
            dtype=example.dtype,
            device=hidden.device,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        node, inputs = ctx.node, ctx.node.family.inputs
        if node.real is not None and version_of(node.real) != node.version:
            raise RuntimeError(
                "pyfused.convert: expected logits passed to an autograd.Function to stay the same, "
                "got logits changed in place. Call pyfused.revert(model)"
            )
        needed, create_graph = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        with node.family.restored():
            logits = node.recompute()
            found = torch.autograd.grad(logits, wanted, grad_output, create_graph=create_graph)
        gradients = iter(found)
        return None, *(next(gradients) if need else None for need in needed)


def _compute(tensor: Any, function: Any) -> Any:
    """Returns the computed logits for an operator that reads them.

    Raises:
        RuntimeError: The operator's result would lack a gradient.
    """
    family = tensor._node.family
    maker = tensor._node if family.modes.gradients else None  # there is no grad_fn in no_grad
    if not family.traced and getattr(tensor.grad_fn, "node", tensor.grad_fn) is not maker:
        raise RuntimeError(
            "pyfused.convert: expected no autograd.Function that changes logits in place or "
            "returns them, got one. Call pyfused.revert(model)"
        )
    family.compute(_name_of(function))
    if function in _OF_GRADIENTS and family.bypassed:
        _refuse()
    return computed(tensor)


def _mapped(change: Callable[[Any], Any], arguments: Any) -> Any:
    """Returns arguments after applying a function to the deferred logits among them."""
    return torch_internals.tree_map(lambda x: change(x) if is_deferred(x) else x, arguments)


def computed(tensor: Any) -> Any:
    """Returns the computed logits of a tensor, which is the tensor itself after a swap."""
    if isinstance(tensor, DeferredLogits):
        return tensor._node.real
    return tensor._node.example if isinstance(tensor, _Logits) else tensor


def _values(tensor: Any) -> Tensor:
    node: _Node = tensor._node
    node.family.bypassed = True
    if node.real is not None:
        return node.real.detach()
    with node.family.restored(), torch.no_grad():
        return node.recompute().to(node.example.dtype)


def _name_of(function: Any) -> str:
    if is_dynamo_compiling():
        return "an operator"
    name = getattr(function, "__name__", str(function))
    name = function.__self__.__name__ if name in ("__get__", "__set__") else name.strip("_")
    return "indexing" if name == "getitem" else name


def is_deferred(value: Any) -> bool:
    return isinstance(value, _Logits)
