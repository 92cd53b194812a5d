"""Replaces the head and the loss of language models with ``linear_cross_entropy``.

The classes of a model and its head are replaced by subclasses of the same names. In training, and
in evaluation if the user asks for it, the model's original ``forward`` runs, but its head returns
recorded or deferred logits (`deferred.py`). In the first calls, torch computes the logits, and
pyfused records which operators read them, until a call shows that only the loss does. Later calls
defer the logits: the cross-entropy is computed from the hidden states and the head's weight. If
other code reads deferred logits, they are computed, so results never change.

The first loss of a model and the gradient of the head's input are compared with torch's. If they
differ, the model's original ``forward`` is restored.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Linear
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.adopt import deferred, subclass
from pyfused.adopt.deferred import LOSS, modes_of
from pyfused.dispatch.reasons import first_time, stacklevel
from pyfused.dispatch.signature import PLAIN, layout_reason
from pyfused.dispatch.sizes import is_small
from pyfused.memory import physical_memory
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY
from pyfused.ops.shards import is_dtensor
from pyfused.torch_internals import active_mode, has_compiled_call, has_hooks, is_jit_tracing

_thread = threading.local()  # its attribute `call` is the model call that is running in the thread
OUTPUT = "the output"
ALONE, COMPARED = "only the loss read the logits", "a loss was compared"
ROWS_BYTES = 16 << 20  # bytes of the logits whose losses and gradients are compared
PARTS = 16  # blocks of rows; torch's logits, their copies and gradients take 1/8 of the memory
_MISSING_LABELS = (
    "it was called in training mode without labels. Pass labels=. Trainer removes them for "
    "label_smoothing_factor and compute_loss_func: leave both unset, and for label smoothing "
    "override compute_loss with pyfused.functional.linear_cross_entropy"
)
# The compiler replaces such a module with a call that no tensor subclass intercepts.
_LOSS_MADE_IN_FORWARD = (
    "its forward creates its loss module, such as torch.nn.CrossEntropyLoss(), and is compiled"
)
_NO_LOSS = (
    "its forward computes no cross-entropy of them. Compute the loss in its forward, or call "
    "pyfused.functional.linear_cross_entropy with the hidden states and the weight of the head"
)
SILENT = ""  # a reason without a warning
ALREADY = "is already converted"
_CAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # dtypes that autocast casts

# ---- a model's forward with another head ---------------------------------------------------------


class _Call:
    """One call of a model whose head records or defers its logits.

    Attributes:
        facts: The warnings issued for the model; (ALONE, modes) and (COMPARED, modes) for the modes
            of calls that have shown this; and COMPARED after a comparison in any modes.
        with_metrics: Whether a loss sets the model's attribute ``pyfused_metrics``.
        always: Whether small logits are also deferred: for metrics, and in transformers models.
        modes: The modes of this call, None before the head is called.
        alone: Whether only the loss has read the logits of the last call in these modes.
        differs: How a loss of this call differs from torch's, None if it does not.
        grad_modes: Whether gradients were enabled, for each call of the head.
        hooks: The saved-tensor hooks, for example of a checkpoint around the model.
    """

    def __init__(
        self, model: Any, head: Any, facts: set[Any], with_metrics: bool, always: bool
    ) -> None:
        self.model, self.head, self.facts, self.with_metrics = model, head, facts, with_metrics
        self.always = always or with_metrics
        self.families: list[Any] = []
        self.modes: Any = None
        self.alone = False
        self.differs: str | None = None
        self.grad_modes: set[bool] = set()
        self.hooks = modes_of("cpu").hooks

    def run(self, kind: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
        """Returns the output of the model's original ``forward``, and the readers of its logits."""
        before, _thread.call = getattr(_thread, "call", None), self
        try:
            output = _finished(kind.forward(self.model, *args, **kwargs))
            for family in self.families:
                family.close("code after its forward")
            uses = [use for family in self.families for use in family.uses]
            if self.modes is not None and not (self.alone and set(uses) == {LOSS}):
                self.learn()
            return output, uses
        finally:
            _thread.call = before
            if before is not None:  # the call of an enclosing model with the same head
                before.grad_modes |= self.grad_modes
            for family in self.families:
                family.release()
            self.families.clear()

    def learn(self) -> None:
        """Records whether only the loss read the logits, unless a checkpoint may rerun the call."""
        uses = [set(family.uses) for family in self.families]
        shared = [family for family in self.families if family.shared]
        alone = all(each in ({LOSS}, {OUTPUT}, set()) for each in uses)
        for family in () if self.alone else shared:
            alone = family.agrees(alone)
        if self.hooks is not None or not any(LOSS in each for each in uses):
            return
        if alone and (COMPARED, self.modes) in self.facts:
            self.facts.add((ALONE, self.modes))
        elif not alone and not shared:  # a shared fact must not change in one process alone
            self.facts.discard((ALONE, self.modes))

    def compares(self) -> bool:
        """Returns whether a loss of this call has to be compared with torch's."""
        return not self.alone and (COMPARED, self.modes) not in self.facts

    def records(self, hidden: Tensor) -> bool:
        """Returns whether torch computes the logits, and pyfused records the operators on them."""
        if self.alone or self.hooks is not None or self.modes is None:
            return False
        memory = physical_memory()
        if hidden.is_cuda and not deferred.captures():
            memory, _ = torch.cuda.mem_get_info(hidden.device)
        return 4 * hidden.shape[:-1].numel() * len(self.head.weight) <= memory // PARTS

    def logits(self, kind: Any, hidden: Tensor) -> Any:
        """Returns the logits of hidden states, or None to call the head."""
        head, hooked = self.head, has_hooks(self.head)
        # In training mode, no_grad means a checkpoint or generation.
        if not torch.is_grad_enabled() and (hooked or self.model.training):
            return None
        # Reading the weight of another class, such as a parametrised layer, may compute it.
        if not (self.always or hooked or is_dynamo_compiling()) and (
            type(head) is _HEAD
            and head.weight.numel()
            and is_small(LINEAR_CROSS_ENTROPY, (hidden, head.weight), ())
        ):
            return None  # torch would compute the loss from all logits
        modes, reason = modes_of(hidden.device.type), _reason(head, None if hooked else hidden)
        if reason != SILENT and self.hooks != modes.hooks:
            reason = "a checkpoint in its forward calls its head"
        if reason is not None:
            return _warn(self.model, self.facts, reason)
        if self.modes is None and not is_dynamo_compiling():
            self.modes = self.model.training, *modes[:3]
            self.alone = (ALONE, self.modes) in self.facts
        if hooked:
            return self.sharded_logits(kind, hidden, modes)
        inputs = modes, hidden, head.weight, head.bias
        self.families.append(deferred.Family(self, *inputs, recorded=self.records(hidden)))
        return self.families[-1].logits()

    def sharded_logits(self, kind: Any, hidden: Any, modes: Any) -> Any:
        """Returns the logits of a head whose hooks torch.distributed has defined."""
        head, policy = self.head, torch_internals.fsdp_policy(self.head)
        for earlier in self.families if policy else ():
            earlier.close("code after another call of its head")
        (hidden,) = args = torch_internals.run_pre_hooks(head, (hidden,))
        finish = partial(torch_internals.run_forward_hooks, head, args)
        inputs = _, weight, _ = hidden, head.weight, head.bias
        reason: str | None = "its head has hooks"
        if policy is not None:
            reason, recorded = _reason(head, hidden), self.records(hidden)
            family: Any = deferred.Family(self, modes, *inputs, recorded=recorded, finish=finish)
        elif all(is_dtensor(x) for x in inputs if x is not None) and (
            all(placement.is_replicate() for placement in hidden.placements)
            and any(placement.is_shard(0) for placement in weight.placements)
        ):
            family = deferred.ColwiseFamily(self, modes, finish, *inputs, recorded=not self.alone)
            reason = None if _is_usable(head, family.inputs[0]) else SILENT
        if reason is None:
            logits, dtype = family.logits(), policy and policy.output_dtype
            if not isinstance(logits, deferred.Logits):
                _warn(self.model, self.facts, "its head has hooks")
                return logits
            self.families.append(family)
            return logits if dtype in (None, logits.dtype) else logits.to(dtype)
        _warn(self.model, self.facts, reason)
        return finish(kind.forward(head, *args))

    def accepts(self, node: Any, target: Tensor, options: Any, expected: Any) -> bool:
        """Returns whether a loss equals torch's; only the first one in these modes is compared.

        Args:
            expected: torch's loss if it has been computed.
        """
        if self.differs is None and self.compares():
            with torch.inference_mode(False), torch.enable_grad(), deferred.without_hooks():
                differs = _loss_differs(node, target, options, expected)
            self.differs = differs or None
            if differs == "":
                self.facts.update((COMPARED, (COMPARED, self.modes)))
        elif expected is not None and self.with_metrics:
            with torch.no_grad():
                node.family.loss(node, node.rows, target, options)
        return self.differs is None


