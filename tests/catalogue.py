"""Calls of every declared operator: the examples of the contract, and random calls.

Operands and the values of options come from `samples.py`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grid
import interpreter
import pytest
import samples
import torch
import torch.nn.functional as F
from compare import DEVICE, FLOATS, HALF, torch_function
from conftest import backend
from samples import (
    DEPRECATED,
    LAYOUTS,
    SAME_VALUES,
    Layout,
    contiguous,
    declared,
    draw,
    has_classes,
    is_divergence,
    is_log_probs,
    operands,
    options,
    values_of,
)
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.dispatch.operator import Operator
from pyfused.layout import loss_shape
from pyfused.ops.activation import Activation
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.operators import (
    KL_DIV_WITH_LOGITS,
    LINEAR_CROSS_ENTROPY,
    LINEAR_KL_DIV,
    LINEAR_TOPK_KL_DIV,
    LOG_PROBS,
    OPERATORS,
)
from pyfused.ops.softmax import Softmax

SHAPE = (6, 5)


@dataclass
class Call:
    """A call of an operator, with its arguments by name.

    Attributes:
        given: The arguments; tensors that require grad are differentiated.
        layout: The layout of grad_output, and of overwritten tensors.
        seed: The seed of grad_output.
        shared: The operands that share memory.
    """

    op: Operator
    given: dict[str, Any]
    layout: Layout = contiguous
    seed: int = 0
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        texts = {n: repr(x) for n, x in self.given.items()}
        for name, x in self.given.items():
            if isinstance(x, Tensor) and x.numel() > 2:
                grad = ", requires_grad" * x.requires_grad
                texts[name] = f"<{str(x.dtype)[6:]} {tuple(x.shape)}, strides {x.stride()}{grad}>"
        return f"{self.op.name}({', '.join(f'{name}={x}' for name, x in texts.items())})"

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
        within = Tensor.sigmoid if bounded and operand.low == 0 else lambda x: x

        def step(x: Tensor) -> Tensor:
            moved = {n: t.to(x.device) for n, t in frozen.tensors.items() if t.device != x.device}
            return function(frozen, **moved | {operand.name: within(x)})

        return step


Function = Callable[..., Tensor]  # Call.ours or Call.reference


def result_of(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def ours(call: Call, **given: Any) -> Any:
    """Calls pyfused's function; log-probabilities and other results are stacked."""
    name = call.op.name + "_with_metrics" * given.pop("with_metrics", False)
    return stacked(call, getattr(fused, name), given)


def reference(call: Call, **given: Any) -> Any:
    """Calls torch's function, or computes pyfused's function by torch's operators."""
    if getattr(given.get("target"), "dtype", None) is torch.uint8:  # not supported by all options
        given["target"] = given["target"].long()
    name = call.op.name + "_with_metrics" * given.pop("with_metrics", False)
    in_torch = hasattr(torch.nn.functional, call.op.name) and call.op not in samples.WITH_OPTIONS
    return stacked(call, torch_function(call.op, "" if in_torch else name), given)


def stacked(call: Call, function: Callable[..., Any], given: dict[str, Any]) -> Any:
    found = function(**given)
    if not is_log_probs(call.op):
        return found
    stacked = torch.stack([result for result in found[:3] if result is not None])
    if not given.get("return_metrics"):
        return stacked
    return stacked, (found.is_top1, found.mean_logit)


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
            if x.is_floating_point():
                x = x.to(dtype).requires_grad_(operand.differentiated)
            given[name] = x
        options = {n: x.clone() if isinstance(x, Tensor) else x for n, x in self.options.items()}
        return Call(self.op, given | options)


