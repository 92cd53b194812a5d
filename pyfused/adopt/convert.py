"""Replaces the modules of a model with pyfused's, and reverts the replacement."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import Module

import pyfused.nn as nn
from pyfused import checks, torch_internals
from pyfused.adopt import heads
from pyfused.adopt.heads import has_original_forward
from pyfused.adopt.subclass import MARK
from pyfused.dispatch.reasons import stacklevel

Model = TypeVar("Model", bound=Module)

_log = logging.getLogger("pyfused")
REPLACEMENTS: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn._NAMES if hasattr(torch.nn, name)
}
_TORCH_CLASSES = {ours: torch_class for torch_class, ours in REPLACEMENTS.items()}
_LOSSES_AND_ACTIVATIONS = {torch.nn.modules.activation.__name__, torch.nn.modules.loss.__name__}
_NOTHING = (
    "Nothing to convert: found no loss or activation of torch.nn that pyfused has, and no "
    "transformers language model. For another language model, pass head=, the name of the linear "
    "layer that computes its logits."
)
_INPUT_SIZES = "in_features", "input_size", "in_channels", "num_features"  # of torch.nn's modules
_MANY_OUTPUTS = 1024  # a layer with at least this many may be a head


class Unconverted(NamedTuple):
    """A module that :func:`pyfused.convert` does not replace."""

    name: str
    kind: str
    reason: str


class AlreadyConverted(Unconverted):
    """A module that is pyfused's already."""


class PossibleHead(Unconverted):
    """A layer that may compute logits."""


class Conversion(NamedTuple):
    """The changes of :func:`pyfused.convert`.

    Attributes:
        swapped: The names of the modules that it replaces.
        left: The modules that it does not replace, with reasons.
        table: A text with both, each module's class and its replacement, and the features and
            classes of heads; ``print`` prints it.
    """

    swapped: tuple[str, ...]
    left: tuple[Unconverted, ...]
    table: str

    def is_empty(self) -> bool:
        """Returns whether nothing would be replaced, is already fused, or may be a head."""
        known = AlreadyConverted, PossibleHead
        return not self.swapped and not any(isinstance(each, known) for each in self.left)

    def __str__(self) -> str:
        return "\n".join([_NOTHING] * self.is_empty() + [self.table] * bool(self.table))


def convert(
    model: Model,
    *,
    head: str | Sequence[str] | None = None,
    evaluation: bool = False,
    metrics: bool = False,
    memory_budget: int | None = None,
) -> Model:
    """Replaces supported torch modules with pyfused's, in place.

    Modules stay the same objects and only change their class: hooks, buffers, device, training
    flag, names and references are kept. Subclasses are not replaced.

    In transformers' language models whose head is a plain linear layer, at any depth, head and loss
    become :func:`pyfused.functional.linear_cross_entropy`: in training mode with gradients, the
    head returns logits that are computed only if something other than their loss reads them, unless
    they are so few that torch's loss is faster. Read them before ``backward()``: afterwards it is
    an error. A program that ``torch.compile`` traces breaks its graph at a large head. With
    ``fullgraph=True`` and in ``torch.export`` the head computes its logits; call
    ``linear_cross_entropy`` by name there.

    :func:`plan_conversion` previews the changes; the logger ``pyfused`` logs them at level INFO.
    ``convert`` warns if nothing was replaced, if a language model keeps its head, with the reason,
    and if another layer may be a head. A converted head warns if it computes its logits in
    training. Another call replaces the options, and converts a head that was replaced.

    ``type(module)`` changes. Libraries that look up the exact class of a module do not recognise a
    replaced one, often without an error: ``torch.ao.quantization`` in eager mode and by FX,
    Captum's ``DeepLift``, BackPACK, counters of operations such as THOP, and pruning libraries.
    Call :func:`revert` before you use them.

    Args:
        model: Any module; its submodules are replaced, and the module itself if it is supported.
        head: The name of the :class:`torch.nn.Linear` that computes the logits, with dots for a
            nested layer: ``"cls.predictions.decoder"``. ``model`` may then be a language model of
            any library whose loss is torch's cross-entropy of this layer's output. A list names
            several heads, each with losses of its own: ``["heads.0", "heads.1"]``. By default, it
            is the head of a transformers model, or the heads that an earlier call has named.
        evaluation: Whether the head also returns such logits in evaluation mode, under ``no_grad``
            and in inference mode, for losses without logits.
        metrics: Whether each call of a language model sets its attribute ``pyfused_metrics`` to the
            :class:`~pyfused.ops.metrics.Metrics` of its last cross-entropy, from the same pass, or
            to None if that cross-entropy was not fused; of several heads, to a dict from their
            names to these. Losses of few logits are fused, too.
        memory_budget: The bytes for the logits that a fused loss has in memory at once, as in
            :func:`pyfused.functional.linear_cross_entropy`; None for the default.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module, or ``memory_budget`` is not an int.
        ValueError: ``model`` is compiled or wrapped by FSDP, or has no such head, or
            ``memory_budget`` is not positive. Nothing has been changed.
    """
    checks.memory_budget(memory_budget)
    options = heads.Options(evaluation, metrics, memory_budget)
    plan, modules = plan_conversion(model, head=head), dict(_modules(model))
    names = heads.names_of(head)
    _log.info("pyfused.convert: %s", _replace(plan, modules, names, options))
    _warn(plan, modules, names, any(options))
    return model


