"""Calls of every declared operator, derived from its declaration.

`examples` returns the calls of the contract tests; `random_calls.py` draws others from the same
operands and options. A new operator is included automatically. If its declaration does not suffice,
an error says what to add: operands of a new family to `operands`, values of a new option to
`OPTIONS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grid
import interpreter
import pytest
import torch
import torch.nn.functional as F
from layouts import Layout, contiguous
from samples import SAMPLES, draw, values_to_try
from torch import Tensor
from torchs import parameters, torch_function

from pyfused import VocabShard
from pyfused import functional as fused
from pyfused.dispatch.operator import TOKEN_WEIGHT, Operand, Operator
from pyfused.ops.activation import Activation
from pyfused.ops.class_loss import ClassLoss, MultiMarginLoss
from pyfused.ops.contrastive import Contrastive
from pyfused.ops.distillation import Divergence
from pyfused.ops.elementwise import PRELU
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.linear_cross_entropy import LinearCrossEntropy
from pyfused.ops.log_probs import LogProbsOperator
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.ops.pointwise_loss import Halves
from pyfused.ops.softmax import Softmax

OF_CLASSES = (ClassLoss, LinearCrossEntropy, LogProbsOperator)
WITH_OPTIONS = (
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)  # they have more options and results than torch's functions
SHAPE = (6, 5)
RANK = 2  # the rank of adapters, which use the last features of the input

# Values of each option; the examples use the middle one.
OPTIONS: dict[str, list[Any]] = {
    name: values
    for names, values in (
        ("alpha lambd negative_slope quantile z_loss", [0.0, 0.125, 1.0]),
        ("approximate", ["none", "tanh"]),
        ("beta", [0.25, 1.0, 0.5, 1.5]),
        ("cap delta margin scale softcap teacher_softcap", [n / 8 for n in range(1, 16)]),
        ("temperature", [n / 8 for n in range(1, 16)]),
        ("denominator", [3.0, torch.tensor(3.0), torch.tensor([2.5]).double()]),
        ("dim", [*range(-5, 5)]),
        ("dtype loss_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16]),
        ("eps", [1e-3, 0.5]),
        ("filter_eps", [0.0]),
        ("full log_input log_target reduce size_average squared swap", [False, True]),
        ("deterministic_rows return_entropy return_lse return_metrics", [False, True]),
        ("gamma", [1.0, 1.5, 2.0, 3.5]),  # below 1, torch's gradient is NaN for p = 1
        ("ignore_index", [0, 255, 1, -1]),
        ("inplace with_metrics", [True]),  # with_metrics is a function of its own
        ("label_smoothing", [0.1, 0.9, 0.1, 0.9, 1.0, 1.5]),
        ("memory_budget", [1000, 1, 10000]),
        ("max_val threshold value", [0.5, 1.0, 2.0]),
        ("min_val", [-1.0, -0.25, 0.5]),
        ("p", [1, 2]),
        ("reduction", ["none", "mean", "sum"] * 4 + ["batchmean"]),
        ("remainder", ["bucket", "ignore"]),
    )
    for name in names.split()
}
LEFT_OUT = ("_stacklevel", "options", "shard", "teacher_requires_grad")
DEPRECATED = ("reduce", "size_average")


@dataclass
class Call:
    """A call of an operator, with its arguments by name.

    Attributes:
        given: The arguments; tensors that require grad are differentiated.
        layout: The layout of grad_output, and of overwritten tensors.
        seed: The seed of grad_output.
    """

    op: Operator
    given: dict[str, Any]
    layout: Layout = contiguous
    seed: int = 0

    def __str__(self) -> str:
        told = {n: repr(x) for n, x in self.given.items()}
        for name, x in self.given.items():
            if isinstance(x, Tensor) and x.numel() > 2:
                grad = ", requires_grad" * x.requires_grad
                told[name] = f"<{str(x.dtype)[6:]} {tuple(x.shape)}, strides {x.stride()}{grad}>"
        return f"{self.op.name}({', '.join(f'{name}={x}' for name, x in told.items())})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.given.items() if isinstance(x, Tensor)}

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.tensors.items() if x.requires_grad}

    def ours(self, **changed: Any) -> Tensor:
        """Calls pyfused with some arguments changed; returns the differentiable result."""
        return result_of(ours(self, **self.given | changed))

    def reference(self, **changed: Any) -> Tensor:
        """Calls torch's function, or the operator's definition, in the same way."""
        return result_of(reference(self, **self.given | changed))

    @property
    def first(self) -> Tensor:
        """Returns the first argument, which some tests replace by a sparse or batched tensor."""
        return self.given[self.op.operands[0].name].detach()

    def of_first(self, function: Function, bounded: bool = True) -> Callable[[Tensor], Tensor]:
        """Returns the call as a function of its first argument.

        The argument is clamped to the operand's bounds, unless `bounded` is False.
        """
        operand = self.op.operands[0]
        frozen = replace(self, given=self.given | {n: t.detach() for n, t in self.tensors.items()})
        within = Tensor.sigmoid if bounded and operand.enforced else lambda x: x

        def step(x: Tensor) -> Tensor:
            moved = {n: t.to(x.device) for n, t in frozen.tensors.items() if t.device != x.device}
            return function(frozen, **moved | {operand.name: within(x)})

        return step


Function = Callable[..., Tensor]  # Call.ours or Call.reference


def result_of(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def ours(call: Call, **given: Any) -> Any:
    """Calls pyfused's function; log-probabilities and other results are stacked."""
    if given.get("inplace"):
        given["input"] = call.layout(given["input"] * 1)  # not a leaf
    name = call.op.name + "_with_metrics" * given.pop("with_metrics", False)
    return stacked(call, getattr(fused, name), given)