def _head_call(kind: Any) -> Any:
    """Returns the ``__call__`` of a head's subclass."""

    def __call__(head: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call: Any = getattr(_thread, "call", None)
        inputs, logits = (*args, *kwargs.values()), None
        if call is not None and call.head is head:
            call.grad_modes.add(torch.is_grad_enabled())
            logits = call.logits(kind, *inputs) if len(inputs) == 1 else None
        return kind.__call__(head, *args, **kwargs) if logits is None else logits

    return __call__


_HEAD = subclass.subclass(Linear, _head_call)


def _is_usable(head: Any, hidden: Any) -> bool:
    """Returns whether a head's call is valid and its gradient needs only reverse mode."""
    if layout_reason("input", hidden) is not None:
        return False
    weight, bias = head.weight, head.bias
    dtypes = {hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return (
        hidden.is_inference() == torch.is_inference_mode_enabled()
        and hidden.numel() > 0
        and hidden.shape[-1:] == weight.shape[-1:]
        and (dtypes <= _CAST_DTYPES if autocast else len(dtypes) == 1)
        and (
            not torch.is_grad_enabled()
            or hidden.requires_grad
            or any(x.requires_grad for x in head.parameters())
        )
        and active_mode() is None
    )


def _reason(head: Any, hidden: Tensor | None = None) -> str | None:
    """Returns why a head has to compute its logits itself, None if its weight and bias suffice.

    Args:
        hidden: The head's input if its hooks have been checked, None before a call.
    """
    compiling, kind = is_dynamo_compiling(), type(head)
    is_unit = kind.__bases__[-1] is _HEAD and torch_internals.fsdp_policy(head)
    if kind not in (Linear, _HEAD) and not is_unit:
        if _has_adapter(head):
            return f"its head has an adapter, {kind.__module__}.{kind.__name__}"
        return f"its head is a {kind.__module__}.{kind.__name__}, not a plain torch.nn.Linear"
    if "forward" in vars(head):
        return "the forward of its head was replaced, for example by accelerate's offloading"
    if is_unit and compiling:
        return "its head is a unit of fully_shard in a compiled model"
    if hidden is None and has_hooks(head, compiling):
        return "its head has hooks"
    if has_compiled_call(head):
        return "its head is compiled separately"
    if hidden is None:
        return None
    for name, value in (("weight", head.weight), ("bias", head.bias)):
        if value is None:
            continue
        if not compiling and type(value) not in PLAIN:
            return f"the {name} of its head is a {type(value).__name__}"
        if value.device != hidden.device:
            return f"the {name} of its head is on {value.device}, its input on {hidden.device}"
        if value.numel() == 0:
            return f"the {name} of its head has no elements"
        if not compiling and value.is_inference():
            return SILENT
    return None if compiling or _is_usable(head, hidden) else SILENT


def _finished(output: Any) -> Any:
    """Returns a model's output, with None for logits that only the loss has read."""
    if isinstance(output, deferred.Logits) and output._node is not None:
        family = output._node.family
        if set(family.uses) == {LOSS}:
            return None
        fused = LOSS in family.uses and isinstance(output, deferred.DeferredLogits)
        if not family.computed:
            family.read(OUTPUT)
        if fused and output.requires_grad:
            return output  # raises for a gradient of the logits, because the loss bypasses them
        logits = deferred.computed(output)
        return logits.view_as(logits) if family.traced else logits
    result: Any = output
    if isinstance(output, tuple):
        parts = [_finished(value) for value in output]
        if any(part is not given for part, given in zip(parts, output, strict=True)):
            result = tuple.__new__(type(output), parts)
            if hasattr(output, "__dict__"):
                vars(result).update(vars(output))
    if isinstance(output, dict):
        entries = {name: _finished(value) for name, value in output.items()}
        changed = {name: entries[name] for name, x in output.items() if x is not entries[name]}
        if changed and is_dataclass(output):  # a transformers output, which omits None
            removed = (name for name, x in changed.items() if x is None)
            result = _without(type(output), *removed)(**entries)
        elif changed:
            result = copy.copy(output)
            result.update(changed)
    return result


class _Entries(tuple[Any, ...]):
    """The entries of a transformers output. Reading the logits by their index raises."""

    def __getitem__(self, index: Any) -> Any:
        entry = super().__getitem__(index)
        if any(x is _Entries for x in (entry if type(index) is slice else (entry,))):
            raise RuntimeError(
                "pyfused.convert: expected an index of an entry other than the logits, got "
                f"{index}. Read other entries by name, or call pyfused.revert(model)"
            )
        return entry

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


@cache
@torch_internals.run_while_tracing
def _without(kind: Any, *removed: str) -> Any:
    """Returns a subclass of a transformers output whose logits are None, but keep their index."""
    if not removed:
        return kind

    def to_tuple(output: Any) -> Any:
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        values |= dict.fromkeys(removed, _Entries)
        return _Entries(value for value in values.values() if value is not None)

    def reduce(output: Any) -> Any:  # the subclass cannot be imported
        return kind(**output).__reduce__()

    return subclass.named(kind, {"to_tuple": to_tuple, "__reduce__": reduce}, kind)


# ---- supported models ----------------------------------------------------------------------------


def _head_of(model: Any, head_name: str | None) -> Any:
    """Returns the head that the user has named, or else the head of a transformers model."""
    head = model.get_submodule(head_name) if head_name else model.get_output_embeddings()
    return _called_head(head)


def _called_head(head: Any) -> Any:
    """Returns the active copy of a head in PEFT's ``modules_to_save``, or else the head itself."""
    if type(head) is not getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    copies = [head.modules_to_save[name] for name in active if name in head.modules_to_save]
    return copies[0] if copies else head.original_module


def _has_adapter(head: Any) -> bool:
    """Returns whether a head is a layer of PEFT that wraps the original head, as in LoRA."""
    return isinstance(getattr(head, "base_layer", None), torch.nn.Module)


def has_head(module: Any) -> bool:
    """Returns whether a module is a transformers model with a head for logits."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return module.get_output_embeddings() is not None


def reason_to_leave(model: Any, head_name: str | None = None) -> str | None:
    """Returns why a model with a head keeps its ``forward``, None if it can be converted.

    Args:
        head_name: The name of the head if the user passed one; None for a transformers model.

    Raises:
        ValueError: There is no such head.
    """
    if head_name is not None:
        heads = [name for name, module in model.named_modules() if _is_head(module)]
        if head_name not in heads:
            known = f"one of {heads[-5:]}" if heads else "but it has none"
            raise ValueError(
                f"head: expected the name of a torch.nn.Linear, {known}, got {head_name!r}"
            )
    if subclass.is_marked(model):
        return ALREADY
    if "forward" in vars(model):
        return "its forward was replaced"
    head = _head_of(model, head_name)
    reason = _reason(head) or ("its head has hooks" if has_hooks(head) else None)
    if reason is None and not subclass.has_original_forward(head):
        reason = "the forward of its head was replaced"
    return reason


def fuse(model: Any, head: str | None, evaluation: bool, metrics: bool) -> None:
    """Changes the classes of a model and its head to fused subclasses with convert's options.

    Args:
        head: The name of the head, None for a transformers model or the head of the last call.
    """
    if head is None and subclass.is_marked(model):
        head = type(model)._arguments[1]
    layer = _head_of(model, head)
    if not subclass.is_fused(layer):
        subclass.fuse(layer, _head_call)
    subclass.fuse(model, _fused_forward, head, evaluation, metrics)


def is_converted(model: Any) -> bool:
    """Returns whether `fuse` has changed a model."""
    return subclass.is_marked(model) and type(model)._arguments[0] is _fused_forward


def shares_head(model: Any) -> bool:
    """Returns whether a transformers model shares its head with a converted model."""
    return subclass.is_marked(_head_of(model, None))


def _is_head(module: Any) -> bool:
    return type(_called_head(module)) in (Linear, _HEAD) or _has_adapter(module)


def _fused_forward(kind: Any, head: str | None, evaluation: bool, metrics: bool) -> Any:
    """Returns the ``forward`` of a model's subclass."""
    names = list(inspect.signature(kind.forward).parameters)[1:]

    @wraps(kind.forward)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        warned = vars(model).get(subclass.MARK)
        if warned is not None and metrics:
            model.pyfused_metrics = None
        if warned is None or not (model.training or evaluation) or is_jit_tracing():
            return kind.forward(model, *args, **kwargs)
        layer, reason = _head_of(model, head), None
        if head is None:
            reason = _reason_for_logits(model, dict(zip(names, args, strict=False)) | kwargs)
        if reason is None and not subclass.is_fused(layer):  # replaced after the conversion
            reason = _reason(layer)
            if reason is None and not is_dynamo_compiling():
                subclass.fuse(layer, _head_call)
        if reason is not None:
            _warn(model, warned, reason)
            return kind.forward(model, *args, **kwargs)
        call = _Call(model, layer, warned, metrics, head is None)
        output, uses = call.run(kind, args, kwargs)
        if call.differs is not None:
            _warn(model, warned, f"its {call.differs}. Later calls run its original forward")
            subclass.unfuse(model)  # the head computes logits if the model does not defer them
            return output
        reads = [use for use in dict.fromkeys(uses) if use not in (LOSS, OUTPUT)]
        if reads:
            _warn(model, warned, f"its logits are read by {', '.join(reads)}")
        elif LOSS not in uses and (is_dynamo_compiling() or COMPARED not in warned):
            _warn(model, warned, _reason_without_loss(call, head, uses))
        return output

    return forward


def _warn(model: Any, warned: set[str], reason: str) -> None:
    if reason in (SILENT, *warned):
        return
    message = f"pyfused.convert: {type(model).__name__} computes all of its logits: {reason}"
    if is_dynamo_compiling():
        _warn_once(message)
    else:
        warned.add(reason)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel())


@torch_internals.run_while_tracing  # the compiler breaks the graph at a warning
def _warn_once(message: str) -> None:
    """Warns once if a model is compiled several times."""
    if first_time("convert", message):
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel())


