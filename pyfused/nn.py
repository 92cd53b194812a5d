"""Fused counterparts of ``torch.nn``'s modules: subclasses that override ``forward``.

A class without a docstring takes the arguments of torch's class of the same name and calls the
function of :mod:`pyfused.functional`. Other names, such as ``Linear``, come from torch.
"""

# mypy: disable-error-code="arg-type"
# torch's modules declare their reduction as a str; the functions check its value.
# ruff: noqa: F403

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss, _WeightedLoss
from torch.overrides import has_torch_function_unary
from typing_extensions import Unpack

import pyfused.functional as F
from pyfused import checks
from pyfused.ops.operators import OPERATORS
from pyfused.types import Approximate, CrossEntropyOptions, FusedOptions, MarginKind, Reduction

if TYPE_CHECKING:
    # The types of the names that __getattr__ finds.
    from torch.nn import attention as attention
    from torch.nn import init as init
    from torch.nn import parallel as parallel
    from torch.nn import utils as utils
    from torch.nn.modules.activation import GLU as GLU
    from torch.nn.modules.activation import Hardshrink as Hardshrink
    from torch.nn.modules.activation import Hardsigmoid as Hardsigmoid
    from torch.nn.modules.activation import Hardswish as Hardswish
    from torch.nn.modules.activation import Hardtanh as Hardtanh
    from torch.nn.modules.activation import MultiheadAttention as MultiheadAttention
    from torch.nn.modules.activation import PReLU as PReLU
    from torch.nn.modules.activation import ReLU6 as ReLU6
    from torch.nn.modules.activation import RReLU as RReLU
    from torch.nn.modules.activation import Softmax2d as Softmax2d
    from torch.nn.modules.activation import Softmin as Softmin
    from torch.nn.modules.activation import Softshrink as Softshrink
    from torch.nn.modules.activation import Threshold as Threshold
    from torch.nn.modules.adaptive import *
    from torch.nn.modules.batchnorm import *
    from torch.nn.modules.channelshuffle import *
    from torch.nn.modules.container import *
    from torch.nn.modules.conv import *
    from torch.nn.modules.distance import *
    from torch.nn.modules.dropout import *
    from torch.nn.modules.flatten import *
    from torch.nn.modules.fold import *
    from torch.nn.modules.instancenorm import *
    from torch.nn.modules.linear import *
    from torch.nn.modules.loss import CTCLoss as CTCLoss
    from torch.nn.modules.loss import MultiLabelMarginLoss as MultiLabelMarginLoss
    from torch.nn.modules.loss import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
    from torch.nn.modules.loss import MultiMarginLoss as MultiMarginLoss
    from torch.nn.modules.loss import NLLLoss2d as NLLLoss2d
    from torch.nn.modules.loss import TripletMarginWithDistanceLoss as TripletMarginWithDistanceLoss
    from torch.nn.modules.module import Module as Module
    from torch.nn.modules.normalization import *
    from torch.nn.modules.padding import *
    from torch.nn.modules.pixelshuffle import *
    from torch.nn.modules.pooling import *
    from torch.nn.modules.rnn import *
    from torch.nn.modules.sparse import *
    from torch.nn.modules.transformer import *
    from torch.nn.modules.upsampling import *
    from torch.nn.parallel import DataParallel as DataParallel
    from torch.nn.parameter import *

