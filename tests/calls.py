"""A call of every operator in each way that takes a path of its own through autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grid
import pytest
import torch
import torch.nn.functional as F
from samples import ACTIVATIONS, LOSSES, Loss
from torch import Tensor

from pyfused import VocabShard
from pyfused import functional as fused
from pyfused.ops import definitions
from pyfused.ops.declaration import Operand
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS
from pyfused.types import CrossEntropyOptions, HeadOptions


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Any:
    """pyfused's function of this name, in torch's terms."""
    return definitions.cross_entropy(input, target, weight, CrossEntropyOptions(**options))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> Any:
    """Likewise, from all logits."""
    given = input, linear_weight, target, linear_bias, weight
    return definitions.linear_cross_entropy(*given, HeadOptions(**options))


class Torchs:
    """torch.nn.functional, with the definitions of what it does not have."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        own = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}
        return own.get(name) or getattr(F, name, None) or OPERATORS[name].reference


TORCH = Torchs()
REDUCTIONS = ("none", "mean", "sum")
CLASSES = torch.tensor([1, 0, 4, -100, 2, 2])
PROBABILITIES = torch.linspace(-2, 2, 30).reshape(6, 5).softmax(1)
OTHER = torch.linspace(-3, 1, 30).reshape(6, 5)
WEIGHT = torch.linspace(0.5, 2, 30).reshape(6, 5)
UNIT = torch.linspace(0.05, 0.95, 30).reshape(6, 5)
CONSTANTS = (CLASSES, PROBABILITIES, OTHER, WEIGHT, UNIT)


@dataclass
class Case:
    """`run(pyfused.functional or torch.nn.functional, x)` for an x of shape (6, 5)."""

    run: Callable[[Any, Tensor], Tensor]

    def ours(self, x: Tensor) -> Tensor:
        return self.run(fused, x)

    def reference(self, x: Tensor) -> Tensor:
        return self.run(TORCH, x)


def constants(loss: Loss) -> dict[str, Tensor]:
    """Operands within their bounds."""
    of = {False: OTHER, True: WEIGHT}
    found = {o.name: UNIT if o.high == 1 else of[o.low == 0] for o in loss.bounded}
    return found | {o.name: OTHER.sign() for o in loss.operands if o.sign}


def within(operand: Operand, x: Tensor) -> Tensor:
    """The values between the operand's bounds, where these are more than a convention."""
    if operand.high == 1:
        return x.sigmoid() if operand.enforced else x
    return x.square() + 0.1 if operand.low == 0 else x


def pointwise(loss: Loss, differentiated: str, reduction: str, weighted: bool) -> Case:
    """A loss as a function of one of its operands, which is kept between its bounds."""
    operand = next(operand for operand in loss.bounded if operand.name == differentiated)
    given: dict[str, Any] = constants(loss) | loss.parameters | {"reduction": reduction}
    if weighted:
        given["weight"] = WEIGHT

    def run(functional: Any, x: Tensor) -> Tensor:
        return getattr(functional, loss.op.name)(**given | {differentiated: within(operand, x)})

    return Case(run)


def focal(functional: Any, x: Tensor) -> Tensor:
    has_gamma = fused.cross_entropy if functional is fused else cross_entropy
    return has_gamma(x, CLASSES, gamma=2.0)


def beyond_torch(functional: Any, x: Tensor) -> Tensor:
    has_them = fused.cross_entropy if functional is fused else cross_entropy
    return has_them(
        x,
        CLASSES,
        WEIGHT[0],
        z_loss=0.1,
        token_weight=UNIT[:, 0],
        denominator=3.0,
        reduction="mean",
    )


HEAD = torch.linspace(-1, 2, 40).reshape(8, 5).sin()


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {
        op.name: Case(lambda f, x, name=op.name: getattr(f, name)(x)) for op in ACTIVATIONS
    }
    made |= {
        "softmax": Case(lambda f, x: f.softmax(x, 1)),
        "log_softmax": Case(lambda f, x: f.log_softmax(x, 0)),
        "nll_loss": Case(lambda f, x: f.nll_loss(x, CLASSES, WEIGHT[0])),
        "multilabel_soft_margin_loss": Case(lambda f, x: f.multilabel_soft_margin_loss(x, UNIT)),
        "focal": Case(focal),
        "target_of_input": Case(lambda f, x: f.mse_loss(x, x.sin())),
        "probabilities_of_input": Case(lambda f, x: f.cross_entropy(x, x.softmax(1))),
        "beyond_torch": Case(beyond_torch),
        "linear_probabilities": Case(
            lambda f, x: f.linear_cross_entropy(OTHER, x, (OTHER @ HEAD[:6].t()).softmax(1))
        ),
    }
    made["relu_inplace"] = Case(lambda f, x: f.relu(x * 1, inplace=True))
    for r in REDUCTIONS:
        made |= {
            f"index_{r}": Case(lambda f, x, r=r: f.cross_entropy(x, CLASSES, reduction=r)),
            f"smoothed_{r}": Case(
                lambda f, x, r=r: f.cross_entropy(
                    x, CLASSES, WEIGHT[0], reduction=r, label_smoothing=0.1
                )
            ),
            f"probabilities_{r}": Case(
                lambda f, x, r=r: f.cross_entropy(x, PROBABILITIES, reduction=r)
            ),
            f"linear_{r}": Case(
                lambda f, x, r=r: f.linear_cross_entropy(x, HEAD, CLASSES, reduction=r)
            ),
            f"linear_to_weight_{r}": Case(
                lambda f, x, r=r: f.linear_cross_entropy(
                    OTHER, x, CLASSES, linear_bias=x[:, 0], label_smoothing=0.1, reduction=r
                )
            ),
            f"to_probabilities_{r}": Case(lambda f, x, r=r: f.cross_entropy(OTHER, x, reduction=r)),
        }
        # The reductions by turns, as all losses share their code.
        for place, (loss, name) in enumerate((o, n) for o in LOSSES for n in o.differentiated):
            if loss is LOSSES[0] or REDUCTIONS[place % 3] == r:
                weighted = loss.takes_weight and name != loss.operands[0].name
                made[f"{loss.id}_to_{name}_{r}"] = pointwise(loss, name, r, weighted)
    return made


