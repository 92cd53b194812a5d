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
from compare import DEVICE, FLOATS, Errors, Outcome, Recording, evaluate, exactly
from conftest import ISAS, KernelCalls
from grid import grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import get_overridable_functions
from verify import check

import pyfused
from pyfused.backends import backend_of, cpu
from pyfused.formula import Formula
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.program import UntraceableError
from pyfused.functional import sigmoid_focal_loss as focal_loss
from pyfused.types import Outputs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import formulas
from formulas import FORMULAS, mish, wing

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
close = torch.testing.assert_close
both_sizes = pytest.mark.parametrize("n", [20, 1 << 15], ids=["by torch", "by the kernel"])
N = 200 if interpreter.ON else 2000


def operands_of(name: str, n: int = N, scale: float = 3.0) -> list[Tensor]:
    """Returns float32 operands in the domain of a formula."""
    generator = torch.Generator().manual_seed(3)
    input, target = torch.randn(2, n, generator=generator, device="cpu") * scale
    uniform = torch.rand(n, generator=generator, device="cpu")
    if name == "generalized_cross_entropy":
        return [(uniform * 0.999 + 1e-3).to(DEVICE)]
    targets = {"tweedie": target.abs(), "asymmetric": (uniform < 0.3).float()}
    operands = input, targets.get(name, target)
    return [x.to(DEVICE) for x in operands[: len(FORMULAS[name].op.variables)]]


def elementwise(formula: Formula, **named: Any) -> Callable[..., Tensor]:
    """Returns the formula with these parameters, without a reduction."""
    return partial(formula, **named, **({"reduction": "none"} if formula.loss else {}))


def check_formula(
    formula: Formula, *operands: Tensor, rtol: Any = None, atol: Any = None, **named: Any
) -> Outcome:
    """Compares the loss of each element, and the gradients, with the function's."""
    got = evaluate(elementwise(formula, **named), *operands)
    expected = evaluate(formula.function, *operands, **named)
    rtol = rtol or (1e-9 if got.value.dtype == torch.float64 else 1.3e-6)
    found, best = (got.value, *got.gradients), (expected.value, *expected.gradients)
    close(found, best, rtol=rtol, atol=rtol / 10 if atol is None else atol, equal_nan=True)
    return got


def defined(parameters: str, code: str) -> Formula:
    """Returns an activation with this body, or expression, which may use the names of this file."""
    body, names = code if "return" in code else f"return {code}", globals().copy()
    exec(f"def mine({parameters}):\n    {body}", names)
    return pyfused.activation(names["mine"])