_OTHERS = "AdditiveMargin", "RMSELoss"
_NAMES = [*_OTHERS, *(op.module for op in OPERATORS.values())]
if not TYPE_CHECKING:  # without __all__, type checkers export the classes of this file
    __all__ = _NAMES


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(torch.nn, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    of_torch = (name for name in dir(torch.nn) if not name.startswith("_"))
    return sorted({*_NAMES, *of_torch})


functional = F  # like torch.nn.functional


def set_options(module: Any, options: Mapping[str, Any]) -> None:
    """Sets a module's keyword options; tensors among them become its parameters or buffers."""
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        is_parameter = isinstance(x, torch.nn.Parameter)
        (module.register_parameter if is_parameter else module.register_buffer)(name, x)
    module.fused_options = {name: x for name, x in options.items() if name not in tensors}
    module.tensor_options = tuple(tensors)


def options_of(module: Any) -> dict[str, Any]:
    """Returns a module's keyword options, with its current parameters and buffers."""
    tensors = {name: getattr(module, name) for name in module.tensor_options}
    return {**module.fused_options, **tensors}


def _keywords_of(function: Any) -> set[str]:
    """Returns the names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def shown(options: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> str:
    """Returns the ``repr`` of options, without default values."""
    texts = []
    for name, value in options.items():
        if isinstance(value, Tensor):
            texts.append(f"{name}=<Tensor of shape {tuple(value.shape)}>")
        elif name not in defaults or value != defaults[name]:
            texts.append(f"{name}={value!r}")
    return ", ".join(texts)


def _changed(module: torch.nn.Module, **defaults: Any) -> str:
    """Returns the ``repr`` of options that torch's module lacks, without default values."""
    options = {name: getattr(module, name, default) for name, default in defaults.items()}
    if hasattr(module, "fused_options"):
        options |= options_of(module)
    of_loss = dict.fromkeys(options) | CrossEntropyOptions._field_defaults
    return shown(options, of_loss | defaults)


class _Module(torch.nn.Module):
    """The last base of all modules.

    torch.fx keeps a module as a node, together with its hooks, if ``module.__module__`` begins with
    torch.nn, and traces all others.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self).__module__ == __name__:
            keep_in_graphs(self)

    def __repr__(self) -> str:
        package = "pyfused." if type(self).__module__ == __name__ else ""
        return package + super().__repr__()

    def __prepare_scriptable__(self) -> Any:
        """Raises when torch.jit.script begins to compile the module, unless it is a subclass."""
        if type(self).__module__ == __name__:
            raise RuntimeError(
                "torch.jit.script: expected modules of torch.nn, got pyfused.nn."
                f"{type(self).__name__}. If pyfused.convert has made it, call pyfused.revert(model)"
            )
        return self


def keep_in_graphs(module: torch.nn.Module) -> None:
    """Makes torch.fx keep a module as a node of its graphs, like the modules of torch.nn."""
    module.__module__ = torch.nn.__name__


# ---- losses over classes, and heads --------------------------------------------------------------


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, _Module):
    """:class:`torch.nn.CrossEntropyLoss` over :func:`pyfused.functional.cross_entropy`.

    Takes torch's arguments and the function's keyword arguments, including ``gamma`` (focal loss).
    """

    # Class attributes, because `convert` only changes the class of a torch.nn.CrossEntropyLoss.
    fused_options: Mapping[str, Any] = {}
    tensor_options: tuple[str, ...] = ()
    gamma: float  # without a class attribute, which a Parameter could not replace

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
        **options: Unpack[FusedOptions],
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.gamma = gamma
        checks.keywords("CrossEntropyLoss", options, FusedOptions.__annotations__)
        set_options(self, options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options, gamma = options_of(self), getattr(self, "gamma", 0.0)
        if isinstance(gamma, Tensor) or gamma != 0:  # small calls with defaults are torch's
            options["gamma"] = gamma
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **options,
        )

    def extra_repr(self) -> str:
        return _changed(self, gamma=0.0)


if TYPE_CHECKING:
    _LinearCrossEntropyLoss = _WeightedLoss
else:  # torch has this module since 2.13
    _LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss, _Module):
    """``torch.nn.LinearCrossEntropyLoss`` over :func:`pyfused.functional.linear_cross_entropy`.

    Takes torch's arguments and the function's keyword arguments, including ``memory_budget``. The
    linear layer is the attribute ``linear``. For the head of a model, call the function.
    """

    memory_budget: int | None = None
    fused_options: Mapping[str, Any] = {}
    tensor_options: tuple[str, ...] = ()

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
        **fused_options: Unpack[FusedOptions],
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
        self.memory_budget = memory_budget
        checks.keywords("LinearCrossEntropyLoss", fused_options, FusedOptions.__annotations__)
        set_options(self, fused_options)

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
            **options_of(self),
        )

    def extra_repr(self) -> str:
        changed = _changed(self, memory_budget=None)
        return ", ".join(filter(None, (super().extra_repr(), changed)))


class LogProbs(_Module):
    """:func:`pyfused.functional.log_probs` as a module, with its keyword arguments."""

    fused_options: dict[str, Any]

    def __init__(
        self,
        *,
        dim: int | None = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        return_lse: bool = False,
        return_metrics: bool = False,
    ) -> None:
        super().__init__()
        options = {
            "dim": dim,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "temperature": temperature,
            "return_entropy": return_entropy,
            "return_lse": return_lse,
            "return_metrics": return_metrics,
        }
        set_options(self, options)

    def forward(self, logits: Tensor, target: Tensor) -> Any:
        return F.log_probs(logits, target, **options_of(self))

    def extra_repr(self) -> str:
        return shown(options_of(self))


class LinearLogProbs(LogProbs):
    """:func:`pyfused.functional.linear_log_probs` as a module, with the layer ``linear``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        **options: Any,
    ) -> None:
        checks.keywords("LinearLogProbs", options, _keywords_of(F.linear_log_probs))
        super().__init__(**options)
        self.fused_options.pop("dim")
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.fused_options["memory_budget"] = memory_budget

    def forward(self, input: Tensor, target: Tensor) -> Any:
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear_log_probs(input, weight, target, linear_bias=bias, **options_of(self))


