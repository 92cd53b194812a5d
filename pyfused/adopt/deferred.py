"""Logits that are computed only if an operation other than their cross-entropy reads them.

`causal_lm.py` decides which of three tensors a head returns:

- recorded logits: computed by torch; their class records the operators that read them during the
  model's call;
- deferred logits: a tensor without memory. ``linear_cross_entropy`` computes its cross-entropy from
  the hidden states. Any other operator makes torch compute the logits once, in the grad mode and
  autocast of the head's call, and later operators use these. C++ code also gets the values, but a
  gradient that it returns for the tensor without memory raises an error;
- under torch.compile: logits with memory, which the compiler removes if nothing reads them.

All three intercept operators by ``__torch_function__``. The results of a few operators can still be
derived from the hidden states, so they are recorded or deferred as well: views that keep rows
whole, selections of rows, a cast to float32, a constant bias, a positive factor, a cap by tanh,
log_softmax.
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
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.dispatch.signature import PLAIN
from pyfused.functional import linear_cross_entropy, linear_cross_entropy_with_metrics
from pyfused.ops.metrics import Metrics
from pyfused.torch_internals import version_of

LOSS = "its loss"
CHANGED = "its loss after a change of its head's input or parameters"
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "is_cpu")),
}
_OF_GRADIENTS = {
    *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
    *(getattr(Tensor, name).__get__ for name in ("grad", "grad_fn")),
    torch.autograd.grad,
}
_INDEX_DTYPES = (torch.bool, torch.int64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXACT: Any = WeakTensorKeyDictionary()  # the compared dtype and version of each bias


class _Modes(NamedTuple):
    """The modes that torch's results depend on; ``autocast`` is its dtype, None if disabled."""

    inference: bool
    gradients: bool
    autocast: torch.dtype | None
    hooks: Any  # for saved tensors, which detect a checkpoint


def modes_of(device: str) -> _Modes:
    compiling = is_dynamo_compiling()
    return _Modes(
        not compiling and torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        None if compiling else torch_internals.saved_tensors_hooks(True),
    )


