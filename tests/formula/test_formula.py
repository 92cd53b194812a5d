"""pyfused.loss and pyfused.activation compile a formula in Python to fused kernels."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from math import pi
from pathlib import Path
from typing import Any

import interpreter
import numpy
import pytest
import torch
import torch.nn.functional as F
from compare import (
    DEVICE,
    FLOATS,
    Errors,
    Outcome,
    evaluate,
    exactly,
    widen,
)
from conftest import ISAS, KernelCalls
from grid import grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from verify import check

import pyfused
import pyfused.functional as fused
from pyfused.backends import backend_of, cpu
from pyfused.formula import Formula
from pyfused.formula_compiler import program as programs
from pyfused.formula_compiler.program import UntraceableError
from pyfused.ops.elementwise import kernels
from pyfused.types import Outputs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import formulas
from formulas import FORMULAS, mish, wing

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
close = torch.testing.assert_close
N = 200 if interpreter.ON else 2000


def operands_of(name: str, n: int = N, scale: float = 3.0) -> list[Tensor]:
    """Returns float32 operands in the domain of a formula."""
    formula, generator = FORMULAS[name], torch.Generator().manual_seed(3)
    input, target = torch.randn(2, n, generator=generator, device="cpu") * scale
    uniform = torch.rand(n, generator=generator, device="cpu")
    if name == "tweedie":
        target = target.abs()
    elif name == "asymmetric":
        target = (uniform < 0.3).float()
    elif name == "generalized_cross_entropy":
        input = uniform * 0.999 + 1e-3
    return [x.to(DEVICE) for x in (input, target)[: len(formula.op.variables)]]


def called(formula: Formula, **named: Any) -> Callable[..., Tensor]:
    return lambda *operands: formula(*operands, **named)


def check_formula(
    formula: Formula, *operands: Tensor, rtol: float | None = None, **named: Any
) -> Outcome:
    """Compares the loss of each element, and the gradients, with the function's."""
    got = evaluate(called(formula, **named, **unreduced(formula)), *operands)
    expected = evaluate(formula.function, *operands, **named)
    if rtol is None:
        rtol = 1e-9 if got.value.dtype == torch.float64 else 1.3e-6
    found, best = (got.value, *got.gradients), (expected.value, *expected.gradients)
    close(found, best, rtol=rtol, atol=rtol / 10, equal_nan=True)
    return got


def unreduced(formula: Formula) -> dict[str, str]:
    return {"reduction": "none"} if formula.loss else {}


def defined(parameters: str, lines: Sequence[str], **names: Any) -> Formula:
    """Returns an activation with this code, which calls functions by these names."""
    body = "".join(f"    {line}\n" for line in lines)
    names |= {"torch": torch, "F": F}
    exec(f"def mine({parameters}):\n{body}", names)
    return pyfused.activation(names["mine"])


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.cpu  # the interpreter lacks fused multiply-add
@grid(name=FORMULAS, dtype=FLOATS[:1] + FLOATS[2:], scale=[1.0, 30.0, 1e-4], isa=ISAS)
def test_accuracy(
    name: str, dtype: torch.dtype, scale: float, isa: str, kernel_calls: KernelCalls
) -> None:
    formula, errors = FORMULAS[name], Errors()
    operands = [x.to(dtype).requires_grad_() for x in operands_of(name, scale=scale)]
    found = (
        evaluate(called(formula, **unreduced(formula)), *operands),
        evaluate(formula.function, *operands),
        evaluate(formula.function, *operands, convert=exactly),
    )
    for k, three in enumerate(zip(*[(x.value, *x.gradients) for x in found], strict=True)):
        errors.add(f"result {k}", *three)
    errors.check()
    assert kernel_calls[formula.op.name] == 2


@pytest.mark.cpu
@pytest.mark.parametrize("name", FORMULAS)
def test_each_instruction_set(name: str, isa: str) -> None:
    check_formula(FORMULAS[name], *[x.double().requires_grad_() for x in operands_of(name, 777)])


@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name: str) -> None:
    formula = FORMULAS[name]
    operands = [x.double().requires_grad_() for x in operands_of(name, 7, 1.0)]
    function = called(formula, **({"reduction": "mean"} if formula.loss else {}))
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)
    assert torch.autograd.gradcheck(function, operands, check_forward_ad=True)


@pyfused.loss
def squared(input: Tensor, target: Tensor) -> Tensor:
    return (input - target) ** 2