@pytest.mark.cpu  # the interpreter lacks fused multiply-add
@grid(name=FORMULAS, dtype=FLOATS[:1] + FLOATS[2:], scale=[1.0, 30.0, 1e-4], isa=ISAS)
def test_accuracy(name: str, dtype: Any, scale: float, isa: str, kernel_calls: KernelCalls) -> None:
    formula, errors = FORMULAS[name], Errors()
    operands = [x.to(dtype).requires_grad_() for x in operands_of(name, scale=scale)]
    found = (
        evaluate(elementwise(formula), *operands),
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
    formula = FORMULAS[name]  # the mean of losses
    operands = [x.double().requires_grad_() for x in operands_of(name, 7, 1.0)]
    assert torch.autograd.gradcheck(formula, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(formula, operands)


squared = pyfused.loss(lambda input, target: (input - target) ** 2)


@grid(
    kind=[None, torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS],
    dtype=FLOATS,
    shape=[(30, N), (N,), ()],
    reduction=["mean", "sum", "none"],
    mode=[contextlib.nullcontext, Recording],
)
def test_reductions_and_weights(
    kind: Any, dtype: Any, shape: Any, reduction: str, mode: Any, kernel_calls: KernelCalls
) -> None:
    """Half precision represents the losses, but neither the sums nor the integer weights.

    torch computes the call under a mode, and if the result has a narrower dtype than the weight.
    """
    input, target = torch.randint(-7, 8, (2, 30, N)).to(dtype)
    leaf, wide = input.requires_grad_(), input.detach().double().requires_grad_()
    weight = None if kind is None else torch.randint(1, 2000, shape).to(kind)

    def definition(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        losses = (input - target) ** 2 * weight
        mean = losses.sum() / weight.expand_as(losses).sum()
        return {"none": losses, "sum": losses.sum(), "mean": mean}[reduction]

    factors = torch.ones((), dtype=dtype) if weight is None else weight
    expected = definition(wide, target.double(), factors.double())
    grad_output = torch.full_like(expected, 1024.0 if reduction == "mean" else 0.125)
    with mode():
        got = squared(leaf, target, weight=weight, reduction=reduction)
        (gradient,) = torch.autograd.grad(got, leaf, grad_output.to(got.dtype))
    assert got.dtype is definition(input, target, factors).dtype
    (best,) = torch.autograd.grad(expected, wide, grad_output)
    for result, exact in ((got, expected), (gradient, best)):
        close(result, exact.to(result.dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    widest = torch.float32 if kind in (torch.uint8, torch.int32, torch.int64) else kind or dtype
    is_narrower = torch.promote_types(widest, dtype) is not got.dtype
    assert bool(kernel_calls) == (mode is not Recording and not is_narrower)


# ---- constructs ----------------------------------------------------------------------------------


def assigned(x: Tensor, mask: Tensor) -> Tensor:
    y = 2 * x
    y[mask] = 0.25
    return y


# Expressions of operands a and b, and of parameters j and k. These overflow, cancel and return NaN
# where torch's operators do.
AS_WRITTEN = (
    "torch.log(1 + torch.exp(a))", "torch.log1p(torch.exp(-a))", "torch.log(torch.sigmoid(a))",
    "torch.log(1 - torch.sigmoid(a))", "1 / (1 + torch.exp(-a))", "a / (1 + torch.exp(a))",
    "torch.log(torch.exp(a))", "torch.exp(a) * torch.sigmoid(-a)", "a * 1e30 * 1e-30",
    "a * 1e-30 / 1e-30", "0.5 * (2 * a)", "torch.log(0.5 * (1 + torch.erf(a / math.sqrt(2))))",
    "1 / (a + 0.0)", "torch.sqrt(a * a)", "torch.sqrt(a**2 + 1)", "torch.hypot(a, 2 * a)",
    "torch.logaddexp(a, -a)", "torch.logaddexp(a, a)", "a**0.5", "a**-0.5", "a.logit()", "a**-2",
    "torch.pow(a, torch.tensor(0.5))", "torch.pow(a, torch.tensor(-0.5))", "torch.floor(a) * a",
    "a**3", "a**4", "F.smooth_l1_loss(a, 2 * a, reduction='none')", "a / (b * b + 0.5)",
)  # fmt: skip
ACCEPTED = (
    "a.clamp(j, k)", "torch.where((a > b) & ~(b == 0), a, 2 * b)", "torch.hypot(a, b)",
    "F.huber_loss(a, b, reduction='none')", "F.smooth_l1_loss(a, b, reduction='none')",
    "torch.nan_to_num(a, posinf=5.0, neginf=-7.0)", "b.nan_to_num(1.5, 5.0, 6.0)", "2.0**a",
    "torch.pow(a, b)", "a**k", "k**b", "a**1.5", "a**(k - 9)", "(k - 9)**b", "(k - 1.3)**b",
    "a**(k + 3)", "a**(k - 4.5)", "torch.rsqrt(a)", "torch.sqrt(a)", "a.reciprocal()",
    "a.tanh()", "a.sin()", "torch.cos(a)", "torch.erf(a)", "torch.expm1(a)", "torch.log1p(a)",
    "F.silu(a)", "torch.log2(a)", "a.log10()", "F.mish(a)", "F.hardsigmoid(a)",
    "(2 * a).add_(1.0) + torch.ones_like(a)", "torch.logaddexp(a, b)",
    "torch.where(a > 1, a.new_full((), 2.5), a)", "torch.where(a.isnan(), torch.zeros_like(a), a)",
    # around the threshold, from which torch's softplus is linear
    "F.softplus(1e-9 * a + 4.0, beta=2.0, threshold=8.0)", "F.softplus(a, 2.0, -1.0)",
    "j * F.softplus(1e-9 * a - 7 / 0.3, beta=0.3, threshold=-7.0)", "F.softplus(a, 0.25, 25.0)",
    "torch.where(a < 0, F.softplus(a, 0.5, 0.25), b)",
    *[f"torch.where({code}, a, b)" for code in (
        "torch.logical_or(a, b).type_as(a) < b.bool().float()", "torch.where(a > b, True, False)",
        "torch.logical_not((a > b).long() * 3)", "a.bool() & ~b.bool()", "a.type_as(b > 0)",
        "torch.full_like(a, 2.5, dtype=torch.bool)", "(a > b).fill_(3.0)", "(a > b).copy_(b)",
        "(2 * a).logical_and_(b).bool()", "assigned(a, b > 0).bool()",
    )],
)  # fmt: skip
# Expressions of an operand a and a mask m.
MASKED = (
    "torch.where(m, a * a, 0.0)", "(a * a).masked_fill_(~m, 0.0)",
    "torch.where(torch.logical_xor(m, a > 0), a, 0.5) * m.bool()",
    "a * m.long() + m.double() + m.type_as(a) + torch.zeros_like(m)",
    "m / 3 * a + m / (a * a + 1) + torch.sigmoid(m)", "torch.where((m < a) | torch.isnan(m), a, m)",
    "(m + 2.0) ** a + torch.maximum(a, m) + torch.minimum(m, a)",
    "torch.where(m == (a > 0), a, (a > 0).long() * a)",
)  # fmt: skip
# Their gradients differ from torch's at NaN or infinity.
AT_FINITE = (
    "F.elu(a)", "F.hardswish(a)", "F.hardtanh(a)", "F.selu(a)", "F.celu(a)", "F.relu6(a)",
    "F.hardshrink(a)", "F.softshrink(a)",
)  # fmt: skip
SPECIAL = (
    *(0.0, 1.0, 2.0, 0.5, 0.25, 1.5, 3.0, math.inf, 1e-3, 1e-8, 1e-20, 1e-25, 1e-30, 1e-40),
    *(10.0, 20.0, 50.0, 87.0, 90.0, 100.0, 1e3, 1e10, 1e19, 1e30, 3e38),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("code", [*AS_WRITTEN, *ACCEPTED, *AT_FINITE, *MASKED])
def test_special_values(code: str, dtype: torch.dtype, kernel_calls: KernelCalls) -> None:
    special, is_masked = SPECIAL[:9] if interpreter.ON else SPECIAL, code in MASKED
    values = torch.tensor([*special, *[-x for x in special], math.nan], dtype=dtype)
    values = values[values.isfinite()] if code in AT_FINITE else values
    operands = [x.flatten() for x in torch.meshgrid(values, values, indexing="ij")]
    operands = [operands[0], operands[1] > 0] if is_masked else operands
    mine = defined(f"a, {'m' if is_masked else 'b'}, *, j=-1.0, k=2.0", code)
    rtol = 1.3e-6 if dtype is torch.float32 else 1e-6 if is_masked else 1e-7
    if code in AS_WRITTEN and DEVICE != "cpu":
        rtol = 1e-4
    leaves = [x.requires_grad_(x.is_floating_point()) for x in operands]
    inputs = [x for x in leaves if x.requires_grad]
    found = [mine(*leaves), mine.function(*leaves)]
    slopes = [torch.autograd.grad(x.sum(), inputs, materialize_grads=True) for x in found]
    close(*found, rtol=rtol, atol=rtol / 10, equal_nan=True)
    close(*slopes, rtol=rtol, atol=rtol / 10, equal_nan=True)
    if "pow" in code:  # includes -0.0
        assert torch.equal(*[x.nan_to_num().signbit() for x in found])
    assert kernel_calls[mine.op.name] == 2


SUBNORMAL = (
    "torch.exp(x)", "torch.exp2(x * 1.44)", "2.7**x", "(-x) ** (x * 0.2)", "torch.sigmoid(x)",
    "F.softplus(x)", "F.logsigmoid(-x)", "torch.log(torch.exp(x) * 2.0)", "torch.expm1(1e-40 * x)",
    "torch.tanh(x * 1e-40)", "torch.exp(-0.5 * (x / 7) * (x / 7)) * 0.3989",
    *(("torch.erf(x * 1e-40)",) if DEVICE == "cpu" else ()),  # 0 on GPUs
)  # fmt: skip


@pytest.mark.parametrize("code", SUBNORMAL)
def test_subnormal_results(code: str, kernel_calls: KernelCalls) -> None:
    formula, x = defined("x", code), torch.linspace(-106, -84, 500)
    x = x[formula.function(x).isfinite()]  # all are 0 below -104
    expected, right = formula.function(x), formula.function(x.double())
    error, rounding = (formula(x).double() - right).abs(), 2 * 2.0**-149
    assert (error <= (expected - right).abs() + 2e-5 * right.abs() + rounding).all()
    assert kernel_calls[formula.op.name]


def test_broadcasting_and_mixed_dtypes(kernel_calls: KernelCalls) -> None:
    input = torch.randn(6, 1, 5, dtype=torch.float64).requires_grad_()
    target = torch.randn(4, 5).requires_grad_()  # float32
    got = check_formula(wing, input, target, rtol=1e-6)
    assert (got.value.dtype, got.value.shape) == (torch.float64, (6, 4, 5))
    four = defined("a, b, c, d", "F.gelu(a) * b + F.gelu(c, approximate='tanh') * d - b * d")
    check_formula(four, input, target.double(), input.detach()[0], torch.rand(5) > 0.5)
    assert kernel_calls[wing.op.name] == kernel_calls[four.op.name] == 2


SHAPES = [((6,), shape) for shape in ((6,), (6, 6), (), (4,))]
SHAPES += ((6, 6), (6,)), ((6, 6), (6, 1)), ((6, 1), (6,))
BROADCAST = "a * a", "a - b", "(2 * a).add_(b)", "assigned(a, b > 0)", "0.5 * a * a + 0 * b"


@grid(shapes=SHAPES, code=BROADCAST, weighted=[False, True])
def test_broadcasting_is_the_functions(
    shapes: tuple[tuple[int, ...], ...], code: str, weighted: bool, kernel_calls: KernelCalls
) -> None:
    """Kernels broadcast all operands; a function may not use one, or raise."""
    mine = pyfused.loss(defined("a, b", code).written)
    if "0 * b" in code:
        mine.gradient(lambda a, b: (assigned(a, b > 0), None))
    (a, b), found = (torch.randn(shape, dtype=torch.float64) for shape in shapes), list[Any]()
    weight = torch.rand(6, 6) if weighted else None
    for mode in (contextlib.nullcontext(), Recording()):
        leaf = a.clone().requires_grad_()
        try:
            with mode:
                value = mine(leaf, b, weight=weight, reduction="sum")
                found.append((value, *torch.autograd.grad(value, leaf)))
        except (IndexError, RuntimeError) as error:
            found.append((type(error), str(error)))
    if isinstance(found[1][1], str):
        assert found[0] == found[1]
    else:
        close(*found)
    assert shapes[0] != shapes[1] or weighted or kernel_calls.total()


@both_sizes
@pytest.mark.thresholds
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_match_torch(dtype: torch.dtype, n: int, request: pytest.FixtureRequest) -> None:
    """They depend on operands, options, autocast and the default dtype."""
    x, y = (each.to(dtype) for each in operands_of("wing", n))
    assert wing(x, y).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert wing(x, y).dtype == wing.function(x, y).mean().dtype
    mine = pyfused.loss(lambda x, *, wide=False: (x.double() if wide else x) ** 2)
    assert (mine(x).dtype, mine(x, wide=True).dtype) == (dtype, torch.float64)
    halved = pyfused.activation(lambda x: x * ((x > 0) / 2))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    for default in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(default)
        close(halved(x), halved.function(x))


LARGE: list[tuple[tuple[int, ...], ...]] = [((), (1 << 15,)), ((1 << 15,), ()), ((256, 1), (256,))]
SMALL: list[tuple[tuple[int, ...], ...]] = [((), (256,)), ((9, 1), (9,)), ((), (0,))]


@pytest.mark.cpu
@pytest.mark.thresholds
@pytest.mark.parametrize("shapes", LARGE + SMALL, ids=str)
def test_the_size_limit_is_of_the_broadcast_shape(shapes: Any, kernel_calls: KernelCalls) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    value, expected = wing(*operands), wing.function(*operands).mean()
    close(value, expected, **{} if shapes in LARGE else {"rtol": 0, "atol": 0, "equal_nan": True})
    assert kernel_calls[wing.op.name] == (shapes in LARGE)
    reason = wing.explain(*operands).reason
    assert reason is None if shapes in LARGE else "faster at this size" in reason


@pytest.mark.parametrize("explain", [wing.explain, partial(pyfused.explain, wing)])
def test_explain_names_the_device_before_the_size(explain: Any) -> None:
    x = torch.empty(9, device="meta")
    assert explain(x, x).reason == "input is on meta"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    nested = torch.nested.as_nested_tensor([torch.randn(2), torch.randn(3)])
    assert pyfused.activation(lambda a, b: a * b)(nested, nested).is_nested


def test_numbers_need_no_new_trace() -> None:
    """A parameter may be named like one of torch's deprecated arguments."""
    mine = pyfused.activation(
        lambda a, b, *, reduce=10.0, power=1.5, flag=False: (
            reduce * torch.log1p(reduce) * (a - b).abs() ** power + (b if flag else reduce)
        )
    )
    operands = [x.double() for x in operands_of("wing")]
    numbers = [{"reduce": x, "power": y} for x, y in product((0.5, 1, 2.0, 7), (1.25, 1.5, 2.5))]
    others = {"power": 2.0}, {"power": 2}, {"flag": True}, {"power": 2.0, "reduce": 3.0}
    for calls, traces in ((numbers, 1), (others, 3)):  # one for squares, and one for the flag
        for named in calls:
            check_formula(mine, *operands, **named)
        assert sum(x.source.trace.cache_info().currsize for x in mine.operators.values()) == traces


def test_static_parameters() -> None:
    """They are distinguished by type and value, and have a limited number of traces."""
    mine = pyfused.activation(
        lambda x, *, flag=False, k=2.5, power=2, kind="x": (
            (x * k if flag is True else x**3 if flag == 1 else x - k) ** power * len(kind)
        )
    )
    x, calls = torch.full((5,), 3.0), [{"flag": flag} for flag in (1, True, 0, False, True, 1)]
    calls += [{"flag": True, "k": k, "power": 1} for k in (0.0, -0.0, 0.0)]
    for named in (*calls, *[{"power": power} for power in range(40)]):
        got, expected = mine(x, **named), mine.function(x, **named)
        close(got, expected)
        assert torch.equal(got.signbit(), expected.signbit())
    assert "have had 32 values" in mine.explain(x, power=99).reason
    assert mine.explain(x, power=2).backend != "torch"
    assert torch.equal(mine(x, kind=[1, 2]), mine.function(x, kind="xy"))
    assert mine.explain(x, kind=[1, 2]).reason == "kind is a list"


@both_sizes
@pytest.mark.thresholds
def test_numbers_for_parameters_whose_default_is_none(n: int) -> None:
    """Each choice of the parameters that are numbers has its own operator."""
    mine = pyfused.activation(
        lambda x, *, p=None, q=None: (x if p is None else p * x) + (0.0 if q is None else q)
    )
    x = torch.ones(n)
    for named, value in (({"p": 0.5}, 0.5), ({"q": 0.5}, 1.5), ({}, 1.0)):
        assert torch.equal(mine(x, **named), torch.full((n,), value))


@pyfused.activation
def power(
    x: Tensor, *, k: Any = 1.5, exponent: int = 2, kind: str = "", least: Any = None
) -> Tensor:
    """x ** exponent with a factor; x if the parameters have other types than in a formula."""
    if not (isinstance(k, Tensor) and type(exponent) is int and type(kind) is str):
        return x
    value = k * torch.log1p(k) * x**exponent
    return value if least is None else torch.maximum(value, least)


TWOS = [torch.full(x, 2, dtype=y) for x in ((), (1,), (1, 1, 1)) for y in (*FLOATS, torch.int64)]
RECEIVED: list[dict[str, Any]] = [
    *({}, {"k": 2}, {"exponent": 3, "kind": "x"}, {"least": 0.25}, *[{"k": k} for k in TWOS])
]


@grid(named=RECEIVED, dtype=FLOATS, n=[20, 1 << 15])
@pytest.mark.thresholds
def test_what_a_formula_receives(named: dict[str, Any], dtype: torch.dtype, n: int) -> None:
    """Floats and tensors of one element are 0-d tensors; bools, ints and strings are unchanged."""
    x, number = torch.randn(n, dtype=dtype), float(named.get("k", 1.5))
    expected = number * math.log1p(number) * x.double() ** named.get("exponent", 2)
    got = power(x, **named)
    assert got.dtype is dtype
    rtol, least = 2 * torch.finfo(dtype).eps, named.get("least", -math.inf)
    close(got.double(), expected.clamp(min=least), rtol=rtol, atol=1e-6)


@both_sizes
@pytest.mark.thresholds
def test_parameters_that_are_tensors(n: int) -> None:
    """torch computes the gradient of one element; others are errors."""
    x, k = torch.ones(n), torch.full((1, 1), 2.0, requires_grad=True)
    power(x, k=k).sum().backward()
    close(k.grad, torch.full((1, 1), n * (math.log(3) + 2 / 3)))
    assert power.explain(x, k=k).backend == "torch"
    tensor = r"a Tensor of shape \(3,\); make it an operand"
    both = r"\[1.0, 2.0\]; make it an operand"
    for wrong, words in ((torch.ones(3), tensor), ([1.0, 2.0], both), ("x", "'x'")):
        for call in (power, power.explain):
            with pytest.raises(TypeError, match=f"k: expected a number or a tensor .* got {words}"):
                call(x, k=wrong)


OVERFLOWS = (
    "x * (j * j / j) + k", "x.abs() ** j * k", "j * k * x / k", "(j * k) ** 2 * (x - j) / (j * k)",
    "torch.where(x > j, j, k) * k * x", "j * (x * x) / k - j", "x * torch.sigmoid(x) * j * k",
    "x * 1e15 * 3e4 * j * k", "torch.where(x > 0, j, -1.0) * (k * (x * x))",
)  # fmt: skip


@pytest.mark.parametrize("code", OVERFLOWS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_parameters_overflow_like_torchs(code: str, as_tensor: bool) -> None:
    """Numbers are float32 if the operands are."""
    mine, values = defined("x, *, j=1.0, k=2.0", code), [0.5, -0.5, 3.0, 1e-25, 1e25]
    x = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-30, 1e30, math.inf, -math.inf, math.nan])
    kind: Any = (lambda value: torch.tensor([[value]])) if as_tensor else float
    for j, k in product([*values, -1e30, math.inf], repeat=2):
        check_formula(mine, x.requires_grad_(), rtol=1e-5, atol=1e-36, j=kind(j), k=kind(k))


@pytest.mark.parametrize("code", ["x.abs() ** (1 / p)", "x ** (p - 1)", "(2 * x).pow_(p)", "x**-2"])
def test_exponents_with_their_own_kernels(code: str) -> None:
    """They keep the sign of 0, and powers below the smallest normal number."""
    mine = defined("x, *, p=1.0", code if "p" in code else f"{code} * p")
    values = (1e-20, 1e15, 1e20, 1e22, 3e38, 0.0, 1.0, 2.5, math.inf)
    x = torch.tensor([*values, *[-each for each in values], math.nan], requires_grad=True)
    for p in (0.0, -0.0, 0.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 1.3):
        check_formula(mine, x, rtol=1e-5, atol=1e-44 if DEVICE == "cpu" else 1e-38, p=p)


def chained(waves: list[Tensor]) -> Tensor:
    total = sum(waves[1:], waves[0])
    for wave in waves[::-1]:
        total = total * wave + wave
    return total


def test_many_parameters_and_registers(kernel_calls: KernelCalls) -> None:
    """All sines are needed until the last sum, so each needs a register."""
    mine = pyfused.activation(
        lambda x, *, a=0.5, b=1.5, c=0.25, d=2.0, e=0.75, f=3.0, g=1.25, h=4.0: chained(
            [torch.sin(k * x) for k in (a, b, c, d, e, f, g, h, *range(1, 13))]
        )
    )
    for k, name in enumerate("abcdefgh"):
        check_formula(mine, torch.randn(40, dtype=torch.float64), **{name: 0.1 * k})
    assert kernel_calls[mine.op.name] == 8


# A step function with a user's gradient, which is None for y.
step = pyfused.activation(lambda x, y, *, width=1.0: torch.where(x > 0, 1.0, 0 * x) + 0 * y * width)
step.gradient(lambda x, y, *, width=1.0: (torch.where(x.abs() < width, 0.5 / width, 0 * x), None))


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
    for strict in (True, False):
        program = torch.export.export(step.module(), (x.detach(), other.detach()), strict=strict)
        close(program.module()(x, other), step(x, other))
    cubes = pyfused.loss(lambda a, b, *, k=0.5: k * (a - b) ** 3)
    cubes.gradient(lambda a, b, *, k=0.5: (3 * k * (a - b) ** 2, -3 * k * (a - b) ** 2))
    smooth = [y.double()[:9].requires_grad_() for y in operands_of("wing")]
    assert torch.autograd.gradcheck(cubes, smooth)
    assert torch.autograd.gradgradcheck(cubes, smooth)


def test_invalid_user_gradients() -> None:
    mine = pyfused.activation(lambda input, *, k=1.0: k * input)
    wrong: tuple[tuple[Any, str], ...] = (
        (lambda input: input, r"expected the parameters \['input', 'k'\], got"),
        (lambda input, *, k=1.0: (k * input, 1), "a tensor or None for each of 1 operands"),
        (lambda input, *, k=1.0: k * HALF_PI[0], "HALF_PI, a list"),
    )
    for slopes, words in wrong:
        with pytest.raises(TypeError, match=words):
            mine.gradient(slopes)
    outer = pyfused.activation(lambda x: mine(x) + 1)
    with pytest.raises(RuntimeError, match="no other formula that calls"):
        mine.gradient(lambda input, *, k=1.0: k * input)
    x = torch.ones(5, requires_grad=True)
    for function in (mine, mine.function):
        assert torch.equal(torch.autograd.grad(function(x, k=3.0).sum(), x)[0], 3 * x)
    assert torch.equal(outer(x), 2 * x)


def test_modules_pickles_and_copies() -> None:
    (input, target), module = operands_of("wing", 20), wing.module(omega=5.0, reduction="sum")
    assert torch.equal(wing(target=target, input=input), wing(input, target))
    for same in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(same(input, target), wing(input, target, omega=5.0, reduction="sum"))
    assert "omega=5.0" in repr(module)
    with pytest.raises(TypeError, match=r"'omega'.*got \['omga'\]"):
        wing.module(omga=5.0)
    with pytest.raises(TypeError, match="reduction"):
        mish.module(reduction="sum")
    assert copy.deepcopy(wing) is copy.copy(wing) is wing
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for formula in (wing, Settings.negated):
            assert pickle.loads(pickle.dumps(formula, protocol)) is formula
        for not_found in (squared, renamed):  # their names refer to the functions
            with pytest.raises(pickle.PicklingError):
                pickle.dumps(not_found, protocol)


def halved(x: Tensor) -> Tensor:
    return x / 2


renamed = pyfused.activation(halved)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_formulas_that_are_defined_in_compiled_functions() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        @pyfused.loss
        def squares(x: Tensor, y: Tensor, *, k: float = 2.0) -> Tensor:
            return k * (x - y) ** 2

        @squares.gradient
        def _(x: Tensor, y: Tensor, *, k: float = 2.0) -> Any:
            return 5 * k * (x - y), None

        return squares(2 * x, y, reduction="sum") + pyfused.activation(halved)(x).mean()

    x, y = torch.randn(2, 20).unbind()
    x.requires_grad_()
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        close(compiled(x, y), step(x, y))
        close(torch.autograd.grad(compiled(x, y), x), torch.autograd.grad(step(x, y), x))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="aot_eager", fullgraph=True)(x, y)


SIGNATURE, EXPANDS = r"wing\(input, target, \*, omega=10.*reduction=", "weight: .* broadcasts to"
WRONG_CALLS: tuple[tuple[Callable[[Tensor, Tensor], Any], str], ...] = (
    (lambda x, y: wing(x, y, omga=1.0), f"'omga': expected {SIGNATURE}"),
    (lambda x, y: wing(x), r"wing.*target"),
    (lambda x, y: wing(x, y, reduction="avg"), "reduction: expected 'none', 'mean' or 'sum'"),
    (lambda x, y: mish(x, reduction="sum"), "reduction"),
    (lambda x, y: wing(x, y[:7]), "size of tensor"),
    (lambda x, y: wing(x, y, weight=x.expand(3, -1)), EXPANDS),
    (lambda x, y: wing(x, y, weight=2.0), "weight: expected a Tensor, got float"),
    (lambda x, y: step(x, y, width=x[:1].requires_grad_()), "width: .* without a gradient"),
    (lambda x, y: wing(x, y.long()), r"target: .* mask, got torch.int64; .*target\.to\("),
    (lambda x, y: wing.explain(x.byte(), y), r"input: .* mask, got torch.uint8"),
    (lambda *x: wing(*x, *x, 1), r"too many .* expected wing\(.*\), got 5 positional arguments"),
)


@both_sizes
@pytest.mark.thresholds
@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_invalid_arguments(call: Callable[..., Any], words: str, n: int) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        call(*operands_of("wing", n))


@pytest.mark.thresholds
def test_formulas_are_freed() -> None:
    """With their functions, after calls of kernels and of torch's operators."""
    mine = pyfused.loss(lambda input, target, *, k=1.0: k * (2 * input - target) ** 2)
    mine.gradient(lambda input, target, *, k=1.0: (4 * k * (2 * input - target), None))
    references = [weakref.ref(x) for x in (mine, mine.written, mine.captured, mine.slopes)]
    x = torch.rand(1 << 15, requires_grad=True)
    for n in (len(x), 1):
        mine(x[:n], torch.zeros(n), k=0.5).backward()
    del mine
    gc.collect()
    assert not any(reference() for reference in references)


# ---- refused definitions -------------------------------------------------------------------------

SCALE, HALF_PI, HALF = 2.0, [math.pi / 2], torch.tensor(0.5)
PAIR, KIND, HALF_OF_NUMPY = (0.5, 2), "double", numpy.float64(0.5)


class Settings:
    scale, absolute, factors = 2.0, torch.abs, [3.0]

    @staticmethod
    @pyfused.activation
    def negated(input: Tensor) -> Tensor:
        return -input

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


def helper(input: Tensor, power: int = 2, *, scale: float = 1.0) -> Tensor:
    return input * scale if power == 0 else input * helper(input, power - 1)


without_grad = torch.no_grad()(scaled)
times_list = partial(torch.mul, other=[2.0])
# Names and attributes that a formula may not read.
UNREADABLE = (
    ("x * (2 if type(x) is Tensor else 3)", "the type of a tensor, which may differ"),
    ("x * HALF_PI[0]", "it reads HALF_PI, a list, which may change; pass it as an argument"),
    ("(lambda y: y * HALF)(x)", "reads HALF, a Tensor"), ("without_grad(x)", "reads without_grad"),
    ("x * getattr(F, 'relu')(x)", "reads getattr"), ("x * wing.module()(x, y)", "'module'"),
    ("with_list(x)", "reads a default of with_list, a list"),
    ("times_list(x)", "reads an argument of times_list, a list"),
    ("x * helper.scale", "'function' object has no attribute 'scale'"),
    ("x * Settings.factors[0]", r"line . of <string>: it reads Settings\.factors, a list"),
    ("try: return x * Settings.factors[0]\n    except: return x", r"Settings\.factors, a list"),
    ("Settings.of_class(x)", r"reads Settings\.of_class\. A formula reads only"),
    ("Settings() * x", r"calls Settings\. A formula"), ("torch.nn.ReLU()(x)", r"calls torch\.nn\."),
    ("x * copy.copy(2.0)", "copy: it reads"),
    ("torch.finfo(x.dtype).eps * x", "supports dtype, whose result may differ"),
    ("wing.defaults['omega'] * x", "no attribute 'defaults'"),
    ("x if torch.is_grad_enabled() else -x", r"reads torch\.is_grad_enabled"),
    ("x * torch.rand_like(x)", r"reads torch\.rand_like"),
    ("torch.absent(x)", "torch' has no attribute 'absent'"),
    ("absent(x)", "name 'absent' is not defined"),
    ("import cmath\n    return x * cmath.pi", "imports or assigns cmath"),
    ("global SCALE\n    SCALE = 3.0\n    return 2 * x", "imports or assigns SCALE"),
    ("x if x is y else x * y", "compares two values by 'is'"),
    ("try: return x / x.shape[-1]\n    except: return x", "supports shape, whose result may"),
)  # fmt: skip
NOT_FUSED = (
    ("x if x > 0 else -x", "torch.where instead of 'if'"), ("x.half() + 1", "float16"),
    ("x - x.mean()", "no kernel supports mean; to reduce"),
    ("x if (x > 0).any() else -x", "no kernel supports any; an 'if' cannot depend"),
    ("x * F.dropout(x)", "no kernel supports dropout"),
    ("x[..., :1000]", "an index or a slice of a tensor"), ("x * len(x.type())", "supports type"),
    ("-F.log_softmax(x, -1)", "no kernel supports log_softmax; for a function of log-prob"),
    ("F.cross_entropy(x, y)", "no kernel supports cross_entropy; for a function of log-prob"),
    ("x * math.exp(x)", "torch's functions instead of math's"),
    ("x.nan_to_num() * 0.5", "nan_to_num: posinf and neginf depend on the dtype"),
    ("x if k > 1 else -x", "is read, but floats are tensors in a formula"),
    ("k.long() * x", "long casts to torch.int64"), ("k.half() * x", "half casts to torch.float16"),
    ("(x > y).to(torch.uint8) * 200 * x", "mul on integers of less than 64 bits"),
    ("((x > 0) + (y > 0)) * x", "a sum of bool tensors; use torch.logical_or"),
    ("torch.zeros(()).copy_(x)", "copy, which writes a tensor into a number"),
    ("x.masked_fill(x > 0, y)", "masked_fill with a value that is not a number"),
)  # fmt: skip
# Refused whatever the operands' shapes are; most are the identity for some shapes. For functions of
# torch, see test_accepted_functions_of_torch.
NOT_ELEMENTWISE = [(code, "no kernel") for code in (
    "x[x > 0]", "x.T", "x.squeeze()", "x.view(-1)", "x.view(torch.int64)", "x.expand(())",
    "x.broadcast_to(())", "x.chunk(2, -1)[0]", "sum(row for row in x)", "x.sum(-1)", "x @ y",
    "torch.stack([x, x]).sum(0)", "x.amax(())", "x.max(-1)[0]", "F.mse_loss(x, 2 * x)",
    "torch.ones(5, 1, 7) * x", "torch.tensor([1.0, 2.0]) * x", "x * x.shape[0]", "x * x.ndim",
    "x / len(x)", "x.to(x.device)", "torch.lgamma(x)", "torch.zeros_like(x).normal_()",
    "torch.zeros(()).normal_() * x", "torch.mul(x, y, out=torch.zeros_like(x))",
)]  # fmt: skip


def check_derivatives(formula: Formula, operands: Sequence[Tensor]) -> None:
    """Compares values, and first and second derivatives, with the function's."""
    found = list[Any]()
    for function in (formula, formula.function):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in operands]
        inputs = [x for x in leaves if x.requires_grad]
        value = function(*leaves)
        found.append([value])
        for twice in (False, True):
            weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
            options: Any = {"create_graph": twice, "materialize_grads": True}
            slopes = torch.autograd.grad(value, inputs, weights, retain_graph=True, **options)
            found[-1] += slopes
        total = sum(k * slope.sum() for k, slope in enumerate(slopes, 1)) + 0 * value.sum()
        found[-1] += torch.autograd.grad(total, inputs, materialize_grads=True)
    close(*found, rtol=1e-8, atol=1e-9, equal_nan=True)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore")
def test_accepted_functions_of_torch() -> None:
    """Calls every function of torch with operands, a mask among them, and with common options.

    Those that are accepted are elementwise, and their kernels compute torch's values and first and
    second derivatives, also beside other operators.
    """
    tables, accepted = get_overridable_functions().values(), set[str]()
    differentiated = set[str]()
    options = ((), {}), ((0.5, 1.5), {}), ((), {"reduction": "none"}), ((), {"dim": 0})
    calls = [*product((1, 2, 3), options, (False,)), *product((1, 2, 3), options[:1], (True,))]
    x = torch.rand(3, 2, 2, dtype=torch.float64)
    for function in {f for table in tables for f in table if callable(f)} - {torch.empty_like}:
        may_be = trace.is_elementwise(function.__name__)
        for count, (numbers, named), is_masked in calls if may_be else calls[:1]:

            def first(*operands: Tensor) -> Any:
                copies = [x.clone() for x in operands[:count]]  # noqa: B023
                result = function(*copies, *numbers, **named)  # noqa: B023
                return result[0] if isinstance(result, (tuple, list)) else result

            operands = [x[0] > 0.5 if is_masked else x[0], *x[1:]]
            dtypes = [each.dtype for each in operands]
            try:
                trace.expressions_of(lambda x, *_: [trace.elementwise(first(*x))], dtypes, {}, True)
            except Exception:
                continue
            accepted.add(function.__name__)
            each = [first(*[x.flatten()[k] for x in operands]) for k in range(4)]
            close(first(*operands), torch.stack(each).view(2, 2), msg=str(function))
            if is_masked:
                continue
            args = ["torch.add(a, a, alpha=-0.5)", "1 * b", "1 * c"][:count]
            args += [*map(repr, numbers), *[f"{name}={value!r}" for name, value in named.items()]]
            scope = {"function": function, "torch": torch}
            lines = f"y = function({', '.join(args)})\n y = y[0] if isinstance(y, tuple) else y"
            exec(f"def beside(a, b, c):\n {lines}\n return y * b + c * a", scope)
            with contextlib.suppress(UntraceableError):  # the derivative is not supported
                formula = pyfused.activation(scope["beside"])
                check_derivatives(formula, operands)
                differentiated.add(function.__name__)
    assert len(accepted) > 120, accepted
    assert len(differentiated) > 120, differentiated
    assert {"sgn", "abs", "silu", "hypot"} < differentiated
    assert accepted.isdisjoint(("inner", "matmul", "prelu"))


@pytest.mark.parametrize(("code", "words"), [*UNREADABLE, *NOT_FUSED, *NOT_ELEMENTWISE])
def test_refused_constructs(code: str, words: str) -> None:
    """Alone, and between two functions that kernels support; the error names the line."""
    with pytest.raises(UntraceableError, match=f"mine: .*{words}"):
        defined("x, y, *, k=2.0", code)
    if "return" not in code:
        line = "" if (code, words) in UNREADABLE else "line 4 of <string>: "
        between = f"y = x\n    x = torch.tanh(x)\n    return torch.exp({code}) * y"
        with pytest.raises(UntraceableError, match=f"mine: {line}.*{words}"):
            defined("x, y, *, k=2.0", between)


def test_attributes_that_only_some_calls_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are kept at the definition; torch computes calls that read what may change."""

    @pyfused.activation
    def mine(x: Tensor, *, kind: str = "") -> Tensor:
        if kind == "number":
            return x * Settings.scale
        try:
            return x * Settings.factors[0] if kind == "list" else Settings.tripled(x)
        except Exception:
            return x

    x = torch.randn(100)
    monkeypatch.setattr(Settings, "scale", 5.0)
    monkeypatch.setattr(Settings, "factors", [7.0])
    for kind, scale in (("number", 2.0), ("list", 7.0), ("", 3.0)):
        assert torch.equal(mine(x, kind=kind), scale * x)
        assert (mine.explain(x, kind=kind).backend == "torch") == (kind == "list")
    assert "reads Settings.factors, a list" in mine.explain(x, kind="list").reason


INVALID: tuple[tuple[Any, str], ...] = (
    (3, "function: expected a function with a name, got 3"),
    (lambda input, weight: input * weight, "pyfused adds the parameter weight"),
    (lambda a, b, c, d, e: a, "1 to 4 tensor operands, got 5"),
    (lambda *inputs: inputs[0], r"expected named parameters, got \*inputs"),
    (lambda input, *, factors=(1.0,): input * factors[0], "factors: expected a default .* a tuple"),
    (lambda input: (input, input), "expected the function to return one tensor, got tuple"),
    (lambda input: (input, None)[1], "return a tensor, got None; add a return"),
    (lambda input, *, k=2.0: k, "expected an elementwise formula, got one number"),
    ((lambda k: lambda x: x * k[0])([2.0]), "reads k, a list"),
    (Settings.of_class, "expected a Python function, got a method"),
    (lambda x: x if x.grad is None else -x, "no kernel supports grad"),
)


@pytest.mark.parametrize(("function", "words"), INVALID)
def test_invalid_definitions(function: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        pyfused.loss(function)


softplus_of_2 = partial(F.softplus, beta=2.0)
called_by_name = pyfused.loss(lambda a, b, *, k=2.0: k * (a - b).abs())


def of_closures() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    """Returns a function, and one that binds other objects to the names that it reads."""
    local = lambda x: sum(map(abs, [x * k for k in (1.0, math.log(4))]))  # noqa: E731
    number = 3.0

    def rebind() -> None:
        nonlocal local, number
        local, number = scaled, 5.0

    return lambda x: local(x) * number * torch.pi + F.softplus(x) + Tensor.abs(x), rebind


reads_closures, rebind_closures = of_closures()
REACHED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: formulas.F.silu(x) * formulas.mish(x) + F.mish(x) + torch.relu(x),
    lambda x: Settings.tripled(x) + (lambda settings: settings.absolute(x))(Settings),
    lambda x: softplus_of_2(x) * pi * math.e * numpy.pi,
    lambda x: partial(torch.clamp, min=-1.0)(x) + partial(Settings.tripled)(x),
    lambda x: torch.log(x.abs() + torch.finfo(torch.float32).eps),
    lambda x: scaled(x) ** PAIR[1] + x * SCALE if KIND == "double" else x,
    lambda x: (lambda y: y * HALF_OF_NUMPY)(x) * math.sqrt(SCALE) + Settings.scale * PAIR[0],
    lambda x: helper(x) + called_by_name(x, 0 * x, k=3.0, reduction="none"),
    reads_closures,
)


@pytest.mark.thresholds
@pytest.mark.parametrize("k", range(len(REACHED)))
def test_names_are_looked_up_at_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding them to others later, or reverting a patch, changes no call, of any size."""
    x = torch.linspace(-3, 3, 1 << 15)
    expected = REACHED[k](x)
    with pyfused.patch():
        mine = pyfused.activation(REACHED[k])
        close(mine(x), expected)
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    monkeypatch.setattr(formulas, "F", None)
    monkeypatch.setattr(Settings, "tripled", None)
    monkeypatch.setitem(softplus_of_2.keywords, "beta", 5.0)
    monkeypatch.setattr(helper, "__defaults__", (3,))
    monkeypatch.setitem(helper.__kwdefaults__, "scale", 5.0)
    monkeypatch.setattr(Settings, "scale", 5.0)
    others: dict[str, Any] = {"pi": 3.0, "helper": scaled, "called_by_name": scaled}
    others |= {"SCALE": 3.0, "PAIR": (1.0, 3), "KIND": "", "HALF_OF_NUMPY": 3.0}
    for name, value in others.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    if REACHED[k] is reads_closures:
        rebind_closures()
    assert (mine.explain(x[:8]).backend, mine.explain(x).backend == "torch") == ("torch", False)
    close(mine(x), expected)
    close(torch.cat([mine(part) for part in x.split(8)]), expected)
    close(compiled(x), expected)


SET_IN_TENSOR = (
    ("gain", SCALE, "x * Tensor.gain"), ("relu", scaled, "x.relu()"),
    ("scaled", property(scaled), "helper(x.scaled)"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value", "code"), SET_IN_TENSOR)
def test_what_a_program_sets_in_the_class_of_tensors(
    name: str, value: Any, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, name, value, raising=False)
    with pytest.raises(UntraceableError, match=f"reads torch.Tensor.{name}, which is not torch's"):
        defined("x", code)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weights_in_programs_with_dynamic_sizes(reduction: str) -> None:
    """The weight's size is static when the operands' sizes become dynamic."""

    def step(input: Tensor, target: Tensor, weight: Any = None) -> tuple[Tensor, ...]:
        named = {"weight": weight, "reduction": reduction}
        return squared(input, target, **named), focal_loss(input, target, **named)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    input, target = torch.randn(100), torch.rand(100)
    for n in (40, 50):
        compiled(input[:n], target[:n])
    for n, weight in ((40, torch.rand(40)), (50, torch.rand(1))):
        close(compiled(input[:n], target[:n], weight), step(input[:n], target[:n], weight))


@pytest.mark.cpu  # the interpreter supports only one thread
@pytest.mark.usefixtures("switching")
def test_threads_trace_at_once() -> None:
    """The anomaly detection of the program, which is global, stays."""
    formula = lambda: pyfused.activation(lambda x, *, k=1.0: k * x.exp())  # noqa: E731
    with torch.autograd.set_detect_anomaly(True), ThreadPoolExecutor(4) as pool:
        for k, value in enumerate(pool.map(lambda k: formula()(torch.zeros(3), k=k), range(40))):
            close(value, torch.full((3,), float(k)))
        assert torch.is_anomaly_enabled()


MODES = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
# Expressions of values a and b, which are operands, parameters and results of others. They rarely
# overflow or jump, so that most results are finite.
STEPS = (
    "abs(a)", "-a", "a.exp()", "a.tanh()", "a.sin()", "a.cos()", "a.sigmoid()", "a.erf()",
    "F.softplus(a)", "F.softplus(a, beta=2.0, threshold=0.5)", "torch.log(1 + torch.exp(a))",
    "a.floor()", "torch.hypot(a, 1 - a)", "torch.logaddexp(a, 2 * a)", "torch.sqrt(a * a + 0.1)",
    "torch.log(a.abs() + 0.5)", "torch.log1p(a * a)", "a.expm1()", "a.relu()", "a**2", "a**3",
    "1 / (a.abs() + 0.3)", "(a.abs() + 0.2) ** 1.3", "a.clamp(-0.7, 1.1)", "0.5 * a", "1 - a",
    "a.sign()", "a.bool() * (a + 1)", "(a > 0).type_as(a)", "F.logsigmoid(a)", "F.silu(a)",
    "torch.logical_not(a.relu()) * a + torch.logical_not(torch.logical_not(a))",
    "torch.rsqrt(a * a + 1)", "a + b", "a - b", "a * b", "torch.minimum(a, b)", "a / (b * b + 0.5)",
    "torch.maximum(a, b)", "torch.where(a < b, a, b * 2)", "(a == b) * a", "a.clamp(min=b)",
    "torch.logical_and(a.relu(), b) * a", "torch.logical_xor(a > 0, b.relu()).type_as(a) - b",
    "torch.where(torch.logical_or(a.relu(), b < 0.25), b, 2 * a)", "(a.abs() + 0.5) ** b",
    "torch.where((a > 0) | (b <= 0.5), a + b, a * b)",
    "torch.where(a < b, torch.log(1 + torch.exp(a)), F.softplus(b - a))",
)  # fmt: skip
MASKS = "m.float()", "(m != 0).float()", "m / 3", "torch.where(m, 1.5, -0.5)", "(~m).float() * 0.5"
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5, -1.5, 0.3, 1.7, 2e18])


@st.composite
def random_formulas(draw: st.DrawFn) -> tuple[int, bool, list[str]]:
    """Draws the number of operands, whether the last one is a mask, and the code of a formula."""
    operands, lines = draw(st.integers(1, 3)), list[str]()
    values = ["j", "k", *[f"v{n}" for n in range(operands)]]
    total = " + ".join(values[2:])
    if is_masked := operands > 1 and draw(st.booleans()):
        lines += [f"m = {values[-1]}", f"{values[-1]} = {draw(st.sampled_from(MASKS))}"]
    for n in range(operands, operands + draw(st.integers(1, 15))):
        a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        lines += [f"a, b = {a}, {b}", f"v{n} = {draw(st.sampled_from(STEPS))}"]
        values.append(f"v{n}")
    return operands, is_masked, [*lines, f"return {values[-1]} + 0.125 * ({total})"]


@pytest.mark.skipif(DEVICE != "cpu", reason="compares kernels for tensors of the CPU")
@given(random_formulas(), st.sampled_from([*MODES]), st.tuples(NUMBERS, NUMBERS))
@settings(max_examples=20 if interpreter.ON else max(80, settings().max_examples))
def test_random_programs(drawn: Any, mode: str, numbers: tuple[float, float]) -> None:
    """Compares kernels with torch's operators, for numbers that the definition has not traced."""
    operands, is_masked, lines = drawn
    names = ", ".join(f"v{n}" for n in range(operands))
    with MODES[mode]():
        formula = defined(f"{names}, *, j=0.7, k=1.3", "\n    ".join(lines))
    masks = (*[False] * (operands - 1), is_masked)
    op, kernels = formula.operator(masks, {}), backend_of(torch.empty(0)).pointwise_loss
    for dtype in FLOATS[:2] if kernels is not cpu.pointwise_loss else FLOATS[1:2]:
        check(op, numbers, kernels, dtype)
    x = torch.randn(operands, 7, dtype=torch.float64)
    x = [(each > 0).double() if mask else each for each, mask in zip(x, masks, strict=True)]
    options = op.options(*numbers, "none")
    cases = op.source.cases_of(options)

    def gradients(wanted: tuple[bool, ...]) -> Sequence[Tensor | None]:
        outputs = Outputs(False, wanted)
        program, parameters = op.source.find(cases, operands, outputs)
        return kernels(program, x, None, parameters(options), "none", outputs)[1]

    of_all = gradients((True,) * operands)
    for wanted in product([False, True], repeat=operands):  # a subset of the instructions
        for one, other, is_wanted in zip(gradients(wanted), of_all, wanted, strict=True):
            assert (one is None) != is_wanted
            assert one is None or torch.equal(one.nan_to_num(), other.nan_to_num())
