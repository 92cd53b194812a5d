"""Logits that are computed only when something other than their cross-entropy reads them.

The head of a converted model returns `LazyLogits`, a tensor without memory, which has four rules:

1. Operators that move whole rows, or that are in the equation of the loss, keep logits lazy:
   `_RULES`.
2. The first loss of each row is ``linear_cross_entropy`` of the hidden states: `_Loss`.
3. This loss records the largest logit of each row and its class, which answer argmax, max and
   topk(1): `_largest`.
4. All other operators of ATen read the logits, which are then computed once.

The tensor is a wrapper subclass with torch's own autograd graph, which begins with `_Head`.
``__torch_function__`` replaces a few functions, such as losses: `_FUNCTIONS`.
``__torch_dispatch__`` receives the operators of all others: it returns the lazy result of an
operator that has a rule, and calls any other with the values.

A program that torch.compile traces breaks its graph at a large head, unless it has to be whole. A
frame that uses lazy logits is left to Python, where Dynamo would break its graph at each operator.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.dispatch import reasons, report
from pyfused.dispatch.operator import Options, Tensors, requires_grad
from pyfused.dispatch.run import fallback_reason, run
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.torch_internals import PLAIN, DisableTorchFunctionSubclass, tree_map_only, version_of

# The product of a head with few rows takes as long as reading its weight. On an AMD EPYC, 64 losses
# of 4 rows took several times as long as with all logits, and losses of 64 rows 1.1 times.
FEW_ROWS = 32
_COST = "This takes time, and memory for all logits."
_ADVICE = (
    f"{_COST} One cross_entropy of each row needs no logits, and afterwards the argmax of rows "
    "that count in it is known: select these first, as in logits[mask].argmax(-1). For other "
    "losses, call pyfused.functional.linear_log_probs, or linear_cross_entropy(z_loss=...) for a "
    "z-loss. Or call pyfused.revert(model)"
)


class HeadCall:
    """One call of a converted head, whose logits are lazy.

    Logits can be computed as long as their inputs stay the same. An optimizer's step follows a
    backward pass, so the first backward pass through a loss of the logits ends them. Until then,
    the versions of the inputs decide, as for tensors that autograd has saved: like autograd, this
    does not notice writes to ``weight.data`` or the steps of fused optimizers.

    Attributes:
        head, options: The head, which receives the metrics, and its options.
        device: The device of the logits.
        inputs: The hidden states, of shape (..., D), the weight (C, D), and the bias (C) or None.
        versions: The inputs that must not change until the logits are read, and their versions.
        autocast: The dtype of autocast, None if it was disabled.
        hooks: The active hooks of saved tensors.
        is_fused: Whether a loss of each row has been fused, on the CPU.
        largest: The largest logit of each row before a scale and a cap, and its class, of shape
            (2, N); the class is -1 if no fused loss counts the row. None before such a loss.
        prior: The constant that was added to these logits, None for 0.
        needs_grad: Whether the logits require a gradient.
        computed: Whether an operator has read the logits.
        bypassed: Whether a loss that requires a gradient was computed without the logits.
        ended: Is set when a backward pass reaches such a loss.
        hooks_of_grad: Hooks of the logits' gradient, which that backward pass calls.
        values: Weak references to the values of lazy tensors that may not have been computed.
    """

    def __init__(self, head: Any, options: Any, *inputs: Any) -> None:
        hidden, weight, bias = inputs
        self.device: torch.device = hidden.device
        self.head, self.options, self.autocast = head, options, active_autocast(hidden)
        self.hooks = torch_internals.saved_tensors_hooks(True)
        self.is_fused = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.bool, device="cpu")
        self.largest: Tensor | None = None
        self.prior: Tensor | None = None
        self.needs_grad = self.computed = self.bypassed = False
        self.ended = threading.Event()
        self.hooks_of_grad: OrderedDict[int, Callable[[Any], None]] = OrderedDict()
        self.values: list[Callable[[], _Value | None]] = []
        self.inputs = hidden.clone() if hidden.is_inference() else hidden, weight, bias
        watched = [x for x in self.inputs if x is not None and not x.is_inference()]
        self.versions = [(x, version_of(x)) for x in watched]

    def logits(self) -> Any:
        """Returns the lazy output of the head."""
        hidden, weight, _ = self.inputs
        shape, dtype = (*hidden.shape[:-1], weight.shape[0]), self.autocast or hidden.dtype
        row_index = torch.arange(len(self.is_fused), device="cpu").view(shape[:-1])
        example = torch.empty(shape, dtype=dtype, device="meta")
        value = _Value(self, row_index, example, len(shape) - 1, self.linear)
        tensor = _head(value, *self.inputs)
        self.needs_grad = value.needs_grad = tensor.requires_grad
        return tensor

    def linear(self) -> Tensor:
        """Returns the values of the logits."""
        dtype = self.autocast or self.inputs[0].dtype
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in self.inputs)
        return F.linear(hidden, weight, bias)  # type: ignore[arg-type]

    def why_ended(self) -> str | None:
        """Returns why the logits cannot be computed any more, None if they can be."""
        if self.ended.is_set():
            return "the backward pass of their loss"
        freed = not self.inputs[1].untyped_storage().nbytes()  # by FSDP
        if freed or any(version_of(x) != version for x, version in self.versions):
            return "a change of the head's input, weight or bias"
        return None

    def check(self, reader: str) -> None:
        """Checks that the logits can still be computed.

        Raises:
            RuntimeError: Their loss's backward pass has run, or an input has been changed.
        """
        if not (reason := self.why_ended()):
            return
        known = "the rows that count in it are known: select these, as in logits[mask].argmax(-1)"
        if self.prior is not None:
            known = "logits + prior are known, where prior is the constant that the loss added"
        raise RuntimeError(
            f"pyfused.convert: expected the logits of {self.options.model_name} to be read before "
            f"{reason}, got {reader} after it. Move the line with {reader} up, or call "
            f"pyfused.revert(model). After a loss, the argmax, max and topk(1) of {known}. On "
            "GPUs, this needs pyfused.convert(model, metrics=True)"
        )

    def compute(self) -> None:
        """Computes all lazy tensors of this call.

        Several threads may do so; the first result of each tensor counts.
        """
        for reference in [*self.values]:  # before an operator changes one of them in place
            if (value := reference()) is not None:
                value.compute()
        self.computed = True
        self.values.clear()

    def warn(self, reader: str) -> None:
        if self.needs_grad or self.is_fused.any():
            self.options.warn(f"its logits are read by {reader}")

    def operands(self, value: _Value, index: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the hidden states of some rows, the weight, and the bias with the constant."""
        hidden, weight, bias = self.inputs
        x = hidden.reshape(-1, hidden.shape[-1])
        if type(index) is slice:
            x = x[index]
        else:
            x = F.embedding(index.to(x.device, non_blocking=True), x)
        if value.constant is not None:
            bias = value.constant if bias is None else bias + value.constant
        return x.view(*value.row_index.shape, x.shape[-1]), weight, bias

    def record(self, value: _Value, index: Any, largest: Tensor, valid: Tensor) -> None:
        """Records the largest logits of some rows, and their classes where a target is valid."""
        if self.largest is None:
            self.prior = value.constant
            self.largest = largest.new_full((2, len(self.is_fused)), -1)
        elif not self.has_recorded(value.constant):
            return
        self.largest[0, index] = largest[0].flatten()
        self.largest[1, index] = largest[1].where(valid, -1).flatten()

    def has_recorded(self, constant: Tensor | None) -> bool:
        """Returns whether the recorded logits contain this constant."""
        if self.prior is None or constant is None:
            return self.prior is constant
        return torch.equal(self.prior, constant)

    def register_hook(self, tensor: Any, hook: Callable[[Any], Any]) -> Any:
        """Registers a hook of a gradient that the backward pass of the loss does not compute.

        Wrappers of models register such hooks on all outputs: FSDP and DeepSpeed prepare the
        backward pass in them, before any gradient of a parameter, and Fabric checks who has started
        it. So a hook runs once in a backward pass, when that reaches a loss that has bypassed the
        logits, with None, as torch passes for an undefined gradient; or at the node of the logits
        if another operator leads there.
        """
        last: Any = None  # the backward pass in which the hook has run

        def run_once(_: Any) -> None:
            nonlocal last
            before, last = last, torch_internals.current_graph_task()
            if last != before and hook(None) is not None:
                raise _error_of_gradient("a hook that changes the gradient")

        handle = tensor.register_hook(run_once)
        self.hooks_of_grad[handle.id] = run_once
        handle.extra_dict_ref = (weakref.ref(self.hooks_of_grad),)
        return handle


