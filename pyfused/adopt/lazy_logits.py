"""Logits that are computed only when something other than their cross-entropy reads them.

The head of a converted model returns `LazyLogits`, a tensor without memory. Its cross-entropy is
``linear_cross_entropy`` of the hidden states, and the gather of a class and the log-sum-exp of each
row are ``linear_log_probs``. The results of a few operators are lazy as well, because they follow
from the hidden states: views that keep rows whole, permutations of dimensions, selections of rows,
a cast to float32, a constant bias, a positive factor, a cap by tanh, log_softmax. The pass over a
loss records the predictions of its rows. Any other operator reads the logits, which are then
computed once.

The tensor is a wrapper subclass with torch's own autograd graph, which begins with `_Head`.
``__torch_function__`` replaces the cross-entropy, and passes a plain view of the tensor to other
operators. ``__torch_dispatch__`` computes the values.

A program that torch.compile traces breaks its graph at a large head, unless it has to be whole. A
frame that uses lazy logits is left to Python, where Dynamo would break its graph at each operator.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.dispatch.operator import requires_grad
from pyfused.dispatch.run import run
from pyfused.layout import accumulate_dtype
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROBS
from pyfused.torch_internals import (
    PLAIN,
    DisableTorchFunctionSubclass,
    tree_map_only,
    version_of,
)
from pyfused.types import LOG_P, LSE, PREDICTION

_ATTRIBUTES = (
    "shape ndim dtype device layout requires_grad is_leaf _base is_cuda is_cpu is_sparse is_meta"
    " is_nested"
)
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(torch.is_floating_point, Tensor.is_floating_point, Tensor.element_size, Tensor.get_device),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    getattr(Tensor, "_backward_hooks").__set__,  # noqa: B009  # called by autograd
    Tensor.__hash__,
}
# They act on the node of the tensor, which its views do not have.
_GRAD_FN = getattr(Tensor, "grad_fn").__get__  # noqa: B009
_OF_NODES = {
    *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
    *(getattr(Tensor, name).__get__ for name in ("grad", "output_nr")),
    _GRAD_FN,
}
_BACKWARD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


class _ThisThread(threading.local):
    """What ``__torch_dispatch__`` calls instead of an operator of ATen in this thread, or None."""

    result: Callable[..., Any] | None = None


_this_thread = _ThisThread()
_NO_INDEX = -(1 << 63)  # an ignore_index that is no class index
_ADVICE = (
    "This takes time, and memory for all logits. Views, permutations and slices such as "
    "logits[:, :n] keep them lazy for cross_entropy with class indices, for gather and for "
    "logsumexp; the argmax is known after the loss. For an entropy, call "
    "pyfused.functional.linear_log_probs. Or call pyfused.revert(model)"
)


def tell(model: str, reason: str) -> None:
    """Warns once that a converted model computes its logits."""
    message = f"pyfused.convert: {model} computes all of its logits: {reason}"
    if reasons.first_time("convert", message):
        warnings.warn(message, RuntimeWarning, stacklevel=reasons.stacklevel())


class HeadCall:
    """One call of a converted head, whose logits are lazy.

    Logits can be computed as long as their inputs stay the same. An optimizer's step follows a
    backward pass, so the first backward pass through a loss of the logits ends them. Until then,
    the versions of the inputs decide, as for tensors that autograd has saved: like autograd, this
    does not notice writes to ``weight.data`` or the steps of fused optimizers.

    Attributes:
        head: The head, which receives the metrics.
        options: The options of the head.
        inputs: The hidden states, of shape (..., D), the weight (C, D), and the bias (C) or None.
        versions: Tensors that must not change until the logits are read, and their versions.
        autocast: The dtype of autocast, None if it was disabled.
        hooks: The active hooks of saved tensors.
        with_metrics: Whether the pass over a loss returns metrics, or the predictions alone, which
            cost nothing on CPUs.
        largest: The largest logit of each row that counts in a loss.
        needs_grad: Whether the logits require a gradient.
        computed: Whether an operator has read the logits.
        bypassed: Whether a loss was computed without the logits.
        ended: Is set when a backward pass reaches such a loss.
        hooks_of_grad: Hooks of the logits' gradient, which such a backward pass calls.
        values: Weak references to the values of lazy tensors that may not have been computed.
        lock: Is held while values are computed, which several threads may read.
    """

    def __init__(self, head: Any, options: Any, *inputs: Any) -> None:
        self.head, self.options, self.autocast = head, options, active_autocast(inputs[0])
        self.computed = self.bypassed = False
        self.with_metrics = options.metrics or (inputs[0].device.type == "cpu" and PREDICTION)
        self.largest: _Largest | None = None
        self.ended, self.lock = threading.Event(), threading.RLock()
        self.hooks_of_grad: OrderedDict[int, Callable[[Any], None]] = OrderedDict()
        self.hooks = torch_internals.saved_tensors_hooks(True)
        self.values: list[Callable[[], _Value | None]] = []
        hidden, weight, bias = inputs
        self.inputs = hidden.clone() if hidden.is_inference() else hidden, weight, bias
        self.versions: list[tuple[Tensor, int]] = []
        self.watch(*(x for x in self.inputs if x is not None and not x.is_inference()))

    def logits(self) -> Any:
        """Returns the lazy output of the head."""
        hidden, weight, _ = self.inputs
        shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        example = torch.empty(shape, dtype=self.autocast or hidden.dtype, device="meta")
        value = _Value(self, hidden, self.inputs[2], example, len(shape) - 1, self.linear)
        if self.with_metrics:
            numbers = torch.arange(shape[:-1].numel(), device=hidden.device)
            value.numbers = numbers.view(*shape[:-1], 1)
        tensor = _head(value, *self.inputs)
        self.needs_grad = value.needs_grad = tensor.requires_grad
        return tensor

    def linear(self) -> Tensor:
        """Returns the values of the logits."""
        dtype = self.autocast or self.inputs[0].dtype
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in self.inputs)
        return F.linear(hidden, weight, bias)  # type: ignore[arg-type]

    def watch(self, *tensors: Tensor) -> None:
        """Makes a change of these tensors an error if the logits are read after it."""
        self.versions += [(x, version_of(x)) for x in tensors]

    def check(self, reader: str) -> None:
        """Checks that the logits can still be computed.

        Raises:
            RuntimeError: Their loss's backward pass has run, or a tensor has been changed.
        """
        freed = not self.inputs[1].untyped_storage().nbytes()  # by FSDP
        if self.ended.is_set():
            event, line = "the backward pass of their loss", "`backward()`"
        elif freed or any(version_of(x) != version for x, version in self.versions):
            event = "a change of the head's input, weight or bias, or of a tensor that was added "
            event, line = f"{event}to the logits or selected their rows", "the change"
        else:
            return
        raise RuntimeError(
            f"pyfused.convert: expected the logits of {self.options.model_name} to be read before "
            f"{event}, got {reader} after it. Move the line with {reader} above {line}, or call "
            "pyfused.revert(model). After a loss, the argmax, max and topk(1) of the rows that "
            "count in it are known: select these rows first, as in logits[mask].argmax(-1). On "
            "GPUs, this needs pyfused.convert(model, metrics=True)"
        )

    def compute(self, reader: str) -> None:
        """Computes all lazy tensors of this call, because an operator reads one of them."""
        with self.lock:
            if not self.computed:
                self.check(reader)
                if self.bypassed or self.needs_grad:
                    when = " after their loss, which has not computed them" if self.bypassed else ""
                    why = f"its logits are read by {reader}{when}. {_ADVICE}"
                    tell(self.options.model_name, why)
            while self.values:  # before an operator changes one of them in place
                if (value := self.values.pop(0)()) is not None:
                    value.compute()
            self.computed = True

    def run(self, op: Any, value: _Value, *operands: Any, **options: Any) -> Any:
        """Runs a fused operator on the rows of a value, without the logits."""
        options |= {"softcap": value.cap, "memory_budget": self.options.memory_budget}
        tensors = value.rows, self.inputs[1], value.bias, *operands
        with (
            torch.autocast(value.rows.device.type, self.autocast, self.autocast is not None),
            torch.set_grad_enabled(value.records_grad()),
        ):
            result: Any = run(op, tensors, op.options(**options))
        self.bypass(result[0] if type(result) is tuple else result)
        return result

    def bypass(self, result: Tensor) -> None:
        """Ends the logits when a backward pass reaches a result, which does not keep the call."""
        if (node := result.grad_fn) is not None:
            self.bypassed = True
            node.register_prehook(partial(_start_backward, self.ended, self.hooks_of_grad))

    def register_hook(self, tensor: Any, hook: Callable[[Any], Any]) -> Any:
        """Registers a hook of a gradient that the backward pass of the loss does not compute.

        Wrappers of models register such hooks on all outputs. FSDP and DeepSpeed prepare the
        backward pass in them, which has to precede all gradients of parameters; Fabric checks who
        has started it. The node of the logits would be reached too late for the one and never for
        both, so a hook runs on the node of each loss that has bypassed the logits, once in a
        backward pass, and with None, as torch passes for an undefined gradient. A backward pass
        that reaches the node of the logits through another operator calls it there.
        """
        last: Any = None

        def called(_: Any) -> None:
            nonlocal last
            before, last = last, torch_internals.current_graph_task()
            if last != before and hook(None) is not None:
                raise _error_of_gradient("a hook that changes the gradient")

        handle = tensor.register_hook(called)
        self.hooks_of_grad[handle.id] = called
        handle.extra_dict_ref = (weakref.ref(self.hooks_of_grad),)
        return handle


@torch_internals.never_traced
def _start_backward(ended: threading.Event, hooks: dict[int, Any], grad_outputs: Any) -> None:
    ended.set()
    for hook in [*hooks.values()]:
        hook(grad_outputs)


class _Largest(NamedTuple):
    """The largest logits that the pass over a loss has recorded, for each row of the head's output.

    Attributes:
        classes: -1 where the class is unknown: without a loss, or with a NaN or an infinity.
        logits: Before a scale and a cap, in float64.
        bias, scale, cap: As in the value of the loss.
    """

    classes: Tensor
    logits: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, value: _Value, classes: Tensor) -> _Largest:
        """Returns the largest logits of a loss, and those of earlier losses of the same logits."""
        call, before, numbers = value.call, value.call.largest, value.numbers.flatten()
        rows, like = value.rows.flatten(0, -2), (value.bias, value.scale, value.cap)
        n = call.inputs[0].shape[:-1].numel()
        if before is None or any(x is not y for x, y in zip(before[2:], like, strict=True)):
            before = cls(numbers.new_full((n,), -1), rows.new_empty(n, dtype=torch.float64), *like)
        else:
            counts = classes >= 0
            numbers, classes, rows = numbers[counts], classes[counts], rows[counts]
        logits = value.linear_at(rows, classes.clamp(min=0))
        classes = before.classes.index_copy(0, numbers, classes)
        return cls(classes, before.logits.index_copy(0, numbers, logits), *like)


@dataclass(eq=False)
class _Value:
    """Describes how a lazy tensor is computed.

    It is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias)``.

    Attributes:
        call: The head's call.
        rows: The hidden states, in the shape of the tensor, with the dimension of the classes moved
            to the end.
        bias: The bias of the head and the constants that were added to the logits, None for 0.
        example: A meta tensor of the same shape, strides and dtype.
        dim: The dimension of the classes.
        operation: Returns the values; None afterwards.
        needs_grad: Whether the result of the operator required a gradient.
        scale, cap: The numbers in the equation above.
        log: Whether log_softmax has been applied.
        numbers: The index of each row in the head's output, in the shape of `rows` with a last
            dimension of size 1; None without metrics.
        real: The computed values, without an autograd graph.
        results: The results of `linear_log_probs`, in the shape of `rows` with a last dimension of
            size 3; None before a gather or a logsumexp.
    """

    call: HeadCall
    rows: Tensor
    bias: Tensor | None
    example: Any
    dim: int
    operation: Callable[[], Tensor] | None
    needs_grad: bool = False
    scale: float = 1.0
    cap: float | None = None
    log: bool = False
    numbers: Any = None
    real: Any = None
    results: Any = None

    def tensor(self) -> Any:
        """Returns a lazy tensor with this value."""
        x = self.example
        tensor: Any = torch_internals.make_wrapper_subclass(
            LazyLogits, x.shape, strides=x.stride(), dtype=x.dtype, device=self.rows.device
        )
        tensor.value = self
        self.call.values.append(weakref.ref(self))
        return tensor

    def compute(self) -> Tensor:
        """Returns the values."""
        with self.call.lock:
            if self.operation is not None:
                mode = torch.inference_mode(self.rows.is_inference())  # must precede no_grad
                autocast = torch.autocast(self.rows.device.type, enabled=False)
                with mode, torch.no_grad(), autocast, DisableTorchFunctionSubclass():
                    self.real, self.operation = self.operation(), None
            return self.real  # type: ignore[no-any-return]

    def result(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns the lazy result of an operator of ATen."""
        others = tree_map_only(Tensor, lambda x: x.to("meta"), args)
        example = function(self.example, *others, **kwargs)
        operation = lambda: function(self.compute(), *args, **kwargs)  # noqa: E731
        return replace(self, example=example, operation=operation).tensor()

    def apply(self, tensor: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the result of an operator if it is known without the logits, or else None."""
        before = self.example
        inference = tensor.is_inference()
        if inference != torch.is_inference_mode_enabled():
            return None
        # An autograd function changes these if it returns the tensor.
        if tensor.requires_grad != self.needs_grad or (not inference and version_of(tensor)):
            return None
        original = _original(function)
        if result := _RESULTS[self.log].get(original):
            return result(self, *args, **kwargs)
        if original in (Tensor.unbind, torch.unbind) and before.dim() > 2:
            return self.unbind(tensor, *args, **kwargs)
        if original in _LARGEST:
            return self.largest(tensor, function, args, kwargs)
        rule = _RULES.get(original)
        if rule is None or (self.log and rule not in _MOVES):
            return None
        changes = rule(self, function, args, kwargs)
        if changes is None:
            return None
        function, args, kwargs = changes.pop("operation", (function, args, kwargs))
        result = _call_with(_Value.result, function, tensor, *args, **kwargs)
        if result is tensor:
            return tensor
        value: _Value = result.value
        shape = value.example.shape
        if "move" not in changes and shape != before.shape:
            key = before.shape[self.dim], before.shape[: self.dim].numel()
            dims = [i for i, size in enumerate(shape) if (size, shape[:i].numel()) == key]
            if not dims:  # a view that does not keep the classes of a row together
                return None
            lead = *shape[: dims[0]], *shape[dims[0] + 1 :]
            changes.update(dim=dims[0], move=lambda x: x.reshape(*lead, x.shape[-1]))
        if (move := changes.pop("move", None)) is not None:
            changes["dim"] %= len(shape)
            of_rows = {name: getattr(self, name) for name in ("rows", "numbers", "results")}
            changes |= {name: x if x is None else move(x) for name, x in of_rows.items()}
        if value.example.dtype is not changes.pop("dtype", before.dtype):
            return None
        for name, attribute in changes.items():
            setattr(value, name, attribute)
        value.needs_grad = result.requires_grad
        return result

    def largest(self, tensor: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of argmax, max or topk if the pass over the loss has recorded it."""
        known, names = self.call.largest, _LARGEST[_original(function)]
        options = dict(zip(names, args, strict=False)) | kwargs
        picks, keeps = function.__name__ != "argmax", "k" in names or options.get("keepdim")
        if (
            known is None
            or options.keys() - names
            or options.get("dim", -1 if "k" in names else None) not in self.dims()
            or options.get("k", 1) != 1
            or options.get("largest", True) is not True
            or known.bias is not self.bias
            or (known.cap is not None and known[3:] != (self.scale, self.cap))
            or (self.log and picks)
        ):
            return None
        numbers = self.numbers.squeeze(-1)
        classes, logits = known.classes[numbers], known.logits[numbers]
        if (classes < 0).any():
            return None
        both = self.scaled(logits).to(self.example.dtype), classes
        values, classes = (x.unsqueeze(self.dim) if keeps else x for x in both)
        answer = (values, classes) if picks else classes
        return _call_with(lambda *_: answer, function, tensor, *args, **kwargs)

    def unbind(self, tensor: Any, dim: int = 0) -> Any:
        """Returns the slices along a dimension, over which loops iterate."""
        if dim in self.dims():
            return None
        lead, count = (slice(None),) * (dim % self.example.dim()), self.example.shape[dim]
        indices = ((*lead, i) for i in range(count))
        return tuple(self.apply(tensor, Tensor.__getitem__, (i,), {}) for i in indices)

    def dims(self) -> tuple[int, int]:
        """Returns the numbers of the dimension of the classes."""
        return self.dim, self.dim - self.example.dim()

    def is_constant(self, tensor: Any, dtype: torch.dtype) -> bool:
        """Returns whether a tensor has a number for each class, in a dtype."""
        if type(tensor) not in PLAIN or tensor.dtype is not dtype:
            return False
        classes, device = self.example.shape[self.dim], self.rows.device
        fits = tensor.shape[-1:] == (classes,) and tensor.numel() == classes
        return fits and tensor.device == device and not requires_grad(tensor)

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
        call, dtype, kind = self.call, self.dtype_of_loss(), self.call.with_metrics
        if not (
            self.dim == 1
            and self.is_index("cross_entropy", target)
            and (weight is None or self.is_constant(weight, dtype))
            and size_average is reduce is None
            and type(ignore_index) is int
            and reduction in ("none", "mean", "sum")
        ):
            return None
        loss: Any = call.run(
            *(LINEAR_CROSS_ENTROPY, self, target, weight, None, None),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            scale=self.scale,
            loss_dtype=dtype,
            with_metrics=kind,
        )
        if kind:
            loss, metrics = loss
            if kind is True:
                call.head.pyfused_metrics, metrics = metrics, metrics.prediction
            call.largest = _Largest.of(self, metrics.where(target != ignore_index, -1).flatten())
        return loss

    def gather(self, dim: Any = None, index: Any = None, **others: Any) -> Any:
        """Returns the logit, or the log-probability, of one class of each row."""
        size = [*getattr(index, "shape", ())]
        if others or dim not in self.dims() or len(size) != self.example.dim() or size[dim] != 1:
            return None
        result = self.of_classes("gather", index.squeeze(dim))
        return None if result is None else result.unsqueeze(dim)

    def selected(self, index: Any) -> Any:
        """Returns the log-probability of one class of each selected row, as in ``x[i, j]``."""
        dims, classes = self.example.dim(), self.example.shape[-1]
        if type(index) is not tuple or (len(index), self.dim + 1) != (dims, dims):
            return None
        if any(type(x) not in PLAIN or x.dtype is not torch.int64 for x in index):
            return None
        *rows, index = torch.broadcast_tensors(*index)
        index = index.where(index >= 0, index + classes)
        return replace(self, rows=self.rows[tuple(rows)]).of_classes("indexing", index)

    def of_classes(self, reader: str, index: Any) -> Any:
        """Returns the logit, or the log-probability, of the class of each row."""
        if not self.is_index(reader, index):
            return None
        classes = self.call.inputs[1].shape[0]
        if index.is_cpu and ((index < 0) | (index >= classes)).any():
            return None  # torch's function raises its error
        if self.log or not self.has_results():
            results = self.row_results(index)
            result = results[..., LOG_P]
            result = result if self.log else result + results[..., LSE]
        else:
            with torch.set_grad_enabled(self.records_grad()):
                result, lse = self.scaled(self.linear_at(self.rows, index)), self.results[..., LSE]
                result = result - (result - lse).clamp(min=0).detach()  # rounding errors
            self.call.bypass(result)
        return result.to(self.example.dtype)

    def logsumexp(self, dim: Any = None, keepdim: Any = False, **others: Any) -> Any:
        """Returns the log-sum-exp of each row."""
        index = torch.zeros(self.rows.shape[:-1], dtype=torch.int64, device=self.rows.device)
        if others or dim not in self.dims() or not self.is_index("logsumexp", index):
            return None
        results = self.results if self.has_results() else self.row_results(index)
        result = results[..., LSE].to(self.dtype_after(torch.logsumexp), copy=True)
        return result.unsqueeze(dim) if keepdim else result

    def row_results(self, index: Tensor) -> Any:
        """Returns the log-probability of a class, the entropy and the log-sum-exp of each row."""
        options = {"temperature": 1 / self.scale, "ignore_index": _NO_INDEX}
        self.results = self.call.run(LINEAR_LOG_PROBS, self, index, **options).movedim(0, -1)
        return self.results

    def has_results(self) -> bool:
        """Returns whether `row_results` has been called in the same gradient mode."""
        return self.results is not None and self.results.requires_grad == self.records_grad()

    def linear_at(self, rows: Tensor, index: Tensor) -> Tensor:
        """Returns the logit of one class of each row in float64, before a scale and a cap."""
        hidden, weight, _ = self.call.inputs
        dtype = self.call.autocast or hidden.dtype
        wide = accumulate_dtype(dtype)
        rows, weight = (x.to(dtype).to(wide) for x in (rows, F.embedding(index, weight)))
        result = (rows * weight).sum(-1)
        if self.bias is not None:
            result = result + self.bias[index].to(dtype)
        return result.to(dtype).double()

    def scaled(self, x: Tensor) -> Tensor:
        """Returns logits with the scale and the cap."""
        return self.scale * (x if self.cap is None else self.cap * (x / self.cap).tanh())

    def is_index(self, reader: str, index: Any) -> bool:
        """Returns whether a fused operator can take a class index for each row."""
        self.call.check(reader)
        return (
            type(index) in PLAIN
            and index.dtype is torch.int64
            and index.shape == self.rows.shape[:-1] != ()
            # A checkpoint of the loss alone has other hooks.
            and self.call.hooks == torch_internals.saved_tensors_hooks(True)
        )

    def records_grad(self) -> bool:
        """Returns whether a result of this value requires a gradient."""
        return torch.is_grad_enabled() and self.needs_grad

    def dtype_after(self, function: Any, **kwargs: Any) -> torch.dtype:
        """Returns the dtype of an operator's result, on which autocast may decide."""
        example = torch.empty(1, dtype=self.example.dtype, device=self.rows.device)
        return function(example, 0, **kwargs).dtype  # type: ignore[no-any-return]

    def casts_to(self, dtype: torch.dtype) -> bool:
        """Returns whether a cast to a dtype keeps logits lazy."""
        before = self.example.dtype
        return dtype is before or (dtype is torch.float32 and before is not torch.float64)

    def dtype_of_loss(self) -> torch.dtype:
        """Returns the dtype of torch's loss, which autocast computes in float32."""
        dtype: torch.dtype = self.example.dtype
        is_cast = dtype is not torch.float64 and torch.is_autocast_enabled(self.rows.device.type)
        return torch.float32 if is_cast else dtype


# ---- operators that keep logits lazy -------------------------------------------------------------

# A rule returns the attributes of a value that an operator changes, its "dtype" if that may change,
# and "operation" if it is called with other arguments; None if the operator reads the logits.


def _operand(args: Any, kwargs: Any) -> Any:
    """Returns the other operand of a binary operator, None if there are more arguments."""
    values = (*args, *kwargs.values())
    return values[0] if len(values) == 1 and kwargs.keys() <= {"other"} else None


def _view(*_: Any) -> Any:
    return {}


def _movement(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """A permutation of the dimensions, or an index of numbers and slices."""
    shape = [*value.example.shape]
    shape[value.dim] = size = 1 << 31  # which a slice only keeps whole if it has no bounds
    strides = [int(i == value.dim) for i in range(len(shape))]
    probe = function(torch.empty_strided(shape, strides, device="meta"), *args, **kwargs)
    sizes = zip(probe.shape, probe.stride(), strict=True)
    kept = [i for i, each in enumerate(sizes) if each == (size, 1)]
    if not kept:
        return None

    def move(x: Tensor) -> Any:
        return function(x.movedim(-1, value.dim), *args, **kwargs).movedim(kept[0], -1)

    return {"dim": kept[0], "move": move}


def _index(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """Slices of rows, or a selection of rows by masks or int64 tensors."""
    (index,), shape = args, value.example.shape
    parts = index if type(index) is tuple else (index,)
    if {*map(type, parts)} <= {int, slice, EllipsisType}:
        return _movement(value, function, args, kwargs)
    indices: tuple[Tensor, ...] = ()
    for part in parts:
        if type(part) not in PLAIN or part.is_inference():  # an inference tensor has no version
            return None
        if part.dtype is torch.bool and part.shape == shape[len(indices) :][: part.dim()] != ():
            indices += part.nonzero(as_tuple=True)
        elif part.dtype is torch.int64:
            indices += (part,)
        else:
            return None
    if value.dim != len(shape) - 1 or not 0 < len(indices) < len(shape):
        return None
    value.call.watch(*parts)
    return {"dim": -1, "move": lambda x: x[indices], "operation": (function, (indices,), {})}


def _log_softmax(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """A log_softmax over the classes."""
    dim, *others = args or (kwargs.get("dim"),)
    if others or type(dim) is not int or dim not in value.dims():
        return None
    dtype = value.dtype_after(_original(function), dtype=kwargs.get("dtype"))
    if not value.casts_to(dtype):
        return None
    operation = lambda x: x.to(dtype).log_softmax(dim)  # noqa: E731
    return {"log": True, "dtype": dtype, "operation": (operation, (), {})}


def _add(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """The sum with a constant bias, which autocast would round."""
    bias, call = _operand(args, kwargs), value.call
    example, dtype = value.example, value.rows.dtype
    if value.scale != 1 or value.cap is not None or call.autocast or example.dtype is not dtype:
        return None
    if not value.is_constant(bias, dtype) or value.dim != example.dim() - 1:
        return None
    if bias.dim() > example.dim() or bias.is_inference():  # it has no version
        return None
    call.watch(bias)
    bias = bias.reshape(-1)
    return {"bias": bias if value.bias is None else value.bias + bias, "results": None}


def _cast(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """A cast to float32, or to the tensor's own dtype and device."""
    if kwargs.keys() - {"dtype", "device", "non_blocking"} or bool in map(type, args):
        return None
    device = value.rows.device
    cast = function(torch.empty(0, dtype=value.example.dtype, device=device), *args, **kwargs)
    if cast.device != device or not value.casts_to(cast.dtype):
        return None
    return {"dtype": cast.dtype, "operation": (Tensor.to, (cast.dtype,), {})}


def _scale(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    number = _operand(args, kwargs)
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = value.scale / number if function in _QUOTIENTS else value.scale * number
    if not 0 < scale < math.inf:
        return None
    return {"scale": 1.0 if math.isclose(scale, 1.0) else scale, "results": None}


def _tanh(value: _Value, _: Any, *arguments: Any) -> Any:
    changes = {"cap": 1 / value.scale, "results": None}
    return None if value.cap or any(arguments) else changes


def _clone(*_: Any) -> Any:
    """A copy without a gradient, as DistributedDataParallel makes of a model's outputs."""
    return None if torch.is_grad_enabled() else {}


def _original(function: Any) -> Any:
    """Returns torch's function for one that :func:`pyfused.patch` has put in its place."""
    return getattr(function, "__wrapped__", function)


# Operators whose results are known without the logits, or without their log_softmax.
_RESULTS: dict[bool, dict[Any, Any]] = {
    False: {
        _original(F.cross_entropy): _Value.cross_entropy,
        **dict.fromkeys((Tensor.gather, torch.gather), _Value.gather),
        **dict.fromkeys((Tensor.logsumexp, torch.logsumexp), _Value.logsumexp),
    },
    True: {
        _original(F.nll_loss): _Value.cross_entropy,
        **dict.fromkeys((Tensor.gather, torch.gather), _Value.gather),
        Tensor.__getitem__: _Value.selected,
    },
}
_MOVES = _view, _index, _movement
_QUOTIENTS = Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide
_NAMES_OF_RULES: dict[Callable[..., Any], str] = {
    _view: "view reshape contiguous flatten unsqueeze squeeze detach",
    _movement: "transpose swapaxes swapdims permute movedim moveaxis t",
    _index: "__getitem__",
    _log_softmax: "log_softmax",
    _add: "add __add__ __radd__",
    _scale: "mul __mul__ __rmul__ div __truediv__ true_divide",
    _cast: "float to",
    _tanh: "tanh",
    _clone: "clone",
}
_RULES = {
    _original(getattr(owner, name)): rule
    for rule, names in _NAMES_OF_RULES.items()
    for name in names.split()
    for owner in (Tensor, torch, F)
    if callable(getattr(owner, name, None))
} | {Tensor.mT.__get__: _movement, Tensor.data.__get__: _view}  # type: ignore[attr-defined]
# Operators that return the largest logit of each row, and the names of their arguments.
_LARGEST = {
    getattr(owner, name): names.split()
    for name, names in (
        ("argmax", "dim keepdim"),
        ("max", "dim keepdim"),
        ("topk", "k dim largest sorted"),
    )
    for owner in (Tensor, torch)
}


# ---- the tensor subclass -------------------------------------------------------------------------


class LazyLogits(Tensor):
    """The output of a converted head, or of an operator on it, without memory."""

    value: _Value

    def __getattr__(self, name: str) -> Any:
        if name == "__tensor_flatten__":  # Dynamo asks whether it can trace the operators
            torch_internals.leave_traced_frame()
        return object.__getattribute__(self, name)  # raises the error

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor: Any = args[0] if args else None
        is_lazy = isinstance(tensor, LazyLogits)
        with DisableTorchFunctionSubclass():
            if is_lazy and function in _METADATA:
                return function(*args, **kwargs)
            if is_lazy and not tensor.value.call.computed:
                result = tensor.value.apply(tensor, function, args[1:], kwargs)
                if result is not None:
                    return result
            name = _name_of(function)
            if is_lazy and function in _OF_NODES:
                if tensor.value.call.bypassed and tensor.requires_grad:
                    if function is Tensor.register_hook:
                        return tensor.value.call.register_hook(*args, **kwargs)
                    if function == _GRAD_FN:
                        return _BypassedNode()
                _expect_gradient(tensor, name)
                return function(*args, **kwargs)
            if is_lazy and _is_in_place(function):
                tensor.value.call.compute(name)
                if name == "data":
                    raise _error_in_place("memory", name)
                return function(*args, **kwargs)
            if function in _BACKWARD:
                edge = partial(_edge_of, function=function)
                others, kwargs = tree_map_only(LazyLogits, edge, (args[1:], kwargs))
                args = *args[:1], *others
            view = partial(_view_of, reader=name)
            args, kwargs = tree_map_only(LazyLogits, view, (args, kwargs))
        result = function(*args, **kwargs)
        return tensor if is_lazy and result is args[0] else result

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows what is known, so that print and a debugger do not compute the logits."""
        value = self.value
        if value.operation is None:
            return repr(value.real)
        x = value.example
        shown = f"shape={tuple(x.shape)}, dtype={x.dtype}, device={value.rows.device}"
        return f"LazyLogits({shown}, not computed)"

    __format__ = object.__format__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor: Any = args[0] if args else None
        if isinstance(tensor, LazyLogits) and (result := _this_thread.result) is not None:
            return result(tensor.value, function, args[1:], kwargs)
        values, kwargs = tree_map_only(LazyLogits, _values_of, (args, kwargs))
        result = function(*values, **kwargs)
        if result is not values[0]:
            return result
        if result.shape != tensor.shape:
            raise _error_in_place("shape", str(function))
        return tensor


torch_internals.skip_frames(LazyLogits.__torch_function__)
# These calls are dispatched to torch's function, whose __torch_function__ computes the fused loss.
reasons.not_reported.add(f"input is a {LazyLogits.__name__}")


class _Head(torch.autograd.Function):
    """The linear layer, whose output is lazy."""

    @staticmethod
    def forward(ctx: Any, value: _Value, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.materialize_grads = False
        return value.tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 4
        hidden, weight, bias = ctx.saved_tensors
        _, *needed = ctx.needs_input_grad
        rows, dtype = grad.reshape(-1, grad.shape[-1]), grad.dtype
        inputs = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            return (
                None,
                (grad @ weight.to(dtype)).to(hidden.dtype) if needed[0] else None,
                (rows.t() @ inputs.to(dtype)).to(weight.dtype) if needed[1] else None,
                rows.sum(0).to(bias.dtype) if needed[2] else None,
            )


_head: Any = torch_internals.apply_of(_Head)


def _call_with(result: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls an operator, for which ``__torch_dispatch__`` calls another function."""
    _this_thread.result = result
    try:
        return function(*args, **kwargs)
    finally:
        _this_thread.result = None


def _values_of(x: LazyLogits) -> Tensor:
    """Returns the values of a lazy tensor."""
    x.value.call.compute("C++ code")
    return x.value.compute()


def _view_of(x: LazyLogits, reader: str) -> Tensor:
    """Returns a plain view of a lazy tensor for an operator."""
    x.value.call.compute(reader)
    with torch.inference_mode(x.is_inference()):
        return x.view_as(x)


def _edge_of(x: LazyLogits, function: Any) -> Any:
    """Returns the node of lazy logits for a backward pass."""
    _expect_gradient(x, "autograd.grad")
    if function is not torch.autograd.grad:
        x.retain_grad()
    return get_gradient_edge(x)


def _expect_gradient(x: Any, reader: str) -> None:
    """Computes logits, so that their gradient passes through their node.

    Raises:
        RuntimeError: Their loss was computed without them, so the gradient would lack it.
    """
    if x.value.call.bypassed and x.requires_grad:
        raise _error_of_gradient("retain_grad or autograd.grad")
    x.value.call.compute(reader)


def _error_of_gradient(expected: str) -> RuntimeError:
    return RuntimeError(
        f"pyfused.convert: expected {expected} of logits before their loss, got it after. Call it "
        "before, or call pyfused.revert(model)"
    )


class _BypassedNode:
    """The ``grad_fn`` of logits that no backward pass reaches, which can only be compared."""

    def __getattr__(self, name: str) -> Any:
        raise _error_of_gradient(f"{name} of the grad_fn")


def _is_in_place(function: Any) -> bool:
    """Returns whether a function changes its first argument, by an operator of ATen."""
    name = getattr(function, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__") and hasattr(torch.ops.aten, name)
    return changes or name.startswith(("__i", "__set"))


def _error_in_place(part: str, name: str) -> RuntimeError:
    message = f"expected no operator that changes the {part} of a model's logits in place"
    return RuntimeError(f"pyfused.convert: {message}, got {name}. Call pyfused.revert(model)")


def active_autocast(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on a tensor's device, None if it is disabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    name = function.__self__.__name__ if name in ("__get__", "__set__") else name.strip("_")
    return "indexing" if name == "getitem" else name
