"""Logits that are computed only when something other than their cross-entropy reads them.

The head of a converted model returns `LazyLogits`, a tensor without memory, which has four rules:

1. Operators that move whole rows, or that are in the equation of the loss, keep logits lazy:
   `_RULES`.
2. The first loss of each row is ``linear_cross_entropy`` of the hidden states: `_Loss`.
3. This loss records the largest logit of each row and its class, which answer argmax, max and
   topk(1): `_largest`.
4. All other operators of ATen read the logits, which are then computed once.

The tensor is a wrapper subclass with torch's own autograd graph, which begins with `_Head`. A loss
is a child of the logits in it, and the gradient that it returns is lazy, too: `lazy_gradients.py`.
``__torch_function__`` replaces a few functions, such as losses: `_FUNCTIONS`.
``__torch_dispatch__`` receives the operators of all others: it returns the lazy result of an
operator that has a rule, and calls any other with the values.

A program that torch.compile traces breaks its graph at a large head, unless it has to be whole. A
frame that uses lazy logits is left to Python, where Dynamo would break its graph at each operator.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.adopt.lazy_gradients import (
    COST,
    OF_MEMORY,
    Gradient,
    LazyGrad,
    LazyTensor,
    LazyValue,
    Part,
    compute_alive,
    input_gradients,
    lazy_tensor,
    metadata,
    name_of,
    values_of,
    with_kept,
)
from pyfused.dispatch import reasons, report
from pyfused.dispatch.autograd import SAVED, Fused, compute
from pyfused.dispatch.operator import Options, Tensors, needs_grad, requires_grad
from pyfused.dispatch.reasons import unsupported
from pyfused.dispatch.run import fallback_reason, run
from pyfused.ops.heads import KeptGradient
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.torch_internals import (
    PLAIN,
    DisableTorchFunctionSubclass,
    active_mode,
    current_graph_task,
    graph_is_retained,
    tree_map_only,
    version_of,
)

# The product of a head with few rows takes as long as reading its weight. On an AMD EPYC, 64 losses
# of 4 rows took several times as long as with all logits, and losses of 64 rows 1.1 times.
FEW_ROWS = 32
_ADVICE = (
    f"{COST} One cross_entropy of each row needs no logits, and afterwards the argmax of rows "
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
        token: Stands for the call in the node of the head, which does not keep the call.
        needs: Whether each input needs a gradient.
        computed: Whether an operator has read the logits.
        ended_by: The last backward pass that has reached a fused loss, or None. Logits can be read
            until it ends.
        kept: Returns the logits if an unreduced loss has kept them, else None.
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
        self.needs, self.token = needs_grad(inputs), object()
        self.computed, self.ended_by = False, None
        self.kept: Callable[[], Tensor | None] = lambda: None
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
        return _head(value, *self.inputs)

    def linear(self) -> Tensor:
        """Returns the values of the logits."""
        dtype = self.autocast or self.inputs[0].dtype
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in self.inputs)
        if (kept := self.kept()) is not None and kept.dtype is dtype:
            return kept.view(
                *self.inputs[0].shape[:-1], -1
            ).clone()  # a backward pass overwrites it
        return F.linear(hidden, weight, bias)  # type: ignore[arg-type]

    def why_ended(self) -> str | None:
        """Returns why the logits cannot be computed any more, None if they can be."""
        backward = current_graph_task()
        if self.ended_by is not None and (backward == -1 or backward != self.ended_by):
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
        if any(self.needs) or self.is_fused.any():
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


@dataclass(eq=False)
class _Value(LazyValue):
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
        is_recorded: Whether autograd has recorded all operators on the output of the head.
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
    is_recorded: bool = field(default_factory=torch.is_grad_enabled)
    constant: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    log: bool = False
    real: Tensor = field(init=False)

    def tensor(self) -> Any:
        """Returns a lazy tensor with this value."""
        self.call.values.append(weakref.ref(self))
        return lazy_tensor(LazyLogits, self)

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

    def has_rules(self, tensor: Any) -> bool:
        """Returns whether results of this lazy tensor may be lazy, or known without the logits."""
        inference = tensor.is_inference()
        if self.call.computed or inference != torch.is_inference_mode_enabled():
            return False
        if not tensor.requires_grad:
            return True
        # An autograd function may have another gradient than the operators that it calls.
        return self.is_recorded and not tensor.is_leaf

    def result(self, example: Tensor, function: Any, *args: Any, **changes: Any) -> Any:
        """Returns the lazy result of an operator, with some changed attributes.

        Args:
            example: A meta tensor like the result. Rules with a number make it by ``empty_like``,
                as operators of numbers on meta tensors import torch's compiler (one second).
        """
        operation = lambda: function(self.compute(), *args)  # noqa: E731
        changes = {"is_recorded": torch.is_grad_enabled()} | changes
        return replace(self, example=example, operation=operation, **changes).tensor()

    def identity(self, example: Tensor) -> dict[str, Any]:
        """Returns the changes of an operator that may return the tensor as it is."""
        same = (example.shape, example.dtype) == (self.example.shape, self.example.dtype)
        return {"is_recorded": self.is_recorded} if same and not torch.is_grad_enabled() else {}

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

    def gradient_of_largest(self, grad: Tensor, largest: Tensor, classes: Tensor) -> Part:
        """Returns the gradients of the head's inputs, given that of the recorded logits."""
        call, index, selected = self.call, self.index(), classes.flatten()
        call.check("the gradient of the largest logits")
        rows, weight, bias = call.operands(self, index)
        rows, grad = rows.flatten(0, -2).double(), grad.reshape(-1, 1).double()
        if self.cap is not None:  # the nodes before multiply by the scale
            grad = grad * (1 - (largest.reshape(-1, 1).double() / (self.scale * self.cap)) ** 2)

        def spread(x: Tensor, like: Tensor) -> Tensor:
            return aten.embedding_dense_backward(x.to(like.dtype), selected, len(weight), -1, False)  # type: ignore[no-any-return]

        of_rows = (grad * F.embedding(selected, weight)).to(call.inputs[0].dtype)
        return Part(
            1.0,
            ((index, of_rows),) if call.needs[0] else (),
            spread(grad * rows, weight) if call.needs[1] else None,
            spread(grad, bias).flatten() if bias is not None and call.needs[2] else None,
        )

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
    options = {name: x for name, x in kwargs.items() if name in ("dtype", "memory_format")}
    function = partial(function, **options)
    example = function(value.example)
    return value.result(example, function, **value.identity(example))