def reference(call: Call, **given: Any) -> Any:
    """Calls torch's function, or computes pyfused's function by torch's operators."""
    given.pop("inplace", None)
    if getattr(given.get("target"), "dtype", None) is torch.uint8:  # not supported by all options
        given["target"] = given["target"].long()
    name = call.op.name + "_with_metrics" * given.pop("with_metrics", False)
    in_torch = call.op.in_torch and call.op not in WITH_OPTIONS
    return stacked(call, torch_function(call.op, "" if in_torch else name), given)


def stacked(call: Call, function: Callable[..., Any], given: dict[str, Any]) -> Any:
    found = function(**given)
    if not isinstance(call.op, LogProbsOperator):
        return found
    stacked = torch.stack([result for result in found[:3] if result is not None])
    if not given.get("return_metrics"):
        return stacked
    return stacked, (found.is_top1, found.mean_logit)


# ---- arguments of an operator --------------------------------------------------------------------


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


def operands(
    op: Operator,
    shape: Sequence[int],
    given: dict[str, Any],
    soft: bool = False,
    features: int = 4,
) -> dict[str, Any]:
    """Draws a float32 tensor for each operand.

    Args:
        shape: The shape of the elements, or of the logits.
        given: The options of the call; the halves of a gated activation have the shape.
        soft: Whether targets are probabilities, if the operator supports them.
        features: The number of features of a linear layer's input.
    """
    if isinstance(op, OF_CLASSES):
        return logits_and_targets(op, shape, given, soft, features)
    if isinstance(op, Divergence):
        return predictions(shape, features)
    if isinstance(op, Contrastive):
        a, b = torch.randn(2, *shape)
        return {"a": a, "b": b, "scale": torch.tensor(0.7), "bias": torch.tensor([-1.3])}
    if isinstance(op, EmbeddingLoss):
        rows = tuple(shape)
        return {o.name: draw(o, rows[:-1] if o.sign else rows, scale=0.5) for o in op.operands}
    assert not any(operand.indices for operand in op.operands), (
        f"{op.name}: catalogue.operands draws no class indices for a {type(op).__name__}"
    )
    if isinstance(op, Halves) and shape:
        shape = [*shape]
        shape[given.get("dim", -1)] *= 2
    found = {operand.name: draw(operand, tuple(shape), scale=0.5) for operand in op.operands}
    if op is PRELU:
        found["weight"] = draw(op.operands[1], (shape[1] if len(shape) > 1 else 1,), scale=0.5)
    first, *others = op.operands
    if given.get("log_input") is False:
        found[first.name] = found[first.name].abs() + 0.01
    for operand in others:
        if (operand.low, operand.high, operand.differentiated) == (0, 1, False):
            found[operand.name] = found[operand.name].round()  # class labels
    return found