def captures() -> bool:
    """Returns whether a CUDA graph is being captured, which cannot wait for a comparison."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def without_hooks() -> AbstractContextManager[Any]:
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


def versioned(x: Any) -> Any:
    """Returns a tensor with a version counter, to detect in-place changes; may be a copy."""
    if not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


class Family:
    """The logits of one call of a head, and the operators recorded for them.

    Attributes:
        call: The model's call, which compares a loss with torch's.
        inputs: The hidden states, the head's weight, and its bias or None.
        recorded: Whether torch has computed the logits.
        finish: Receives ``results``, the losses and computed logits of a unit of FSDP, at the end.
        traced: Whether torch.compile traces the head's call.
        uses: The names of the operators that have read the logits, and LOSS for a loss that was
            computed without them.
        computed: Whether operators are no longer recorded, because one has read the logits.
        tensors: Weak references to the tensors that the user's code has received.
        watched: The inputs and the tensors of recorded operators, none of which may change in
            place, with their versions and addresses.
        checksums: Checksums of the inputs, which detect changes that do not increment a version;
            None if not computed.
    """

    shared = False  # whether several processes compute the logits together

    def __init__(
        self, call: Any, modes: Any, *inputs: Any, recorded: bool, finish: Any = None
    ) -> None:
        self.call, self.modes, self.recorded, self.finish = call, modes, recorded, finish
        self.traced, self.computed = is_dynamo_compiling(), False
        self.dtype = modes.autocast or inputs[0].dtype
        self.uses: list[str] = []
        self.results: list[Tensor] = []
        self.tensors: list[Callable[[], Any]] = []
        self.watched: list[tuple[Tensor, int, int]] = []
        self.inputs = self.watch(*inputs)
        checks = not (self.traced or call.alone or captures())
        self.checksums = self._checksums() if checks else None

    def watch(self, *tensors: Any) -> tuple[Any, ...]:
        """Returns `versioned` tensors, and records their versions until the logits are computed.

        In compiled programs it returns copies, which Inductor removes if nothing changes a tensor.
        """
        kept = list(tensors)
        for i, x in enumerate(tensors):
            if x is not None and self.traced:
                kept[i] = x.clone()
            elif x is not None:
                kept[i] = x = versioned(x) if x.is_inference() else x
                self.watched.append((x, version_of(x), x.data_ptr()))
        return tuple(kept)

    def _checksums(self) -> list[Tensor]:
        local = (getattr(x, "to_local", x.detach)().detach() for x in self.inputs if x is not None)
        return [x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64) for x in local]

    def is_unchanged(self) -> bool:
        """Returns whether the inputs and the tensors of recorded operators are unchanged."""
        for x, version, address in self.watched:
            # FSDP moves the weight.
            if version_of(x) != version or (x.data_ptr() != address and self.finish is None):
                return False
        return self.checksums is None or all(map(torch.equal, self.checksums, self._checksums()))

    def check(self) -> None:
        """Checks that the tensors from which the logits are computed have not changed.

        Raises:
            RuntimeError: A tensor has been changed in place since the head's call.
        """
        if not self.is_unchanged():
            raise RuntimeError(
                "pyfused.convert: expected the head's input, weight and bias, and tensors that are "
                "added to its logits or select their rows, to stay the same until the logits are "
                "read, got one changed in place. Read the logits before the change, or call "
                "pyfused.revert(model)"
            )

    def logits(self) -> Any:
        """Returns the output of the head."""
        hidden, weight, *_ = self.inputs
        shape = *hidden.shape[:-1], weight.shape[0]
        if not (self.traced or self.recorded):
            return _Node(self, hidden).tensor(torch.empty(shape, dtype=self.dtype, device="meta"))
        logits = self.linear(hidden)
        if self.recorded and (type(logits) is not Tensor or logits.shape != shape):
            return logits  # sharded
        return _Node(self, hidden).tensor(logits)

    def linear(self, rows: Tensor) -> Tensor:
        """Returns the logits of rows of hidden states, computed by torch."""
        return F.linear(rows, *self.inputs[1:])

    def loss(self, node: _Node, rows: Any, target: Any, options: dict[str, Any]) -> Any:
        """Returns the cross-entropy of rows of hidden states, with the operators of a node."""
        (_, weight, bias), shift, call = self.inputs, node.shift, self.call
        if shift is not None:
            bias = shift if bias is None else bias + shift
        options = options | {"linear_bias": bias, "softcap": node.cap, "scale": node.scale}
        options["loss_dtype"] = node.cast
        if not call.with_metrics:
            return linear_cross_entropy(rows, weight, target, **options)
        loss, call.model.pyfused_metrics = linear_cross_entropy_with_metrics(
            rows, weight, target, **options
        )
        return loss

    def read(self, reader: str) -> None:
        """Ends the recording and computes deferred logits, because an operator reads them."""
        self.uses.append(reader)
        if self.recorded:
            self.results += self.alive()
            self.release()
        elif not self.computed and not self.traced:
            tensors = self.alive()
            with self.restored():
                for tensor in tensors:
                    tensor._node.compute()
            for tensor in tensors:
                tensor._node.parent = None
        self.computed = True

    def close(self, reader: str) -> None:
        """Ends the head's call, after which its weight may change."""
        # nll_loss saves recorded log-probabilities for its backward pass.
        kept = [x for x in self.alive() if not (self.recorded and x._node.log)]
        if kept and not self.computed:
            self.read(reader)
        finish, self.finish = self.finish, None
        if finish is not None:
            with torch_internals.DisableTorchFunctionSubclass():
                finish(self.results)
        self.results = []

    def alive(self) -> list[Any]:
        """Returns the tensors of the user's code that are still referenced."""
        tensors = [reference() for reference in self.tensors]
        return [tensor for tensor in tensors if tensor is not None]

    def release(self) -> None:
        """Turns recorded logits back into plain tensors."""
        for tensor in self.alive() if self.recorded else ():
            tensor.__class__ = Tensor
            del tensor._node
        self.tensors = [] if self.recorded else self.tensors

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the grad mode and the autocast of the head's call, which `check` allows."""
        self.check()
        inference, gradients, dtype, _ = self.modes
        cast = torch.autocast(self.inputs[0].device.type, dtype, dtype is not None)
        mode = torch.inference_mode(inference)  # must precede grad mode, which it sets
        with mode, torch.set_grad_enabled(gradients), cast, without_hooks():
            yield