class KLDivWithLogitsLoss(_Loss, _Module):
    """:func:`pyfused.functional.kl_div_with_logits` as a module, called with the same tensors.

    Takes the function's keyword arguments except ``token_weight``, which is passed to the call.
    """

    _function: ClassVar[str] = "kl_div_with_logits"

    def __init__(
        self,
        beta: float = 0.0,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction=reduction)
        known = _keywords_of(getattr(F, self._function)) - {"token_weight"}
        checks.keywords(type(self).__name__, options, known)
        set_options(self, {"beta": beta, "temperature": temperature, **options})

    def forward(self, *tensors: Tensor, **by_name: Tensor | None) -> Tensor:
        options, function = options_of(self), getattr(F, self._function)
        result: Tensor = function(*tensors, **by_name, reduction=self.reduction, **options)
        return result

    def extra_repr(self) -> str:
        return shown(options_of(self))


class LinearKLDivLoss(KLDivWithLogitsLoss):
    """:func:`pyfused.functional.linear_kl_div` as a module, called with the same tensors."""

    _function = "linear_kl_div"


class LinearTopKKLDivLoss(KLDivWithLogitsLoss):
    """:func:`pyfused.functional.linear_topk_kl_div` as a module, called with the same tensors."""

    _function = "linear_topk_kl_div"


class AdditiveMargin(_Module):
    """:func:`pyfused.functional.additive_margin` as a module."""

    def __init__(self, margin: float = 0.35, kind: MarginKind = "cosface") -> None:
        super().__init__()
        self.margin, self.kind = margin, kind

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.additive_margin(input, target, self.margin, self.kind)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, kind={self.kind!r}"


# ---- losses --------------------------------------------------------------------------------------


class NLLLoss(torch.nn.NLLLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class TripletMarginLoss(torch.nn.TripletMarginLoss, _Module):
    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        options = self.margin, self.p, self.eps, self.swap
        return F.triplet_margin_loss(anchor, positive, negative, *options, reduction=self.reduction)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss, _Module):
    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(
            input1, input2, target, self.margin, reduction=self.reduction
        )