def logits_and_targets(
    op: Operator, shape: Sequence[int], given: dict[str, Any], soft: bool, features: int
) -> dict[str, Tensor]:
    dim = min(len(shape) - 1, 1)
    rows, classes, columns = shape[:dim], shape[dim], shape[dim + 1 :]
    target = torch.rand(shape).softmax(dim)
    if not soft:
        target = torch.randint(max(classes, 1), (*rows, *columns))
        if op.operands[1].labels:
            target = labels(shape)
        elif not isinstance(op, MultiMarginLoss) and target.dim():
            target.view(-1)[1::4] = given.get("ignore_index", -100)
    logits = 2 * torch.randn(shape)
    return {
        "input": torch.randn(*rows, features) if "linear" in op.name else logits,
        "logits": logits,
        "linear_weight": torch.randn(classes, *columns, features) / features**0.5,
        "target": target,
        "linear_bias": torch.randn(classes, *columns),
        "adapter_weight": torch.randn(classes, *columns, RANK),
        "weight": torch.rand(classes) + 0.1,
        "token_weight": torch.rand((*rows, *columns)),
    }


def labels(shape: Sequence[int]) -> Tensor:
    """Draws class indices of each row of scores, a third of which are -1."""
    return torch.randint(max(shape[-1], 1), tuple(shape)).masked_fill(torch.rand(*shape) < 0.3, -1)


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


# ---- examples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A call of an operator, whose tensors are drawn with the same values for each test.

    Attributes:
        options: The options that differ from their defaults.
        optional: The optional operands that are passed.
        soft: Whether the target is probabilities.
    """

    op: Operator
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    soft: bool = False

    @property
    def id(self) -> str:
        return f"{self.op.name}-{self.name}" if self.name else self.op.name

    def call(self, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Call:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            drawn = operands(self.op, shape, self.options, self.soft)
        given = {}
        for name, operand in declared(self.op).items():
            x = drawn[name]
            if operand.optional and name not in self.optional:
                continue
            if name == "linear_weight" and "adapter_weight" in self.optional:
                x = x[..., :-RANK].contiguous()
            if x.is_floating_point():
                x = x.to(dtype).requires_grad_(operand.differentiated)
            given[name] = x
        options = {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.options.items()}
        return Call(self.op, given | options)


def examples(op: Operator) -> Iterator[Example]:
    """Returns the calls of the contract tests, at least one for each reduction, operand and option.

    The last one combines compatible options; test_fuzz.py tries other combinations.
    """
    every = options(op)
    values = {
        name: tried(op, name, default)
        for name, default in every.items()
        if name not in ("reduction", *DEPRECATED)
        and (name != "inplace" or overwrites(op))
        and (name != "dim" or isinstance(op, Softmax))  # other operators infer it from the shapes
    }
    required = [name for name, default in every.items() if default is inspect.Parameter.empty]
    base = {name: values[name][0] for name in required}
    if "dim" in every:
        base["dim"] = -1 if isinstance(op, Divergence) else 1  # the classes in `operands`
    optional = [operand.name for operand in declared(op).values() if operand.optional]
    yield Example(op, "", base)
    for operand in op.operands:
        if operand.indices and operand.differentiated:
            yield Example(op, "probabilities", soft=True)
        if operand.number:
            yield Example(op, f"{operand.name}=0.5", {operand.name: 0.5})
    for name in optional:
        yield Example(op, name, base, (name,))
    if "reduction" in every:
        for reduction in dict.fromkeys(("none", "sum", *getattr(op, "denominators", ("mean",)))):
            if reduction != every["reduction"]:
                yield Example(op, reduction, {"reduction": reduction})
        if optional:
            yield Example(op, "none_of_all", {"reduction": "none"}, (*optional,))
    for name in values:
        for value in values[name][name in required :]:
            told = "tensor" if isinstance(value, Tensor) else str(value).removeprefix("torch.")
            yield Example(op, f"{name}={told}", base | {name: value})
    together = {name: found[0] for name, found in values.items() if name not in ALONE and found}
    if isinstance(op, OF_CLASSES):
        together.pop("gamma", None)  # incompatible with label_smoothing
    if every.get("reduction") == "none":
        together["reduction"] = "mean"
    if len(together) > 1 or optional:
        yield Example(op, "everything", base | together, (*optional,))


ALONE = ("dtype", "filter_eps", "inplace", "loss_dtype", "remainder", "with_metrics")


def overwrites(op: Operator) -> bool:
    """Returns whether a result overwrites the input. (test_inplace.py tests gradients that do.)"""
    return isinstance(op, Activation) and op.torch_ is not op.torch


def values_of(op: Operator, name: str) -> list[Any]:
    """Returns values of an option, from its name, the operator's sample, or the declaration."""
    sample = SAMPLES.get(op.name)
    found = OPTIONS.get(name) or [t[name] for t in (sample.tried if sample else ()) if name in t]
    found = found or values_to_try(op, name)
    assert found, f"{op.name}: neither its sample nor catalogue.OPTIONS has values for {name}"
    return found