class ColwiseFamily(Family):
    """The logits of a head of ``ColwiseParallel``, whose input is a replicated DTensor.

    All processes record the first call, and agree on whether only the loss read the logits.
    """

    shared = True

    def __init__(self, call: Any, modes: Any, gather: Any, *inputs: Any, recorded: bool) -> None:
        hidden, weight, bias = inputs
        self.mesh, layout = hidden.device_mesh, (hidden.device_mesh, hidden.placements)
        self.gather = gather  # runs the hooks after the head's forward
        self.replicate: Any = lambda x: type(hidden).from_local(x, *layout, run_check=False)
        local = hidden.full_tensor()
        local = local if type(local) in PLAIN else local.clone()
        super().__init__(call, modes, local, weight, bias, recorded=recorded)

    def linear(self, rows: Tensor) -> Any:
        return self.gather(F.linear(self.replicate(rows), *self.inputs[1:]))

    def loss(self, node: _Node, rows: Any, target: Any, options: dict[str, Any]) -> Any:
        loss = super().loss(node, self.replicate(rows), self.replicate(target), options)
        if self.call.with_metrics:
            metrics = self.call.model.pyfused_metrics
            self.call.model.pyfused_metrics = Metrics(*(x.full_tensor() for x in metrics))
        return loss.full_tensor()

    def agrees(self, alone: bool) -> bool:
        """Returns whether only the loss has read the logits, in all processes."""
        votes = torch.tensor(int(alone), device=self.inputs[0].device)
        for group in self.mesh.get_all_groups():
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group)
        return bool(votes)