@torch_internals.never_traced
def _start_backward(ended: threading.Event, hooks: dict[int, Any], grad_outputs: Any) -> None:
    ended.set()
    for hook in [*hooks.values()]:
        hook(grad_outputs)


@dataclass(eq=False)
class _Value:
    """Describes how a lazy tensor is computed.

    The tensor is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias) + constant``.

    Attributes:
        call: The head's call.
        row_index: The index of each row in the head's output, of the shape of the tensor without
            the dimension of the classes. On the CPU unless a tensor on a GPU has selected rows.
        example: A meta tensor of the same shape, strides and dtype.
        dim: The dimension of the classes.
        operation: Returns the values; None afterwards.
        needs_grad: Whether the result of the operator requires a gradient.
        constant: A tensor (C) in the equation above, None for 0.
        scale, cap: The numbers in the equation above.
        log: Whether log_softmax has been applied.
        real: The computed values, without an autograd graph.
    """

    call: HeadCall
    row_index: Tensor
    example: Tensor
    dim: int
    operation: Callable[[], Tensor] | None
    needs_grad: bool = False
    constant: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    log: bool = False
    real: Tensor = field(init=False)

    def tensor(self) -> Any:
        """Returns a lazy tensor with this value."""
        x = self.example
        tensor: Any = torch_internals.make_wrapper_subclass(
            LazyLogits, x.shape, strides=x.stride(), dtype=x.dtype, device=self.call.device
        )
        torch_internals.throw_on_data_ptr(tensor)
        tensor.value = self
        self.call.values.append(weakref.ref(self))
        return tensor

    def compute(self) -> Tensor:
        """Returns the values."""
        if (operation := self.operation) is not None:
            mode = torch.inference_mode(self.call.inputs[0].is_inference())  # must precede no_grad
            autocast = torch.autocast(self.call.device.type, enabled=False)
            with mode, torch.no_grad(), autocast, DisableTorchFunctionSubclass():
                vars(self).setdefault("real", operation())  # another thread may have been faster
            self.operation = None
        return self.real

    def read(self, reader: str) -> Tensor:
        """Returns the values for an operator, and computes all lazy tensors of the head's call."""
        call = self.call
        if not call.computed:
            call.check(reader)
            fused = " after a loss that has not computed them" * bool(call.is_fused.any())
            call.warn(f"{reader}{fused}. {_ADVICE}")
        call.compute()
        return self.compute()

    def records_grad(self) -> bool:
        """Returns whether the result of an operator requires a gradient."""
        return torch.is_grad_enabled() and self.needs_grad

    def has_rules(self, tensor: Any) -> bool:
        """Returns whether results of this lazy tensor may be lazy, or known without the logits."""
        inference = tensor.is_inference()
        if self.call.computed or inference != torch.is_inference_mode_enabled():
            return False
        # An autograd function changes these if it returns the tensor.
        return tensor.requires_grad == self.needs_grad and (inference or not version_of(tensor))

    def result(self, example: Tensor, function: Any, *args: Any, **changes: Any) -> Any:
        """Returns the lazy result of an operator, with some changed attributes.

        Args:
            example: A meta tensor like the result. Rules with a number make it by ``empty_like``,
                as operators of numbers on meta tensors import torch's compiler (one second).
        """
        operation = lambda: function(self.compute(), *args)  # noqa: E731
        changes = {"needs_grad": self.records_grad()} | changes
        return replace(self, example=example, operation=operation, **changes).tensor()

    def dims(self) -> tuple[int, int]:
        """Returns the dimension of the classes, counted from the front and from the back."""
        return self.dim, self.dim - self.example.dim()

    def index(self) -> Any:
        """Returns the indices of the rows in the head's output, a slice if they are consecutive."""
        index = self.row_index.flatten()
        if index.is_cpu and len(index):
            first, last = int(index[0]), int(index[0]) + len(index)
            if torch.equal(index, torch.arange(first, last, device="cpu")):
                return slice(first, last)
        return index

    def largest(self) -> tuple[Tensor, Tensor] | None:
        """Returns the recorded logits and classes of all rows, None if they are not recorded."""
        call, recorded = self.call, self.call.largest
        if recorded is None or not call.has_recorded(self.constant):
            return None
        x, classes = recorded[:, self.row_index.to(recorded.device, non_blocking=True)]
        if (classes < 0).any():
            return None
        x = x.to(call.autocast or call.inputs[0].dtype).double()
        return self.scaled(x), classes.long()

    def largest_with_gradient(self, results: Any) -> Any:
        """Returns recorded logits, whose gradient is computed without all logits, and classes."""
        values, classes = results
        if not values.requires_grad or self.call.why_ended():
            return results
        rows, weight, bias = self.call.operands(self, self.index())
        index, dtype = classes.view(self.row_index.shape), self.call.autocast or rows.dtype
        pair = [x.to(dtype).double() for x in (rows, F.embedding(index, weight))]
        x = (pair[0] * pair[1]).sum(-1)
        x = x if bias is None else x + bias[index].to(dtype)
        return type(results)((self.scaled(x).view_as(values), classes))

    def scaled(self, x: Tensor) -> Tensor:
        """Returns logits with this x of the equation above, in float64."""
        x = x if self.cap is None else self.cap * (x / self.cap).tanh()
        return (self.scale * x).to(self.example.dtype)

    def is_constant(self, tensor: Any, dtype: torch.dtype) -> bool:
        """Returns whether a plain tensor of a dtype has one number per class, and no gradient."""
        if type(tensor) not in PLAIN or tensor.dtype is not dtype:
            return False
        classes = self.example.shape[self.dim]
        fits = tensor.shape[-1:] == (classes,) and tensor.numel() == classes
        return fits and tensor.device == self.call.device and not requires_grad(tensor)