@grid(
    kind=[torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS],
    dtype=FLOATS,
    shape=[(30, N), (N,), ()],
    reduction=["mean", "sum", "none"],
    by_kernel=[True, False],
)
def test_weights_of_every_dtype(
    kind: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reduction: str,
    by_kernel: bool,
    kernel_calls: KernelCalls,
) -> None:
    """Half precision represents the losses, but neither the sums nor the integer weights."""
    input, target = torch.randint(-7, 8, (2, 30, N)).to(dtype)
    weight = torch.randint(1, 2000, shape).to(kind)
    leaf, scale = input.requires_grad_(), 1024.0 if reduction == "mean" else 0.125

    def definition(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        each = (input - target) ** 2 * weight
        total = each.sum()
        by = weight.expand_as(each).sum()
        return {"none": each, "sum": total, "mean": total / by}[reduction]

    with contextlib.nullcontext() if by_kernel else Recording():
        got = squared(leaf, target, weight=weight, reduction=reduction)
        (gradient,) = torch.autograd.grad(got, leaf, torch.full_like(got, scale))
    wide = input.detach().double().requires_grad_()
    expected = definition(wide, target.double(), weight.double())
    (best,) = torch.autograd.grad(expected, wide, torch.full_like(expected, scale))
    assert got.dtype is definition(input, target, weight).dtype
    for result, exact in ((got, expected), (gradient, best)):
        close(result, exact.to(result.dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert bool(kernel_calls[squared.op.name]) == by_kernel


@pyfused.loss
def kinks(input: Tensor, target: Tensor, *, low: float = -1.0, high: float = 2.0) -> Tensor:
    d = input - target
    return (
        d.abs()
        + F.relu(input)
        + torch.maximum(input, target)
        + torch.minimum(input, 0.5 * target)
        + input.clamp(low, high)
        + torch.where((input > target) & ~(target == 0), input, 2 * target)
        + F.leaky_relu(target, 0.1)
        + F.huber_loss(input, target, reduction="none")
        + F.smooth_l1_loss(input, target, reduction="none")
    )


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, math.inf, -math.inf, math.nan]


def special_pairs(dtype: torch.dtype, *more: float) -> list[Tensor]:
    """Returns all pairs of special values, in two tensors."""
    values = torch.tensor([*SPECIAL, *more], dtype=dtype)
    return [x.flatten() for x in torch.meshgrid(values, values, indexing="ij")]


def nan_to_num(a: Tensor, b: Tensor) -> Tensor:
    return torch.nan_to_num(a, posinf=5.0, neginf=-7.0) + b.nan_to_num(1.5, 5.0, 6.0)


LOGIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "twice": lambda a, _: torch.logical_not(torch.logical_not(a)),
    "bool": lambda a, b: a.bool() & ~b.bool(),
    "type_as_bool": lambda a, b: a.type_as(b > 0),
    "of_a_cast": lambda a, b: torch.logical_or(a, b).type_as(a) < b.bool().float(),
    "of_integers": lambda a, b: torch.logical_not((a > b).long() * 3),
    "to_integers_and_back": lambda a, b: (a > b).long().bool(),
    "constants": lambda a, b: torch.where(a > b, True, False),
    "full": lambda a, _: torch.full_like(a, 2.5, dtype=torch.bool),
    "fill": lambda a, b: (a > b).fill_(3.0),
    "copy": lambda a, b: (a > b).copy_(b),
    "masked_fill": lambda a, b: (a > b).masked_fill(a < 0, True),
    "in_place": lambda a, b: (2 * a).logical_and_(b).bool(),
    "assigned": lambda a, b: _assigned(a, b > 0).bool(),
}


@grid(name=["kinks", "nan_to_num", *LOGIC], dtype=[torch.float32, torch.float64])
def test_special_values(name: str, dtype: torch.dtype, kernel_calls: KernelCalls) -> None:
    formula = {"kinks": kinks, "nan_to_num": pyfused.activation(nan_to_num)}.get(name)
    if formula is None:
        logic = LOGIC[name]
        formula = pyfused.activation(lambda a, b: torch.where(logic(a, b), a + 2 * b, 0.25))
    check_formula(formula, *[x.requires_grad_() for x in special_pairs(dtype, 1e-25, -1e-30)])
    assert kernel_calls[formula.op.name] == 2


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda x, m: torch.where(m, x * x, 0.0),
    "not": lambda x, m: torch.where(~m, x * x, x),
    "filled": lambda x, m: (x * x).masked_fill_(~m, 0.0),
    "and": lambda x, m: torch.where(m & (x > 0), x, 0.5),
    "logic": lambda x, m: torch.where(torch.logical_xor(m, x > 0), x, 0.5) * m.bool(),
    "times": lambda x, m: x * m + torch.where(m > 0, x.exp(), 0.0),
    "signs": lambda x, m: F.softplus(-(2.0 * m - 1) * x),
    "converted": lambda x, m: x * m.long() + m.double() + m.type_as(x) + torch.zeros_like(m),
    "divided": lambda x, m: m / 3 * x + m / (x * x + 1) + torch.sigmoid(m),
    "powers": lambda x, m: (m + 2.0) ** x + torch.maximum(x, m) + torch.minimum(m, x),
    "compared": lambda x, m: torch.where((m < x) | torch.isnan(m), x, m),
    "of_masks": lambda x, m: torch.where(m == (x > 0), x, (x > 0).long() * x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MASKED)
def test_masks(name: str, dtype: torch.dtype, kernel_calls: KernelCalls) -> None:
    mine = pyfused.activation(MASKED[name])
    x = torch.randn(40, 4, dtype=dtype).requires_grad_()
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for shape in ((40, 4), (40, 1)):
        m = torch.rand(shape) < 0.6
        calls = kernel_calls[mine.op.name]
        got, expected = evaluate(mine, x, m), evaluate(mine.function, x, m, convert=widen)
        assert kernel_calls[mine.op.name] == calls + 2, mine.explain(x, m)
        assert got.value.dtype == mine.function(x, m).dtype
        found, best = (got.value, *got.gradients), (expected.value, *expected.gradients)
        close(found, best, rtol=bound, atol=bound, check_dtype=False)


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [8, 1 << 15])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int64])
def test_integer_operands_are_refused(kind: torch.dtype, n: int) -> None:
    mine = pyfused.loss(lambda input, label: (input * label) ** 2)
    x, label = torch.randn(n), torch.ones(n, dtype=kind)
    for call in (mine, mine.explain, torch.compile(mine, backend="eager")):
        with pytest.raises(Exception, match=rf"label: .* bool mask, got {kind}; .*label\.to\("):
            call(x, label)  # torch.compile wraps the TypeError
    close(mine(x, label.to(x.dtype)), mine(x, label == 1))


def _assigned(x: Tensor, m: Tensor) -> Tensor:
    y = 2 * x
    y[m] = 0.25
    return y


SUBNORMAL: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.exp(x), lambda x: torch.exp2(x * 1.44), lambda x: 2.7**x,
    lambda x: (-x) ** (x * 0.2), lambda x: torch.sigmoid(x), lambda x: F.softplus(x),
    lambda x: F.logsigmoid(-x), lambda x: torch.log(torch.exp(x) * 2.0),
    lambda x: torch.expm1(1e-40 * x), lambda x: torch.tanh(x * 1e-40),
    *((lambda x: torch.erf(x * 1e-40),) if DEVICE == "cpu" else ()),  # 0 on GPUs
    lambda x: torch.exp(-0.5 * (x / 7) * (x / 7)) * 0.3989,
)  # fmt: skip


def test_subnormal_results(kernel_calls: KernelCalls) -> None:
    for function in SUBNORMAL:
        formula = pyfused.activation(function)
        x = torch.linspace(-106, -84, 500)
        x = x[function(x).isfinite()]  # all are 0 below -104
        expected, right = function(x), function(x.double())
        error, rounding = (formula(x).double() - right).abs(), 2 * 2.0**-149
        assert (error <= (expected - right).abs() + 2e-5 * right.abs() + rounding).all()
        assert kernel_calls[formula.op.name]
        kernel_calls.clear()


@pyfused.activation
def of_everything(input: Tensor) -> Tensor:
    x = input.abs() + 0.5
    y = torch.rsqrt(x) + torch.sqrt(x) + x.reciprocal() + x**1.5 + 2.0**input + x**-2 + input**3
    y = y + torch.erf(input) + torch.expm1(input) + torch.log1p(x) + torch.log2(x) + x.log10()
    y = y + input.sign() * (input >= 0.3) + (input != 0).float() + torch.cos(input)
    y = y + F.gelu(input) + F.silu(input) + F.elu(input) + F.hardswish(input) + F.logsigmoid(input)
    y = y + F.gelu(input, approximate="tanh") + F.hardtanh(input) + F.selu(input) + F.mish(input)
    y = y + F.softplus(input, beta=2.0) + F.tanhshrink(input) + F.softsign(input) + F.celu(input)
    y = y + F.relu6(input) + F.hardsigmoid(input) + F.hardshrink(input) + F.softshrink(input)
    y = y.masked_fill(input == 0.25, 7.0).add_(1.0) + torch.ones_like(input)
    y = y + torch.lerp(input, x, 0.3) + torch.where(input > 1, input.new_full((), 2.5), input)
    y = y + torch.nan_to_num(input, posinf=2.0, neginf=-2.0) + input.nan_to_num(4.0, 5.0, 6.0)
    return torch.where(torch.isnan(input), torch.zeros_like(input), y)