def _view(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """Views the logits in another shape that still has a dimension for the classes."""
    before, example = value.example.shape, function(value.example, *args)
    size, rows, shape = before[value.dim], before[: value.dim].numel(), example.shape
    dims = [i for i, each in enumerate(shape) if each == size and shape[:i].numel() == rows]
    if len(dims) != 1:
        return None
    row_index = value.row_index.reshape(shape[: dims[0]] + shape[dims[0] + 1 :])
    changes = {"dim": dims[0], "row_index": row_index} | value.identity(example)
    return value.result(example, function, *args, **changes)


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


# ---- functions that are not called as they are ---------------------------------------------------


@dataclass(eq=False)
class _LossCall:
    """A call of cross_entropy with lazy logits, or of nll_loss with lazy log-probabilities.

    Attributes:
        value: The value of the lazy tensor.
        function: torch's function.
        index, rows: The rows of the head's output, for tensors on its device and on the CPU.
        dtype: The dtype of the loss.
    """

    value: _Value
    function: Callable[..., Tensor]
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
        if value.log != (self.function is _NLL_LOSS):
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
        with self.autocast():
            return fallback_reason(LINEAR_CROSS_ENTROPY, *self.arguments)

    def compute(self, compute: Any) -> Tensor:
        """Returns the loss, and records the other results of the kernel.

        Args:
            compute: Computes the call by a kernel; see `run`.

        Raises:
            IndexError: A class index is out of range.
        """
        call = self.value.call
        with self.autocast():
            # torch's loss of few rows needs the logits of all rows.
            result = run(LINEAR_CROSS_ENTROPY, *self.arguments, any_size=True, compute=compute)
        loss, metrics, prediction = (result, None, None) if type(result) is Tensor else result
        if prediction is not None:
            call.record(self.value, self.index, prediction, self.target != self.ignore_index)
        if metrics is not None:
            call.head.pyfused_metrics = metrics
        call.is_fused[self.rows] = True
        return loss

    def autocast(self) -> Any:
        """Returns a context with autocast as it was for the head."""
        call = self.value.call
        return torch.autocast(call.device.type, call.autocast, call.autocast is not None)

    def gradient(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Returns the gradient of computed logits, given that of the loss, by torch's operators."""
        x = logits.to(self.dtype).movedim(1, -1)
        valid, weight, smoothing = self.target != self.ignore_index, self.weight, 0.0
        index = self.target.where(valid, 0)
        row_weights = valid.to(x.dtype) if weight is None else weight[index].where(valid, 0)
        if self.reduction == "mean":
            grad = grad / row_weights.sum()
        if self.function is not _NLL_LOSS:
            smoothing = self.label_smoothing
        of_target = ((smoothing - 1) * grad * row_weights).where(valid, 0).unsqueeze(-1)
        gradient = torch.zeros_like(x).scatter(-1, index.unsqueeze(-1), of_target)
        if smoothing:
            of_class = (grad * smoothing / x.shape[-1]).expand(valid.shape).where(valid, 0)
            of_class = of_class.unsqueeze(-1)
            gradient = gradient - (of_class if weight is None else of_class * weight)
        if self.function is not _NLL_LOSS:
            gradient = gradient - x.softmax(-1) * gradient.sum(-1, keepdim=True)
        return gradient.movedim(-1, 1).to(logits.dtype)

    @cached_property
    def arguments(self) -> tuple[Tensors, Options]:
        """The tensors and options of ``linear_cross_entropy`` for this loss."""
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
        with torch.no_grad():
            tensors = *call.operands(value, self.index), self.target, self.weight, None, None
        return tensors, options


# The operator, whose backward pass may return a gradient of the logits before its products.
_DEFERRED = SimpleNamespace(
    name=LINEAR_CROSS_ENTROPY.name,
    forward=LINEAR_CROSS_ENTROPY.forward,
    backward=LINEAR_CROSS_ENTROPY.backward_of_logits,
    reference_backward=LINEAR_CROSS_ENTROPY.reference_backward,
)


class _Loss(torch.autograd.Function):
    """`linear_cross_entropy` of the head's inputs, as a function of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Any, loss: _LossCall) -> Tensor:
        call = loss.value.call
        needs = [need and ctx.needs_input_grad[0] for need in call.needs]
        ctx.loss, ctx.logits = loss, logits
        ctx.version = None if logits.is_inference() else version_of(logits)

        def output_of(op: Any, options: Options, inputs: Tensors) -> Any:
            constants = [False] * (op.num_differentiable - len(needs))
            output = Fused.forward(ctx, (_DEFERRED, options, (*needs, *constants)), *inputs)
            ctx.output = output[0] if isinstance(output, tuple) else output
            if options.reduction == "none":
                _keep_logits(loss.value, ctx, len(op.all_operands))
            return output

        result = loss.compute(partial(compute, output_of=output_of))
        ctx.output = ctx.output.dtype, ctx.output.shape
        return result

    @staticmethod
    @torch_internals.never_traced
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        """Returns a lazy gradient, or a dense one that can be differentiated again."""
        if grad_output is None:
            return None, None
        loss, logits, alive = ctx.loss, ctx.logits, list[Any]()
        if logits is None:
            raise RuntimeError("Trying to backward through the graph a second time")
        if not graph_is_retained():
            ctx.loss = ctx.logits = None
        value: _Value = loss.value
        call = value.call

        def computed() -> Tensor:
            call.check("the gradient")
            if version_of(logits) != ctx.version:
                raise _error("expected no change in place of logits whose gradient is read")
            return value.compute()

        if not _begin_backward(call, grad_output, alive):
            call.options.warn(f"their gradient is computed by torch's operators. {COST}")
            computed()
            call.compute()
            return loss.gradient(grad_output, aten.alias(logits)), None
        part = None
        if any(call.needs):
            dtype, shape = ctx.output
            _, rows, *others = Fused.backward(ctx, grad_output.to(dtype).reshape(shape))
            pairs = () if rows is None else ((loss.index, rows),)
            # The nodes between the loss and the head multiply by the scale once more.
            part = Part(1 / value.scale)
            if isinstance(rows, KeptGradient):
                part = part._replace(kept=pairs)
            else:
                part = Part(1 / value.scale, pairs, *others[:2])
        operation = lambda: loss.gradient(grad_output, computed())  # noqa: E731
        return Gradient(call, value.example, alive, operation, part).tensor(), None


def _keep_logits(value: _Value, ctx: Any, count: int) -> None:
    """Lets later readers copy the logits of all rows that an unreduced loss has kept.

    Args:
        ctx: The context of the loss, which saves its operands, the states of rows and the logits.
        count: The number of operands, which may be None, as may be the others.
    """
    call, saved = value.call, len(ctx.to_save) + len(ctx.missing)
    if saved == count + 2 and saved - 1 not in ctx.missing and call.hooks is value.constant is None:
        kept = ctx.to_save[-1]
        is_whole = value.index() == slice(0, len(call.is_fused))
        if is_whole and kept.numel() == len(call.is_fused) * call.inputs[1].shape[0]:
            call.kept = weakref.ref(kept)


class _Largest(torch.autograd.Function):
    """The recorded logits of some classes, as a function of the logits."""

    @staticmethod
    def forward(ctx: Any, _: Any, value: _Value, largest: Tensor, classes: Tensor) -> Tensor:
        ctx.value = value
        ctx.save_for_backward(largest, classes)
        return largest.clone()

    @staticmethod
    @torch_internals.never_traced
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Returns a lazy gradient, or a dense one that can be differentiated again."""
        value, (largest, classes), alive = ctx.value, ctx.saved_tensors, list[Any]()
        shape, keepdim = value.example.shape, largest.dim() == value.example.dim()
        operation = partial(
            aten.value_selecting_reduction_backward, grad_output, value.dim, classes, shape, keepdim
        )
        if not graph_is_retained():
            ctx.value = None
        if not _begin_backward(value.call, grad_output, alive):
            return operation(), None, None, None
        part = value.gradient_of_largest(grad_output, largest, classes)
        return Gradient(value.call, value.example, alive, operation, part).tensor(), *(None,) * 3


def _begin_backward(call: HeadCall, grad_output: Tensor, alive: list[Any]) -> bool:
    """Returns whether a gradient can be lazy; it is computed if it outlives the backward pass."""
    call.ended_by, call.kept = current_graph_task(), lambda: None
    if torch.is_grad_enabled() or active_mode() or unsupported(SAVED, (grad_output,)):
        return False
    return torch_internals.at_end_of_backward(partial(compute_alive, alive))


_loss: Any = torch_internals.apply_of(_Loss)
_largest_of: Any = torch_internals.apply_of(_Largest)


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function as it is; ``__torch_dispatch__`` receives its operators."""
    with DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _call_loss(function: Any, args: Any, kwargs: Any) -> Any:
    """Computes a loss without the logits, or calls torch's function with their values."""
    original, name, reason = _original(function), name_of(function), None
    if args and isinstance(tensor := args[0], LazyLogits):
        call = tensor.value.call
        if call.options.metrics:
            call.head.pyfused_metrics = None
        with DisableTorchFunctionSubclass():
            if tensor.value.has_rules(tensor):
                call.check("cross_entropy")
                loss = _LossCall(tensor.value, original, *args[1:], **kwargs)
                reason = loss.reason_not_fused()
                if reason is None:
                    return _loss(tensor, loss)
                call.compute()
    args, kwargs = _views_of(args, kwargs, name)
    result = function(*args, **kwargs)
    if reason is not None:  # only now, as the arguments were valid
        call.warn(f"{name}, because {reason}. {COST}")
        if report.active and function is original:
            report.count_call(OPERATORS[name], args, (), reason)
    return result


def _call_with_values(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function that accesses memory without an operator of ATen."""
    args, kwargs = _views_of(args, kwargs, name_of(function))
    return function(*args, **kwargs)


def _call_largest(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls max or topk, whose results may be known from a loss."""
    result = _call(function, args, kwargs)
    tensor = args[0] if args else kwargs.get("input")
    if not isinstance(tensor, LazyLogits) or tensor.value.call.why_ended():
        return result
    with DisableTorchFunctionSubclass():
        if tensor.value.call.computed or not result[0].requires_grad:
            return result
        return type(result)((_largest_of(tensor, tensor.value, *result), result[1]))


def _set_data(function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    raise _error("expected no change of the memory of a model's logits, got data")


def _original(function: Any) -> Any:
    """Returns torch's function for one that :func:`pyfused.patch` has put in its place."""
    return getattr(function, "__wrapped__", function)


def _views_of(args: Any, kwargs: Any, reader: str) -> Any:
    """Returns the arguments of a function with plain tensors in the place of lazy ones."""
    with DisableTorchFunctionSubclass():
        return tree_map_only(LazyLogits, partial(_view_of, reader=reader), (args, kwargs))


_NLL_LOSS = _original(F.nll_loss)
_LOSSES = _original(F.cross_entropy), _NLL_LOSS
_MAX = torch.max, Tensor.max, aten.max, aten.max.dim
_TOPK = torch.topk, Tensor.topk, aten.topk, aten.topk.default
_SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009
_FUNCTIONS: dict[Any, Callable[..., Any]] = {  # `_call` calls all others
    **dict.fromkeys(_LOSSES, _call_loss),
    **dict.fromkeys(OF_MEMORY, _call_with_values),
    **dict.fromkeys((*_MAX, *_TOPK), _call_largest),
    _SET_DATA: _set_data,
}


# ---- the tensor subclass -------------------------------------------------------------------------


class LazyLogits(LazyTensor):
    """The output of a converted head, or of an operator on it, without memory."""

    value: _Value

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call: Any = _FUNCTIONS.get(_original(function), _call)
        return call(function, args, kwargs or {})

    def as_subclass(self, cls: Any) -> Any:
        """Reads the logits, because a tensor that ``__torch_dispatch__`` returns has its class."""
        with DisableTorchFunctionSubclass():
            return _view_of(self, "as_subclass").as_subclass(cls)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(function)
        tensor: Any = args[0] if args else None
        if (result := metadata(function, args, kwargs)) is not None:
            return result
        if isinstance(tensor, LazyLogits) and tensor.value.has_rules(tensor):
            rule: Any = _RULES.get(function)
            applies = rule is not None and not (tensor.value.log and rule in _EQUATION)
            result = rule(tensor.value, function, args[1:], kwargs) if applies else None
            if result is None and tensor.is_inference():  # autograd has decomposed no operator
                result = function.decompose(*args, **kwargs)
            if result is not None and result is not NotImplemented:
                return result
        values, kwargs = values_of((args, kwargs), name)
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
        ctx.set_materialize_grads(False)
        ctx.token, ctx.shape = value.call.token, inputs[0].shape
        ctx.dtypes = [x if x is None else x.dtype for x in inputs]
        return value.tensor()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return (None,) * 4
        part, dense = None, grad
        if isinstance(grad, LazyGrad):
            is_own = grad.value.call.token is ctx.token
            part, dense = grad.value.terms() if is_own else (None, grad.value.compute())
        _, *needed = ctx.needs_input_grad
        found = list[Any]((None, None, None))
        if dense is not None:
            if part is not None:
                owns_dense = grad.value.owns_dense
                dense, part = with_kept(dense, part, owns_dense)
            found = _products(dense, ctx.saved_tensors, needed)
        if part is not None:
            shape, dtypes = ctx.shape, ctx.dtypes
            for i, x in enumerate(input_gradients(part, shape[:-1].numel())):
                if x is not None and needed[i]:
                    x = x.view(shape) if i == 0 else x
                    x = x.to(dtypes[i])
                    found[i] = x if found[i] is None else found[i] + x
        return None, *found


def _products(grad: Tensor, inputs: Any, needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradients of a linear layer's inputs, given that of its output."""
    hidden, weight, bias = inputs
    rows, dtype = grad.reshape(-1, grad.shape[-1]), grad.dtype
    x = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(grad.device.type, enabled=False):
        return [
            (grad @ weight.to(dtype)).to(hidden.dtype) if needed[0] else None,
            (rows.t() @ x.to(dtype)).to(weight.dtype) if needed[1] else None,
            rows.sum(0).to(bias.dtype) if needed[2] else None,
        ]


_head: Any = torch_internals.apply_of(_Head)


def _view_of(x: LazyLogits, reader: str) -> Tensor:
    """Returns a plain view of a lazy tensor for an operator."""
    x.value.read(reader)
    with torch.inference_mode(x.is_inference()):
        return aten.alias(x)  # type: ignore[no-any-return]  # with any layout of the gradient


def _error(problem: str) -> RuntimeError:
    return RuntimeError(f"pyfused.convert: {problem}. Or call pyfused.revert(model)")


def active_autocast(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on a tensor's device, None if it is disabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
