"""Makes the head of a language model return lazy logits (`lazy_logits.py`).

`fuse` changes the classes of the head and of the model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Linear, Module

from pyfused import torch_internals
from pyfused.adopt import subclass
from pyfused.adopt.lazy_logits import HeadCall, active_autocast
from pyfused.adopt.subclass import MARK
from pyfused.backends import takes_triton
from pyfused.dispatch import reasons
from pyfused.dispatch.operator import needs_grad
from pyfused.dispatch.report import reasons_of_torch
from pyfused.dispatch.run import head_elements
from pyfused.dispatch.sizes import COMPILED, converted_limit
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY
from pyfused.torch_internals import (
    PLAIN,
    active_mode,
    graph_is_whole,
    has_own_hooks,
    size_hint,
)

_CAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # dtypes that autocast casts


class Options(NamedTuple):
    """The mark of a converted head: options of `convert`, and a name for messages.

    Attributes:
        model_name: The class of the model; of several heads, also the name of the head.
    """

    evaluation: bool
    metrics: bool
    memory_budget: int | None
    model_name: str = ""

    def warn(self, reason: str) -> None:
        """Warns once that the model computes its logits."""
        message = f"pyfused.convert: {self.model_name} computes all of its logits: {reason}"
        reasons.warn_once("convert", message, message)


def _of_head(kind: Any) -> dict[str, Any]:
    """Returns a ``forward`` whose output is lazy if a later loss could be fused."""

    def forward(head: Any, input: Tensor) -> Any:
        options = vars(head).get(MARK)
        if options is None:
            return kind.forward(head, input)
        _mark_as_called(options.model_name)
        if options.metrics:
            head.pyfused_metrics = None
        is_lazy = head.training or options.evaluation
        if not is_lazy or (is_dynamo_compiling() and _stays_in_graph(head, input, options)):
            return kind.forward(head, input)
        return output(head, input, options)

    @torch_internals.never_traced
    def output(head: Any, input: Tensor, options: Options) -> Any:
        weight, bias = head.weight, head.bias  # another read would run a parametrization again
        if _is_wanted(options, input, weight, bias):
            if reason := _reason_not_lazy(head, input, weight, bias):
                options.warn(reason)
            elif _can_be_lazy(options, input, weight, bias):
                return HeadCall(head, options, input, weight, bias).logits()
        return F.linear(input, weight, bias)

    return {"forward": forward}


def _stays_in_graph(head: Any, input: Tensor, options: Options) -> bool:
    """Returns whether a program that Dynamo traces computes the logits, without a graph break."""
    limit = COMPILED[LINEAR_CROSS_ENTROPY.name][int(takes_triton(input))]
    if size_hint(head_elements(input, head.weight)) < limit or graph_is_whole():
        return True
    return not (options.evaluation or torch.is_grad_enabled())


def _is_wanted(options: Options, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether a call of a converted head should return lazy logits."""
    if active_mode() is not None or input.is_meta:
        return False
    # Without gradients, logits are kept as constants and read after the next step.
    return options.evaluation or any(needs_grad((input, weight, bias)))