def test_operations() -> None:
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    check(of_everything.op, ())
    check_formula(of_everything, x, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_match_torch(dtype: torch.dtype) -> None:
    @pyfused.activation
    def power(a: Tensor, b: Tensor, *, exponent: float = 1.7, base: float = 2.5) -> Tensor:
        return torch.pow(a, b) + a**exponent + base**b

    alone = pyfused.activation(lambda a, b: torch.pow(a, b))
    root = pyfused.activation(lambda a, *, exponent=0.7: a**exponent)
    a, b = special_pairs(dtype, 3.0, -3.0, 1.5, -1.5, 1e-40, 1e30)
    for named in ({}, {"exponent": 5.0}, {"exponent": -7.0, "base": 0.7}):
        close(power(a, b, **named), power.function(a, b, **named), equal_nan=True)
    got, expected = alone(a, b), torch.pow(a, b)
    close(got, expected, equal_nan=True)
    assert torch.equal(*[x.nan_to_num().signbit() for x in (got, expected)])  # includes -0.0
    for x in (a, a.abs().nan_to_num().clamp(0.1, 9)):  # the gradient divides by x
        for exponent in (0.7, -2.5, 5.0):
            leaf = x.clone().requires_grad_()
            found = [evaluate(f, leaf, exponent=exponent) for f in (root, root.function)]
            close(*[each.gradients for each in found], equal_nan=True)


def test_broadcasting_strides_and_mixed_dtypes(kernel_calls: KernelCalls) -> None:
    input = torch.randn(6, 1, 5, dtype=torch.float64).requires_grad_()
    target = torch.randn(5, 4).t().requires_grad_()  # (4, 5), float32, not contiguous
    got = check_formula(wing, input, target, rtol=1e-6)
    assert (got.value.dtype, got.value.shape) == (torch.float64, (6, 4, 5))
    assert kernel_calls[wing.op.name]
    four = pyfused.activation(lambda a, b, c, d: a * b + torch.exp(-(c**2)) * d - b * d)
    check_formula(four, input, target.double(), input.detach()[0], torch.rand(5).double())
    assert kernel_calls[four.op.name]


BROADCAST: dict[str, Callable[..., Tensor]] = {
    "one": lambda input, target, *, both=False: input - target if both else input * input,
    "both": lambda input, target, *, both=True: input - target if both else input * input,
    "in_place": lambda input, target: (2 * input).add_(target),
    "indexed": lambda input, target: _assigned(input - 2, target > 0),
}
SHAPES = (
    *(((6,), (6,)), ((6,), (6, 6)), ((6, 6), (6,)), ((6, 6), (6, 1)), ((6, 1), (6,))),
    *(((6,), ()), ((6,), (4,))),
)


@grid(shapes=SHAPES, name=BROADCAST, weighted=[False, True])
def test_broadcasting_is_the_functions(shapes: Any, name: str, weighted: bool) -> None:
    """Kernels broadcast all operands; a function may not use one, or raise."""
    mine = pyfused.loss(BROADCAST[name])
    input, target = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    weight, found = torch.rand(6, 6) if weighted else None, list[Any]()
    for mode in (contextlib.nullcontext(), Recording()):  # under a mode, torch computes the formula
        leaf = input.clone().requires_grad_()
        try:
            with mode:
                value = mine(leaf, target, weight=weight, reduction="sum")
                found.append((value, *torch.autograd.grad(value, leaf)))
        except (IndexError, RuntimeError) as error:
            found.append((type(error), str(error)))
    if isinstance(found[1][1], str):
        assert found[0] == found[1]
    else:
        close(*found)


# ---- parameters ----------------------------------------------------------------------------------


def traces(formula: Formula) -> int:
    """Returns the number of a formula's traces."""
    return sum(op.traced.cache_info().currsize for op in formula.operators.values())


def test_parameters_need_no_new_trace() -> None:
    """A parameter may be named like one of torch's deprecated arguments."""

    @pyfused.loss
    def mine(
        input: Tensor, target: Tensor, *, reduce: float = 10.0, power: float = 1.5, flag: Any = 0
    ) -> Tensor:
        value = reduce * torch.log1p(reduce) * (input - target).abs() ** power + reduce
        return value if flag is True else value * (2.0 - reduce) if flag == 1 else value - reduce

    operands = [x.double() for x in operands_of("wing")]
    for reduce, power in product((0.5, 1, 2.0, 7), (1.25, 1.5, 2.5)):
        check_formula(mine, *operands, reduce=reduce, power=power)
    assert traces(mine) == 1
    named: dict[str, Any]
    for named in ({"power": 2.0}, {"power": 2}, {"flag": True}, {"power": 2.0, "reduce": 3.0}):
        check_formula(mine, *operands, **named)
    assert traces(mine) == 3  # one for squares, and one for the flag
    for flag in (1, True, 0, False, True, 1):  # equal, but of different types
        check_formula(mine, *operands, flag=flag)
    raised = pyfused.activation(lambda input, *, power=2: input**power)
    for power in range(40):
        check_formula(raised, torch.randn(9, dtype=torch.float64), power=power)
    assert "have had 32 values" in raised.explain(torch.ones(9), power=99).reason
    assert raised.explain(torch.ones(9), power=2).backend != "torch"
    signed = pyfused.activation(lambda input, *, k=1.0: input * k)
    for k in (0.0, -0.0, 0.0):
        assert torch.equal(
            torch.signbit(signed(torch.ones(3), k=k)), torch.signbit(torch.full((3,), k))
        )
    of_lists, x = pyfused.activation(lambda input, *, kind="x": input * len(kind)), torch.ones(50)
    assert torch.equal(of_lists(x, kind=[1, 2]), 2 * x)
    assert of_lists.explain(x, kind=[1, 2]).reason == "kind is a list"


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [8, 1 << 15])
def test_what_a_formula_receives(n: int) -> None:
    """Floats are 0-d tensors at every size; bools, ints and strings are unchanged."""

    @pyfused.activation
    def mine(
        input: Tensor, *, k: float = 1.5, exponent: int = 2, kind: str = "", wide: bool = False
    ) -> Tensor:
        if not (isinstance(k, Tensor) and type(exponent) is int and type(kind) is str):
            return input
        value = k * torch.log1p(k) * input**exponent
        return value.double() if wide else value

    for dtype in FLOATS:
        x = torch.randn(n, dtype=dtype)
        for named in ({}, {"k": 2}, {"exponent": 3, "kind": "x"}, {"wide": True}):
            k, exponent = float(named.get("k", 1.5)), named.get("exponent", 2)
            got = mine(x, **named)
            assert got.dtype is (torch.float64 if "wide" in named else dtype)
            expected = k * math.log1p(k) * x.double() ** exponent
            close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [20, 1 << 15])