ALL_CASES = cases()
# Losses of one, two and three differentiated operands stand for those that share their code.
STANDING_IN = (
    "mse_loss",
    "hinge_embedding_loss",
    "gaussian_nll_loss",
    "binary_cross_entropy_with_logits-pos_weight",
)
SHARING = tuple(loss.id for loss in LOSSES if loss.id not in STANDING_IN)
CASES = {
    name: case
    for name, case in ALL_CASES.items()
    if grid.FULL or not name.startswith(tuple(f"{loss}_to_" for loss in SHARING))
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_operator = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())


@dataclass
class Beside:
    """What a loss takes beside its first operand."""

    op: str
    first: Operand
    tensors: dict[str, Tensor]
    parameters: dict[str, Any]
    differentiated: tuple[str, ...] = ("target",)

    def inside(self, x: Tensor) -> Tensor:
        return within(self.first, x)

    def clones(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


LOGITS = CROSS_ENTROPY.operands[0]
BESIDE = {
    "index": Beside("cross_entropy", LOGITS, {"target": CLASSES, "weight": WEIGHT[0]}, {}, ()),
    "probabilities": Beside(
        "cross_entropy",
        LOGITS,
        {"target": PROBABILITIES, "weight": WEIGHT[0]},
        {},
    ),
}
for _loss in LOSSES:
    _tensors = constants(_loss) | ({"weight": WEIGHT} if _loss.takes_weight else {})
    _first = _loss.bounded[0]
    del _tensors[_first.name]
    _others = tuple(name for name in _loss.differentiated if name != _first.name)
    BESIDE[_loss.id] = Beside(_loss.op.name, _first, _tensors, _loss.parameters, _others)
_CALLS = {name: call for name, call in BESIDE.items() if grid.FULL or name not in SHARING}
every_loss_call = pytest.mark.parametrize("beside", _CALLS.values(), ids=_CALLS.keys())


@dataclass
class WithTensorOption:
    """A call with an input of shape (6, 5), one of whose options is a tensor."""

    function: Callable[..., Any]
    option: str
    arguments: dict[str, Any]

    def run(self, x: Tensor, value: Tensor, **options: Any) -> Tensor:
        floating = {
            name: tensor.to(x.dtype)
            for name, tensor in self.arguments.items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        }
        return self.function(x, **self.arguments | floating | options | {self.option: value})

    def value(self, dtype: torch.dtype) -> Tensor:
        if self.option == "denominator":
            return torch.tensor(2.5, dtype=dtype)
        return torch.linspace(0.5, 1.5, 6).to(dtype)


LAYER = {"linear_weight": HEAD, "linear_bias": HEAD[:, 0]}
TEACHER = {"teacher_linear_weight": HEAD.flip(0), "teacher_linear_bias": HEAD[:, 1]}
TOP_K = torch.arange(12).view(6, 2) % 8
INDEX = {"target": CLASSES}
SHARD = {"shard": VocabShard(0)}
_OF_CLASSES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "cross_entropy": (fused.cross_entropy, INDEX),
    "probabilities": (fused.cross_entropy, {"target": PROBABILITIES}),
    "linear_cross_entropy": (fused.linear_cross_entropy, INDEX | LAYER),
    "linear_by_blocks": (fused.linear_cross_entropy, INDEX | LAYER | {"memory_budget": 100}),
    "sharded_cross_entropy": (fused.cross_entropy, INDEX | SHARD),
    "sharded_linear_cross_entropy": (fused.linear_cross_entropy, INDEX | LAYER | SHARD),
}
_OF_TEACHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "kl_div_with_logits": (fused.kl_div_with_logits, {"teacher_logits": OTHER}),
    "linear_kl_div": (fused.linear_kl_div, LAYER | TEACHER | {"teacher_input": OTHER}),
    "linear_topk_kl_div": (
        fused.linear_topk_kl_div,
        LAYER | {"teacher_indices": TOP_K, "teacher_log_probs": torch.full((6, 2), -1.5)},
    ),
}
WITH_TENSOR_OPTION = {
    f"{name}-{option}": WithTensorOption(function, option, arguments)
    for option, calls in (
        ("token_weight", _OF_CLASSES | _OF_TEACHERS),
        ("denominator", _OF_CLASSES),
    )
    for name, (function, arguments) in calls.items()
}
every_tensor_option = pytest.mark.parametrize(
    "call", WITH_TENSOR_OPTION.values(), ids=WITH_TENSOR_OPTION.keys()
)