def _reason_without_loss(call: _Call, head: str | None, uses: list[str]) -> str:
    """Returns why a training step has not computed a fused loss, SILENT for other calls."""
    if not (call.model.training and torch.is_grad_enabled()):
        return SILENT
    if OUTPUT in uses:
        made_in_forward = head is None and is_dynamo_compiling()
        return _LOSS_MADE_IN_FORWARD if made_in_forward else _NO_LOSS
    if call.grad_modes == {False}:
        return "a checkpoint in its forward calls its head"
    return SILENT if call.grad_modes else "its forward does not call its head"


def _reason_for_logits(model: Any, arguments: dict[str, Any]) -> str | None:
    """Returns why a call of a transformers model needs logits, None if it only needs its loss.

    Training steps without labels compute their loss from all logits.
    """
    if arguments.get("labels") is None:
        values = map(arguments.get, ("shift_labels", "logits_to_keep", "output_hidden_states"))
        alone = getattr(_thread, "call", None) is None  # not called by another model
        asks = any(torch.is_tensor(value) or value for value in values)
        trains = model.training and torch.is_grad_enabled()
        return _MISSING_LABELS if alone and trains and not asks else SILENT
    if arguments.get("return_dict", model.config.return_dict) is False:
        return "return_dict is False"
    return None