class MarginRankingLoss(torch.nn.MarginRankingLoss, _Module):
    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.margin_ranking_loss(input1, input2, target, self.margin, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(input, target, self.reduction, self.delta)


class BCELoss(torch.nn.BCELoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(torch.nn.KLDivLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class PoissonNLLLoss(torch.nn.PoissonNLLLoss, _Module):
    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            log_input, target, self.log_input, self.full, eps=self.eps, reduction=self.reduction
        )


class GaussianNLLLoss(torch.nn.GaussianNLLLoss, _Module):
    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return F.gaussian_nll_loss(input, target, var, self.full, self.eps, self.reduction)


class SoftMarginLoss(torch.nn.SoftMarginLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.soft_margin_loss(input, target, reduction=self.reduction)


class HingeEmbeddingLoss(torch.nn.HingeEmbeddingLoss, _Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.hinge_embedding_loss(input, target, self.margin, reduction=self.reduction)


class QuantileLoss(_Loss, _Module):
    """:func:`pyfused.functional.quantile_loss` as a module."""

    def __init__(self, quantile: float = 0.5, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.quantile = quantile

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.quantile_loss(input, target, self.quantile, self.reduction)

    def extra_repr(self) -> str:
        return _changed(self, quantile=0.5)


class LogCoshLoss(_Loss, _Module):
    """:func:`pyfused.functional.log_cosh_loss` as a module."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.log_cosh_loss(input, target, self.reduction)


class HingeLoss(_Loss, _Module):
    """:func:`pyfused.functional.hinge_loss` as a module."""

    def __init__(
        self, margin: float = 1.0, squared: bool = False, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        self.margin, self.squared = margin, squared

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.hinge_loss(input, target, self.margin, self.squared, self.reduction)

    def extra_repr(self) -> str:
        return _changed(self, margin=1.0, squared=False)


class SigmoidFocalLoss(_WeightedLoss, _Module):
    """:func:`pyfused.functional.sigmoid_focal_loss` as a module, with ``"mean"`` by default."""

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2,
        reduction: Reduction = "mean",
        *,
        weight: Tensor | None = None,
        ignore_index: float | None = None,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction)
        self.alpha, self.gamma, self.ignore_index = alpha, gamma, ignore_index

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return _changed(self, alpha=0.25, gamma=2, ignore_index=None)


class RMSELoss(_WeightedLoss, _Module):
    """:func:`pyfused.functional.rmse_loss` as a module."""

    def __init__(
        self, reduction: Reduction = "mean", weight: Tensor | None = None, eps: float = 0.0
    ) -> None:
        super().__init__(weight=weight, reduction=reduction)
        self.eps = eps

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.rmse_loss(input, target, self.reduction, self.weight, self.eps)

    def extra_repr(self) -> str:
        return _changed(self, eps=0.0)


# ---- activations ---------------------------------------------------------------------------------


def _is_plain(input: Any) -> bool:
    """Returns whether no ``__torch_function__`` and no error depends on which function is called.

    torch's modules Sigmoid and Tanh call other functions than torch.nn.functional has.
    """
    return isinstance(input, Tensor) and not has_torch_function_unary(input)


class ReLU(torch.nn.ReLU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Sigmoid(torch.nn.Sigmoid, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input) if _is_plain(input) else super().forward(input)


class Tanh(torch.nn.Tanh, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input) if _is_plain(input) else super().forward(input)


class SiLU(torch.nn.SiLU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace)


class GELU(torch.nn.GELU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=self.approximate)


class ELU(torch.nn.ELU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input, self.inplace)


class CELU(torch.nn.CELU, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha, self.inplace)


class Mish(torch.nn.Mish, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace)


class Softplus(torch.nn.Softplus, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)


class LogSigmoid(torch.nn.LogSigmoid, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class Softsign(torch.nn.Softsign, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class Tanhshrink(torch.nn.Tanhshrink, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


class Softmax(torch.nn.Softmax, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax, _Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softcap(_Module):
    """:func:`pyfused.functional.softcap` as a module."""

    def __init__(self, cap: float = 30.0) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, input: Tensor) -> Tensor:
        return F.softcap(input, self.cap)

    def extra_repr(self) -> str:
        return _changed(self, cap=30.0)


class SwiGLU(_Module):
    """:func:`pyfused.functional.swiglu` as a module."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.swiglu(gate, up)


class GEGLU(_Module):
    """:func:`pyfused.functional.geglu` as a module."""

    def __init__(self, approximate: Approximate = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return _changed(self, approximate="none")


class ReGLU(_Module):
    """:func:`pyfused.functional.reglu` as a module."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.reglu(gate, up)