def examples(op: Operator) -> Iterator[Example]:
    """Yields the calls of the contract tests, at least one for each reduction, operand and option.

    The last call combines compatible options; test_fuzz.py tries other combinations.
    """
    every = options(op)
    values = {
        name: tried(op, name, default)
        for name, default in every.items()
        if name not in ("reduction", *DEPRECATED)
        and name != "inplace"  # test_activation.py
        and (name != "dim" or isinstance(op, Softmax))  # other operators infer it from the shapes
    }
    required = [name for name, default in every.items() if default is inspect.Parameter.empty]
    base = {name: values[name][0] for name in required}
    if "dim" in every:
        base["dim"] = -1 if is_divergence(op) else 1  # the classes in `operands`
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
            text = "tensor" if isinstance(value, Tensor) else str(value).removeprefix("torch.")
            yield Example(op, f"{name}={text}", base | {name: value})
    together = {name: found[0] for name, found in values.items() if name not in ALONE and found}
    if has_classes(op):
        together.pop("gamma", None)  # incompatible with label_smoothing
    if every.get("reduction") == "none":
        together["reduction"] = "mean"
    if len(together) > 1 or optional:
        yield Example(op, "everything", base | together, (*optional,))


ALONE = ("dtype", "loss_dtype", "remainder", "with_metrics")


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
_NO_KERNEL = ("nll_loss",) if interpreter.ON or DEVICE != "cpu" else ()  # torch computes it on GPUs
_CALLED = [op for n, op in OPERATORS.items() if hasattr(fused, op.name) and n not in _NO_KERNEL]
EXAMPLES = {example.id: example for op in _CALLED for example in examples(op)}
# A few calls of each operator: plain, with probabilities, and with all options. Interpreted
# kernels are slow, and operators of a family differ only in the formula, whose values all examples
# compare. In the interpreter, only one operator of each family runs the rest of the contract.
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
COMPILED = SOME if grid.SLOW else OF_FAMILIES  # compiling takes long
every_compiled = pytest.mark.parametrize("example", COMPILED.values(), ids=COMPILED)


# ---- random calls --------------------------------------------------------------------------------

ROUNDED = ("softcap",)  # the capped logits are rounded before the loss
# torch's gradient for NaN differs between vectorised elements and the remainder.
NAN_OF_VECTORS = ("celu", "elu", "selu")


class Random(random.Random):
    def once_in(self, n: float) -> bool:
        return self.random() < 1 / n