def test_dtypes_match_torch(n: int) -> None:
    """As decided by the operands, the default dtype and autocast."""
    masked = pyfused.activation(lambda input: input * (input > 0).float())
    halved = pyfused.activation(lambda input: input * ((input > 0) / 2))
    for dtype, default in product(FLOATS, (torch.float32, torch.float64)):
        operands = [x.to(dtype) for x in operands_of("wing", n)]
        assert wing(operands[0], operands[1].double()).dtype == torch.float64
        torch.set_default_dtype(default)
        try:
            for mine in (masked, halved):
                close(mine(operands[0]), mine.function(operands[0]))
            with torch.autocast("cpu", torch.bfloat16):
                assert wing(*operands).dtype == wing.function(*operands).mean().dtype
        finally:
            torch.set_default_dtype(torch.float32)
        assert wing(*operands).dtype == wing.function(*operands).mean().dtype


MODES = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class Recording(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op._schema.name)
        return op(*args, **(kwargs or {}))


def test_modes_and_hooks_of_the_caller_do_not_see_tracing() -> None:
    """On a GPU, the first call generates the kernel, under any mode."""

    def fail(_: Any) -> None:
        raise AssertionError("the mode or hook sees a tensor of the trace")

    recording, hooks = Recording(), torch.autograd.graph.saved_tensors_hooks(fail, fail)
    for name in ("softsign", "log_cosh_loss"):
        expected = [(p.prologue, p.body, p.constants) for p in kernels()[name].programs]
        with hooks, recording, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            traced = replace(kernels()[name]).programs
        assert [(p.prologue, p.body, p.constants) for p in traced] == expected
        assert not recording.names


def test_many_parameters_and_registers(kernel_calls: KernelCalls) -> None:
    """All sines are needed until the last sum, so each needs a register."""
    names = "abcdefgh"
    lines = [
        f"waves = [torch.sin(k * input) for k in ({', '.join(names)}, *range(1, 13))]",
        "total = sum(waves)",
        "for wave in reversed(waves): total = total * wave + wave",
        "return total",
    ]
    defaults = ", ".join(f"{name}={0.25 * k + 0.5}" for k, name in enumerate(names))
    mine = defined(f"input, *, {defaults}", lines)
    for k, name in enumerate(names):
        check_formula(mine, torch.randn(40, dtype=torch.float64), **{name: 0.1 * k})
    assert kernel_calls[mine.op.name] == 8


# ---- user gradients ------------------------------------------------------------------------------


@pyfused.activation
def step(input: Tensor, other: Tensor, *, width: float = 1.0) -> Tensor:
    """A step function with a user's gradient of 0; the gradient of other is None."""
    return torch.where(input > 0, 1.0, 0.0) * torch.ones_like(input) + 0 * other * width


@step.gradient
def _through(input: Tensor, other: Tensor, *, width: float = 1.0) -> tuple[Tensor, None]:
    return torch.where(input.abs() < width, 0.5 / width, 0.0) * torch.ones_like(input), None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in torch
def test_a_user_gradient_is_used_on_all_paths(kernel_calls: KernelCalls) -> None:
    x, other = torch.randn(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    expected, named = torch.where(x.abs() < 0.5, 1.0, 0.0).double(), {"width": 0.5}
    leaves = x.requires_grad_(), other.requires_grad_()
    for function in (step, step.function):
        found = torch.autograd.grad(function(*leaves, **named).sum(), leaves, allow_unused=True)
        close(found[0], expected)
        assert found[1] is None or not found[1].any()
    assert kernel_calls[step.op.name] == 2
    of_one = lambda x: step(x, other.detach(), **named).sum()  # noqa: E731
    close(torch.func.grad(of_one)(x.detach()), expected)
    _, tangent = torch.func.jvp(of_one, (x.detach(),), (torch.ones_like(x),))
    close(tangent, expected.sum())
    compiled = torch.compile(lambda x: of_one(x) * 2, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(compiled(x), x)[0], 2 * expected)
    given = x.detach(), other.detach()
    for strict in (True, False):
        program = torch.export.export(step.module(**named), given, strict=strict)
        close(program.module()(*given), step(*given, **named))
    smooth = pyfused.activation(lambda x, *, k=1.0: torch.sin(k * x))
    smooth.gradient(lambda x, *, k=1.0: k * torch.cos(k * x))
    assert torch.autograd.gradcheck(smooth, x[:9])
    assert torch.autograd.gradgradcheck(smooth, x[:9])


def test_invalid_user_gradients() -> None:
    mine = pyfused.activation(lambda input, *, k=1.0: k * input)
    with pytest.raises(TypeError, match=r"expected the parameters \['input', 'k'\], got"):
        mine.gradient(lambda input: input)
    with pytest.raises(TypeError, match="expected a tensor or None for each of 1 operands"):
        mine.gradient(lambda input, *, k=1.0: (k * input, input))
    with pytest.raises(UntraceableError, match="SCALE, a float"):
        mine.gradient(lambda input, *, k=1.0: k * SCALE)
    x = torch.ones(5, requires_grad=True)
    for function in (mine, mine.function):
        assert torch.equal(torch.autograd.grad(function(x, k=3.0).sum(), x)[0], 3 * x)


# ---- rewrites ------------------------------------------------------------------------------------


AS_WRITTEN: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.log(1 + torch.exp(x)), lambda x: torch.log1p(torch.exp(-x)),
    lambda x: torch.log(torch.sigmoid(x)), lambda x: torch.log(1 - torch.sigmoid(x)),
    lambda x: 1 / (1 + torch.exp(-x)), lambda x: x / (1 + torch.exp(x)),
    lambda x: torch.log(torch.exp(x)), lambda x: torch.exp(x) * torch.sigmoid(-x),
    lambda x: x * 1e30 * 1e-30, lambda x: x * 1e-30 / 1e-30, lambda x: 0.5 * (2 * x),
    lambda x: torch.log(0.5 * (1 + torch.erf(x / math.sqrt(2)))), lambda x: 1 / (x + 0.0),
    lambda x: torch.sqrt(x * x), lambda x: torch.sqrt(x**2 + 1), lambda x: torch.hypot(x, 2 * x),
    lambda x: torch.logaddexp(x, -x), lambda x: torch.logaddexp(x, x), lambda x: x**0.5,
    lambda x: x**-0.5, lambda x: torch.pow(x, torch.tensor(0.5)), lambda x: torch.floor(x) * x,
    lambda x: torch.pow(x, torch.tensor(-0.5)), lambda x: x**-2, lambda x: x**3, lambda x: x**4,
    lambda x: F.smooth_l1_loss(x, 2 * x, reduction="none"), lambda x: x.logit(),
)  # fmt: skip


