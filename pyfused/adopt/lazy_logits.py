"""Logits that are computed only when something other than their cross-entropy reads them.

The head of a converted model returns `LazyLogits`, a tensor without memory, which has four rules:

1. What moves whole rows, or is in the equation of the loss, keeps logits lazy: `_RULES`.
2. One loss of each row is ``linear_cross_entropy`` of the hidden states: `_Value.cross_entropy`.
3. The pass over a loss records the largest logit of each row and its class, which answer argmax,
   max and topk(1): `_largest`.
4. Every other operator of ATen reads the logits, which are then computed once, and is torch's.

The tensor is a wrapper subclass with torch's own autograd graph, which begins with `_Head`.
``__torch_function__`` replaces the loss and calls other functions as they are, with lazy logits;
if one of their operators needs values, it calls the function again with a plain view.
``__torch_dispatch__`` returns the lazy result of an operator that has a rule.

A program that torch.compile traces breaks its graph at a large head, unless it has to be whole. A
frame that uses lazy logits is left to Python, where Dynamo would break its graph at each operator.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.dispatch import reasons, report
from pyfused.dispatch.operator import requires_grad
from pyfused.dispatch.run import decide, run
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.torch_internals import PLAIN, DisableTorchFunctionSubclass, tree_map_only, version_of

# These act on the node of the tensor, which its views do not have.
_GRAD_FN = getattr(Tensor, "grad_fn").__get__  # noqa: B009
_SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009
_OF_NODES = {_GRAD_FN, Tensor.register_hook, Tensor.retain_grad}
_OF_NODES |= {Tensor.register_post_accumulate_grad_hook}
# These access memory without an operator of ATen.
_NAMES_OF_MEMORY = (
    "numpy tolist data_ptr const_data_ptr storage untyped_storage share_memory_"
    " __array__ __dlpack__ __deepcopy__ __reduce_ex__"
)
_OF_MEMORY = {getattr(Tensor, name) for name in _NAMES_OF_MEMORY.split()}
_BACKWARD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
# The product of a head with few rows takes as long as reading its weight. On an AMD EPYC, 64 losses
# of 4 rows took several times as long as with all logits, and losses of 64 rows 1.1 times.
FEW_ROWS = 32
_COST = "This takes time, and memory for all logits."
_ADVICE = (
    f"{_COST} One cross_entropy of each row needs no logits, "
    "and its argmax is known afterwards. For other losses, call "
    "pyfused.functional.linear_log_probs, or linear_cross_entropy(z_loss=...) for a z-loss. Or "
    "call pyfused.revert(model)"
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
        head, options: The head, which receives the metrics, and its options.
        device: The device of the logits.
        inputs: The hidden states, of shape (..., D), the weight (C, D), and the bias (C) or None.
        versions: The inputs that must not change until the logits are read, and their versions.
        autocast: The dtype of autocast, None if it was disabled.
        hooks: The active hooks of saved tensors.
        records: Whether losses record predictions, which costs nothing on CPUs.
        is_fused: Whether a loss of each row has been fused, on the CPU.
        largest: The largest logit of each row before a scale and a cap, and its class, which is -1
            without a fused loss; and the constant that was added to these logits.
        needs_grad: Whether the logits require a gradient.
        computed: Whether an operator has read the logits.
        bypassed: Whether a loss that requires a gradient was computed without the logits.
        ended: Is set when a backward pass reaches such a loss.
        hooks_of_grad: Hooks of the logits' gradient, which such a backward pass calls.
        values: Weak references to the values of lazy tensors that may not have been computed.
    """

    def __init__(self, head: Any, options: Any, *inputs: Any) -> None:
        hidden, weight, bias = inputs
        self.device: torch.device = hidden.device
        self.head, self.options, self.autocast = head, options, active_autocast(hidden)
        self.hooks = torch_internals.saved_tensors_hooks(True)
        self.records = options.metrics or hidden.is_cpu
        self.is_fused = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.bool, device="cpu")
        self.largest: Any = None
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
        numbers = torch.arange(len(self.is_fused), device="cpu").view(shape[:-1])
        example = torch.empty(shape, dtype=dtype, device="meta")
        value = _Value(self, numbers, example, len(shape) - 1, self.linear)
        tensor = _head(value, *self.inputs)
        self.needs_grad = value.needs_grad = tensor.requires_grad
        return tensor

    def linear(self) -> Tensor:
        """Returns the values of the logits."""
        dtype = self.autocast or self.inputs[0].dtype
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in self.inputs)
        return F.linear(hidden, weight, bias)  # type: ignore[arg-type]

    def why_ended(self) -> tuple[str, str] | None:
        """Returns why the logits cannot be computed any more, and the line that did it, or None."""
        if self.ended.is_set():
            return "the backward pass of their loss", "`backward()`"
        freed = not self.inputs[1].untyped_storage().nbytes()  # by FSDP
        if freed or any(version_of(x) != version for x, version in self.versions):
            return "a change of the head's input, weight or bias", "the change"
        return None

    def check(self, reader: str) -> None:
        """Checks that the logits can still be computed.

        Raises:
            RuntimeError: Their loss's backward pass has run, or an input has been changed.
        """
        if not (reason := self.why_ended()):
            return
        event, line = reason
        known = "the rows that count in it are known: select these, as in logits[mask].argmax(-1)"
        if self.largest is not None and self.largest[1] is not None:
            known = "logits + prior are known, where prior is the constant that the loss added"
        raise RuntimeError(
            f"pyfused.convert: expected the logits of {self.options.model_name} to be read before "
            f"{event}, got {reader} after it. Move the line with {reader} above {line}, or call "
            f"pyfused.revert(model). After a loss, the argmax, max and topk(1) of {known}. On "
            "GPUs, this needs pyfused.convert(model, metrics=True)"
        )

    def compute(self, reader: str, warns: bool = True) -> None:
        """Computes all lazy tensors of this call, because an operator reads one of them.

        Several threads may do so; the first result of each tensor counts.
        """
        if not self.computed:
            self.check(reader)
            if warns:
                fused = " after a loss that has not computed them" * bool(self.is_fused.any())
                self.warn(f"{reader}{fused}. {_ADVICE}")
        for reference in [*self.values]:  # before an operator changes one of them in place
            if (value := reference()) is not None:
                value.compute()
        self.computed = True
        self.values.clear()

    def warn(self, reader: str) -> None:
        if self.needs_grad or self.is_fused.any():
            tell(self.options.model_name, f"its logits are read by {reader}")

    def run(self, value: _Value, index: Any, *operands: Any, **options: Any) -> Any:
        """Returns the results of the fused loss of some rows, or why torch has to compute it.

        It is fused for few rows, too, as torch's loss would need the logits of all rows.
        """
        op = LINEAR_CROSS_ENTROPY
        options |= {"with_metrics": self.options.metrics, "with_prediction": self.records}
        options["memory_budget"] = self.options.memory_budget
        autocast = torch.autocast(self.device.type, self.autocast, self.autocast is not None)
        with autocast, torch.set_grad_enabled(value.records_grad()):
            call = (*self.operands(value, index), *operands), op.options(**options)
            method, _ = decide(op, *call, small=False)
            return method if isinstance(method, str) else run(op, *call, small=False)

    def operands(self, value: _Value, index: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the hidden states of some rows, the weight, and the bias with the constant."""
        hidden, weight, bias = self.inputs
        x = hidden.reshape(-1, hidden.shape[-1])
        x = x[index] if type(index) is slice else F.embedding(self.moved(index), x)
        if value.constant is not None:
            bias = value.constant if bias is None else bias + value.constant
        return x.view(*value.numbers.shape, x.shape[-1]), weight, bias

    def moved(self, x: Tensor) -> Tensor:
        """Returns a tensor on the device of the logits, without waiting for it."""
        return x.to(self.device, non_blocking=True)

    def record(self, value: _Value, index: Any, largest: Tensor, counts: Tensor) -> None:
        """Records the largest logits of the rows that count in a loss."""
        if self.largest is None:
            self.largest = largest.new_full((2, len(self.is_fused)), -1), value.constant
        known, constant = self.largest
        if _equal(constant, value.constant):
            known[0, index] = largest[0].flatten()
            known[1, index] = largest[1].where(counts, -1).flatten()

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


@dataclass(eq=False)
class _Value:
    """Describes how a lazy tensor is computed.

    It is ``scale * x``, or with a cap ``scale * cap * tanh(x / cap)``, where
    ``x = linear(rows, weight, bias) + constant``.

    Attributes:
        call: The head's call.
        numbers: The index of each row in the head's output, in the shape of the tensor without the
            dimension of the classes. It is on the CPU unless a tensor on a GPU has selected rows.
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
    numbers: Tensor
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

        Operators of numbers on meta tensors, which could return the example, import torch's
        compiler (one second).
        """
        operation = lambda: function(self.compute(), *args)  # noqa: E731
        changes = {"needs_grad": self.records_grad()} | changes
        return replace(self, example=example, operation=operation, **changes).tensor()

    def dims(self) -> tuple[int, int]:
        """Returns the numbers of the dimension of the classes."""
        return self.dim, self.dim - self.example.dim()

    def index(self) -> Any:
        """Returns the indices of the rows in the head's output, a slice if they are consecutive."""
        index = self.numbers.flatten()
        if index.is_cpu and len(index):
            first, last = int(index[0]), int(index[0]) + len(index)
            if torch.equal(index, torch.arange(first, last, device="cpu")):
                return slice(first, last)
        return index

    def cross_entropy(
        self,
        function: Any,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """Returns the result of torch's function, or a str: why it has to read the logits.

        Raises:
            IndexError: A class index is out of range.
        """
        call, dtype = self.call, self.example.dtype
        if dtype is not torch.float64 and torch.is_autocast_enabled(call.device.type):
            dtype = torch.float32
        call.check("cross_entropy")
        index = self.index()
        rows = index if self.numbers.is_cpu else slice(None)  # reading them would synchronise
        if self.dim != 1:
            return "dimension 1 does not hold the classes"
        if self.log != _LOSSES[function]:
            return f"log_softmax {'precedes' if self.log else 'does not precede'} it"
        if isinstance(target, Tensor) and target.is_floating_point():
            return "target holds class probabilities; call linear_cross_entropy for these"
        if not self.is_target(target):
            return "target is not a plain int64 tensor on the device of the logits"
        if not target.numel():
            return "it has no rows"
        if weight is not None and not (self.is_constant(weight, dtype) and weight.dim() == 1):
            return f"weight is not a plain {dtype} tensor without a gradient"
        if call.hooks != torch_internals.saved_tensors_hooks(True):
            return "hooks for saved tensors, as of a checkpoint, contain only one of head and loss"
        if call.is_fused[rows].any():
            return "an earlier loss of the same rows is fused; call linear_log_probs for others"
        few = self.numbers.numel() <= min(FEW_ROWS, len(call.is_fused) // 8)
        limited = call.options.metrics or call.options.memory_budget is not None
        if few and call.is_fused.any() and not limited:
            return "it is one of several losses of few rows; compute one loss of all rows"
        if not (
            type(ignore_index) is int
            and size_average is reduce is None
            and reduction in ("none", "mean", "sum")
            and type(label_smoothing) in (int, float)
            and 0 <= label_smoothing <= 1
        ):
            return "some of its arguments are deprecated or invalid"
        result = call.run(
            *(self, index, target, weight, None, None),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            scale=self.scale,
            softcap=self.cap,
            loss_dtype=dtype,
        )
        if isinstance(result, str):
            return result
        loss = result
        if call.records:
            loss, metrics, prediction = result
            call.record(self, index, prediction, target != ignore_index)
            if metrics is not None:
                call.head.pyfused_metrics = metrics
        call.is_fused[rows] = True
        if (node := loss.grad_fn) is not None:
            call.bypassed = True  # the node does not keep the call
            node.register_prehook(partial(_start_backward, call.ended, call.hooks_of_grad))
        return loss

    def largest_with_gradient(self, results: Any) -> Any:
        """Returns recorded logits and their classes with the gradient of these logits alone.

        The gradient of torch's operator is one of all logits.
        """
        values, classes = results
        if not values.requires_grad or self.call.why_ended():
            return results
        with torch.autocast(self.call.device.type, enabled=False):
            rows, weight, bias = self.call.operands(self, self.index())
            classes = classes.view(self.numbers.shape)
            dtype = self.call.autocast or rows.dtype
            wide = [x.to(dtype).double() for x in (rows, F.embedding(classes, weight))]
            x = (wide[0] * wide[1]).sum(-1)
            if bias is not None:
                x = x + bias[classes].to(dtype)
            x = self.scale * (x if self.cap is None else self.cap * (x / self.cap).tanh())
        return type(results)((x.view_as(values).to(values.dtype), results[1]))

    def is_target(self, target: Any) -> bool:
        """Returns whether a tensor has a class index for each row."""
        if type(target) not in PLAIN or target.dtype is not torch.int64:
            return False
        fits: bool = target.shape == self.numbers.shape
        return fits and target.device == self.call.device

    def is_constant(self, tensor: Any, dtype: torch.dtype) -> bool:
        """Returns whether a tensor has a number for each class, in a dtype."""
        if type(tensor) not in PLAIN or tensor.dtype is not dtype:
            return False
        classes = self.example.shape[self.dim]
        fits = tensor.shape[-1:] == (classes,) and tensor.numel() == classes
        return fits and tensor.device == self.call.device and not requires_grad(tensor)


# ---- operators that keep logits lazy -------------------------------------------------------------

# A rule takes the value of a lazy tensor, an operator of ATen and its other arguments. It returns
# the operator's result, or None if the operator reads the logits.


def _same(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """The same values."""
    needs_grad = value.records_grad() and function is not aten.detach.default
    function = partial(function, **kwargs)
    return value.result(function(value.example), function, needs_grad=needs_grad)


def _view(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A view that keeps the classes of each row together."""
    before, example = value.example.shape, function(value.example, *args)
    size, rows, shape = before[value.dim], before[: value.dim].numel(), example.shape
    dims = [i for i, each in enumerate(shape) if each == size and shape[:i].numel() == rows]
    if len(dims) != 1:
        return None
    numbers = value.numbers.reshape(shape[: dims[0]] + shape[dims[0] + 1 :])
    return value.result(example, function, *args, dim=dims[0], numbers=numbers)


def _move(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A permutation of the dimensions, or a slice of rows."""
    size = value.example.shape[value.dim]
    numbers = value.numbers.unsqueeze(value.dim).expand(value.example.shape)  # of each logit
    numbers = function(numbers, *args)
    sizes = zip(numbers.shape, numbers.stride(), strict=True)
    dims = [i for i, each in enumerate(sizes) if each == (size, 0)]
    if len(dims) != 1:
        return None
    (dim,), example = dims, function(value.example, *args)
    return value.result(example, function, *args, dim=dim, numbers=numbers.select(dim, 0))


def _pieces(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """The slices of rows over which a loop iterates, or of a split."""
    pieces, is_loop = function(value.example, *args), function is aten.unbind.int
    (dim,) = args[not is_loop :] or (0,)
    if dim in value.dims():
        return None
    ends = itertools.accumulate(1 if is_loop else each.shape[dim] for each in pieces)
    if is_loop:
        return [_move(value, aten.select.int, (dim, end - 1), {}) for end in ends]
    slices = itertools.pairwise((0, *ends))
    return [_move(value, aten.slice.Tensor, (dim, *each), {}) for each in slices]


def _index(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A selection of rows by masks or int64 tensors."""
    if function is aten.index_select.default:
        function, args = aten.index.Tensor, ([None] * (args[0] % value.example.dim()) + [args[1]],)
    shape, numbers, indices = value.example.shape, value.numbers, list[Tensor | None]()
    for x in args[0]:
        if x is None:
            indices.append(None)
        elif type(x) not in PLAIN:
            return None
        elif x.dtype is torch.bool and x.shape == shape[len(indices) :][: x.dim()] != ():
            indices += x.nonzero(as_tuple=True)
        elif x.dtype is torch.int64:
            indices.append(x.clone())
        else:
            return None
        if x is not None and not x.is_cpu:
            numbers = value.call.moved(numbers)
    if value.dim != numbers.dim() or len(indices) > value.dim:
        return None
    numbers = function(numbers, indices)
    example = function(value.example, [x if x is None else x.to("meta") for x in indices])
    return value.result(example, function, indices, dim=numbers.dim(), numbers=numbers)


def _cast(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A cast to float32, or a copy."""
    before, device = value.example.dtype, kwargs.get("device")
    dtype = kwargs.get("dtype") or before
    casts = dtype is before or (dtype is torch.float32 and before is not torch.float64)
    if not casts or device not in (None, value.call.device) or kwargs.get("pin_memory"):
        return None
    function = partial(function, dtype=dtype, memory_format=kwargs.get("memory_format"))
    return value.result(function(value.example), function)


def _scale(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """A positive Python number as a factor or divisor."""
    (number,) = args
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return None
    scale = value.scale / number if function in _QUOTIENTS else value.scale * number
    if not 0 < scale < math.inf:
        return None
    # The rounding of a quotient and a product is not a factor.
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-15) else scale
    return value.result(torch.empty_like(value.example), function, number, scale=scale)


def _add(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """The sum with a constant bias, which autocast would round."""
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
    """A cap by tanh."""
    if value.cap:
        return None
    return value.result(torch.empty_like(value.example), function, cap=1 / value.scale)


def _log_softmax(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
    """The log-probabilities."""
    if args[0] not in value.dims():
        return None
    return value.result(value.example.new_empty(value.example.shape), function, *args, log=True)


def _largest(value: _Value, function: Any, args: Any, kwargs: Any) -> Any:
    """The largest logit of each row, or its class, if the pass over the loss has recorded them."""
    names, is_argmax = _LARGEST[function], function is aten.argmax.default
    options = {"dim": -1 if "k" in names else None} | dict(zip(names, args, strict=False)) | kwargs
    dims = (*value.dims(), None) if is_argmax and value.example.dim() == 1 else value.dims()
    is_largest = options.get("k", 1) == 1 and options.get("largest", True)
    known, constant = value.call.largest or (None, None)
    if (
        known is None
        or not _equal(constant, value.constant)
        or options["dim"] not in dims
        or not is_largest
    ):
        return None
    x, classes = known[:, value.call.moved(value.numbers)]
    if (value.log and not is_argmax) or (classes < 0).any():
        return None
    x = x.to(value.call.autocast or value.call.inputs[0].dtype).double()
    x = value.scale * (x if value.cap is None else value.cap * (x / value.cap).tanh())
    results = x.to(value.example.dtype), classes.long()
    if "k" in names or options.get("keepdim"):
        results = results[0].unsqueeze(value.dim), results[1].unsqueeze(value.dim)
    return results[1] if is_argmax else results


def _equal(constant: Tensor | None, other: Tensor | None) -> bool:
    """Returns whether two constants of `_Value` are the same."""
    if constant is None or other is None:
        return constant is other
    return torch.equal(constant, other)


aten: Any = torch.ops.aten
_QUOTIENTS = aten.div.Tensor, aten.div.Scalar
# The arguments of the operators that return the largest logit of each row.
_LARGEST = {
    aten.argmax.default: ("dim", "keepdim"),
    aten.max.dim: ("dim", "keepdim"),
    aten.topk.default: ("k", "dim", "largest", "sorted"),
}
_MOVES = (
    *(aten.transpose.int, aten.t.default, aten.permute.default, aten.select.int, aten.slice.Tensor),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
_PIECES = aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.clone.default), _same),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_PIECES, _pieces),
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), _index),
    aten._to_copy.default: _cast,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *_QUOTIENTS), _scale),
    aten.tanh.default: _cap,
    aten.add.Tensor: _add,
    aten._log_softmax.default: _log_softmax,
    **dict.fromkeys(_LARGEST, _largest),
}
_OF_LOG = _same, _view, _move, _pieces, _index, _largest
_RULES_OF_LOG = {operator: rule for operator, rule in _RULES.items() if rule in _OF_LOG}
_INDEXES = "getitem", "index", "select", "slice"
# Operators without values whose results are not new tensors.
_NAMES_OF_METADATA = "is_same_size", "is_pinned", "dense_dim", "sparse_dim"
_OF_METADATA = {getattr(aten, name).default for name in _NAMES_OF_METADATA}


def _original(function: Any) -> Any:
    """Returns torch's function for one that :func:`pyfused.patch` has put in its place."""
    return getattr(function, "__wrapped__", function)


# Losses of the logits, and of their log_softmax.
_LOSSES = {_original(F.cross_entropy): False, _original(F.nll_loss): True}


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
        kwargs, original = kwargs or {}, _original(function)
        tensor: Any = args[0] if args else None
        is_lazy = isinstance(tensor, LazyLogits)
        with DisableTorchFunctionSubclass():
            name, reason = _name_of(function), ""
            if is_lazy and original in _LOSSES:
                call = tensor.value.call
                if call.options.metrics:
                    call.head.pyfused_metrics = None
                if tensor.value.has_rules(tensor):
                    result = tensor.value.cross_entropy(original, *args[1:], **kwargs)
                    if not isinstance(result, str):
                        return result
                    reason = result
                    call.compute(name, warns=False)
            if is_lazy and function in _OF_NODES:
                if tensor.value.call.bypassed and tensor.requires_grad:
                    if function is Tensor.register_hook:
                        return tensor.value.call.register_hook(*args, **kwargs)
                    if function == _GRAD_FN:
                        return _BypassedNode()
                _expect_gradient(tensor, name)
                return function(*args, **kwargs)
            if is_lazy and function == _SET_DATA:
                raise _error_in_place("memory", name)
            if function in _BACKWARD:
                edge = partial(_edge_of, function=function)
                others, kwargs = tree_map_only(LazyLogits, edge, (args[1:], kwargs))
                args = *args[:1], *others
            elif not reason and function not in _OF_MEMORY:
                result = _without_values(function, args, kwargs)
                if result is not _NEEDS_VALUES:
                    is_largest = is_lazy and name in ("max", "topk")
                    return tensor.value.largest_with_gradient(result) if is_largest else result
            view = partial(_view_of, reader=name)
            args, kwargs = tree_map_only(LazyLogits, view, (args, kwargs))
        result = function(*args, **kwargs)
        if reason:  # only now, as the arguments were valid
            call.warn(f"{name}, because {reason}. {_COST}")
            if report.active and function is original:
                report.counted(OPERATORS[name], args, (), reason, function)
        if not is_lazy or result is not args[0]:
            return result
        if result.shape != tensor.shape:
            raise _error_in_place("shape", name)
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows what is known, so that print and a debugger do not compute the logits."""
        value = self.value
        if value.operation is None:
            return repr(value.real)
        x = value.example
        shown = f"shape={tuple(x.shape)}, dtype={x.dtype}, device={value.call.device}"
        return f"LazyLogits({shown}, not computed)"

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
        if function in _OF_METADATA:
            args = tree_map_only(LazyLogits, lambda x: x.value.example, args)
            return function(*args, **kwargs)
        refuses = getattr(_THREAD, "refuses_values", False)
        if _is_factory(name) and not refuses:
            return function(tensor.value.example, *args[1:], **{"device": tensor.device} | kwargs)
        if isinstance(tensor, LazyLogits) and tensor.value.has_rules(tensor):
            rule = (_RULES_OF_LOG if tensor.value.log else _RULES).get(function)
            result = rule and rule(tensor.value, function, args[1:], kwargs)
            if result is None and tensor.is_inference():  # autograd has decomposed no operator
                result = function.decompose(*args, **kwargs)
            if result is not None and result is not NotImplemented:
                return result
        if refuses:
            raise _ValuesNeededError
        values_of = partial(_values_of, reader=name)
        values, kwargs = tree_map_only(LazyLogits, values_of, (args, kwargs))
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


def _values_of(x: LazyLogits, reader: str) -> Tensor:
    """Returns the values of a lazy tensor."""
    x.value.call.compute(reader)
    return x.value.compute()


def _view_of(x: LazyLogits, reader: str) -> Tensor:
    """Returns a plain view of a lazy tensor for an operator."""
    x.value.call.compute(reader)
    with torch.inference_mode(x.is_inference()):
        return aten.alias(x)  # type: ignore[no-any-return]  # with any layout of the gradient


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


class _ValuesNeededError(Exception):
    """An operator of ATen needs the values of lazy logits in `_without_values`."""


_NEEDS_VALUES = object()
_THREAD = threading.local()


def _without_values(function: Any, args: Any, kwargs: Any) -> Any:
    """Returns the result of a function of lazy logits, or _NEEDS_VALUES."""
    if not _is_factory(_name_of(function)):
        hooks = torch_internals.saved_tensors_hooks(True)
        _THREAD.refuses_values = True
        try:
            with nullcontext() if hooks is None else torch.no_grad():  # which calls no hooks
                result = function(*args, **kwargs)
        except _ValuesNeededError:
            return _NEEDS_VALUES
        finally:
            _THREAD.refuses_values = False
        if hooks is None:
            return result
    return function(*args, **kwargs)


def _is_factory(name: str) -> bool:
    """Returns whether a function of this name returns a new tensor, without reading values."""
    return name.startswith("new_") or name.endswith("_like")


def _error_in_place(part: str, name: str) -> RuntimeError:
    message = f"expected no operator that changes the {part} of a model's logits in place"
    return RuntimeError(f"pyfused.convert: {message}, got {name}. Call pyfused.revert(model)")


def active_autocast(x: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on a tensor's device, None if it is disabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _name_of(function: Any) -> str:
    """Returns the name of a function, or of an operator of ATen, in messages."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        return function.__self__.__name__  # type: ignore[no-any-return]
    name = name.partition(".")[0].strip("_")
    return {"to_copy": "to"}.get(name, "indexing" if name in _INDEXES else name)