def _replace(
    plan: Conversion, modules: dict[str, Module], names: tuple[str, ...], options: heads.Options
) -> str:
    """Replaces the modules of a plan, and returns a line for the log."""
    for left in plan.left:
        if isinstance(left, AlreadyConverted) and heads.is_converted(module := modules[left.name]):
            heads.fuse(module, names if left.name == "." else (), options)
    kinds: Counter[str] = Counter()
    for name in plan.swapped:
        module = modules[name]
        kind = type(module).__name__
        if type(module) in REPLACEMENTS:
            module.__class__ = REPLACEMENTS[type(module)]
            nn.keep_in_graphs(module)
            setattr(module, MARK, True)
        else:
            heads.fuse(module, names if name == "." else (), options)
            kind = f"head and loss of {kind}"
        kinds[kind] += 1
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    number = "1 module" if kinds.total() == 1 else f"{kinds.total()} modules"
    made = (
        f"replaced {number} ({listed}); left {len(plan.left)}: see pyfused.plan_conversion(model)"
    )
    return made if kinds else str(plan)


def _warn(
    plan: Conversion, modules: dict[str, Module], names: tuple[str, ...], options: bool
) -> None:
    """Warns if `convert` changed nothing, left a language model as is, or ignored an option."""
    messages = []
    for left in plan.left:
        module = modules[left.name]
        is_named = heads.is_converted(module) or (bool(names) and left.name == ".")
        is_model = is_named or (heads.has_head(module) and not heads.has_converted_head(module))
        if is_model and not isinstance(left, AlreadyConverted):
            messages.append(f"{left.kind} computes all of its logits: {left.reason}")
    possible = [each for each in plan.left if isinstance(each, PossibleHead)]
    if messages:
        pass
    elif plan.is_empty():
        messages = [str(plan)]
    elif possible:
        listed = (f"{name} may compute logits: {reason}" for name, _, reason in possible)
        messages = ["; ".join(listed)]
    elif options and not any(map(heads.is_converted, modules.values())):
        message = "evaluation, metrics and memory_budget have no effect, because no head was "
        messages = [message + "converted"]
    for message in messages:
        warnings.warn(f"pyfused.convert: {message}", RuntimeWarning, stacklevel=stacklevel())


