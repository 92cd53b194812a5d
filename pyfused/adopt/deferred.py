"""Logits that are computed only if an operation other than their cross-entropy reads them.

`causal_lm.py` decides which of three tensors a head returns:

- recorded logits: torch's, whose class records during the model's call who reads them;
- deferred logits, a tensor without memory. Its cross-entropy is computed by
  ``linear_cross_entropy`` from the hidden states. Any other operator makes torch compute the logits
  once, in the grad mode and autocast of the head's call. From then on, operators use these. C++
  code gets values, too, but a gradient that it sends to the tensor without memory is an error;
- under torch.compile, logits with memory, which the compiler removes if nothing reads them.

All three intercept operators by ``__torch_function__``. A few operators keep the logits known, so
their results are recorded or deferred, too: views that keep rows whole, selections of rows, a cast
to float32, a constant bias, a positive factor, a cap by tanh, log_softmax.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from pyfused.adopt import adapters
from pyfused.dispatch import reasons
from pyfused.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from pyfused.ops.metrics import Metrics
from pyfused.torch_internals import version_of

LOSS = "its loss"
CHANGED = "its loss after a change of its head's input or parameters"
PLAIN = (Tensor, Parameter)
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "is_cpu")),
}
_INDEX_DTYPES = (torch.bool, torch.int64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXACT: Any = WeakTensorKeyDictionary()  # a bias, and the dtype and version that were compared
_OF_GRADIENTS = {
    *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
    *(getattr(Tensor, name).__get__ for name in ("grad", "grad_fn")),
    torch.autograd.grad,
}


class Family:
    """The logits of one call of a head, and the operators recorded for them.

    Attributes:
        call: The model's call, which compares a loss with torch's.
        inputs: The hidden states, the head's weight, its bias, and the weight of an adapter, whose
            features follow the hidden states, or None.
        traced: Whether torch.compile traces the head's call.
        recorded: Whether torch has computed the logits.
        watched: The inputs and the tensors of recorded operators, none of which may change in
            place, with their versions and addresses.
        checksums: Of the inputs, to detect changes without a version; None to not compute them.
        finish: Receives the losses and computed logits of a unit of FSDP when its call ends.
        uses: The names of the operators that have read the logits, and LOSS for a loss without
            logits.
        computed: Whether operators are no longer recorded, because one has read the logits.
        tensors: Weak references to the tensors that the user's code has received.
    """

    def __init__(self, call: Any, *inputs: Any, recorded: bool = False, finish: Any = None) -> None:
        self.call, self.finish, self.recorded = call, finish, recorded
        self.results: list[Any] | None = None if finish is None else []
        self.uses: list[str] = []
        self.tensors: list[Callable[[], Any]] = []
        self.computed, self.traced = False, is_dynamo_compiling()
        self.inputs = tuple(map(_snapshot if self.traced else versioned, inputs))
        self.modes = modes_of(inputs[0].device.type)
        self.dtype = self.modes.autocast or inputs[0].dtype
        self.watched: list[tuple[Tensor, Any]] = []
        self.watch(*inputs)
        self.checksums = None if self.traced or not call.checks() else self._checksums()

    def watch(self, *tensors: Tensor | None) -> None:
        """Records the versions of tensors that are read until the logits have been computed."""
        if not self.traced:
            self.watched += [(x, self._state(x)) for x in tensors if x is not None]

    def _state(self, tensor: Tensor) -> Any:
        """Returns the version and the address, which FSDP changes, to detect in-place changes."""
        version, address = _state(tensor)
        return version, self.finish or address

    def _checksums(self) -> list[Tensor]:
        local = (getattr(x, "to_local", x.detach)().detach() for x in self.inputs if x is not None)
        return [x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64) for x in local]

    def is_unchanged(self) -> bool:
        """Returns whether the inputs and the tensors of recorded operators are unchanged."""
        if any(self._state(tensor) != state for tensor, state in self.watched):
            return False
        return self.checksums is None or all(map(torch.equal, self.checksums, self._checksums()))

    def logits(self) -> Any:
        """Returns the output of the head."""
        hidden, weight, *_, adapter_weight = self.inputs
        if self.traced:
            return _Node(self, hidden, self.linear(hidden, adapter_weight)).tensor()
        shape = *hidden.shape[:-1], len(weight)
        if self.recorded:
            logits = self.linear(hidden, adapter_weight)
            if type(logits) is not Tensor or logits.shape != shape:
                return logits  # sharded
            return _Node(self, hidden, _on_meta(logits)).tensor(logits)
        return _Node(self, hidden, torch.empty(shape, dtype=self.dtype, device="meta")).tensor()

    def linear(self, rows: Tensor, adapter_weight: Tensor | None) -> Tensor:
        """Returns the logits of rows of hidden states, computed by torch."""
        _, weight, bias, _ = self.inputs
        return adapters.linear(rows, weight, bias, adapter_weight)

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
        # nll_loss saves recorded log-probabilities for its backward pass.
        if not self.computed and any(
            not (self.recorded and tensor._node.log) for tensor in self.alive()
        ):
            self.read(reader)
        results, self.results = self.results, None
        if results is not None:
            with torch_internals.DisableTorchFunctionSubclass():
                self.finish(results)

    def is_lazy(self) -> bool:
        """Returns whether operators can be recorded: the modes have not changed since the call."""
        return not self.computed and self.modes == modes_of(self.inputs[0].device.type)

    def agrees(self, alone: bool) -> bool:
        """Returns whether only the loss has read the logits, in all processes that share them."""
        return alone

    def read(self, reader: str) -> None:
        """Ends the recording, and computes deferred logits, because an operator reads them."""
        self.uses.append(reader)
        if self.recorded:
            self.collect(*self.alive())
            self.release()
        elif not self.computed and not self.traced:
            tensors = self.alive()
            with self.restored():
                for tensor in tensors:
                    tensor._node.compute()
            for tensor in tensors:
                tensor._node.parent = None
        self.computed = True

    def alive(self) -> list[Any]:
        """Returns the tensors of the user's code that are still referenced."""
        tensors = (reference() for reference in self.tensors)
        return [tensor for tensor in tensors if tensor is not None]

    def release(self) -> None:
        """Turns recorded logits back into plain tensors."""
        if self.recorded:
            for tensor in self.alive():
                tensor.__class__ = Tensor
                del tensor._node
            self.tensors.clear()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the grad mode and the autocast of the head's call.

        Raises:
            RuntimeError: The head's input or parameters have been changed in place since the call.
        """
        if not self.is_unchanged():
            raise RuntimeError(
                "pyfused.convert: expected the head's input, weight and bias, and tensors that are "
                "added to its logits or select their rows, to stay the same until the logits are "
                "read, got one changed in place. Read the logits before the change, or call "
                "pyfused.revert(model)"
            )
        inference, gradients, dtype, _ = self.modes
        cast = torch.autocast(self.inputs[0].device.type, dtype, dtype is not None)
        mode = torch.inference_mode(inference)  # must precede grad mode, which it sets
        with mode, torch.set_grad_enabled(gradients), cast, without_hooks():
            yield


class ColwiseFamily(Family):
    """The logits of a head of ``ColwiseParallel``, whose input is a replicated DTensor."""

    def __init__(
        self, call: Any, gather: Any, hidden: Any, weight: Any, bias: Any, recorded: bool
    ) -> None:
        self.mesh, layout = hidden.device_mesh, (hidden.device_mesh, hidden.placements)
        self.gather = gather  # runs the hooks after the head's forward
        self.replicate: Any = lambda x: type(hidden).from_local(x, *layout, run_check=False)
        local = hidden.full_tensor()
        local = local if type(local) in PLAIN else local.clone()
        super().__init__(call, local, weight, bias, None, recorded=recorded)

    def linear(self, rows: Tensor, adapter_weight: Any) -> Any:  # noqa: ARG002
        return self.gather(F.linear(self.replicate(rows), *self.inputs[1:3]))

    def loss(self, rows: Any, target: Any, *options: Any) -> Any:
        loss = super().loss(self.replicate(rows), self.replicate(target), *options)
        if self.call.with_metrics:
            metrics = self.call.model.pyfused_metrics
            self.call.model.pyfused_metrics = Metrics(*(x.full_tensor() for x in metrics))
        return loss.full_tensor()

    def agrees(self, alone: bool) -> bool:
        votes = torch.tensor(int(alone), device=self.inputs[0].device)
        for group in self.mesh.get_all_groups():
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group)
        return bool(votes)


def hooks() -> Any:
    """Returns the hooks for saved tensors, which detect a checkpoint."""
    return None if is_dynamo_compiling() else torch_internals.saved_tensors_hooks(True)


def without_hooks() -> AbstractContextManager[Any]:
    """Hides tensors that are saved for backward from the active hooks, such as a checkpoint's."""
    if hooks() is None:
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