def by_size(formula: Formula, x: Tensor, **named: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns the value and the gradient of a small call, each with a large call's."""
    found = []
    for n in (1, 1 << 12):
        leaf = x.repeat(n).requires_grad_()
        value = formula(leaf, **named)
        (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
        found.append((value[: len(x)], gradient[: len(x)]))
    return [*zip(*found, strict=True)]


@pytest.mark.thresholds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(len(AS_WRITTEN)))
def test_a_formula_is_computed_as_it_is_written(k: int, dtype: torch.dtype) -> None:
    """Kernels overflow, cancel and return NaN where torch's operators do."""
    large = [10.0, 20.0, 50.0, 87.0, 90.0, 100.0, 1e3, 1e10, 1e19, 1e30, 3e38]
    values = [0.25, 1.5, 1e-3, 1e-8, 1e-20, 1e-30, *large]
    x = torch.tensor([*SPECIAL, *values, *(-v for v in values)], dtype=dtype)
    mine = pyfused.activation(AS_WRITTEN[k])
    assert mine.explain(x.repeat(1 << 10)).backend != "torch"
    for small, ours in by_size(mine, x):
        close(ours, small, rtol=1e-4, atol=1e-6, equal_nan=True)


PARAMETERS: tuple[Callable[..., Tensor], ...] = (
    lambda x, *, j=1.0, k=2.0: x * (j * j / j) + k,
    lambda x, *, j=1.0, k=2.0: x.abs() ** j * k,
    lambda x, *, j=1.0, k=2.0: j * k * x / k,
    lambda x, *, j=1.0, k=2.0: (j * k) ** 2 * (x - j) / (j * k),
    lambda x, *, j=1.0, k=2.0: torch.where(x > j, j, k) * k * x,
    lambda x, *, j=1.0, k=2.0: x / (k * k + 0.5) + torch.minimum(x, j),
    lambda x, *, j=1.0, k=2.0: (abs(k) + 0.5) ** x.clamp(max=j),
    lambda x, *, j=1.0, k=2.0: x * torch.log1p(k * k) - torch.where(j > 1, x, x * x),
    lambda x, *, j=1.0, k=2.0: torch.maximum(k * x, (j - 1) * x) * torch.cos(k),
)


@pytest.mark.thresholds
@pytest.mark.parametrize("k", range(len(PARAMETERS)))
@pytest.mark.parametrize("as_tensor", [False, True])
def test_parameters_overflow_at_every_size(k: int, as_tensor: bool) -> None:
    """Numbers are float32 if the operands are."""
    mine, values = pyfused.activation(PARAMETERS[k]), [0.5, -0.5, 3.0, 1e-25, 1e25, -1e30, math.inf]
    x = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-30, 1e30, math.inf, -math.inf, math.nan])
    for numbers in product(values, values):
        named: dict[str, Any] = dict(zip("jk", numbers, strict=True))
        if as_tensor:
            named = {name: torch.tensor([[value]]) for name, value in named.items()}
        for small, ours in by_size(mine, x, **named):
            close(ours, small, rtol=1e-5, atol=1e-36, equal_nan=True)


# ---- fallbacks -----------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.thresholds
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_size_limit_applies_to_the_broadcast_shape() -> None:
    column, row = torch.randn(1 << 8, 1), torch.randn(1 << 8)
    assert wing.explain(column, row).backend != "torch"
    assert "faster at this size" in wing.explain(column[:9], row[:9]).reason
    close(wing(column[:9], row[:9]), wing.function(column[:9], row[:9]).mean(), rtol=0, atol=0)
    nested = torch.nested.as_nested_tensor([torch.randn(2), torch.randn(3)])
    assert pyfused.activation(lambda a, b: a * b)(nested, nested).is_nested


# ---- formulas as objects -------------------------------------------------------------------------


def test_module_pickle_and_copy() -> None:
    input, target = operands_of("wing", 20)
    module = wing.module(omega=5.0, reduction="sum")
    for same in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(same(input, target), wing(input, target, omega=5.0, reduction="sum"))
    assert "omega=5.0" in repr(module)
    with pytest.raises(TypeError, match=r"'omega'.*got \['omga'\]"):
        wing.module(omga=5.0)
    with pytest.raises(TypeError, match="reduction"):
        mish.module(reduction="sum")


def test_pickles_by_name() -> None:
    """Like a function."""
    local = pyfused.loss(lambda input, target: 3 * (input - target))
    assert pickle.loads(pickle.dumps(wing)) is copy.deepcopy(wing) is copy.copy(wing) is wing
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(local)


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [20, 1 << 15], ids=["by torch", "by the kernel"])
def test_arguments(n: int) -> None:
    input, target = operands_of("wing", n)
    assert torch.equal(wing(target=target, input=input), wing(input, target))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ((input, target), {"omga": 1.0}, r"wing.*omga"),
        ((input,), {}, r"wing.*target"),
        ((input, target), {"reduction": "avg"}, "reduction: expected 'none', 'mean' or 'sum'"),
        ((input, target[:7]), {}, "size of tensor"),
        ((input, target), {"weight": 2.0}, "weight: expected a Tensor, got float"),
    ]
    for weight, reduction in product(
        (torch.rand(3, n), torch.rand(1, n), torch.rand(3)), ("none", "mean", "sum")
    ):
        named = {"weight": weight, "reduction": reduction}
        wrong.append(((input, target), named, "weight: expected a shape that broadcasts to"))
    for arguments, named, words in wrong:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
            wing(*arguments, **named)
    with pytest.raises(TypeError, match="reduction"):
        mish(input, reduction="sum")


# ---- definitions ---------------------------------------------------------------------------------


SCALE, HALF_PI = 2.0, [math.pi / 2]


class Settings:
    scale, absolute = 2.0, torch.abs

    def double(self, input: Tensor) -> Tensor:
        return 2 * input

    @staticmethod
    def tripled(input: Tensor) -> Tensor:
        return 3 * input

    @classmethod
    def of_class(cls, input: Tensor) -> Tensor:
        return cls.scale * input