def plan_conversion(model: Module, *, head: str | Sequence[str] | None = None) -> Conversion:
    """Previews the changes of :func:`convert` to a model.

    Args:
        model: Any module.
        head: As in :func:`convert`.

    Returns:
        The modules that would be replaced (``"."`` is the model itself), and the language models,
        losses and activations that would not be, with reasons, each under its first name.

    Raises:
        TypeError, ValueError: As in :func:`convert`.
    """
    modules, names = _modules(model), heads.names_of(head)
    sizes = {} if names else _possible_heads(dict(modules))
    swapped, left, rows = [], [], []
    for name, module in modules:
        head_names, kind = names if name == "." else (), type(module).__name__
        if reason := _unconverted(name, module, head_names, sizes):
            left.append(reason)
            size, verb = (f"({sizes[name]})", "") if name in sizes else ("", "left: ")
            rows.append((name, kind + size, verb + reason.reason))
            continue
        if _has_head(module, head_names):
            replacement = heads.description(module, head_names)
        elif type(module) in REPLACEMENTS:
            in_place = ", but torch computes it in place" * bool(getattr(module, "inplace", False))
            replacement = f"pyfused.nn.{kind}{in_place}"
        else:
            continue
        swapped.append(name)
        rows.append((name, kind, f"replaced by {replacement}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {what}" for name, kind, what in rows]
    return Conversion(tuple(swapped), tuple(left), "\n".join(lines))


def _has_head(module: Module, names: tuple[str, ...] = ()) -> bool:
    """Returns whether the heads of a module are known, by names that a user has passed or not."""
    return bool(names) or heads.has_head(module) or heads.is_converted(module)


def _unconverted(
    name: str, module: Module, head_names: tuple[str, ...], possible_heads: Container[str]
) -> Unconverted | None:
    """Returns a module and why it is not replaced, None if it is or pyfused has no counterpart."""
    kind = type(module).__name__
    if _has_head(module, head_names):
        for head in head_names:
            heads.check_name(module, head)
        if heads.is_converted(module) and heads.has_converted_head(module, head_names):
            return AlreadyConverted(name, kind, "is already converted")
        reason = heads.reason_to_leave_model(module, head_names)
    elif name in possible_heads:
        return PossibleHead(name, kind, f"pass head={name!r} to fuse it with its loss")
    elif type(module).__module__ == nn.__name__:
        return AlreadyConverted(name, kind, "is already a module of pyfused.nn")
    else:
        reason = heads.already_fused(module) or _reason_to_leave(module)
    return Unconverted(name, kind, reason) if reason else None


def _possible_heads(modules: dict[str, Module]) -> dict[str, str]:
    """Returns the sizes of the linear layers that may compute logits, by name.

    A possible head has many outputs, no other layer with that many inputs, and is the last linear
    layer, the only one of its size, or one with an output for each row of an embedding. Layers in
    models whose head is known are skipped.
    """
    in_models = {
        id(layer) for module in modules.values() if _has_head(module) for layer in module.modules()
    }
    linear = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    inputs = {getattr(m, name, None) for m in modules.values() for name in _INPUT_SIZES}
    sizes = Counter((layer.in_features, layer.out_features) for layer in linear.values())
    embeddings = torch.nn.Embedding, torch.nn.EmbeddingBag
    rows = {m.num_embeddings for m in modules.values() if isinstance(m, embeddings)}
    possible, last = {}, [*linear][-1:]
    for name, layer in linear.items():
        size = n, classes = layer.in_features, layer.out_features
        is_special = classes in rows or sizes[size] == 1 or name in last
        is_large = classes >= max(_MANY_OUTPUTS, n) and classes not in inputs
        is_known = name == "." or type(layer) is not torch.nn.Linear or id(layer) in in_models
        if is_special and is_large and not is_known:
            possible[name] = f"{n} -> {classes}"
    return possible


def revert(model: Module) -> tuple[str, ...]:
    """Reverts the modules that :func:`convert` has replaced to torch's, in place.

    Args:
        model: The converted model, a copy of it, or one loaded from a file.

    Returns:
        The names of the reverted modules, as :func:`plan_conversion` lists them.

    Raises:
        TypeError, ValueError: As in :func:`convert`.
    """
    converted = [(name, module) for name, module in _modules(model) if MARK in vars(module)]
    for _, module in converted:
        if type(module) in _TORCH_CLASSES:
            module.__class__ = _TORCH_CLASSES[type(module)]
            vars(module).pop("__module__", None)
        else:
            heads.unfuse(module)
        vars(module).pop(MARK, None)
    return tuple(name for name, m in converted if not isinstance(m, torch.nn.Linear))  # no heads


def _modules(model: Any) -> list[tuple[str, Module]]:
    """Returns the modules, each under its first name; raises for a wrapped module."""
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = [(name or ".", module) for name, module in model.named_modules()]
    for name, module in modules:
        wrapper = _wrapper(module)
        if wrapper:
            call = "Convert or revert the model before compiling or sharding it"
            if hasattr(module, "_orig_mod"):  # the result of torch.compile
                path = "model" if name == "." else f"model.{name}"
                call = f"Convert or revert the module that was compiled, {path}._orig_mod"
            raise ValueError(
                f"model: expected a module that is not {wrapper} yet, got {type(module).__name__} "
                f"at {name!r}. {call}"
            )
    return modules


def _wrapper(module: Module) -> str | None:
    """Returns the wrapper that relies on a module's class, or None."""
    if torch_internals.is_compiled_module(module):
        return "compiled"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
        return "sharded by FSDP"
    return None


def _reason_to_leave(module: Module) -> str | None:
    kind = type(module)
    if kind in REPLACEMENTS:
        return None if has_original_forward(module) else "its forward was replaced"
    is_script = isinstance(module, torch.jit.ScriptModule)
    for torch_class in REPLACEMENTS:
        name = torch_class.__name__
        if isinstance(module, torch_class):
            return f"is a subclass of torch.nn.{name}"
        if is_script and module.original_name == name:
            return "is compiled by torch.jit"
        if kind.__name__ == name:
            return f"is a class of {kind.__module__}, not torch.nn.{name}"
    if isinstance(module, torch.nn.MultiheadAttention):
        return None
    known = any(base.__module__ in _LOSSES_AND_ACTIVATIONS for base in kind.__mro__)
    return "has no counterpart in pyfused.nn" if known else None