class _Modes(NamedTuple):
    """The modes that torch's results depend on; ``autocast`` is its dtype, None if disabled."""

    inference: bool
    gradients: bool
    autocast: torch.dtype | None
    hooks: Any


def modes_of(device: str) -> _Modes:
    inference = not is_dynamo_compiling() and torch.is_inference_mode_enabled()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _Modes(inference, torch.is_grad_enabled(), dtype, hooks())


def versioned(x: Any) -> Any:
    """Returns a tensor with a version counter, to detect in-place changes; may be a copy."""
    if is_dynamo_compiling() or not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def _snapshot(x: Any) -> Any:
    """Returns a copy for a compiled program, which Inductor removes if nothing changes ``x``."""
    return None if x is None else x.clone()


def _state(x: Tensor) -> tuple[int, int]:
    """Returns the version of a tensor, 0 for an inference tensor, and its address."""
    return 0 if x.is_inference() else version_of(x), x.data_ptr()


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


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
        real: The computed tensor of deferred logits.
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

    def tensor(self, logits: Any = None) -> Any:
        """Returns the tensor that the user's code receives, which is ``logits`` if recorded."""
        family, example, tensor = self.family, self.example, logits
        if family.traced:
            tensor = example.as_subclass(_Logits)
            tensor._node = self
            return tensor
        if family.recorded:
            tensor.__class__ = _Logits
        else:
            needs_grad = [x is not None and x.requires_grad for x in family.inputs]
            tensor = torch_internals.make_wrapper_subclass(
                DeferredLogits,
                example.shape,
                strides=example.stride(),
                dtype=example.dtype,
                device=self.rows.device,
                requires_grad=family.modes.gradients and any(needs_grad),
            )
            if tensor.requires_grad:
                with torch_internals.DisableTorchFunctionSubclass():
                    tensor.register_hook(_refuse_gradient)
        tensor._node = self
        family.tensors.append(weakref.ref(tensor))
        return tensor

    def compute(self) -> Tensor:
        """Computes the tensor once."""
        if self.real is None:
            parent = self.parent.compute() if self.parent else self.family.inputs[0]
            self.real = self.apply(parent)
            if self.parent is None:
                self.family.collect(self.real)
        return self.real

    def value(self) -> Tensor:
        if self.real is not None:
            return self.real.detach()
        return self.apply(self.parent.value() if self.parent else self.family.inputs[0])

    def apply(self, input: Tensor) -> Tensor:
        """Returns the result of torch's operator for its parent's value or the hidden states."""
        if self.parent is None:
            return self.family.linear(input, self.family.inputs[-1])
        function, args, kwargs = self.operation
        result: Tensor = function(input, *args, **kwargs)
        return result

    def recompute(self, rows: Tensor) -> Tensor:
        """Returns the logits of other rows."""
        if self.parent is None:
            return self.apply(rows)
        parent, moves = self.parent.recompute(rows), _RULES.get(self.operation[0]) in _MOVES
        return parent if moves else self.apply(parent)

    def record(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator if it can be recorded, or else None."""
        if function is (F.nll_loss if self.log else F.cross_entropy):
            return self.cross_entropy(tensor, function, *args, **kwargs)
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
        if not self.family.recorded:
            return tensor if node.example is self.example else node.tensor()
        result = function(tensor, *args, **kwargs)
        return result if type(result) is not Tensor else node.tensor(result)

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
        tensor: Any,
        function: Any,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Any = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """Returns the result of torch's function if it can be fused, or else None."""
        family = self.family
        legacy = size_average is not None or reduce is not None or type(ignore_index) is not int
        plain = family.traced or type(target) in PLAIN
        if legacy or not plain or target.dtype is not torch.int64 or self.rows.dim() != 2:
            return None
        if weight is not None and not self.is_constant(weight):
            return None
        shape = target.shape
        if self.channels and shape != (self.example.shape[:1] + self.example.shape[2:]):
            return None
        targets = target.flatten() if self.channels else target
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        expected: Any = None
        if family.recorded:
            expected = function(tensor, target, **self._of(function, options))
            family.collect(expected)
            if not family.is_unchanged():
                family.read(CHANGED)
                return expected  # type: ignore[no-any-return]
        if not family.traced:
            with family.restored():
                if not family.call.accepts(self, targets, options, expected):
                    return expected  # type: ignore[no-any-return]
        family.uses.append(LOSS)
        if family.recorded:
            result: Tensor = expected
            return result
        loss = self.loss(self.rows, targets, options)
        loss = loss.view(shape) if self.channels and reduction == "none" else loss
        family.collect(loss)
        return loss

    @staticmethod
    def _of(function: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the options that torch's function has."""
        known = options.items()
        return dict(known if function is F.cross_entropy else list(known)[:-1])

    def loss(self, rows: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        options = options | {"softcap": self.cap, "scale": self.scale, "loss_dtype": self.cast}
        loss: Tensor = self.family.loss(rows, target, self.shift, options)
        return loss


# ---- recorded operators --------------------------------------------------------------------------

# A rule returns a copy of a node with the attributes that an operator changes, or None if the
# operator cannot be recorded.


def _operand(args: Any, kwargs: Any) -> Any:
    """Returns the other operand of a binary operator, None if there are more arguments."""
    values = (*args, *kwargs.values())
    return values[0] if len(values) == 1 and kwargs.keys() <= {"other"} else None


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
    return replace(node, log=True, operation=(function, (), {"dim": -1}))  # for selected rows, too


def _add(node: _Node, function: Any, args: Any, kwargs: Any) -> _Node | None:
    """Records the sum with a tensor that equals a bias of the head."""
    bias, autocast = _operand(args, kwargs), node.family.modes.autocast
    sharded = isinstance(node.family, ColwiseFamily)
    if sharded or node.scale != 1 or node.cap is not None:
        return None
    if not node.is_constant(bias) or bias.dim() > node.example.dim():
        return None
    if autocast and (node.family.traced or not _is_exact(bias, autocast)):
        return None  # autocast casts the head's bias
    bias = _snapshot(bias) if node.family.traced else versioned(bias)
    node.family.watch(bias)
    bias = bias.reshape(-1)  # for selected rows, too
    example = function(node.example, bias.to(node.example.device))
    shift = bias if node.shift is None else node.shift + bias
    return replace(node, shift=shift, example=example, operation=(function, (bias,), {}))


def _is_exact(bias: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a dtype represents a bias exactly; a bias is compared only once."""
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
    number = _operand(args, kwargs)
    if type(number) not in (int, float) or not 0 < number < math.inf:
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
            if is_dynamo_compiling() and type(tensor).__module__ == "numpy":
                args = torch.as_tensor(tensor), *args[1:]  # a NumPy scalar times logits
            node = getattr(tensor, "_node", None) if isinstance(tensor, _Logits) else None
            if node is not None and node.family.is_lazy():
                result = node.record(tensor, function, args[1:], kwargs)
                if result is not None:
                    return result
            args, kwargs = torch_internals.tree_map(partial(_read, function), (args, kwargs))
        return function(*args, **kwargs)


class DeferredLogits(_Logits):
    """Logits without memory."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes an operator that C++ called, from values without a gradient."""
        if torch_internals.is_mutable(function):
            raise RuntimeError(
                "pyfused.convert: expected no in-place operator on a converted model's logits in "
                f"C++ or compiled code, got {function}. Call pyfused.revert(model)"
            )
        args, kwargs = torch_internals.tree_map(_value, (args, kwargs or {}))
        return function(*args, **kwargs)


# These calls are dispatched to torch's function, whose __torch_function__ computes the fused loss.
reasons.not_logged.update(f"input is a {kind.__name__}" for kind in (_Logits, DeferredLogits))


def _refuse_gradient(_: Any) -> Any:
    """Raises for a gradient of a tensor without memory, which does not reach the hidden states."""
    raise RuntimeError(
        "pyfused.convert: expected no autograd.Function of a model's logits in a call whose first "
        "calls had none, got one. Call pyfused.revert(model)"
    )


def _read(function: Any, tensor: Any) -> Any:
    """Returns the computed logits for an operator that reads them; returns other values as is.

    Raises:
        RuntimeError: The operator's result would lack a gradient.
    """
    if not isinstance(tensor, _Logits):
        return tensor
    if tensor._node is None:  # torch.compile iterates over logits without __torch_function__
        return tensor.as_subclass(Tensor)
    family: Family = tensor._node.family
    if isinstance(tensor, DeferredLogits) and function in _OF_GRADIENTS and LOSS in family.uses:
        raise RuntimeError(
            "pyfused.convert: expected register_hook, retain_grad or autograd.grad of logits "
            "before their loss, got it after. Call it before the loss, or call "
            "pyfused.revert(model)"
        )
    family.read(_name_of(function))
    return computed(tensor)


def _value(tensor: Any) -> Any:
    """Returns the values of deferred logits, whose gradient raises; other values as is."""
    if not isinstance(tensor, DeferredLogits):
        return tensor
    node: _Node = tensor._node
    node.family.uses.append("C++ code")
    with node.family.restored(), torch.no_grad():
        return node.value().to(tensor.dtype)


def computed(tensor: Any) -> Any:
    """Returns the computed logits of a tensor."""
    if isinstance(tensor, DeferredLogits):
        return tensor._node.real
    return tensor._node.example if isinstance(tensor, _Logits) else tensor


def _name_of(function: Any) -> str:
    if is_dynamo_compiling():
        return "an operator"
    name = getattr(function, "__name__", str(function))
    name = function.__self__.__name__ if name in ("__get__", "__set__") else name.strip("_")
    return "indexing" if name == "getitem" else name


def is_deferred(value: Any) -> bool:
    return isinstance(value, _Logits) and value._node is not None