def scaled(input: Tensor) -> Tensor:
    return SCALE * input


def with_list(input: Tensor, factors: list[float] = HALF_PI) -> Tensor:
    return input * factors[0]


with_list_of_2 = partial(with_list, factors=[2.0])


def catching(input: Tensor) -> Tensor:
    try:
        return input / input.shape[-1]
    except Exception:
        return input


def importing(input: Tensor) -> Tensor:
    import cmath

    return input * cmath.pi


def assigning(input: Tensor) -> Tensor:
    global SCALE
    SCALE = 3.0
    return 2 * input


REFUSED: tuple[tuple[Any, str], ...] = (
    (lambda x: x if x > 0 else -x, r"torch\.where instead of 'if'"),
    (lambda x: x if x.sum() > 0 else -x, "no kernel supports sum; to reduce"),
    (lambda x: x - x.mean(), "no kernel supports mean; to reduce"),
    (lambda x: x * F.dropout(x), "no kernel supports dropout"),
    (lambda x: x / x.shape[0], "the result of shape may differ between calls"),
    (lambda x: x * math.exp(x), "torch's functions instead of math's"),
    (lambda x: x.nan_to_num() * 0.5, "nan_to_num: posinf and neginf depend on the dtype"),
    (lambda x: x.half() + 1, "float16"),
    (lambda x, k=2.0: x if k > 1 else -x, "is read, but floats are tensors in a formula"),
    (lambda x, k=2.0: k.long() * x, r"long casts to torch\.int64"),
    (lambda x, k=2.0: k.half() * x, r"half casts to torch\.float16"),
    (lambda x, y: (x > y).to(torch.uint8) * 200 * x, "mul on integers of less than 64 bits"),
    (lambda x: torch.zeros(()).copy_(x), "copy, which writes a tensor into a number"),
    (lambda x, y: x.masked_fill(x > 0, y), "masked_fill with a value that is not a number"),
    (3, "function: expected a function with a name, got 3"),
    (lambda input, weight: input * weight, "pyfused adds the parameter weight"),
    (lambda a, b, c, d, e: a, "1 to 4 tensor operands, got 5"),
    (lambda *inputs: inputs[0], r"expected named parameters, got \*inputs"),
    (lambda input: absent(input), r"name 'absent' is not defined"),  # noqa: F821
    (lambda input, *, factors=(1.0,): input * factors[0], "factors: expected a default .* a tuple"),
    (lambda input: (input, input), "expected the function to return one tensor, got tuple"),
    (lambda input: (input, None)[1], "return a tensor, got None; add a return"),
    (lambda input, *, k=2.0: k, "expected an elementwise formula, got one number"),
    (lambda x: x * SCALE, "reads SCALE, a float; pass it as an argument with a default"),
    (lambda x: (lambda y: y * SCALE)(x), "reads SCALE, a float"),
    (lambda x: scaled(x), "reads SCALE, a float"),
    ((lambda k: lambda x: x * k)(2.0), "reads k, a float"),
    (lambda x: x * HALF_PI[0], "reads HALF_PI, a list"),
    (lambda x: with_list(x), "with_list has a default that may change, a list"),
    (lambda x: x * helper.scale, r"the attribute helper\.scale; pass"),  # type: ignore[attr-defined]
    (lambda x: x * Settings.scale, r"reads Settings\.scale, a float"),
    (lambda x: formulas.operands(x), "formulas has no attribute 'operands'"),
    (lambda x: Settings.of_class(x), r"reads Settings\.of_class\. A formula reads only"),
    (lambda x: x * formulas, r"reads formulas\. A formula"),
    (lambda x: partial(scaled)(x), "reads SCALE, a float"),
    (lambda x: with_list_of_2(x), "with_list_of_2 has a default that may change, a list"),
    (lambda x: torch.finfo(x.dtype).eps * x, "the result of dtype may differ"),
    (lambda x: x if torch.backends.mkldnn.enabled else -x, "enabled, a bool"),
    (lambda x: wing.defaults["omega"] * x, r"the attribute wing\.defaults"),
    (lambda x: x * getattr(Settings, "scale"), "reads getattr"),  # noqa: B009
    (lambda x: x if torch.is_grad_enabled() else -x, r"reads torch\.is_grad_enabled"),
    (lambda x: x * torch.rand_like(x), r"reads torch\.rand_like"),
    (lambda x: (lambda library: library.relu(x))(torch), r"reads torch\."),
    (lambda x: (lambda library: x * library.pi)(math), r"reads math\."),
    (lambda x: torch.absent(x), "torch has no attribute 'absent'"),
    (lambda x: x * copy.copy(2.0), "the attribute _copy_dispatch"),
    (lambda x: x if x.grad is None else -x, "the result of grad may differ"),
    (Settings().double, "expected a Python function, got a method"),
    (importing, "imports or assigns cmath"),
    (catching, "the result of shape may differ"),
    (assigning, "imports or assigns SCALE"),
)

# Refused whatever the operands' shapes are; most are the identity for some shapes.
NOT_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[..., :1000], "rows": lambda x: x[:1000], "whole": lambda x: x[...],
    "column": lambda x: x[:, :1], "new axis": lambda x: x[None], "selection": lambda x: x[x > 0],
    "integer": lambda x: x[0], "narrow": lambda x: x.narrow(0, 0, 1), "T": lambda x: x.T,
    "mT": lambda x: x.mT, "t": lambda x: x.t(), "movedim": lambda x: x.movedim(0, -1),
    "transpose": lambda x: x.transpose(0, -1), "squeeze": lambda x: x.squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(-1), "flatten": lambda x: x.flatten(),
    "view": lambda x: x.view(-1), "view_as": lambda x: x.view_as(x), "bits": lambda x: x.view(
        torch.int64), "reshape": lambda x: x.reshape(()), "expand": lambda x: x.expand(()),
    "expand_as": lambda x: x.expand_as(x), "broadcast_to": lambda x: x.broadcast_to(()),
    "chunk": lambda x: x.chunk(2, -1)[0], "split": lambda x: x.split(1)[0],
    "unbind": lambda x: x.unbind()[0], "iteration": lambda x: sum(row for row in x),
    "stack": lambda x: torch.stack([x, x]).sum(0), "repeat": lambda x: x.repeat(1),
    "flip": lambda x: x.flip(-1), "roll": lambda x: x.roll(1), "sort": lambda x: x.sort()[0],
    "cumsum": lambda x: x.cumsum(-1), "sum": lambda x: x.sum(-1), "mean": lambda x: x.mean(),
    "amax": lambda x: x.amax(()), "max": lambda x: x.max(-1)[0], "norm": lambda x: x.norm(),
    "normalize": lambda x: F.normalize(x), "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (7,)), "mse": lambda x: F.mse_loss(x, 2 * x),
    "ones": lambda x: torch.ones(5, 1, 7) * x, "list": lambda x: torch.tensor([1.0, 2.0]) * x,
    "shape": lambda x: x * x.shape[0], "size": lambda x: torch.zeros(x.size()) + x,
    "ndim": lambda x: x * x.ndim, "numel": lambda x: x / x.numel(), "len": lambda x: x / len(x),
    "stride": lambda x: torch.zeros(x.stride()) + x, "device": lambda x: x.to(x.device),
    "random": lambda x: torch.zeros_like(x).normal_(), "lgamma": lambda x: torch.lgamma(x),
}  # fmt: skip


