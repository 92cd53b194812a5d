"""Replaces the head and the loss of language models with ``linear_cross_entropy``.

The classes of a model and its head are replaced by subclasses of the same names. In training, and
in evaluation if the user asks for it, the model's original ``forward`` runs, but its head returns
recorded or deferred logits (`deferred.py`). A transformers model was tried when it was
converted, so its logits are deferred. For another model, torch computes the logits, and their
readers are recorded, until a call shows that only the loss reads them. Later calls defer them:
their cross-entropy is computed from the hidden states and the head's weight.
If other code reads deferred logits, they are computed, so results never change.

The first loss of a model and the gradient of the head's input are compared with torch's, for a few
rows of logits at a time. If they differ, the model's original ``forward`` is restored. This costs,
once, the time of one more head and loss; recorded logits are in memory as a whole, up to a limit.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Linear
from torch.nn import functional as F

from pyfused import torch_internals
from pyfused.adopt import adapters, deferred, subclass
from pyfused.adopt.deferred import LOSS
from pyfused.dispatch.reasons import first_time, stacklevel
from pyfused.ops.chunk_sizes import physical_memory
from pyfused.ops.shards import is_dtensor
from pyfused.torch_internals import active_mode, has_compiled_call, has_hooks, is_jit_tracing

_thread = threading.local()  # its attribute `call` is the model call that is running in the thread
OUTPUT = "the output"
ALONE, READ, COMPARED = "only the loss read the logits", "the logits were read", "compared"
ROWS_BYTES = 16 << 20  # bytes of logits that torch computes at a time for the comparison
PARTS = 16  # torch's logits, their copies and gradients are recorded in an eighth of the memory
TOKENS = 5  # tokens in the batch of a trial run
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
_CAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that autocast casts

# ---- a model's forward with another head ---------------------------------------------------------


class _Call:
    """One call of a model whose head records or defers its logits.

    Attributes:
        facts: The warnings issued for the model, and what its calls have shown: ALONE, READ and
            COMPARED, each with the modes of the call.
        with_metrics: Whether a loss sets the model's attribute ``pyfused_metrics``.
        tried: Whether a trial run has shown that only the loss reads the logits.
        modes: The modes of this call, None before the head is called.
        shown: ALONE if only the loss read the logits of the last call in these modes, READ if
            something else did, None before the first call.
        agreed: Whether a loss of this call equals torch's.
        differs: How it differs, None if it does not.
        grad_modes: Whether gradients were enabled, for each call of the head.
    """

    def __init__(
        self, model: Any, head: Any, facts: set[Any], with_metrics: bool = False, tried: bool = True
    ) -> None:
        self.model, self.head, self.facts = model, head, facts
        self.with_metrics, self.tried = with_metrics, tried
        self.families: list[deferred.Family] = []
        self.modes: Any = None
        self.shown: str | None = None
        self.agreed = False
        self.differs: str | None = None
        self.grad_modes: set[bool] = set()
        self.hooks = deferred.hooks()

    def run(self, kind: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
        """Returns the output of the model's original ``forward``, and the readers of its logits."""
        before, _thread.call = getattr(_thread, "call", None), self
        try:
            output = _finished(kind.forward(self.model, *args, **kwargs))
            for family in self.families:
                family.close("code after its forward")
            if self.modes is not None:
                self.learn()
            return output, [use for family in self.families for use in family.uses]
        finally:
            _thread.call = before
            for family in self.families:
                family.release()
                family.results = None
            self.families.clear()

    def look_up(self, device: str) -> None:
        """Looks up what earlier calls in the same modes have shown."""
        if not is_dynamo_compiling() and self.modes is None:
            self.modes = self.model.training, *deferred.modes_of(device)[:3]
            self.shown = next((x for x in (ALONE, READ) if (x, self.modes) in self.facts), None)

    def learn(self) -> None:
        """Records what this call has shown, unless a checkpoint may run it again."""
        uses = [set(family.uses) for family in self.families]
        losses = any(LOSS in each for each in uses)
        recorded = any(family.recorded for family in self.families)
        alone = all(each in ({LOSS}, {OUTPUT}, set()) for each in uses)
        if self.shown is None:
            for family in self.families:
                alone = family.agrees(alone)
        shown = self.shown
        if not alone and (losses or recorded):
            shown = READ
        elif alone and losses and shown != ALONE:
            shown = ALONE if self.agreed else None
        tensor_parallel = any(type(x) is deferred.ColwiseFamily for x in self.families)
        if shown != self.shown and self.hooks is None and not (self.shown and tensor_parallel):
            self.facts.discard((self.shown, self.modes))
            self.facts.add((shown, self.modes))

    def is_compared(self) -> bool:
        """Returns whether a loss of this call has to be compared with torch's."""
        return self.shown is None and (COMPARED, self.modes) not in self.facts

    def checks(self) -> bool:
        """Returns whether this call looks for changes of the head's input and parameters."""
        return self.shown is None and not _captures()

    def records(self, hidden: Tensor) -> bool:
        """Returns whether torch computes the logits, and their readers are recorded."""
        if self.shown is not None:
            return self.shown == READ
        bytes_of_logits = 4 * hidden.shape[:-1].numel() * len(self.head.weight)
        memory = physical_memory()
        if hidden.is_cuda and not _captures():
            memory, _ = torch.cuda.mem_get_info(hidden.device)
        fits = bytes_of_logits <= memory // PARTS
        return not self.tried and self.hooks is None and fits

    def logits(self, kind: Any, hidden: Tensor) -> Any:
        """Returns the logits of hidden states, or None to call the head."""
        head, hooked = self.head, has_hooks(self.head)
        # In training mode, no_grad means a checkpoint or generation.
        if not torch.is_grad_enabled() and (hooked or self.model.training):
            return None
        reason = _reason(head, None if hooked else hidden)
        if reason != SILENT and self.hooks != deferred.hooks():
            reason = "a checkpoint in its forward calls its head"
        if reason is not None:
            return _warn(self.model, self.facts, reason)
        self.look_up(hidden.device.type)
        if self.shown == READ and self.hooks is not None:
            return None
        if hooked:
            return self.sharded_logits(kind, hidden)
        if adapters.is_lora(head) and self.is_compared():
            with torch.inference_mode(False), torch.enable_grad(), deferred.without_hooks():
                if adapters.differs(head, hidden.flatten(0, -2)[:TOKENS]):
                    self.differs = "LoRA layer adds something other than scaling * B A x"
                    return None
        rows, adapter_weight = adapters.with_features(head, hidden)
        recorded = self.modes is not None and self.records(hidden)
        family = deferred.Family(
            self, rows, head.weight, head.bias, adapter_weight, recorded=recorded
        )
        self.families.append(family)
        return family.logits()

    def sharded_logits(self, kind: Any, hidden: Any) -> Any:
        """Returns the logits of a head whose hooks torch.distributed has defined."""
        head, policy = self.head, torch_internals.fsdp_policy(self.head)
        for earlier in self.families if policy else ():
            earlier.close("code after another call of its head")
        (hidden,) = args = torch_internals.run_pre_hooks(head, (hidden,))
        finish = partial(torch_internals.run_forward_hooks, head, args)
        weight, bias = head.weight, head.bias
        reason: str | None = "its head has hooks"
        if policy is not None:
            reason = _reason(head, hidden)
            recorded = self.records(hidden)
            family: Any = deferred.Family(
                self, hidden, weight, bias, None, recorded=recorded, finish=finish
            )
        elif all(is_dtensor(x) for x in (hidden, weight, bias) if x is not None) and (
            all(placement.is_replicate() for placement in hidden.placements)
            and any(placement.is_shard(0) for placement in weight.placements)
        ):
            # All processes record the first call, and agree on what it has shown.
            family = deferred.ColwiseFamily(
                self, finish, hidden, weight, bias, recorded=self.shown is None
            )
            reason = None if _is_usable(head, family.inputs[0]) else SILENT
        if reason is None and self.shown == READ and policy is None:
            reason = SILENT
        if reason is not None:
            _warn(self.model, self.facts, reason)
            return finish(kind.forward(head, *args))
        logits, dtype = family.logits(), policy and policy.output_dtype
        if not deferred.is_deferred(logits):
            self.facts.add((READ, self.modes))
            _warn(self.model, self.facts, "its head has hooks")
            return logits
        self.families.append(family)
        return logits if dtype in (None, logits.dtype) else logits.to(dtype)

    def accepts(self, node: Any, target: Tensor, options: Any, expected: Any) -> bool:
        """Returns whether a loss equals torch's; only the first one in these modes is compared.

        Args:
            expected: torch's loss if it has been computed.
        """
        if self.shown is None and not self.agreed and self.differs is None:
            if self.is_compared():
                with torch.inference_mode(False), torch.enable_grad(), deferred.without_hooks():
                    differs = _loss_differs(node, target, options, expected)
                self.differs = differs or None
                if differs == "":
                    self.facts.add((COMPARED, self.modes))
            self.agreed = (COMPARED, self.modes) in self.facts
        elif expected is not None and self.with_metrics:
            with torch.no_grad():
                node.loss(node.rows, target, options)
        return self.differs is None


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _head_call(kind: Any) -> Any:
    """Returns the ``__call__`` of a head's subclass."""

    def __call__(head: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call: Any = getattr(_thread, "call", None)
        given, logits = (*args, *kwargs.values()), None
        if call is not None and call.head is head:
            call.grad_modes.add(torch.is_grad_enabled())
            logits = call.logits(kind, *given) if len(given) == 1 else None
        return kind.__call__(head, *args, **kwargs) if logits is None else logits

    return __call__


_HEAD = subclass.subclass(Linear, _head_call)


def _is_usable(head: Any, hidden: Any) -> bool:
    """Returns whether a head's call is valid and its gradient needs only reverse mode."""
    if is_dynamo_compiling():
        return True
    if type(hidden) not in deferred.PLAIN:
        return False
    tensors = [x for x in (hidden, head.weight, head.bias) if x is not None]
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return (
        hidden.layout is torch.strided
        and not hidden.is_nested
        and hidden.is_inference() == torch.is_inference_mode_enabled()
        and hidden.numel() > 0
        and hidden.shape[-1:] == head.weight.shape[-1:]
        and all(x.dtype in _CAST_DTYPES if autocast else x.dtype is hidden.dtype for x in tensors)
        and (
            not torch.is_grad_enabled()
            or any(x.requires_grad for x in (*tensors, *head.parameters()))
        )
        and not any(x.is_inference() for x in head.parameters())
        and active_mode() is None
    )


def _reason(head: Any, hidden: Tensor | None = None) -> str | None:
    """Returns why a head has to compute its logits itself, None if weight and bias determine them.

    Args:
        hidden: The head's input, None before a call.
    """
    for where, layer in adapters.layers(head).items():
        is_lora = layer is head and adapters.is_lora(head)
        kind: Any = type(layer)
        is_unit = kind.__bases__[-1] is _HEAD and torch_internals.fsdp_policy(layer)
        if kind not in (Linear, _HEAD) and not (is_lora or is_unit):
            return f"{where} is a {kind.__module__}.{kind.__name__}, not a plain torch.nn.Linear"
        if "forward" in vars(layer):
            return f"the forward of {where} was replaced, for example by accelerate's offloading"
        if is_unit and is_dynamo_compiling():
            return "its head is a unit of fully_shard in a compiled model"
        if has_hooks(layer, distributed=is_dynamo_compiling() or adapters.is_lora(head)):
            return f"{where} has hooks"
        if has_compiled_call(layer):
            return f"{where} is compiled separately"
        for name, value in (("weight", layer.weight), ("bias", layer.bias)):
            if hidden is None or value is None:
                continue
            if not is_dynamo_compiling() and type(value) not in deferred.PLAIN:
                return f"the {name} of {where} is a {type(value).__name__}"
            if value.device != hidden.device:
                return f"the {name} of {where} is on {value.device}, its input on {hidden.device}"
            if value.numel() == 0:
                return f"the {name} of {where} has no elements"
        reason = adapters.reason_to_compute(head, hidden) if is_lora else None
        if reason is not None:
            return reason
    return None if hidden is None or _is_usable(head, hidden) else SILENT


def _finished(output: Any) -> Any:
    """Returns a model's output, with None for logits that only the loss has read."""
    if deferred.is_deferred(output):
        family = output._node.family
        if set(family.uses) == {LOSS}:
            return None
        fused = LOSS in family.uses and isinstance(output, deferred.DeferredLogits)
        if not family.computed:
            family.read(OUTPUT)
        if fused and output.requires_grad:
            return output  # which refuses a gradient of the logits, as the loss bypasses them
        result = deferred.computed(output)
        return result.view_as(result) if family.traced else result
    if isinstance(output, tuple):
        parts = list(map(_finished, output))
        if all(part is given for part, given in zip(parts, output, strict=True)):
            return output
        result = tuple.__new__(type(output), parts)
        vars(result).update(vars(output)) if hasattr(output, "__dict__") else None
        return result
    if isinstance(output, dict):
        found = {name: _finished(value) for name, value in output.items()}
        changed = [name for name, value in output.items() if found[name] is not value]
        if not changed:
            return output
        if is_dataclass(output):  # a transformers output, which leaves out None
            removed = tuple(name for name in changed if found[name] is None)
            return _without(type(output), removed)(**found) if removed else type(output)(**found)
        result = copy.copy(output)
        result.update((name, found[name]) for name in changed)
        return result
    return output


class _Entries(tuple[Any, ...]):
    """The entries of a transformers output; reading its logits by their index raises."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if any(x is _REMOVED for x in (found if type(index) is slice else (found,))):
            raise RuntimeError(
                "pyfused.convert: expected an index of an entry other than the logits, got "
                f"{index}. Read other entries by name, or call pyfused.revert(model)"
            )
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


_REMOVED = object()


@torch_internals.run_while_tracing
def _without(kind: Any, removed: tuple[str, ...]) -> Any:
    return _subclass_without(kind, removed)


@cache
def _subclass_without(kind: Any, removed: tuple[str, ...]) -> Any:
    """Returns a subclass of a transformers output whose logits are None, but keep their index."""

    def to_tuple(output: Any) -> Any:
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        known = {name: _REMOVED if name in removed else value for name, value in values.items()}
        return _Entries(value for value in known.values() if value is not None)

    def reduce(output: Any) -> Any:  # the subclass cannot be imported
        return kind(**output).__reduce__()

    return subclass.named(kind, {"to_tuple": to_tuple, "__reduce__": reduce}, kind)


# ---- supported models ----------------------------------------------------------------------------


def _head_of(model: Any, head_name: str | None) -> Any:
    """Returns the head that the user has named, or else the head of a transformers model."""
    head = model.get_submodule(head_name) if head_name else model.get_output_embeddings()
    return adapters.called_head(head)


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
    if not _is_head(head):
        return "its head is not a plain torch.nn.Linear"
    reason = _reason(head) or ("its head has hooks" if has_hooks(head) else None)
    if reason is None and not subclass.has_original_forward(head):
        reason = "the forward of its head was replaced"
    if head_name is not None or reason is not None:
        return reason
    if head.weight.numel() == 0:
        return "the weight of its head has no elements"
    return None if head.weight.is_meta else _trial_reason(model, head)


def fuse(model: Any, head: str | None, evaluation: bool, metrics: bool) -> None:
    """Changes the classes of a model and its head to fused subclasses with convert's options.

    Args:
        head: The name of the head, None for a transformers model or the head of the last call.
    """
    if head is None and subclass.is_marked(model):
        head = type(model)._arguments[1]
    _fuse_head(_head_of(model, head))
    subclass.fuse(model, _fused_forward, head, evaluation, metrics)


def is_converted(model: Any) -> bool:
    """Returns whether `fuse` has changed a model."""
    return subclass.is_marked(model) and type(model)._arguments[0] is _fused_forward


def shares_head(model: Any) -> bool:
    """Returns whether a transformers model shares its head with a converted model."""
    return subclass.is_marked(_head_of(model, None))


def _is_head(module: Any) -> bool:
    head = adapters.called_head(module)
    return type(head) in (Linear, _HEAD) or adapters.is_lora(head)


def _fuse_head(head: Any) -> None:
    if not subclass.is_fused(head):
        subclass.fuse(head, _head_call)


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
        given = dict(zip(names, args, strict=False)) | kwargs
        reason = _reason_for_logits(model, given) if head is None else None
        if reason is None:
            layer = _head_of(model, head)
            reason = _reason(layer)
        if reason is not None:
            _warn(model, warned, reason)
            return kind.forward(model, *args, **kwargs)
        if not is_dynamo_compiling():
            _fuse_head(layer)  # the head may have been replaced after the conversion
        call = _Call(model, layer, warned, metrics, tried=head is None)
        output, uses = call.run(kind, args, kwargs)
        if call.differs is not None:
            _warn(model, warned, f"its {call.differs}. From now on, its original forward runs")
            subclass.unfuse(model)  # the head computes logits if the model does not defer them
            return output
        reads = [use for use in dict.fromkeys(uses) if use not in (LOSS, OUTPUT)]
        if reads:
            _warn(model, warned, f"its logits are read by {', '.join(reads)}")
        elif LOSS not in uses and (is_dynamo_compiling() or not _was_compared(warned)):
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


def _was_compared(facts: set[Any]) -> bool:
    return any(type(fact) is tuple and fact[0] == COMPARED for fact in facts)


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


def _reason_for_logits(model: Any, given: dict[str, Any]) -> str | None:
    """Returns why a call of a transformers model needs logits, None if it only needs its loss.

    Training steps without labels compute their loss from all logits.
    """
    if given.get("labels") is None:
        values = map(given.get, ("shift_labels", "logits_to_keep", "output_hidden_states"))
        alone = getattr(_thread, "call", None) is None  # not called by another model
        asks = any(torch.is_tensor(value) or value for value in values)
        trains = model.training and torch.is_grad_enabled()
        return _MISSING_LABELS if alone and trains and not asks else SILENT
    if "_loss_function" in vars(model):
        return "its loss function was replaced"
    if given.get("return_dict", model.config.return_dict) is False:
        return "return_dict is False"
    return None


# ---- comparison with torch's loss ----------------------------------------------------------------


def _loss_differs(node: Any, target: Tensor, options: dict[str, Any], loss: Any) -> str | None:
    """Returns how a loss or its gradient differs from torch's, "" if equal, None if unknown.

    Args:
        loss: torch's loss, None if it has to be computed, too.
    """
    if _captures():
        return None
    size = max(1, ROWS_BYTES // (4 * len(node.family.inputs[1])))
    losses, gradients = [], []
    valid: Any = 1
    if options["reduction"] == "mean":
        kept, weight = target[target != options["ignore_index"]], options["weight"]
        valid = len(kept) if weight is None else weight[kept.long()].sum()
    # Autograd cannot save inference tensors, so copies are used.
    rows, target = node.rows.detach().clone().requires_grad_(), target.clone()
    options = {name: deferred.versioned(value) for name, value in options.items()}
    fused = node.loss(rows, target, options)
    (gradient,) = torch.autograd.grad(fused, rows, torch.ones_like(fused) * valid)
    for chunk, targets in zip(rows.split(size), target.split(size), strict=True):
        leaf, unreduced = chunk.detach().requires_grad_(), options | {"reduction": "none"}
        losses.append(F.cross_entropy(node.recompute(leaf), targets, **unreduced))
        gradients += torch.autograd.grad(losses[-1].sum(), leaf)
    if loss is None:
        loss = torch.cat(losses).detach()
        loss = loss if options["reduction"] == "none" else loss.float().sum() / valid
    expected_gradient = torch.cat(gradients)
    if not (loss.isfinite().all() and expected_gradient.isfinite().all()):
        return None
    pairs = (fused.detach(), loss.detach().flatten()), (gradient, expected_gradient)
    return _difference(pairs, node.family.dtype) or ""


def _difference(pairs: Any, dtype: torch.dtype) -> str | None:
    """Returns how a loss or its gradient differs from the expected one, None if they agree."""
    for name, (value, expected) in zip(("loss", "gradient"), pairs, strict=True):
        if not adapters.agree(value, expected, dtype):
            error = (value.float() - expected.float()).norm() / expected.float().norm()
            return f"{name} differs from torch's by {float(error):.2g}"
    return None


class _Outputs:
    """The outputs of a decoder, with hidden states only."""

    def __init__(self, hidden: Tensor, *_: Any, **__: Any) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        states = self.last_hidden_state, self.last_hidden_state[:, 0]  # and the pooled output
        return states[index] if isinstance(index, slice) else states[0] if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _with_classes(classes: dict[Any, Any]) -> Iterator[None]:
    """Changes the classes of modules within a block."""
    before = {module: type(module) for module in classes}
    try:
        for module, kind in classes.items():
            module.__class__ = kind
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind


def _trial_reason(model: Any, head: Any) -> str | None:
    """Returns why a transformers model cannot be converted, by running it.

    Its ``forward`` runs with and without deferred logits, and its decoder returns random hidden
    states instead of running. Only a few rows of logits are computed.
    """
    kinds = sys.modules["transformers"].PreTrainedModel
    parts = [m for m in model.modules() if m is model.base_model or isinstance(m, kinds)]
    bases = [module for module in parts if head not in list(module.modules())]
    if not bases or model in bases:
        return "its hidden states do not come from a base model"
    weight, generator = head.weight, torch.Generator().manual_seed(0)
    labels = torch.randint(len(weight), (1, TOKENS), generator=generator, device="cpu")
    labels[0, 1] = -100
    labels = labels.to(weight.device)
    inputs: dict[str, Any] = {"input_ids": torch.zeros_like(labels), "labels": labels}
    parameters = inspect.signature(type(model).forward).parameters
    more: dict[str, Any] = {"output_router_logits": False}
    more |= dict.fromkeys(("next_sentence_label", "sentence_order_label"), labels.new_zeros(1))
    inputs |= {name: value for name, value in more.items() if name in parameters}
    if "input_ids" not in parameters and model.main_input_name in parameters:
        inputs[model.main_input_name] = inputs.pop("input_ids")
    reason = None
    # The head's input may be a projection of the decoder's output.
    features = head.in_features
    for size in dict.fromkeys((features, getattr(model.config, "hidden_size", features))):
        values = torch.randn(1, TOKENS, size, generator=generator, device="cpu")
        hidden = values.to(weight.device, weight.dtype).requires_grad_()
        fixed = {"__call__": staticmethod(partial(_Outputs, hidden))}
        classes: dict[Any, Any] = {
            base: type(type(base).__name__, (type(base),), fixed) for base in bases
        }
        if not subclass.is_fused(head):
            kind: Any = type(head)
            classes[head] = subclass.subclass(kind, _head_call)
        results: list[tuple[Tensor, ...]] = []
        uses: list[str] = []
        try:
            for deferring in (None, head):
                # Both calls draw the same dropout. The second one defers logits.
                fork = torch.random.fork_rng([weight.device] * weight.is_cuda)
                with torch.enable_grad(), fork, _with_classes(classes):
                    call = _Call(model, deferring, set())
                    call.modes, call.shown = (), ALONE
                    output, uses = call.run(type(model), (), inputs)
                    results.append((output.loss, *torch.autograd.grad(output.loss, hidden)))
        except Exception as error:
            reason = f"its forward raised {error!r} when called with random hidden states"
            continue
        if set(uses) != {LOSS}:
            read = ", ".join(dict.fromkeys(use for use in uses if use != LOSS))
            return f"its logits are read by {read}" if read else "its loss is not a cross-entropy"
        expected, found = results
        difference = _difference(zip(found, expected, strict=True), weight.dtype)
        return f"its {difference}" if difference else None
    return reason
