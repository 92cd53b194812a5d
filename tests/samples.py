"""Describes every operator for the tests: values of options, domains of operands, closed forms.

`SAMPLES` has a row for each pointwise loss and activation, `OPTIONS` the values of each option.
The contract's examples, the random calls and the tests of the families use these values.
A closed form computes the value of each element and the gradient of each operand in NumPy's long
double. Operators that torch has, and gated activations, need none: they are compared with torch in
float64. New operators are included automatically. If a declaration does not suffice, an error
states what to add: operands of a new family to `operands`, or values of a new option to `OPTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import interpreter
import numpy as np
import torch
from compare import DEVICE, Extended, Outcome, extended, largest, parameters, torch_function
from torch import Tensor

from pyfused import functional as fused
from pyfused.dispatch.operator import TOKEN_WEIGHT, Operand, Operator
from pyfused.ops.activation import Activation
from pyfused.ops.distillation import DivergenceLoss
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.log_probs import LogProbsLoss
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss, weight_or_elements
from pyfused.ops.rows import RowOperator
from pyfused.types import Choice

INF, NAN = float("inf"), float("nan")
LARGE = 1 << 40 if DEVICE == "cpu" else 1 << 20  # of an index; torch reads 32 bits on GPUs
FINITE_PRODUCTS = (1.0, NAN, INF, -INF, -0.0, 30.0)  # products of any two are finite or special


@dataclass(frozen=True)
class Sample:
    """An operator's definition, and the parameters to test.

    Attributes:
        tried: The parameters to test; by default, the declared defaults and others.
        rounds: Whether results are rounded; if not, they are bitwise equal to torch's.
        cancels: Whether a result may be a small difference of terms as large as the input, or 1.
        heavy: Whether one element and its rounding error may dominate all others.
        large: The factor of large inputs; torch's exponential must stay finite.
        special: Special values; all pairs of them are tested.
        beyond_float64: Whether the definition is more accurate than float64.
        branches: Whether torch's function branches on values, which torch.compile cannot trace.
    """

    define: Callable[..., tuple[Extended, ...]] = None  # type: ignore[assignment]
    tried: tuple[dict[str, Any], ...] = ()
    rounds: bool = True
    cancels: bool = False
    heavy: bool = False
    large: float = 1e4
    special: tuple[float, ...] = (1.0, NAN, INF, -INF, -0.0, 3e38)
    beyond_float64: bool = True
    branches: bool = False


def quantile_loss(input: Extended, target: Extended, quantile: float = 0.5) -> tuple[Extended, ...]:
    d, q = target - input, np.longdouble(quantile)
    slope = np.where(d > 0, -q, np.where(d < 0, 1 - q, np.longdouble(0.5) - q))
    return np.maximum(q * d, (q - 1) * d), slope, -slope


def log_cosh_loss(input: Extended, target: Extended) -> tuple[Extended, ...]:
    d = input - target
    return np.logaddexp(d, -d) - np.log(np.longdouble(2)), np.tanh(d), -np.tanh(d)


def hinge_loss(
    input: Extended, target: Extended, margin: float = 1.0, squared: bool = False
) -> tuple[Extended, ...]:
    slack = np.maximum(margin - target * input, 0)
    active = np.heaviside(margin - target * input, 1)
    return (slack**2, -2 * target * slack) if squared else (slack, -target * active)


def sigmoid_focal_loss(
    inputs: Extended, targets: Extended, alpha: float = 0.25, gamma: float = 2, **given: float
) -> tuple[Extended, ...]:
    of_0, of_1 = np.logaddexp(0, inputs), np.logaddexp(0, -inputs)  # entropies for these targets
    p, q = np.exp(-of_1), np.exp(-of_0)
    missing = p * (1 - targets) + q * targets
    entropy = of_0 * (1 - targets) + of_1 * targets
    factor = np.longdouble(alpha) * targets + (1 - np.longdouble(alpha)) * (1 - targets)
    factor = factor if alpha >= 0 else np.ones_like(factor)
    factor = np.where(targets == given.get("ignore_index", NAN), 0, factor)
    slope = missing**gamma * (p - targets)
    slope = slope + gamma * entropy * missing ** (gamma - 1) * p * q * (1 - 2 * targets)
    return factor * entropy * missing**gamma, factor * slope


def softcap(input: Extended, cap: float = 30.0) -> tuple[Extended, ...]:
    value = np.tanh(input / np.longdouble(cap))
    return cap * value, 1 - value**2


SAMPLES = {
    "smooth_l1_loss": Sample(tried=({}, {"beta": 3.5}, {"beta": 0.0})),
    "kl_div": Sample(
        tried=({}, {"log_target": True}), cancels=True, large=3.0, special=FINITE_PRODUCTS
    ),
    "poisson_nll_loss": Sample(
        tried=(
            {},
            {"full": True},
            {"log_input": False},
            {"log_input": False, "full": True, "eps": 1e-3},
        ),
        cancels=True,
        heavy=True,
        large=3.0,
        special=FINITE_PRODUCTS,
    ),
    "quantile_loss": Sample(quantile_loss, ({}, {"quantile": 0.9})),
    "log_cosh_loss": Sample(log_cosh_loss, cancels=True),
    "hinge_loss": Sample(
        hinge_loss, ({}, {"margin": 0.5, "squared": True}), special=FINITE_PRODUCTS
    ),
    "sigmoid_focal_loss": Sample(
        sigmoid_focal_loss,
        ({}, {"alpha": -1.0, "gamma": 1.5}, {"gamma": 0.0}),
        cancels=True,
        special=(1.0, NAN, 0.5, -0.0, 0.25, 0.75),
    ),
    "soft_margin_loss": Sample(large=4.0, special=(1.0, NAN, 2.0, 0.5, -0.0, 30.0)),
    "hinge_embedding_loss": Sample(cancels=True),
    "binary_cross_entropy": Sample(cancels=True, special=(1.0, 0.0, 0.5, 0.25, -0.0, 2.0**-20)),
    "binary_cross_entropy_with_logits": Sample(cancels=True),
    "gaussian_nll_loss": Sample(tried=({}, {"full": True, "eps": 1e-3}), heavy=True, branches=True),
    "relu": Sample(rounds=False),
    "sigmoid": Sample(cancels=True),
    "tanh": Sample(cancels=True),
    "softcap": Sample(softcap, cancels=True),
    "silu": Sample(cancels=True),
    "gelu": Sample(cancels=True),
    "mish": Sample(cancels=True),
    "softplus": Sample(tried=({}, {"beta": 2.5, "threshold": 10.0})),
    "tanhshrink": Sample(cancels=True),
    "swiglu": Sample(cancels=True),
    "geglu": Sample(cancels=True),
}


# ---- families of operators of rows --------------------------------------------------------------


def is_divergence(op: Operator) -> bool:
    return isinstance(op, RowOperator) and isinstance(op.loss, DivergenceLoss)


def is_log_probs(op: Operator) -> bool:
    return isinstance(op, RowOperator) and isinstance(op.loss, LogProbsLoss)


def has_classes(op: Operator) -> bool:
    """Returns whether the targets are classes."""
    return isinstance(op, RowOperator) and not is_divergence(op)


# ---- options -------------------------------------------------------------------------------------

# These operators have more options and results than torch's functions.
WITH_OPTIONS = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)
LEFT_OUT = ("_stacklevel", "options", "others", "teacher_requires_grad")
DEPRECATED = ("reduce", "size_average")

# Values of each option; the examples use the middle one.
OPTIONS: dict[str, list[Any]] = {
    name: values
    for names, values in (
        ("alpha negative_slope quantile z_loss", [0.0, 0.125, 1.0]),
        ("approximate", ["none", "tanh"]),
        ("beta", [0.25, 1.0, 0.5, 1.5]),
        ("cap delta margin scale softcap teacher_softcap", [n / 8 for n in range(1, 16)]),
        ("temperature", [n / 8 for n in range(1, 16)]),
        ("denominator", [3.0, torch.tensor(3.0), torch.tensor([2.5]).double()]),
        ("dim", [*range(-5, 5)]),
        ("dtype loss_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16]),
        ("eps", [1e-3, 0.5]),
        ("full log_input log_target reduce size_average squared swap", [False, True]),
        ("return_entropy return_lse return_metrics", [False, True]),
        ("gamma", [1.0, 1.5, 2.0, 3.5]),  # below 1, torch's gradient is NaN for p = 1
        ("ignore_index", [0, 255, -LARGE, 1, -1, LARGE]),
        ("inplace with_metrics", [True]),  # with_metrics is a function of its own
        ("label_smoothing", [0.1, 0.9, 0.1, 0.9, 1.0, 1.5]),
        ("memory_budget", [1000, 16 if interpreter.ON else 1, 10000]),
        ("threshold", [0.5, 1.0, 2.0]),
        ("p", [1, 2]),
        ("reduction", ["none", "mean", "sum"] * 4 + ["batchmean"]),
        ("remainder", ["bucket", "ignore"]),
    )
    for name in names.split()
}


def declared(op: Operator) -> dict[str, Operand]:
    """Returns the operands that are tensors, including options."""
    found = {operand.name: operand for operand in op.operands}
    if "token_weight" in parameters(op):
        found["token_weight"] = TOKEN_WEIGHT
    return found


def options(op: Operator) -> dict[str, Any]:
    """Returns the options with their defaults, including deprecated ones."""
    found = parameters(op)
    if op in WITH_OPTIONS:
        found["with_metrics"] = False
    left_out = {*declared(op), *LEFT_OUT}
    return {name: default for name, default in found.items() if name not in left_out}


def values_of(op: Operator, name: str) -> list[Any]:
    """Returns values of an option, from its name, the operator's sample, or the declaration."""
    sample = SAMPLES.get(op.name)
    found = OPTIONS.get(name) or [t[name] for t in (sample.tried if sample else ()) if name in t]
    found = found or values_to_try(op, name)
    assert found, f"{op.name}: neither its row in SAMPLES nor OPTIONS has values for {name}"
    return found