@pytest.mark.parametrize(("function", "words"), REFUSED)
def test_refused(function: Any, words: str) -> None:
    with pytest.raises((TypeError, UntraceableError), match=words) as error:
        pyfused.loss(function)
    if function is assigning:
        line = function.__code__.co_firstlineno + 2
        assert f"assigning: line {line} of {__file__}: " in str(error.value)


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_what_is_not_elementwise_is_refused(name: str) -> None:
    """Before and after functions that kernels support."""
    function = NOT_ELEMENTWISE[name]
    for mine in (lambda x: function(torch.tanh(x)) + x, lambda x: torch.tanh(x * function(x))):
        with pytest.raises(UntraceableError, match=r"line \d+ of .*(no kernel|the result of)"):
            pyfused.activation(mine)


def helper(input: Tensor, power: int = 2, *, scale: float = 1.0) -> Tensor:
    return input * scale if power == 0 else input * helper(input, power - 1)


sign = torch.sign
softplus_of_2 = partial(F.softplus, beta=2.0)
REACHED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: formulas.F.silu(x) * formulas.mish(x),
    lambda x: Settings.tripled(x) + Settings.absolute(x),
    lambda x: softplus_of_2(x) * pi * math.e * numpy.pi,
    lambda x: partial(torch.clamp, min=-1.0)(x) + partial(Settings.tripled)(x),
    lambda x: torch.log(x.abs() + torch.finfo(torch.float32).eps),
    lambda x: helper(x) + sign(x) * torch.nn.functional.softplus(x) + Tensor.abs(x) * torch.pi,
    lambda x: sum(map(abs, [x * k for k in (1.0, math.log(4))])),
)


@pytest.mark.thresholds
@pytest.mark.parametrize("k", range(len(REACHED)))
def test_functions_and_constants_by_any_name(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were at the definition: names that are bound to others later change no call."""
    x = torch.linspace(-3, 3, 1 << 15)
    mine, expected = pyfused.activation(REACHED[k]), REACHED[k](x)
    monkeypatch.setattr(formulas, "F", None)
    monkeypatch.setattr(Settings, "tripled", None)
    monkeypatch.setitem(softplus_of_2.keywords, "beta", 5.0)
    monkeypatch.setattr(helper, "__defaults__", (3,))
    monkeypatch.setitem(helper.__kwdefaults__, "scale", 5.0)
    for name, other in (("pi", 3.0), ("helper", scaled), ("sign", scaled)):
        monkeypatch.setattr(sys.modules[__name__], name, other)
    close(mine(x), expected)
    close(torch.cat([mine(part) for part in x.split(1 << 12)]), expected)
    close(torch.compile(mine, backend="eager", fullgraph=True)(x), expected)


def test_a_formula_in_a_formula() -> None:
    inner = pyfused.loss(lambda a, b, *, k=2.0: k * (a - b).abs())
    mine = pyfused.activation(lambda x: inner(x, 0 * x, k=3.0, reduction="none"))
    check_formula(mine, torch.linspace(-1, 1, 50).requires_grad_())
    with pytest.raises(RuntimeError, match="no other formula that calls"):
        inner.gradient(lambda a, b, *, k=2.0: (a, b))


def test_a_formula_may_be_defined_under_patch(kernel_calls: KernelCalls) -> None:
    x = torch.randn(100)
    with pyfused.patch():
        mine = pyfused.activation(lambda x: F.mish(x) + F.softplus(x) + torch.relu(x))
        close(mine(x), mine.written(x))
    close(mine(x), mine.written(x))
    assert kernel_calls[mine.op.name] == 2


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [20, 1 << 15])
def test_parameters_that_are_tensors(n: int) -> None:
    """A tensor of one element is a number, with its gradient; another one is refused by name."""
    mine = pyfused.activation(lambda input, *, k=1.5: input * k)
    for dtype, kind, shape in product(FLOATS, (*FLOATS, torch.int64), ((), (1,), (1, 1, 1))):
        x = torch.ones(n, dtype=dtype)
        assert torch.equal(mine(x, k=torch.full(shape, 2, dtype=kind)), (x * 2).to(dtype))
    k = torch.full((1, 1), 2.0, requires_grad=True)
    mine(torch.ones(n), k=k).sum().backward()
    assert torch.equal(k.grad, torch.full((1, 1), float(n)))
    with torch.no_grad():  # not needed
        assert mine.explain(torch.ones(n), k=k) == mine.explain(torch.ones(n), k=2.0)
    of_three = r"a Tensor of shape \(3,\); make it an operand"
    for (wrong, got), call in product(
        ((torch.ones(3), of_three), ("x", "'x'")), (mine, mine.explain)
    ):
        with pytest.raises(TypeError, match=f"k: expected a number or a tensor .* got {got}"):
            call(torch.ones(n), k=wrong)


def test_weights_in_programs_with_dynamic_sizes() -> None:
    """The weight's size is static when the operands' sizes become dynamic."""

    def step(input: Tensor, target: Tensor, weight: Any = None) -> tuple[Tensor, ...]:
        named = {"weight": weight}
        return squared(input, target, **named), fused.sigmoid_focal_loss(input, target, **named)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    input, target = torch.randn(100), torch.rand(100)
    for n in (40, 50):
        compiled(input[:n], target[:n])
    for n, weight in ((40, torch.rand(40)), (50, torch.rand(1))):
        close(compiled(input[:n], target[:n], weight), step(input[:n], target[:n], weight))


def test_formulas_are_freed() -> None:
    """With what their functions hold, after calls of kernels and of torch's operators."""

    def make() -> weakref.ref[Any]:
        def helper(input: Tensor) -> Tensor:
            return 2 * input

        mine = pyfused.loss(lambda input, target, *, k=1.0: k * (helper(input) - target) ** 2)
        mine.gradient(lambda input, target, *, k=1.0: (4 * k * (2 * input - target), None))
        x = torch.rand(50, requires_grad=True)
        for n in (50, 1):
            mine(x[:n], torch.zeros(n), k=0.5).backward()
        return weakref.ref(helper)

    reference = make()
    gc.collect()
    assert reference() is None


@pytest.mark.cpu  # the interpreter supports only one thread
def test_threads_trace_at_once() -> None:
    """The anomaly detection of the program, which is global, stays."""

    def trace(k: int) -> Tensor:
        return pyfused.activation(lambda x, *, k=1.0: k * x.log())(torch.ones(3) * math.e, k=k)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with torch.autograd.set_detect_anomaly(True), ThreadPoolExecutor(4) as pool:
            for k, value in enumerate(pool.map(trace, range(40))):
                close(value, torch.full((3,), float(k)))
            assert torch.is_anomaly_enabled()
    finally:
        sys.setswitchinterval(interval)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(input: Tensor) -> Tensor:
        return 2 * input.sigmoid() ** 2

    check(pyfused.activation(mine).op, ())
    monkeypatch.setitem(programs.RULES, "pow", [programs.Rule(("pow", "a", "b"), "a", True)])
    with pytest.raises(AssertionError, match=r"its kernel computes .* for the value at input="):
        check(pyfused.activation(mine).op, ())


# ---- random programs -----------------------------------------------------------------------------

UNARY = {
    "abs": torch.abs, "neg": torch.neg, "exp": torch.exp, "tanh": torch.tanh, "sin": torch.sin,
    "cos": torch.cos, "sigmoid": torch.sigmoid, "erf": torch.erf,
    "softplus": F.softplus, "steps": lambda x: F.softplus(x, beta=2.0, threshold=0.5),
    "log_exp": lambda x: torch.log(1 + torch.exp(x)), "floor": torch.floor,
    "hypot": lambda x: torch.hypot(x, 1 - x), "logaddexp": lambda x: torch.logaddexp(x, 2 * x),
    "sqrt": lambda x: torch.sqrt(x * x + 0.1), "log": lambda x: torch.log(x.abs() + 0.5),
    "log1p": lambda x: torch.log1p(x * x), "expm1": torch.expm1, "relu": torch.relu,
    "square": lambda x: x**2, "cube": lambda x: x**3, "reciprocal": lambda x: 1 / (x.abs() + 0.3),
    "power": lambda x: (x.abs() + 0.2) ** 1.3, "clamp": lambda x: x.clamp(-0.7, 1.1),
    "half": lambda x: 0.5 * x, "rest": lambda x: 1 - x, "sign": torch.sign,
    "bool": lambda x: x.bool() * (x + 1), "positive": lambda x: (x > 0).type_as(x),
    "not": lambda x: torch.logical_not(x.relu()) * x + torch.logical_not(torch.logical_not(x)),
    "log_sigmoid": F.logsigmoid, "silu": F.silu, "rsqrt": lambda x: torch.rsqrt(x * x + 1),
}  # fmt: skip
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "minimum": torch.minimum,
    "maximum": torch.maximum, "div": lambda a, b: a / (b * b + 0.5),
    "less": lambda a, b: torch.where(a < b, a, b * 2), "equal": lambda a, b: (a == b) * a,
    "and": lambda a, b: torch.logical_and(a.relu(), b) * a,
    "or": lambda a, b: torch.where(torch.logical_or(a.relu(), b < 0.25), b, 2 * a),
    "xor": lambda a, b: torch.logical_xor(a > 0, b.relu()).type_as(a) - b,
    "most": lambda a, b: torch.where((a > 0) | (b <= 0.5), a + b, a * b),
    "branch": lambda a, b: torch.where(a < b, torch.log(1 + torch.exp(a)), F.softplus(b - a)),
}  # fmt: skip


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda m: m.float(), "nonzero": lambda m: (m != 0).float(), "third": lambda m: m / 3,
    "where": lambda m: torch.where(m, 1.5, -0.5), "not": lambda m: (~m).float() * 0.5,
}  # fmt: skip