def tried(op: Operator, name: str, default: Any) -> list[Any]:
    """Returns values of an option that differ from its default, one for each type."""
    values = values_of(op, name)
    middle = len(values) // 2
    found: dict[type, Any] = {}
    for value in (*values[middle:], *values[:middle]):
        if isinstance(value, Tensor) or value != default:
            found.setdefault(type(value), value)
    return [*found.values()]


# test_completeness.py reports operators without a function.
_CALLED = [op for op in OPERATORS.values() if hasattr(fused, op.name)]
EXAMPLES = {example.id: example for op in _CALLED for example in examples(op)}
# A few calls of each operator: plain, with probabilities, and with all options. Interpreted
# kernels are slow, and operators of a family differ only in the formula, whose values are compared
# in all examples. So there one operator of each family goes through the rest of the contract.
FAMILIES = {(type(op), getattr(op, "saves", "")): op for op in reversed(OPERATORS.values())}
_OPERATORS = FAMILIES if interpreter.ON and not grid.FULL else OPERATORS
TRIED = {n: e for n, e in EXAMPLES.items() if e.op in _OPERATORS.values()}
SOME = {n: e for n, e in TRIED.items() if e.name in ("", "probabilities", "everything")}
if interpreter.ON:
    TRIED = {n: e for n, e in TRIED.items() if n in SOME or e.name == "none_of_all"}
every_example = pytest.mark.parametrize("example", TRIED.values(), ids=TRIED)
every_operator = pytest.mark.parametrize("example", SOME.values(), ids=SOME)
OF_FAMILIES = {n: e for n, e in SOME.items() if e.op in FAMILIES.values()}
every_family = pytest.mark.parametrize("example", OF_FAMILIES.values(), ids=OF_FAMILIES)
# Calls with an option that is a tensor, and with sharded classes if supported.
TENSOR_OPTIONS = {
    f"{e.id}{'-shard' * sharded}": (
        name,
        replace(e, options=e.options | {"shard": VocabShard(0)} if sharded else e.options),
    )
    for e in EXAMPLES.values()
    for name in ("token_weight", "denominator")
    for sharded in (False, True)
    if e.name in (name, f"{name}=tensor")
    and e.op in _OPERATORS.values()
    and (not sharded or "shard" in parameters(e.op))
}


# ---- torch's functions, and definitions of functions that torch lacks ----------------------------


class Torchs:
    """torch.nn.functional, with definitions of functions that torch lacks."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        if hasattr(F, name) and name not in ("cross_entropy", "linear_cross_entropy"):
            return getattr(F, name)
        return torch_function(OPERATORS[name], name)


TORCH = Torchs()
linear_cross_entropy = TORCH.linear_cross_entropy


def cross_entropy(*args: Any, with_metrics: bool = False, **given: Any) -> Any:
    name = "cross_entropy" + "_with_metrics" * with_metrics
    return torch_function(CROSS_ENTROPY, name)(*args, **given)