def values_to_try(op: Operator, name: str) -> list[Any]:
    """Returns values of an option that follow from its declaration."""
    parameter = next((x for x in op.parameters if x.name == name), None)
    if parameter is None:
        return []
    if isinstance(parameter, Choice):
        return [*parameter.values]
    default = parameters(op)[name]
    values = [x for x in (default / 2, 1.5 * default + 0.25) if x > 0 or not parameter.positive]
    return [x for x in values if parameter.low <= x <= parameter.high]


def of_torch(op: Activation | PointwiseLoss, sample: Sample) -> Sample:
    """Returns a sample whose definition is torch's function in float64."""

    def define(*operands: Extended, **named: Any) -> tuple[Extended, ...]:
        declared = {operand.name: operand for operand in op.operands}
        given = dict(zip(declared, operands, strict=False)) | named
        for name in given.keys() & declared.keys():
            given[name] = torch.from_numpy(given[name].astype(np.float64))
            given[name].requires_grad_(declared[name].differentiated)
        leaves = [given[name] for name in declared if name in given and given[name].requires_grad]
        value = torch_function(op)(**given, **({"reduction": "none"} if loss else {}))
        return tuple(map(extended, (value, *torch.autograd.grad(value.sum(), leaves))))

    loss = "reduction" in op.names
    return replace(sample, define=define, beyond_float64=False)