def random_call(op: Operator, seed: int, elements: int, shared: Shared | None = None) -> Call:
    """Draws a call with tensors of at most `elements` elements; deterministic for a seed.

    Args:
        shared: Two operands that share memory, and how; by default, one call in four has such.
    """
    rng = Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(FLOATS)
    given = {
        name: rng.choice(values_of(op, name))
        for name in options(op)
        if name not in ("inplace", *DEPRECATED)  # test_activation.py, test_values.py
        if name in ("dim", "reduction") or rng.once_in(12 if name in ROUNDED else 4)
    }
    given = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
    if given.keys() & {*ROUNDED} or (op is LINEAR_CROSS_ENTROPY and dtype in HALF):
        given = without_metrics(given)  # rounding causes ties
    reduction = given.get("reduction", "mean")
    if reduction != "mean":
        given.pop("denominator", None)
    if given.get("negative_slope") == 0.0:
        given["negative_slope"] = -0.5
    if has_classes(op):
        found = of_classes(rng, elements, op, given)
    elif is_divergence(op):
        *rows, classes = shape_of(rng, elements, rng.choice([1, 2, 3]))
        classes = 5 if classes == 1 else classes  # torch's value would be a rounding error
        k = rng.randint(1, max(classes // 2, 1))
        found = samples.predictions((*rows, classes), rng.randint(1, 20), k)
        found["logits"] *= rng.choice([1.0, 8.0])
    elif isinstance(op, EmbeddingLoss):
        shape = shape_of(rng, elements, rng.choice([1, 2, 2, 2 if op.has_target else 3]))
        if shape[-1] == 1:
            shape[-1] = 5  # with one feature, gradients cancel
        given["margin"] = given.get("margin", 1.0) + 0.0137  # exceeds differences of few features
        found = {
            name: x[:1] if x.dim() > 1 and rng.once_in(8) else x  # broadcasts
            for name, x in operands(op, shape, given).items()
        }
    else:
        found = of_elements(rng, elements, op, given)
    if op in (LOG_PROBS, KL_DIV_WITH_LOGITS):
        given["dim"] = -1 if is_divergence(op) else rng.choice([-1, 0, 1])
        if found["logits"].dim() < 3:
            del given["dim"]
        elif op is LOG_PROBS:
            found["logits"] = found["logits"].movedim(1, given["dim"])
    if "token_weight" in found:
        found["token_weight"] = found["token_weight"].sub(0.2).clamp(min=0)
    same, chosen = [*SAME_VALUES.values()], [*LAYOUTS.values()]
    tensors: dict[str, Any] = {}
    for name, operand in declared(op).items():
        alike = op.is_linear or is_divergence(op)
        mixed = tensors and not alike and rng.once_in(20)
        x = found[name]
        if operand.optional and not rng.once_in(3) and name not in (shared or ()):
            continue
        if isinstance(x, Tensor):
            if x.is_floating_point():
                x = x.to(rng.choice(FLOATS) if mixed else dtype)
            if x.numel():  # repeated classes are an error
                x = rng.choice(same if name == "teacher_indices" else chosen)(x)
            if operand.differentiated and x.is_floating_point() and x.frac().any():  # not integers
                x.requires_grad_(not rng.once_in(4))
        tensors[name] = x
    if shared is None and rng.once_in(4):
        shared = rng.choice(pairs_of(op) or [None])
    names = shared[:2] if shared and share_memory(op, tensors, *shared) else ()
    if "linear_weight" in tensors and tensors["linear_weight"].stride(0) == 0:
        given = without_metrics(given)  # all logits are equal up to rounding
    return Call(op, tensors | given, rng.choice(chosen), seed, names)


# Two operands, and the way in which they share memory: a key of SHARED.
Shared = tuple[str, str, str]
# Each takes a tensor and a shape, and returns the tensor, or a leaf that reads its memory.
SHARED: dict[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "one object": lambda x, _: x,
    "alias": lambda x, _: x.detach(),
    "view": lambda x, shape: x.detach().flatten()[: shape.numel()].view(shape),
    "expanded": lambda x, shape: x.detach().as_strided(shape, [0] * len(shape)),
}


def pairs_of(op: Operator) -> list[Shared]:
    """Returns all pairs of operands that may share memory, with each way to do so."""
    names = [name for name in declared(op) if name != "teacher_indices"]
    return [(*pair, kind) for pair in itertools.combinations(names, 2) for kind in SHARED]


def share_memory(op: Operator, tensors: dict[str, Any], first: str, second: str, kind: str) -> bool:
    """Makes two operands share memory, with values that are valid for both.

    Returns False, and changes nothing, if their dtypes or shapes do not allow it.
    """
    x, y = (tensors.get(name) for name in (first, second))
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.numel() and y.numel()):
        return False
    source, other = declared(op)[first], declared(op)[second]
    is_narrower = other.sign or second == "teacher_log_probs" or x.numel() < y.numel()
    if is_narrower or not y.is_floating_point():
        source, other, x, y = other, source, y, x
    integers = [not z.is_floating_point() for z in (x, y)]
    if (integers[0] and not (other.converts and x.min() >= 0)) or integers[1]:
        return False
    low, high = max(source.low, other.low), min(source.high, other.high)
    low = max(low, 0.0) if "token_weight" in (first, second) else low
    if kind in ("one object", "alias") and x.shape != y.shape:
        return False
    if low > high or (kind == "view" and x.numel() < y.numel()):
        return False
    if (source.sign and low > -1) or (other.sign and not source.sign):
        return False
    if not integers[0]:
        x = x.detach()
        if (low, high) != (source.low, source.high):
            x = (x if low < 0 else x.abs()).clamp(low, high)
        x = x.contiguous() if kind == "view" else x
        x.requires_grad_(source.differentiated)
    shared = SHARED[kind](x, y.shape)
    if shared is not x and x.is_floating_point():
        shared.requires_grad_(other.differentiated)
    tensors |= {source.name: x, other.name: shared}
    return True


def without_metrics(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in given.items() if n not in ("with_metrics", "return_metrics")}


def shape_of(rng: Random, elements: int, dims: int) -> list[int]:
    """Draws a shape; any dimension may be the long one."""
    shape = []
    for _ in range(dims):
        most = min(elements, 9) if rng.once_in(2) else elements
        shape.append(0 if rng.once_in(50) else 1 + int(rng.random() * most))
        elements //= max(shape[-1], 1)
    return rng.sample(shape, dims)


def of_classes(rng: Random, elements: int, op: Operator, given: Any) -> dict[str, Tensor]:
    shape = shape_of(rng, elements, rng.choice([1, 2, 3, 4]))
    of_class = len(shape) > 1
    if shape[of_class] == 1 and not rng.once_in(8):
        shape[of_class] = 5  # calls with one class fall back to torch
    classes = shape[of_class]
    soft = any(o.indices and o.differentiated for o in op.operands) and rng.once_in(3)
    found = operands(op, shape, given, soft, rng.randint(1, 20))
    if not soft:
        found["target"] = class_indices(rng, found["logits"], given)
    if soft or "label_smoothing" in given:
        given.pop("gamma", None)
    if soft:
        given.pop("ignore_index", None)
    if classes == 1:
        given.pop("loss_dtype", None)  # torch would compute in this dtype
    logits = found["logits"].mul_(rng.choice([0.5, 4.0]))
    if not given.keys() & {*ROUNDED, "gamma"} and logits.numel() and classes > 1:
        logits += 1e4 if rng.once_in(6) else 0.0
        if rng.once_in(4):  # metrics and loss of inf are NaN
            statistics = "with_metrics" in given or op is LOG_PROBS
            special = [-math.inf, math.nan, math.inf][: 3 - statistics]
            logits.view(-1)[torch.randint(logits.numel(), (3,))] = rng.choice(special)
    if "linear" in op.name and of_class and rng.once_in(4):  # hidden states with more dimensions
        for name in ("input", "target", "token_weight"):
            found[name] = found[name].unsqueeze(1)
    return found


def class_indices(rng: Random, logits: Tensor, given: dict[str, Any]) -> Tensor:
    """Draws class indices, some or all of which are ignored, or out of range."""
    classes, rows = logits.shape[logits.dim() > 1], loss_shape(logits, "none")
    target = torch.randint(max(classes, 1), rows)
    ignored = torch.rand(rows) < rng.choice([0.0, 0.3, 0.3, 1.0])
    target[ignored] = given.get("ignore_index", -100)
    if logits.dim() == 2 and target.byte().equal(target) and rng.once_in(4):
        target = target.byte()
    if target.numel() and backend is cpu and rng.once_in(30) and classes < 256:
        target.view(-1)[-1] = classes  # raises on CPU, NaN on a GPU
    return target


def of_elements(rng: Random, elements: int, op: Operator, given: dict[str, Any]) -> dict[str, Any]:
    shape, scale = shape_of(rng, elements, rng.randint(0, 4)), rng.choice([1 / 16, 1 / 4, 1.0])
    found: dict[str, Any] = {}
    for operand in op.operands:
        own = tuple(shape)
        if rng.once_in(4) and len(op.operands) > 1:  # broadcasts
            own = tuple(rng.choice([1, n]) for n in shape)[rng.randint(0, len(shape)) :]
        x = draw(operand, own, scale=scale)
        if found and operand.low == 0 and rng.once_in(2):
            x = x.round()  # integers: labels, counts
        if not found and given.get("log_input") is False:
            x = x.abs()
        found[operand.name] = 0.5 if operand.number and rng.once_in(4) else x
    x = found[op.operands[0].name]
    has_nan = isinstance(op, (Activation, Softmax)) and op.name not in NAN_OF_VECTORS
    if has_nan and x.numel() and rng.once_in(4):
        x.view(-1)[torch.randint(x.numel(), (3,))] = math.nan
    if isinstance(op, Softmax) and not rng.once_in(20):  # rarely a dimension that does not exist
        given["dim"] = given["dim"] % max(x.dim(), 1) - x.dim() * (given["dim"] < 0)
    return found


# ---- random calls of functions of logits, with options that torch lacks --------------------------


CLASSES = (2, 5, 19) if interpreter.ON else (2, 5, 19, 91, 300, 1100)
ROWS = (0, 1, 2, 5) if interpreter.ON else (0, 1, 2, 5, 5, 37, 130)
FACTOR_DTYPES = *FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64


def call_of_rows(op: Operator, seed: int, shift: float = 0.0) -> Call:
    """Draws a call with rows of masked, certain and infinite logits.

    Logits, teachers and probabilities of rows that do not count may be NaN. Weights, masks and
    divisors have any dtype, operands any strides, and heads any memory budget.

    Args:
        shift: Logits are this number plus a few steps that their dtype can represent.
    """
    rng = Random(seed)
    torch.manual_seed(seed)
    rows, classes, features = rng.choice(ROWS), rng.choice(CLASSES), 4
    rounds = op.is_linear and not shift  # logits in half precision
    dtype = rng.choice(FLOATS[:2] if rounds else [x for x in FLOATS if fits(shift, x)])
    given = options_of_rows(rng, op, rows, classes)
    if shift:  # products with other scales would be rounded, as in torch's definition
        given |= {n: float(given[n]) for n in {"gamma", "softcap", "z_loss"} & given.keys()}
        given |= {"temperature": 2.0} | ({"scale": 0.5} if "scale" in given else {})
        if "gamma" not in given and op in samples.WITH_OPTIONS:
            given["label_smoothing"] = 0.1
        if op.is_linear:
            given["memory_budget"] = rng.choice([None, 1])
    if abs(shift) > 1e16:  # sums of squares overflow
        given.pop("z_loss", None)
    for option in ("weight", "target"):
        if option in given and given[option].is_floating_point():
            given[option] = given[option].to(dtype)
    z, teacher = (draw_logits(rng, rows, classes).to(dtype) for _ in range(2))
    leaves = {op.operands[0].name: z}
    if op.is_linear:
        input, weight = torch.randn(rows, features), torch.randn(classes, features)
        input[torch.rand(rows) < 0.2] *= 10
        bias = torch.full((classes,), shift).double()
        if shift:
            input, weight = input.clamp(-2, 2).round(), weight.clamp(-3, 3).round()
            weight = weight.double() * step_near(shift, dtype)
        if not shift or rng.random() < 0.3:
            bias = bias.masked_fill(torch.rand(classes) < rng.random() / 2, -math.inf)
        leaves = {"input": input, "linear_weight": weight, "linear_bias": bias}
    elif shift:
        steps = math.copysign(1, -shift) * (4 * z).round().abs().clamp(max=90)
        steps = steps.where(z > -math.inf, z)
        leaves = {
            op.operands[0].name: torch.tensor(shift).to(dtype) + step_near(shift, dtype) * steps
        }
    teachers = {}
    if op is LINEAR_TOPK_KL_DIV:
        log_q = teacher.where(teacher < math.inf, 0).log_softmax(1)
        log_q = log_q.nan_to_num(nan=-math.inf, neginf=-math.inf)
        log_q, indices = log_q.topk(rng.randint(1, classes), 1)
        teachers = {"teacher_indices": indices, "teacher_log_probs": log_q}
    elif op is LINEAR_KL_DIV:
        teachers = {"teacher_input": torch.randn(rows, features).to(dtype)}
        teachers["teacher_linear_weight"] = torch.randn(classes, features).to(dtype)
    elif is_divergence(op):
        teachers = {"teacher_logits": teacher}
    ignored = ~rows_that_count(given, rows)
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    next(iter(leaves.values()))[ignored] = rng.choice([math.nan, 1.0])
    for name, x in (teachers | given).items():
        if name in OF_ROWS and name != "token_weight" and x.is_floating_point():
            x[ignored] = rng.choice([math.nan, 0.5])
    layout = rng.choice([*SAME_VALUES.values()])
    leaves = {name: layout(x).requires_grad_() for name, x in leaves.items()}
    return Call(op, leaves | teachers | given, seed=seed)


def fits(shift: float, dtype: torch.dtype) -> bool:
    """Returns whether logits can be near a number, and float32 can add up their differences."""
    return abs(shift) < torch.finfo(dtype).max and step_near(shift, dtype) < 1e34


def step_near(shift: float, dtype: torch.dtype) -> float:
    """Returns the distance of logits near a number; it is at least 1/4."""
    return max(0.25, 2.0 ** math.frexp(shift)[1] * torch.finfo(dtype).eps / 2)


OF_ROWS = "target", "token_weight", "teacher_logits", "teacher_input"
OF_ROWS += "teacher_indices", "teacher_log_probs"


def rows_that_count(given: dict[str, Any], rows: int) -> Tensor:
    counts = given.get("token_weight", torch.ones(rows)) != 0
    target = given.get("target")
    if target is None or target.is_floating_point():
        return counts
    return counts & (target != given["ignore_index"])


def draw_logits(rng: Random, rows: int, classes: int) -> Tensor:
    z = 3 * torch.randn(rows, classes)
    for row in z:
        kind, at = rng.choice(["usual", "masked", "certain", "infinite", "empty"]), rng.random()
        if kind == "masked":
            row[torch.rand(classes) < at] = -math.inf
        elif kind == "certain":
            row[int(at * classes)] += rng.choice([20.0, 60.0, 150.0])
        elif at < 0.3 and kind == "infinite":
            row[int(at * classes)] = math.inf
        elif at < 0.3 and kind == "empty":
            row[:] = -math.inf
    return z


def draw_numbers(rng: Random, **values: list[Any]) -> dict[str, Any]:
    """Draws some of the numbers; a few are tensors of another dtype."""
    found = {name: rng.choice(x) for name, x in values.items() if rng.once_in(2.5)}
    for name, x in found.items():
        if rng.once_in(5):
            found[name] = torch.tensor(x, dtype=torch.float64)
    return found


def options_of_rows(rng: Random, op: Operator, rows: int, classes: int) -> dict[str, Any]:
    given = draw_numbers(rng, softcap=[2.0, 30.0], temperature=[0.5, 2.0])
    given.setdefault("temperature", 1.0 if is_log_probs(op) else 1.5)
    if op.is_linear:
        row = classes * 8
        given["memory_budget"] = rng.choice([None, None, 1, row, 3 * row, rows * row // 2 + 1])
    if has_classes(op):
        given["ignore_index"] = rng.choice([-100, 0])
        given["target"] = torch.randint(classes, (rows,))
        given["target"][torch.rand(rows) < 0.2] = given["ignore_index"]
    if is_log_probs(op):
        given |= {"return_entropy": True, "return_lse": True}
        given["return_metrics"] = "softcap" not in given  # rounded, capped logits may tie
        return given
    given["reduction"] = rng.choice(["none", "mean", "sum"])
    if given["reduction"] == "mean" and rng.once_in(3):
        shape, dtype = rng.choice([(), (1,)]), rng.choice(FACTOR_DTYPES)
        given["denominator"] = rng.choice([2.5, torch.full(shape, 2.5).to(dtype)])
    if rng.once_in(2):
        weight = (torch.rand(rows) - rng.choice([0.3, 0.3, 0.3, 1.0])).clamp(min=0)
        dtype = rng.choice(FACTOR_DTYPES)
        given["token_weight"] = (weight if dtype.is_floating_point else weight > 0).to(dtype)
    if is_divergence(op):
        given["beta"] = rng.choice([0.0, 0.5, 1.0])
        if op is not LINEAR_TOPK_KL_DIV:
            given |= draw_numbers(rng, teacher_softcap=[2.0])
        elif given["beta"] == 0 and rng.once_in(3):
            given["remainder"] = "ignore"
        return given
    given |= draw_numbers(rng, z_loss=[0.1], scale=[0.5, 3.0])
    kind = rng.choice(["plain", "focal", "smooth", "soft"])
    if kind == "focal" and not op.is_linear:
        given |= {"gamma": 2.0} | draw_numbers(rng, gamma=[0.5, 1.0, 1.5])
        given["label_smoothing"] = rng.choice([0.0, -0.5])
    elif kind != "plain":
        given["label_smoothing"] = rng.choice([0.1, 0.9, -0.5])
    if kind == "soft":
        given |= {"target": torch.rand(rows, classes).softmax(1), "ignore_index": -100}
    if rng.once_in(3):
        given["weight"] = torch.rand(classes) + 0.1
    if rng.once_in(10):
        given["loss_dtype"] = rng.choice([torch.float32, torch.float64])
    return given


# ---- torch's functions, and definitions of functions that torch lacks ----------------------------


class TorchFunctional:
    """torch.nn.functional, with definitions of functions that torch lacks."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if hasattr(F, name) and name not in ("cross_entropy", "linear_cross_entropy"):
            return getattr(F, name)
        return torch_function(OPERATORS[name.removesuffix("_with_metrics")], name)


TORCH = TorchFunctional()
