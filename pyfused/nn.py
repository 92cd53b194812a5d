"""Fused counterparts of ``torch.nn``'s modules: subclasses, alike but for their ``forward``.

Most of them follow from the declarations of their operators; ``nn.pyi`` has their signatures. A
name that has no counterpart here, such as ``Linear``, is torch's.
"""

# mypy: disable-error-code="arg-type"
# torch's modules declare their reduction as a str, whose values are checked by the functions.

from __future__ import annotations

import inspect
import linecache
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

import pyfused.functional as F
from pyfused import checks
from pyfused.ops.declaration import Operator, parameters_of
from pyfused.ops.operators import OPERATORS
from pyfused.types import (
    Approximate,  # noqa: F401 of geglu, whose module follows from its declaration
    CrossEntropyOptions,
    MarginKind,
    ModuleOptions,
    Reduction,
    VocabShard,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "AdditiveMargin",
    "CrossEntropyLoss",
    "KLDivWithLogitsLoss",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "LinearTopKKLDivLoss",
    "LogProbs",
]


# For type checkers, too: a star import would clash with the classes defined here.
def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(torch.nn, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    of_torch = (name for name in dir(torch.nn) if not name.startswith("_"))
    return sorted({*__all__, *of_torch})


functional = F  # as torch.nn has torch's


def _changed(module: torch.nn.Module, **defaults: Any) -> str:
    """Returns the options, for ``repr``, that torch's module lacks and that are no defaults."""
    options = {name: getattr(module, name) for name in defaults}
    for name, value in getattr(module, "fused_options", {}).items():
        options[name], defaults[name] = value, getattr(CrossEntropyOptions, name, None)
    shown = []
    for name, value in options.items():
        if isinstance(value, Tensor):
            shown.append(f"{name}=<Tensor of shape {tuple(value.shape)}>")
        elif value != defaults[name]:
            shown.append(f"{name}={value!r}")
    return ", ".join(shown)


# From torch 2.13 on; before it the module is this package's alone.
_LinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` over :func:`pyfused.functional.cross_entropy`.

    Its arguments are torch's, and by name ``gamma``, which makes it focal loss, ``inplace``, which
    lets the gradient take the logits' memory, and that function's other keywords.
    """

    # Of a module that was torch's, too.
    gamma, inplace = 0.0, False
    fused_options: ModuleOptions = {}  # noqa: RUF012 never changed

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        gamma: float = 0.0,
        inplace: bool = False,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.gamma, self.inplace = gamma, inplace
        self.fused_options = checks.keywords("CrossEntropyLoss", options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            inplace=self.inplace,
            **self.fused_options,
        )

    def extra_repr(self) -> str:
        return _changed(self, gamma=0.0, inplace=False)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):  # type: ignore[misc]
    """torch's module of this name over :func:`pyfused.functional.linear_cross_entropy`.

    Its arguments are torch's, and ``memory_budget``, ``filter_eps`` and that function's other
    keywords. The layer is its ``linear``: a model's own head goes with the
    function.
    """

    memory_budget: int | None = None
    filter_eps = 0.0
    fused_options: ModuleOptions = {}  # noqa: RUF012 never changed

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        memory_budget: int | None = None,
        filter_eps: float = 0.0,
        **fused_options: Unpack[ModuleOptions],
    ) -> None:
        _WeightedLoss.__init__(self, weight, None, None, reduction)
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"weight: expected shape ({num_classes},), got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing: expected 0.0 to 1.0, got {label_smoothing}")
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        columns = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, columns, bias, device, dtype)
        self.options = options
        self.memory_budget, self.filter_eps = memory_budget, filter_eps
        self.fused_options = checks.keywords("LinearCrossEntropyLoss", fused_options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = self.num_classes, *self.out_features
        bias = self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            memory_budget=self.memory_budget,
            filter_eps=self.filter_eps,
            **self.fused_options,
        )

    def extra_repr(self) -> str:
        changed = _changed(self, memory_budget=None, filter_eps=0.0)
        return ", ".join(filter(None, (super().extra_repr(), changed)))


class LogProbs(torch.nn.Module):
    """:func:`pyfused.functional.log_probs` as a module, with its keywords."""

    def __init__(
        self,
        *,
        dim: int | None = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        return_lse: bool = False,
        shard: VocabShard | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "dim": dim,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "temperature": temperature,
            "return_entropy": return_entropy,
            "return_lse": return_lse,
            "shard": shard,
        }

    def forward(self, logits: Tensor, target: Tensor) -> Any:
        return F.log_probs(logits, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearLogProbs(LogProbs):
    """:func:`pyfused.functional.linear_log_probs` of its own layer ``linear``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        deterministic_rows: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.options.pop("dim")
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.options["memory_budget"] = memory_budget
        self.options["deterministic_rows"] = deterministic_rows

    def forward(self, input: Tensor, target: Tensor) -> Any:
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear_log_probs(input, weight, target, linear_bias=bias, **self.options)


class KLDivWithLogitsLoss(torch.nn.modules.loss._Loss):
    """:func:`pyfused.functional.kl_div_with_logits` as a module, which takes its tensors.

    Its arguments are that function's keywords but for ``token_weight``, which goes with a call.
    """

    _function = "kl_div_with_logits"

    def __init__(
        self,
        beta: float = 0.0,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction=reduction)
        known = inspect.signature(getattr(F, self._function)).parameters
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}() got an unexpected argument {name!r}")
        self.options: dict[str, Any] = {"beta": beta, "temperature": temperature, **options}

    def forward(self, *tensors: Tensor, **by_name: Tensor | None) -> Tensor:
        function: Callable[..., Tensor] = getattr(F, self._function)
        return function(*tensors, **by_name, reduction=self.reduction, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearKLDivLoss(KLDivWithLogitsLoss):
    """:func:`pyfused.functional.linear_kl_div` as a module, which takes its tensors."""

    _function = "linear_kl_div"


class LinearTopKKLDivLoss(KLDivWithLogitsLoss):
    """:func:`pyfused.functional.linear_topk_kl_div` as a module, which takes its tensors."""

    _function = "linear_topk_kl_div"


class AdditiveMargin(torch.nn.Module):
    """:func:`pyfused.functional.additive_margin` as a module."""

    def __init__(self, margin: float = 0.35, kind: MarginKind = "cosface") -> None:
        super().__init__()
        self.margin, self.kind = margin, kind

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.additive_margin(input, target, self.margin, self.kind)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, kind={self.kind!r}"


# ---- modules that follow from declarations -------------------------------------------------------


def _module_of(op: Operator) -> type[torch.nn.Module]:
    """Returns the class of an operator's module: torch's with another ``forward``, or a new one.

    Its functions are compiled from text, as those of a dataclass are, so that a call of the module
    takes no longer than if they had been written out.
    """
    theirs: Any = getattr(torch.nn, op.module, None)
    function, members = getattr(F, op.name), dict[str, Any]()
    accepted, kinds = parameters_of(function), function.__annotations__
    if theirs is not None:
        base, source = theirs, ""
        doc = f":class:`torch.nn.{op.module}` over :func:`pyfused.functional.{op.name}`."
        operands = list(parameters_of(theirs.forward))[1:]
        options = parameters_of(theirs.__init__).keys() - {"size_average", "reduce"}
        options |= {o.name for o in op.operands[len(operands) :] if not o.optional}  # a slope
    else:
        doc = f":func:`pyfused.functional.{op.name}` as a module."
        operands = [operand.name for operand in op.operands if not operand.optional]
        options = accepted.keys() - {*operands}
        base = torch.nn.modules.loss._Loss if "reduction" in options else torch.nn.Module
        base = _WeightedLoss if "weight" in options else base
        of_base = parameters_of(base.__init__).keys() & options
        defaults = {name: accepted[name] for name in accepted if name in options}
        if defaults.get("reduction", "mean") != "mean":
            defaults["reduction"], doc = "mean", f"{doc[:-1]}, which takes the mean."
        given = [f"{name}: {kinds[name]} = {default!r}" for name, default in defaults.items()]
        if by_name := function.__code__.co_kwonlyargcount:
            given.insert(-by_name, "*")
        own = {name: default for name, default in defaults.items() if name not in of_base}
        source = (
            f"def __init__({', '.join(['self', *given])}) -> None:\n"
            f"    super({op.module}, self).__init__({', '.join(f'{n}={n}' for n in of_base)})\n"
            + "".join(f"    self.{name} = {name}\n" for name in own)
            + f"def extra_repr(self) -> str:\n    return _changed(self, **{own})\n"
        )
    taken = [f"{name}: {kinds[ours]}" for name, ours in zip(operands, accepted, strict=False)]
    passed = [*operands, *(f"{name}=self.{name}" for name in accepted if name in options)]
    passed += ["_stacklevel=5"] * ("_stacklevel" in accepted)
    source += f"def forward({', '.join(['self', *taken])}) -> Tensor:\n"
    source += f"    return F.{op.name}({', '.join(passed)})\n"
    file = f"<{__name__}.{op.module}>"  # as a traceback, and who reads sources, knows it
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), globals(), members)
    for name, function in members.items():
        function.__qualname__ = f"{op.module}.{name}"
    return type(op.module, (base,), {"__module__": __name__, "__doc__": doc, **members})


for _op in OPERATORS.values():
    if _op.module not in globals():  # else it is written above
        globals()[_op.module] = _module_of(_op)
        __all__.append(_op.module)
__all__.sort()