def tried_of(op: Operator) -> tuple[dict[str, Any], ...]:
    """Returns the default parameters, and others that follow from the declaration."""
    others = {x.name: values_to_try(op, x.name)[-1] for x in op.parameters}
    return ({}, others) if others else ({},)


for _op in OPERATORS.values():
    if isinstance(_op, (Activation, PointwiseLoss)):
        _in_torch = hasattr(torch.nn.functional, _op.name) or _op.family == "Gated"
        _sample = SAMPLES.get(_op.name, Sample() if _in_torch else None)
        if _sample is not None:  # test_completeness.py reports missing samples
            _sample = replace(_sample, tried=_sample.tried or tried_of(_op))
            SAMPLES[_op.name] = of_torch(_op, _sample) if _in_torch else _sample


# ---- operands ------------------------------------------------------------------------------------


def draw(
    operand: Operand, shape: tuple[int, ...], dtype: Any = torch.float32, scale: float = 1.0
) -> Tensor:
    """Draws values within the operand's declared bounds."""
    low, high = operand.low, operand.high
    if operand.sign:
        return (torch.randint(2, shape) * 2 - 1).to(dtype)
    if math.isinf(low):
        return (4 * scale * torch.randn(shape)).to(dtype)
    return (low + torch.rand(shape) * min(high - low, 2.0)).clamp(low + 1e-2, high - 1e-2).to(dtype)


def target_indices(shape: tuple[int, ...], ignored: bool = True) -> Tensor:
    """Draws class indices for logits; every third is -100 if ``ignored``."""
    dim = min(len(shape) - 1, 1)
    target = torch.randint(shape[dim], (*shape[:dim], *shape[dim + 1 :]))
    if ignored and target.dim():
        target.view(-1)[1::3] = -100
    return target


def target_probabilities(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).softmax(min(len(shape) - 1, 1)).to(dtype)