def _reason_not_lazy(head: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Returns why a head cannot return lazy logits in this or any call, None if it can."""
    if "forward" in vars(head) or has_own_hooks(head):
        return reason_to_leave(head)
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is not None and type(value) not in PLAIN:
            return f"the {name} of its head is a {type(value).__name__}"
        if value is not None and value.device != input.device:
            return f"the {name} of its head is on {value.device}, its input on {input.device}"
    return None if weight.numel() else "the weight of its head has no elements"


def _can_be_lazy(options: Options, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether a head takes these inputs, and a fused loss less time than torch's."""
    if type(input) not in PLAIN or input.layout is not torch.strided or input.is_nested:
        return False
    is_inference = torch.is_inference_mode_enabled()
    constants = [x for x in (weight, bias) if x is not None]
    if input.is_inference() != is_inference or any(x.is_inference() for x in constants):
        return False
    dtypes = {input.dtype, *(x.dtype for x in constants)}
    if not (dtypes <= _CAST_DTYPES if active_autocast(input) else len(dtypes) == 1):
        return False
    if input.numel() == 0 or input.shape[-1:] != weight.shape[-1:] or weight.shape[0] == 1:
        return False
    limit = 0 if options.metrics else converted_limit(LINEAR_CROSS_ENTROPY, input)
    return bool(head_elements(input, weight) >= limit)


# A reference to a head that no call has used yet, and its description, by the name of its model.
_uncalled: dict[str, tuple[weakref.ref[Any], str]] = {}


@torch_internals.called_while_tracing
def _mark_as_called(model_name: str) -> None:
    """Notes that the head of a model is called."""
    _uncalled.pop(model_name, None)


def _uncalled_heads() -> str:
    """Returns a line for reports with the converted heads that were never called."""
    heads = [(head(), name) for head, name in [*_uncalled.values()]]
    names = ", ".join([name for head, name in heads if head is not None and MARK in vars(head)])
    return names and f"converted heads that were never called, unless by compiled programs: {names}"


reasons_of_torch.append(_uncalled_heads)


def reason_to_leave(head: Any) -> str | None:
    """Returns why a head keeps computing its logits, None if it can return lazy ones."""
    kind = type(head)
    if kind is not Linear and not subclass.is_fused(head, _of_head):
        adapter = isinstance(getattr(head, "base_layer", None), Module)
        is_a = "has an adapter," if adapter else "is a"
        end = "" if adapter else ", not a plain torch.nn.Linear"
        return f"its head {is_a} {kind.__module__}.{kind.__name__}{end}"
    if "forward" in vars(head):
        return "the forward of its head was replaced, for example by accelerate's offloading"
    if torch_internals.fsdp_policy(head) is not None:
        return "its head is a unit of fully_shard. Leave the head in the root unit"
    if has_own_hooks(head):
        return "its head has hooks"
    if not has_original_forward(head):
        return "the forward of its head was replaced"
    return None


def has_original_forward(module: Any) -> bool:
    """Returns whether a module's ``forward`` is the one that its class was defined with."""
    kind = vars(type(module)).get("_original", type(module))
    forward, defined_in = kind.forward, sys.modules.get(kind.__module__)
    return (
        "forward" not in vars(module)
        and defined_in is not None
        and getattr(forward, "__globals__", None) is vars(defined_in)
    )


# ---- models and their heads ----------------------------------------------------------------------


def _of_model(kind: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"pyfused_metrics": property(_metrics)}


def _metrics(model: Any) -> Any:
    """Returns the metrics of the last call of a converted model's head, None if there are none.

    Of several heads, returns a dict from their names to these.
    """
    by_name = {}
    for name in _names(model, ()):
        metrics = [vars(head).get("pyfused_metrics") for head in _copies(model, name)]
        by_name[name] = next((each for each in metrics if each is not None), None)
    return by_name if len(by_name) > 1 else next(iter(by_name.values()))


def has_head(module: Any) -> bool:
    """Returns whether a module is a transformers model with a head for logits."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return module.get_output_embeddings() is not None


def names_of(head: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the heads that a user has passed, empty if there are none."""
    if head is None:
        return ()
    several = isinstance(head, Sequence) and not isinstance(head, str)
    names: tuple[Any, ...] = tuple(dict.fromkeys(head)) if several else (head,)
    if not names:
        raise ValueError(f"head: expected None or at least one name, got {head!r}")
    return names


def _names(model: Any, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """Returns the names of the heads of a model; None is the head of a transformers model.

    Args:
        names: The names that the user has passed; empty for a transformers model, or for the heads
            that an earlier call of `convert` has named.
    """
    return names or vars(model).get(MARK) or (None,)


def _copies(model: Any, name: str | None) -> list[Any]:
    """Returns a head, and its copies in PEFT's ``modules_to_save``."""
    head = model.get_submodule(name) if name else model.get_output_embeddings()
    if type(head) is getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def check_name(model: Any, name: str) -> None:
    """Raises a ValueError if a model has no head of this name."""
    modules = [*model.named_modules()]
    names = [each for each, module in modules if _may_be_head(module)]
    if name in names:
        return
    expected = f"one of {names[-5:]}" if names else f"but {type(model).__name__} has none"
    got = repr(name)
    for kind in [type(module) for each, module in modules if each == name]:
        is_a = "a subclass," if issubclass(kind, Linear) else "a"
        got += f", {is_a} {kind.__module__}.{kind.__name__}"
    raise ValueError(f"head: expected the name of a torch.nn.Linear, {expected}, got {got}")


def _may_be_head(module: Any) -> bool:
    is_adapter = isinstance(getattr(module, "base_layer", None), Module)
    is_linear = type(module) is Linear or subclass.is_fused(module, _of_head)
    return is_linear or hasattr(module, "modules_to_save") or is_adapter


def reason_to_leave_model(model: Any, names: tuple[str, ...]) -> str | None:
    """Returns why a model with heads is not converted, None if it can be."""
    for name in _names(model, names):
        for head in _copies(model, name):
            if reason := reason_to_leave(head):
                return reason if len(_names(model, names)) == 1 else f"{name}: {reason}"
    return None


def description(model: Any, names: tuple[str, ...]) -> str:
    """Describes what replaces the heads of a model and their losses."""
    heads = {name: _description(_copies(model, name)[0]) for name in _names(model, names)}
    if len(heads) == 1:
        return heads.popitem()[1]
    return ", ".join(f"{text} for {name}" for name, text in heads.items())


def _description(head: Any) -> str:
    return f"linear_cross_entropy({head.in_features} -> {head.out_features})"


def already_fused(module: Any) -> str | None:
    """Returns a description of a module if it is a converted head, None if it is not."""
    is_head = subclass.is_fused(module, _of_head) and MARK in vars(module)
    if not is_head or reason_to_leave(module) is not None:
        return None
    return f"is already fused with its loss: {_description(module)}"


def is_converted(model: Any) -> bool:
    """Returns whether `fuse` has changed a model."""
    return subclass.is_fused(model, _of_model) and MARK in vars(model)


def has_converted_head(model: Any, names: tuple[str, ...] = ()) -> bool:
    """Returns whether the heads are converted, also if the model shares them with another one."""
    return all(MARK in vars(_copies(model, name)[0]) for name in _names(model, names))


def fuse(model: Any, names: tuple[str, ...], options: Options) -> None:
    """Makes the heads of a model return lazy logits, or changes the options of a converted model.

    Args:
        names: The names of the heads; empty for a transformers model or the heads of the last call.
        options: The options of `convert`.
    """
    heads, kind = _names(model, names), type(model).__name__
    subclass.fuse(model, _of_model, names or vars(model).get(MARK))
    for name in heads:
        where = f"{name or 'the head'} of {kind}"
        named = options._replace(model_name=kind if len(heads) == 1 else where)
        for head in _copies(model, name):
            if MARK not in vars(head):
                _uncalled[named.model_name] = weakref.ref(head), where
            subclass.fuse(head, _of_head, named)
            vars(head)["pyfused_metrics"] = None


def unfuse(module: Any) -> None:
    """Restores a head or a model, unless a wrapper has made another subclass of its class."""
    vars(module).pop("pyfused_metrics", None)
    subclass.unfuse(module)