@st.composite
def random_formulas(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    operands = draw(st.integers(1, 3))
    steps = []
    for k in range(draw(st.integers(1, 15))):
        place = st.integers(0, operands + k - 1)
        steps.append((draw(st.sampled_from([*UNARY, *BINARY])), draw(place), draw(place)))
    return operands, steps


@pytest.mark.skipif(DEVICE != "cpu", reason="compares kernels for tensors of the CPU")
@given(random_formulas(), st.sampled_from([*MODES]), st.sampled_from([None, None, *MASKS]))
@settings(max_examples=20 if interpreter.ON else max(50, settings().max_examples))
def test_random_programs(
    drawn: tuple[int, list[tuple[str, int, int]]], mode: str, mask: str | None
) -> None:
    """Compares kernels with torch's operators."""
    operands, drawn_steps = drawn
    names = [f"v{k}" for k in range(operands)]
    is_masked = mask is not None and operands > 1
    lines = [f"{names[-1]} = masked({names[-1]})"] if is_masked else []
    for k, (op, i, j) in enumerate(drawn_steps, operands):
        lines.append(f"v{k} = op_{op}(v{i}{'' if op in UNARY else f', v{j}'})")
    lines.append(f"return v{operands + len(drawn_steps) - 1} + 0.125 * ({' + '.join(names)})")
    functions = {f"op_{op}": (UNARY | BINARY)[op] for op, *_ in drawn_steps}
    with MODES[mode]():
        formula = defined(", ".join(names), lines, **functions, masked=MASKS.get(str(mask)))
    masks = (*[False] * (operands - 1), is_masked)
    op = formula.operator(masks, ())
    check(op, ())
    x = tuple(torch.randn(operands, 7, dtype=torch.float64))
    x = tuple([(each > 0).double() if m else each for each, m in zip(x, masks, strict=True)])
    cases = op.cases(())

    def gradients(wanted: tuple[bool, ...]) -> Sequence[Tensor | None]:
        outputs = Outputs(False, wanted)
        program, parameters = op.kernel(cases, operands, outputs)
        launch = cpu.pointwise_loss(program, (x, None, None), parameters, "none", outputs)
        return launch((*x, None, None), ())[1]

    of_all = gradients((True,) * operands)
    for wanted in product([False, True], repeat=operands):  # a subset of the instructions
        for one, other, is_wanted in zip(gradients(wanted), of_all, wanted, strict=True):
            assert (one is None) != is_wanted
            assert one is None or torch.equal(one.nan_to_num(), other.nan_to_num())
    kernels = backend_of(torch.empty(0)).pointwise_loss
    check(op, (), kernels, torch.float32)
    if kernels is not cpu.pointwise_loss:
        check(op, (), kernels, torch.float64)