def predictions(shape: Sequence[int], features: int, k: int = 2) -> dict[str, Tensor]:
    """Draws predictions of a student and of a teacher, for every kind of divergence."""
    *rows, classes = shape
    log_probs, indices = (
        torch.randn(*rows, max(classes, 1)).log_softmax(-1).topk(min(k, max(classes, 1)))
    )
    return {
        "logits": torch.randn(*rows, classes),
        "teacher_logits": torch.randn(*rows, classes),
        "input": torch.randn(*rows, features),
        "linear_weight": torch.randn(classes, features) / features**0.5,
        "linear_bias": torch.randn(classes),
        "teacher_input": torch.randn(*rows, features),
        "teacher_linear_weight": torch.randn(classes, features) / features**0.5,
        "teacher_linear_bias": torch.randn(classes),
        "teacher_indices": indices,
        "teacher_log_probs": log_probs - 0.01,  # keeps the sum below 1 after rounding
        "token_weight": torch.rand(rows),
    }


def logits_and_targets(
    op: Operator, shape: Sequence[int], given: dict[str, Any], soft: bool, features: int
) -> dict[str, Tensor]:
    dim = min(len(shape) - 1, 1)
    rows, classes, columns = shape[:dim], shape[dim], shape[dim + 1 :]
    target = torch.rand(shape).softmax(dim)
    if not soft:
        target = torch.randint(max(classes, 1), (*rows, *columns))
        if target.dim():
            target.view(-1)[1::4] = given.get("ignore_index", -100)
    logits = 2 * torch.randn(shape)
    return {
        "input": torch.randn(*rows, features) if "linear" in op.name else logits,
        "logits": logits,
        "linear_weight": torch.randn(classes, *columns, features) / features**0.5,
        "target": target,
        "linear_bias": torch.randn(classes, *columns),
        "weight": torch.rand(classes) + 0.1,
        "token_weight": torch.rand((*rows, *columns)),
    }


def operands(
    op: Operator, shape: Sequence[int], given: dict[str, Any], soft: bool = False, features: int = 4
) -> dict[str, Any]:
    """Draws a float32 tensor for each operand.

    Args:
        shape: The shape of the elements, or of the logits.
        given: The options of the call.
        soft: Whether targets are probabilities, if the operator supports them.
        features: The number of features of a linear layer's input.
    """
    if has_classes(op):
        return logits_and_targets(op, shape, given, soft, features)
    if is_divergence(op):
        return predictions(shape, features)
    if isinstance(op, EmbeddingLoss):
        rows = tuple(shape)
        return {o.name: draw(o, rows[:-1] if o.sign else rows, scale=0.5) for o in op.operands}
    assert not any(operand.indices for operand in op.operands), (
        f"{op.name}: operands draws no class indices for a {type(op).__name__}"
    )
    found = {operand.name: draw(operand, tuple(shape), scale=0.5) for operand in op.operands}
    first, *others = op.operands
    if given.get("log_input") is False:
        found[first.name] = found[first.name].abs() + 0.01
    for operand in others:
        if (operand.low, operand.high, operand.differentiated) == (0, 1, False):
            found[operand.name] = found[operand.name].round()  # class labels
    return found


# ---- memory layouts ------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """Reverses the order of the dimensions in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def innermost(x: Tensor, dim: int) -> Tensor:
    return x if x.dim() < 2 else x.movedim(dim, -1).contiguous().movedim(-1, dim)


def every_second(x: Tensor) -> Tensor:
    """Returns a view of every second element in the last dimension of a larger tensor."""
    if not x.dim():
        return x
    memory = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    memory[..., ::2] = x
    return memory[..., ::2]


def rows_apart(x: Tensor) -> Tensor:
    """Returns a slice of every dimension except the last: rows with gaps between them."""
    if not x.dim():
        return x
    memory = x.new_zeros([3 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 5])
    window = (*(slice(1, 3 * n, 3) for n in x.shape[:-1]), slice(2, 2 + x.shape[-1]))
    memory[window] = x
    return memory[window]


def misaligned(x: Tensor) -> Tensor:
    """Returns a tensor whose data starts one element after an aligned address."""
    memory = x.new_zeros(x.numel() + 1)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    return view


def last_dimensions_swapped(x: Tensor) -> Tensor:
    """Returns (N, C, d1, d2) with d1 innermost: the positions have no common stride."""
    return x if x.dim() < 3 else x.mT.contiguous().mT