@dataclass(eq=False)
class _Node:
    """One tensor of a family: the head's output, or an operator's result.

    Its value is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias) + shift``.

    Attributes:
        rows: The hidden states, in the shape of the tensor.
        operation: torch's operator, and its arguments and keyword arguments after the parent.
        shift: A tensor of one number for each class, None without an addition.
        log: Whether log_softmax has been applied to this value.
        channels: Whether the classes are dimension 1, as in the cross-entropy of images; ``rows``
            then has two dimensions.
        cast: The dtype that x was cast to, None without a cast.
        example: For deferred logits, a meta tensor of the same shape, strides and dtype; under
            torch.compile, the logits.
        real: The computed tensor, for deferred logits.
    """

    family: Family
    rows: Tensor
    parent: _Node | None = None
    operation: tuple[Any, Any, Any] = (None, (), {})
    shift: Tensor | None = None
    log: bool = False
    channels: bool = False
    cast: torch.dtype | None = None
    scale: float = 1.0
    cap: float | None = None
    example: Any = None
    real: Any = None

    def tensor(self, logits: Any) -> Any:
        """Returns the tensor that the user's code receives, given logits, on meta if deferred."""
        family, tensor = self.family, logits
        if family.recorded:
            tensor.__class__ = Logits
        elif family.traced:
            tensor = logits.as_subclass(Logits)
        else:
            needs_grad = [x is not None and x.requires_grad for x in family.inputs]
            tensor = torch_internals.make_wrapper_subclass(
                DeferredLogits,
                logits.shape,
                strides=logits.stride(),
                dtype=logits.dtype,
                device=self.rows.device,
                requires_grad=family.modes.gradients and any(needs_grad),
            )
            with torch_internals.DisableTorchFunctionSubclass():
                if tensor.requires_grad:
                    tensor.register_hook(_refuse)
        self.example = None if family.recorded else logits
        tensor._node = self
        if not family.traced:
            family.tensors.append(weakref.ref(tensor))
        return tensor

    def compute(self) -> Any:
        """Computes the tensor once."""
        if self.real is not None:
            return self.real
        if self.parent is None:
            self.real = self.family.linear(self.rows)
            self.family.results.append(self.real)
        else:
            function, args, kwargs = self.operation
            self.real = function(self.parent.compute(), *args, **kwargs)
        return self.real

    def replay(self, rows: Tensor, moves: bool) -> Tensor:
        """Returns the logits of rows of hidden states; ``moves`` includes moves of rows."""
        if self.parent is None:
            return self.family.linear(rows)
        logits, (function, args, kwargs) = self.parent.replay(rows, moves), self.operation
        is_left_out = not moves and _RULES.get(function) in _MOVES
        return logits if is_left_out else function(logits, *args, **kwargs)

    def record(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator if it can be recorded, or else None."""
        if function is (F.nll_loss if self.log else F.cross_entropy):
            return self.cross_entropy(function, tensor, *args, **kwargs)
        rule = _RULES.get(function)
        if rule is None or self.channels or (self.log and rule not in _MOVES):
            return None
        logits = tensor if self.family.recorded else self.example
        changes = rule(self, logits, function, args, kwargs)
        if changes is None:
            return None
        changes = {"operation": (function, args, kwargs)} | changes
        result = changes.pop("result", None)
        if result is None:
            result = function(logits, *args, **kwargs)
        if result is logits:
            return tensor
        return replace(self, parent=self, **changes).tensor(result)

    def is_constant(self, tensor: Any, dtype: torch.dtype) -> bool:
        """Returns whether a tensor has a number for each class, in the dtype of its logits."""
        if not isinstance(tensor, Tensor) or not (self.family.traced or type(tensor) in PLAIN):
            return False
        classes, autocast = len(self.family.inputs[1]), self.family.modes.autocast
        dtypes = {torch.float32} if autocast else {self.rows.dtype, dtype}
        shaped = tensor.numel() == classes and tensor.shape[-1:] == (classes,)
        fits = dtypes == {tensor.dtype} and tensor.device == self.rows.device
        return bool(shaped and fits and not tensor.requires_grad)

    def cross_entropy(
        self,
        function: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """Returns the result of torch's function if it can be fused, or else None."""
        family, shape = self.family, target.shape
        legacy = size_average is not None or reduce is not None or type(ignore_index) is not int
        plain = family.traced or type(target) in PLAIN
        if legacy or not plain or target.dtype is not torch.int64 or self.rows.dim() != 2:
            return None
        if weight is not None and not self.is_constant(weight, logits.dtype):
            return None
        if self.channels and shape != (logits.shape[:1] + logits.shape[2:]):
            return None
        original_target, target = target, target.flatten() if self.channels else target
        options: Any = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
        smoothing = {} if self.log else {"label_smoothing": label_smoothing}
        expected: Any = None
        if family.recorded:
            expected = function(logits, original_target, **options, **smoothing)
            family.results.append(expected)
            if not family.is_unchanged():
                family.read(CHANGED)
                return expected
        elif not family.traced:
            family.check()
        options |= smoothing
        if not (family.traced or family.call.accepts(self, target, options, expected)):
            return expected
        family.uses.append(LOSS)
        if family.recorded:
            return expected
        loss: Tensor = family.loss(self, self.rows, target, options)
        loss = loss.view(shape) if self.channels and reduction == "none" else loss
        family.results.append(loss)
        return loss


# ---- recorded operators --------------------------------------------------------------------------

# A rule returns the attributes of a node that an operator on logits changes, and the operator's
# result if it is known. It returns None if the operator cannot be recorded. ``operation`` applies
# to any rows of logits.


def _operand(args: Any, kwargs: Any) -> Any:
    """Returns the other operand of a binary operator, None if there are more arguments."""
    values = (*args, *kwargs.values())
    return values[0] if len(values) == 1 and kwargs.keys() <= {"other"} else None


def _view(node: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    """Records a view in the same order, which keeps rows whole if it keeps the last dimension."""
    result = function(logits, *args, **kwargs)
    if result.shape[-1:] != logits.shape[-1:] or result.dtype is not logits.dtype:
        return None
    rows = node.rows.reshape(*result.shape[:-1], node.rows.shape[-1])
    return {"result": result, "rows": rows}


def _index(node: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    """Records slices of rows, or a selection of rows by masks or int64 tensors."""
    (index,), dimensions = args, logits.dim()
    parts = index if type(index) is tuple else (index,)
    if _keeps_rows(parts, dimensions):
        return {"rows": node.rows[parts]}
    if node.family.traced or not _selects_rows(parts, dimensions):
        return None
    rows = node.rows[parts]
    if not rows.is_contiguous():
        return None
    parts = node.family.watch(*parts)
    shape = *rows.shape[:-1], logits.shape[-1]
    result = logits.new_empty(shape) if logits.is_meta else logits[parts]
    return {"rows": rows, "result": result, "operation": (function, (parts,), kwargs)}


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
    return sum(x.dim() if x.dtype is torch.bool else 1 for x in parts) < dimensions


def _transpose(node: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    """Records the move of the classes to dimension 1."""
    result, expected = function(logits, *args, **kwargs), logits.movedim(-1, 1)
    is_expected = (result.shape, result.stride()) == (expected.shape, expected.stride())
    if logits.dim() < 3 or not is_expected:
        return None
    return {"result": result, "rows": node.rows.flatten(0, -2), "channels": True}


def _log_softmax(node: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    """Records a log_softmax over the classes whose result has the dtype of its input."""
    dim, *others = args or (kwargs.get("dim"),)
    is_last = type(dim) is int and dim in (-1, logits.dim() - 1)
    keeps_dtype = node.family.modes.autocast is None or logits.dtype is torch.float32
    if others or not is_last or not keeps_dtype or kwargs.get("dtype") is not None:
        return None
    return {"log": True, "operation": (function, (), {"dim": -1})}


def _add(node: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    """Records the sum with a tensor that equals a bias of the head."""
    bias, autocast = _operand(args, kwargs), node.family.modes.autocast
    if node.family.shared or node.scale != 1 or node.cap is not None:
        return None
    if not node.is_constant(bias, logits.dtype) or bias.dim() > logits.dim():
        return None
    if autocast and (node.family.traced or not _is_exact(bias, autocast)):
        return None  # autocast casts the head's bias
    (bias,) = node.family.watch(bias)
    bias = bias.reshape(-1)
    shift = bias if node.shift is None else node.shift + bias
    result = function(logits, bias.to(logits.device))
    return {"shift": shift, "result": result, "operation": (function, (bias,), {})}


def _is_exact(bias: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a dtype represents a bias exactly; a bias is compared only once."""
    state = None if bias.is_inference() else (dtype, version_of(bias), bias.data_ptr())
    if state is None or _EXACT.get(bias) != state:
        if captures() or not torch.equal(bias.to(dtype).to(bias.dtype), bias):
            return False
        _EXACT[bias] = state
    return True


def _cast(_: _Node, logits: Tensor, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    is_float32 = all(dtype is torch.float32 for dtype in (*args, *kwargs.values()))
    return {"cast": torch.float32} if is_float32 and logits.dtype is not torch.float64 else None


def _scale(node: _Node, _: Tensor, function: Any, args: Any, kwargs: Any) -> Any:
    number = _operand(args, kwargs)
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = node.scale / number if function in _QUOTIENTS else node.scale * number
    if not 0 < scale < math.inf:
        return None
    return {"scale": 1.0 if math.isclose(scale, 1.0) else scale}


def _tanh(node: _Node, _: Tensor, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    return None if node.cap or args or kwargs else {"cap": 1 / node.scale}


_MOVES = (_view, _index, _transpose)
_QUOTIENTS = Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide
_RULES: dict[Any, Callable[..., Any]] = {
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


class Logits(Tensor):
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
            if type(tensor).__module__ == "numpy" and is_dynamo_compiling():
                args = torch.as_tensor(tensor), *args[1:]  # a NumPy scalar times logits
            node = getattr(tensor, "_node", None) if isinstance(tensor, Logits) else None
            if node is not None and not node.family.computed:
                family: Family = node.family
                if family.modes == modes_of(family.inputs[0].device.type):
                    result = node.record(tensor, function, args[1:], kwargs)
                    if result is not None:
                        return result
            args, kwargs = torch_internals.tree_map(partial(_read, function), (args, kwargs))
        return function(*args, **kwargs)


class DeferredLogits(Logits):
    """Logits without memory."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Computes an operator that C++ called, from values without a gradient."""
        if torch_internals.is_mutable(function):
            _refuse()
        args, kwargs = torch_internals.tree_map(_value, (args, kwargs or {}))
        return function(*args, **kwargs)


# These calls are dispatched to torch's function, whose __torch_function__ computes the fused loss.
reasons.not_logged.update(f"input is a {kind.__name__}" for kind in (Logits, DeferredLogits))


def _refuse(*_: Any) -> Any:
    """Raises for C++ code that changes a tensor without memory, or sends it a gradient."""
    raise RuntimeError(
        "pyfused.convert: expected no autograd.Function and no in-place C++ operator on a model's "
        "logits, because the first calls had none, got one. Call pyfused.revert(model)"
    )


def _read(function: Any, tensor: Any) -> Any:
    """Returns the computed logits for an operator that reads them; returns other values unchanged.

    Raises:
        RuntimeError: The operator's result would lack a gradient.
    """
    if not isinstance(tensor, Logits):
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
    """Returns the values of deferred logits, whose gradient raises; returns others unchanged."""
    if not isinstance(tensor, DeferredLogits):
        return tensor
    node: _Node = tensor._node
    node.family.uses.append("C++ code")
    if node.real is not None:
        return node.real.detach()
    with node.family.restored(), torch.no_grad():
        return node.replay(node.family.inputs[0], moves=True).to(tensor.dtype)


def computed(tensor: Any) -> Any:
    """Returns the computed logits of a tensor."""
    if isinstance(tensor, DeferredLogits):
        return tensor._node.real
    return tensor._node.example if isinstance(tensor, Logits) else tensor


def _name_of(function: Any) -> str:
    if is_dynamo_compiling():
        return "an operator"
    name = getattr(function, "__name__", str(function))
    name = function.__self__.__name__ if name in ("__get__", "__set__") else name.strip("_")
    return "indexing" if name == "getitem" else name