# ---- operators that keep logits lazy -------------------------------------------------------------

# A rule takes the value of a lazy tensor, an operator of ATen and its other arguments. It returns
# the operator's result, or None if the operator reads the logits.


def _copy(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Copies the logits, or casts half precision to float32, on the same device."""
    before, device = value.example.dtype, value.call.device
    dtype = kwargs.get("dtype") or before
    widens = dtype is torch.float32 and before is not torch.float64 and not value.log
    moves = (kwargs.get("device") or device) != device or kwargs.get("pin_memory")
    if moves or not (widens or dtype is before):
        return None
    needs_grad = value.records_grad() and function is not aten.detach.default
    options = {name: x for name, x in kwargs.items() if name in ("dtype", "memory_format")}
    function = partial(function, **options)
    return value.result(function(value.example), function, needs_grad=needs_grad)


def _view(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Views the logits in another shape that still has a dimension for the classes."""
    before, example = value.example.shape, function(value.example, *args)
    size, rows, shape = before[value.dim], before[: value.dim].numel(), example.shape
    dims = [i for i, each in enumerate(shape) if each == size and shape[:i].numel() == rows]
    if len(dims) != 1:
        return None
    row_index = value.row_index.reshape(shape[: dims[0]] + shape[dims[0] + 1 :])
    return value.result(example, function, *args, dim=dims[0], row_index=row_index)


def _move(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Permutes the dimensions, or selects or splits rows."""
    row_index = value.row_index.unsqueeze(value.dim).expand(value.example.shape)  # of each logit
    moved, examples = function(row_index, *args), function(value.example, *args)
    if isinstance(moved, Tensor):
        return _moved(value, moved, examples, function, *args)
    results = [
        _moved(value, piece, example, lambda x, i=i: function(x, *args)[i])
        for i, (piece, example) in enumerate(zip(moved, examples, strict=True))
    ]
    return None if any(x is None for x in results) else results


def _moved(value: _Value, row_index: Tensor, example: Tensor, function: Any, *args: Any) -> Any:
    """Returns the logits of the rows with these indices, None if they lack classes of a row."""
    classes = value.example.shape[value.dim], 0
    sizes = zip(row_index.shape, row_index.stride(), strict=True)
    dims = [i for i, each in enumerate(sizes) if each == classes]
    if len(dims) != 1:
        return None
    (dim,) = dims
    return value.result(example, function, *args, dim=dim, row_index=row_index.select(dim, 0))


def _index(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Selects rows by masks or int64 tensors."""
    if function is aten.index_select.default:
        function, args = aten.index.Tensor, ([None] * (args[0] % value.example.dim()) + [args[1]],)
    shape, row_index, indices = value.example.shape, value.row_index, list[Tensor | None]()
    for x in args[0]:
        dtype = x.dtype if type(x) in PLAIN else None
        if dtype is torch.bool and x.shape == shape[len(indices) :][: x.dim()] != ():
            indices += x.nonzero(as_tuple=True)
        elif x is None or dtype is torch.int64:
            indices.append(None if x is None else x.clone())
        else:
            return None
        if dtype is not None and not x.is_cpu:
            row_index = row_index.to(x.device, non_blocking=True)
    if value.dim != row_index.dim() or len(indices) > value.dim:
        return None
    row_index = function(row_index, indices)
    example = function(value.example, [x if x is None else x.to("meta") for x in indices])
    return value.result(example, function, indices, dim=row_index.dim(), row_index=row_index)


def _scale(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Multiplies or divides the logits by a positive Python number."""
    (number,) = args
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = value.scale / number if function in _QUOTIENTS else value.scale * number
    if not 0 < scale < math.inf:
        return None
    return value.result(torch.empty_like(value.example), function, number, scale=scale)


def _add(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """Adds a constant bias, but not under autocast, which would round it."""
    (bias,), example, dtype = args, value.example, value.call.inputs[0].dtype
    if kwargs or value.call.autocast or value.scale != 1 or value.cap or example.dtype is not dtype:
        return None
    is_last = value.dim == example.dim() - 1
    if not (is_last and value.is_constant(bias, dtype) and bias.dim() <= example.dim()):
        return None
    bias = bias.clone()
    constant = bias.view(-1) if value.constant is None else value.constant + bias.view(-1)
    return value.result(torch.empty_like(example), function, bias, constant=constant)


def _cap(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Caps the logits by tanh."""
    if value.cap:
        return None
    return value.result(torch.empty_like(value.example), function, cap=1 / value.scale)


def _log_softmax(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Computes the log-probabilities."""
    if args[0] not in value.dims():
        return None
    return value.result(value.example.new_empty(value.example.shape), function, *args, log=True)


def _largest(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """Returns the largest logit of each row, its class, or both, if a loss has recorded them."""
    names, is_argmax = [*_LARGEST[function]], function is aten.argmax.default
    options = _LARGEST[function] | dict(zip(names, args, strict=False)) | kwargs
    dims = (*value.dims(), None) if is_argmax and value.example.dim() == 1 else value.dims()
    if options["dim"] not in dims or options["k"] != 1 or not options["largest"]:
        return None
    if (value.log and not is_argmax) or (largest := value.largest()) is None:
        return None
    results = tuple(x.unsqueeze(value.dim) for x in largest) if options["keepdim"] else largest
    return results[1] if is_argmax else results


aten: Any = torch.ops.aten
_QUOTIENTS = aten.div.Tensor, aten.div.Scalar
# The operators that return the largest logit of each row. The first options are their arguments, in
# order, and the others what they imply.
_LARGEST: dict[Any, dict[str, Any]] = {
    aten.argmax.default: {"dim": None, "keepdim": False, "k": 1, "largest": True},
    aten.max.dim: {"dim": None, "keepdim": False, "k": 1, "largest": True},
    aten.topk.default: {"k": 1, "dim": -1, "largest": True, "sorted": True, "keepdim": True},
}
_MOVES = (
    *(aten.transpose.int, aten.t.default, aten.permute.default, aten.select.int, aten.slice.Tensor),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default),
)
_COPIES = aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), _index),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *_QUOTIENTS), _scale),
    aten.tanh.default: _cap,
    aten.add.Tensor: _add,
    aten._log_softmax.default: _log_softmax,
    **dict.fromkeys(_LARGEST, _largest),
}
_EQUATION = _scale, _cap, _add, _log_softmax  # the rules that apply only before log_softmax
# Operators without values whose results are not new tensors.
_OF_METADATA = "is_same_size", "is_pinned", "dense_dim", "sparse_dim"


# ---- functions that are not called as they are ---------------------------------------------------


@dataclass(eq=False)
class _Loss:
    """A call of cross_entropy with lazy logits, or of nll_loss with lazy log-probabilities.

    Attributes:
        value: The value of the lazy tensor.
        takes_log: Whether the function is nll_loss.
        index, rows: The rows of the head's output, for tensors on its device and on the CPU.
        dtype: The dtype of the loss.
    """

    value: _Value
    takes_log: bool
    target: Any
    weight: Any = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        value = self.value
        self.index, self.dtype = value.index(), value.example.dtype
        # Reading the indices on a GPU would synchronise.
        self.rows = self.index if value.row_index.is_cpu else slice(None)
        is_autocast = torch.is_autocast_enabled(value.call.device.type)
        if is_autocast and self.dtype is not torch.float64:
            self.dtype = torch.float32

    def reason_not_fused(self) -> str | None:
        """Returns why torch's function has to read the logits, None if a kernel computes it."""
        value, target, weight, call = self.value, self.target, self.weight, self.value.call
        if value.dim != 1:
            return "dimension 1 does not hold the classes"
        if value.log != self.takes_log:
            return f"log_softmax {'precedes' if value.log else 'does not precede'} it"
        if isinstance(target, Tensor) and target.is_floating_point():
            return "target holds class probabilities; call linear_cross_entropy for these"
        is_plain = type(target) in PLAIN and target.dtype is torch.int64
        if not (is_plain and (target.shape, target.device) == (value.row_index.shape, call.device)):
            return "target is not a plain int64 tensor on the device of the logits"
        if not target.numel():
            return "it has no rows"
        if weight is not None and not value.is_constant(weight, self.dtype):
            return f"weight is not a plain {self.dtype} tensor without a gradient"
        if call.hooks != torch_internals.saved_tensors_hooks(True):
            return "hooks for saved tensors, as of a checkpoint, contain only one of head and loss"
        if call.is_fused[self.rows].any():
            return "an earlier loss of the same rows is fused; call linear_log_probs for others"
        few = value.row_index.numel() <= min(FEW_ROWS, len(call.is_fused) // 8)
        limited = call.options.metrics or call.options.memory_budget is not None
        if few and call.is_fused.any() and not limited:
            return "it is one of several losses of few rows; compute one loss of all rows"
        if not self.size_average is self.reduce is None:
            return "size_average and reduce are deprecated"
        with self.modes():
            return fallback_reason(LINEAR_CROSS_ENTROPY, *self.arguments)

    def compute(self) -> Tensor:
        """Returns the loss, computed by a kernel, and records the other results of the kernel.

        Raises:
            IndexError: A class index is out of range.
        """
        call = self.value.call
        with self.modes():
            # torch's loss of few rows needs the logits of all rows.
            result = run(LINEAR_CROSS_ENTROPY, *self.arguments, any_size=True)
        loss, metrics, prediction = (result, None, None) if type(result) is Tensor else result
        if prediction is not None:
            call.record(self.value, self.index, prediction, self.target != self.ignore_index)
        if metrics is not None:
            call.head.pyfused_metrics = metrics
        call.is_fused[self.rows] = True
        if (node := loss.grad_fn) is not None:
            call.bypassed = True  # the node does not keep the call
            node.register_prehook(partial(_start_backward, call.ended, call.hooks_of_grad))
        return loss

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Sets autocast as it was for the head, and whether the loss records a gradient."""
        call = self.value.call
        autocast = torch.autocast(call.device.type, call.autocast, call.autocast is not None)
        with autocast, torch.set_grad_enabled(self.value.records_grad()):
            yield

    @cached_property
    def arguments(self) -> tuple[Tensors, Options]:
        """Returns the tensors and options of ``linear_cross_entropy`` for this loss."""
        value, call = self.value, self.value.call
        metrics = call.options.metrics
        options = LINEAR_CROSS_ENTROPY.options(
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            scale=value.scale,
            softcap=value.cap,
            loss_dtype=self.dtype,
            memory_budget=call.options.memory_budget,
            with_metrics=metrics,
            with_prediction=metrics or call.device.type == "cpu",  # where it costs nothing
        )
        tensors = *call.operands(value, self.index), self.target, self.weight, None, None
        return tensors, options


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function as it is; ``__torch_dispatch__`` receives its operators."""
    with DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _call_loss(function: Any, args: Any, kwargs: Any) -> Any:
    """Computes a loss without the logits, or calls torch's function with their values."""
    original, name, reason = _original(function), _name_of(function), None
    if args and isinstance(tensor := args[0], LazyLogits):
        call = tensor.value.call
        if call.options.metrics:
            call.head.pyfused_metrics = None
        with DisableTorchFunctionSubclass():
            if tensor.value.has_rules(tensor):
                call.check("cross_entropy")
                loss = _Loss(tensor.value, _LOSSES[original], *args[1:], **kwargs)
                reason = loss.reason_not_fused()
                if reason is None:
                    return loss.compute()
                call.compute()
    args, kwargs = _values_of(args, kwargs, name)
    result = function(*args, **kwargs)
    if reason is not None:  # only now, as the arguments were valid
        call.warn(f"{name}, because {reason}. {_COST}")
        if report.active and function is original:
            report.count_call(OPERATORS[name], args, (), reason)
    return result


def _call_with_values(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function that accesses memory without an operator of ATen."""
    args, kwargs = _values_of(args, kwargs, _name_of(function))
    return function(*args, **kwargs)


def _call_of_node(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function of the tensor's node, which its views do not have."""
    tensor = args[0]
    with DisableTorchFunctionSubclass():
        if tensor.value.call.bypassed and tensor.requires_grad:
            if function is Tensor.register_hook:
                return tensor.value.call.register_hook(*args, **kwargs)
            if function == _GRAD_FN:
                return _BypassedNode()
        _expect_gradient(tensor, _name_of(function))
        return function(*args, **kwargs)


def _call_backward(function: Any, args: Any, kwargs: Any) -> Any:
    """Runs a backward pass, which may return gradients of lazy logits."""
    with DisableTorchFunctionSubclass():
        expect = partial(_expect_gradient, reader="autograd.grad")
        tree_map_only(LazyLogits, expect, (args[1:], kwargs))
        return function(*args, **kwargs)


def _call_largest(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls max or topk, whose results may be known from a loss."""
    with DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)
        tensor = args[0] if args else None
        if isinstance(tensor, LazyLogits) and not tensor.value.call.computed:
            return tensor.value.largest_with_gradient(result)
        return result


def _set_data(function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    raise _error("expected no change of the memory of a model's logits, got data")


def _original(function: Any) -> Any:
    """Returns torch's function for one that :func:`pyfused.patch` has put in its place."""
    return getattr(function, "__wrapped__", function)


def _values_of(args: Any, kwargs: Any, reader: str) -> Any:
    """Returns the arguments of a function with plain tensors in the place of lazy ones."""
    with DisableTorchFunctionSubclass():
        return tree_map_only(LazyLogits, partial(_view_of, reader=reader), (args, kwargs))


_LOSSES = {_original(F.cross_entropy): False, _original(F.nll_loss): True}  # _Loss.takes_log
_GRAD_FN = getattr(Tensor, "grad_fn").__get__  # noqa: B009
_SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009
_OF_MEMORY = (
    "numpy tolist data_ptr const_data_ptr storage untyped_storage share_memory_"
    " __array__ __dlpack__ __deepcopy__ __reduce_ex__"
)
_MAX = torch.max, Tensor.max, aten.max, aten.max.dim
_TOPK = torch.topk, Tensor.topk, aten.topk, aten.topk.default
_FUNCTIONS: dict[Any, Callable[..., Any]] = {  # `_call` calls all others
    **dict.fromkeys(_LOSSES, _call_loss),
    **dict.fromkeys((_GRAD_FN, Tensor.register_hook, Tensor.retain_grad), _call_of_node),
    **dict.fromkeys((getattr(Tensor, x, None) for x in _OF_MEMORY.split()), _call_with_values),
    torch.autograd.grad: _call_backward,
    torch.autograd.backward: _call_backward,
    Tensor.backward: _call_backward,
    **dict.fromkeys((*_MAX, *_TOPK), _call_largest),
    _SET_DATA: _set_data,
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
        call: Any = _FUNCTIONS.get(_original(function), _call)
        return call(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows what is known, so that print and a debugger do not compute the logits."""
        value = self.value
        if value.operation is None:
            return repr(value.real)
        description = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}"
        return f"LazyLogits({description}, not computed)"

    __format__ = object.__format__

    def as_subclass(self, cls: Any) -> Any:
        """Reads the logits, because a tensor that ``__torch_dispatch__`` returns has its class."""
        with DisableTorchFunctionSubclass():
            return _view_of(self, "as_subclass").as_subclass(cls)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name_of(function)
        tensor: Any = args[0] if args else None
        is_new = name.startswith("new_") or name.endswith("_like")
        if is_new or name in _OF_METADATA:
            args = tree_map_only(LazyLogits, lambda x: x.value.example, args)
            return function(*args, **({"device": tensor.device} if is_new else {}) | kwargs)
        if isinstance(tensor, LazyLogits) and tensor.value.has_rules(tensor):
            rule: Any = _RULES.get(function)
            applies = rule is not None and not (tensor.value.log and rule in _EQUATION)
            result = rule(tensor.value, function, args[1:], kwargs) if applies else None
            if result is None and tensor.is_inference():  # autograd has decomposed no operator
                result = function.decompose(*args, **kwargs)
            if result is not None and result is not NotImplemented:
                return result
        values, kwargs = tree_map_only(LazyLogits, lambda x: x.value.read(name), (args, kwargs))
        result = function(*values, **kwargs)
        if result is not values[0]:
            return result
        if result.shape != tensor.shape:
            raise _error(f"expected no change of the shape of a model's logits, got {name}")
        return tensor


torch_internals.skip_frames(LazyLogits.__torch_function__)
reasons.lazy_classes.add(LazyLogits)


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


def _view_of(x: LazyLogits, reader: str) -> Tensor:
    """Returns a plain view of a lazy tensor for an operator."""
    x.value.read(reader)
    with torch.inference_mode(x.is_inference()):
        return aten.alias(x)  # type: ignore[no-any-return]  # with any layout of the gradient


def _expect_gradient(x: Any, reader: str) -> None:
    """Computes logits, so that their gradient passes through their node.

    Raises:
        RuntimeError: Their loss was computed without them, so the gradient would lack it.
    """
    if x.value.call.bypassed and x.requires_grad:
        raise _error_of_gradient("retain_grad or autograd.grad")
    x.value.read(reader)


def _error_of_gradient(expected: str) -> RuntimeError:
    return _error(f"expected {expected} of logits before their loss, got it after. Call it before")


class _BypassedNode:
    """The ``grad_fn`` of logits that no backward pass reaches, which can only be compared."""

    def __getattr__(self, name: str) -> Any:
        raise _error_of_gradient(f"{name} of the grad_fn")


def _error(problem: str) -> RuntimeError:
    return RuntimeError(f"pyfused.convert: {problem}. Or call pyfused.revert(model)")


def active_autocast(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on a tensor's device, None if it is disabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _name_of(function: Any) -> str:
    """Returns the name of a function, or of an operator of ATen, in messages."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        return function.__self__.__name__  # type: ignore[no-any-return]
    return name.partition(".")[0].strip("_")