def one_element_expanded(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].view([1] * x.dim()).expand(x.shape) if x.numel() else x


def overlapping_windows(x: Tensor) -> Tensor:
    """Returns rows that share elements, as unfold returns them."""
    return torch.cat([x.reshape(-1)] * 2).as_strided(x.shape, (1, 1)) if x.dim() == 2 else x


SAME_VALUES: dict[str, Layout] = {
    "contiguous": contiguous,
    "transposed": transposed,
    "classes_innermost": lambda x: innermost(x, 1),
    "every_second": every_second,
    "rows_apart": rows_apart,
    "misaligned": misaligned,
    "last_dimensions_swapped": last_dimensions_swapped,
    "batch_innermost": lambda x: innermost(x, 0),
}
REPEATING: dict[str, Layout] = {
    "first_row_expanded": lambda x: x[:1].expand(x.shape) if x.dim() else x,
    "first_column_expanded": lambda x: x[..., :1].expand(x.shape) if x.dim() else x,
    "one_element_expanded": one_element_expanded,
    "overlapping_windows": overlapping_windows,
}
LAYOUTS = SAME_VALUES | REPEATING


# ---- pointwise losses ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A pointwise loss, with one choice of operands and parameters."""

    op: PointwiseLoss
    operands: tuple[Operand, ...]
    parameters: dict[str, float]

    @property
    def id(self) -> str:
        further = [operand.name for operand in self.operands if operand.optional]
        return "-".join([self.op.name, *further, *map(str, self.parameters.values())])

    @property
    def bounded(self) -> tuple[Operand, ...]:
        """Returns the operands with bounds that depend on the parameters."""
        if self.parameters.get("log_input") is not False:
            return self.operands
        rate, *others = self.operands
        return rate._replace(low=0.0), *others

    @property
    def takes_weight(self) -> bool:
        return len(self.op.variables) < len(self.op.operands)

    @property
    def differentiated(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.operands if o.differentiated)

    @property
    def ours(self) -> Callable[..., Tensor]:
        return getattr(fused, self.op.name)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return torch_function(self.op)

    def draw(
        self,
        shape: tuple[int, ...],
        dtype: Any = torch.float32,
        leaves: Any = None,
        scale: float = 1,
    ) -> dict[str, Tensor]:
        """Draws operands by name; differentiated ones are leaves."""
        leaves = self.differentiated if leaves is None else leaves
        drawn = {operand.name: draw(operand, shape, dtype, scale) for operand in self.bounded}
        return {name: x.requires_grad_(name in leaves) for name, x in drawn.items()}

    def exact(
        self, given: dict[str, Tensor], reduction: str, grad_output: Tensor
    ) -> tuple[Outcome, float, float]:
        """Returns the exact results for tensors of one shape.

        They are followed by the largest terms of the gradients, and of the value.
        """
        wide = {name: extended(tensor) for name, tensor in given.items() if name != "weight"}
        each, *gradients = SAMPLES[self.op.name].define(**wide, **self.parameters)
        weight = extended(given["weight"]) if "weight" in given else np.ones_like(each)
        divisor = np.longdouble(1)
        if reduction == "mean":
            by_weight = self.op.denominators["mean"] is weight_or_elements
            divisor = weight.sum() if by_weight else np.longdouble(each.size)
        value, size = weight * each / divisor, 0.0
        if reduction != "none":
            value, size = value.sum(), float(abs(value).sum())
        factor = weight * extended(grad_output) / divisor
        term = largest(factor) if SAMPLES[self.op.name].cancels else 0.0
        return Outcome(value, [gradient * factor for gradient in gradients]), term, size

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return draw(next(o for o in self.op.operands if o.name == "weight"), shape, dtype)


def losses() -> list[Loss]:
    found = []
    for op in OPERATORS.values():
        is_loss = isinstance(op, PointwiseLoss) and op.family != "Gated"
        if is_loss and op.name in SAMPLES:  # test_completeness.py reports missing samples
            always = tuple(o for o in op.variables if not o.optional)
            for operands in dict.fromkeys((always, op.variables)):
                found += [Loss(op, operands, tried) for tried in SAMPLES[op.name].tried]
    return found


LOSSES = losses()
FIRST = list({loss.op: loss for loss in reversed(LOSSES)}.values())[::-1]  # one per operator
GATED = [OPERATORS[name] for name in ("swiglu", "geglu", "reglu")]
ACTIVATIONS = [op for op in OPERATORS.values() if isinstance(op, Activation)]