# ---- comparison with torch's loss ----------------------------------------------------------------


def _loss_differs(node: Any, target: Tensor, options: Any, whole: Any) -> str | None:
    """Returns how a loss or its gradient differs from torch's, "" if equal, None if unknown.

    The losses of some rows and their gradients are compared, and the loss of all rows if torch has
    computed it.

    Args:
        whole: The loss of all rows, computed by torch, or None.
    """
    if deferred.captures():
        return None
    count = max(1, ROWS_BYTES // (4 * len(node.family.inputs[1])))
    kept = (target != options["ignore_index"]).nonzero()[:count, 0]
    # Autograd cannot save inference tensors, so copies are used.
    options = {name: deferred.versioned(value) for name, value in options.items()}
    rows, targets = node.rows.detach()[kept].requires_grad_(), target[kept]
    unreduced = options | {"reduction": "none"}
    fused_loss = node.family.loss(node, rows, targets, unreduced)
    expected = F.cross_entropy(node.replay(rows, moves=False), targets, **unreduced)
    gradients = [torch.autograd.grad(loss.sum(), rows)[0] for loss in (fused_loss, expected)]
    pairs = [("loss", fused_loss.detach(), expected.detach()), ("gradient", *gradients)]
    if whole is not None:
        with torch.no_grad():
            fused_loss = node.family.loss(node, node.rows, target, options)
        pairs.append(("loss", fused_loss, whole.detach().flatten()))
    if not len(kept) or not all(expected.isfinite().all() for _, _, expected in pairs):
        return None
    for name, value, expected in pairs:
        if not _agree(value, expected, node.family.dtype):
            error = (value.float() - expected.float()).norm() / expected.float().norm()
            return f"{name} differs from torch's by {float(error):.2g}"
    return ""


def _agree(value: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two results that were computed in ``dtype`` differ only by rounding."""
    value, expected = value.float(), expected.float()
    tolerance = max(1e-3, 16 * torch.finfo(dtype).eps)
    return bool((value - expected).norm() <= tolerance * expected.norm())
