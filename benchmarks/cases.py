"""What is measured: the cases, one a line, and their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Step
from settings import AS_IT_COMES, CURRENT, torch_in
from torch import Tensor
from torch.nn import functional as F

import pyfused.functional
from pyfused.ops.declaration import Operand
from pyfused.ops.operators import OPERATORS


def of_family(*families: str) -> tuple[str, ...]:
    """Operators by their families' names: a revision compared with may not have all of these."""
    return tuple(name for name, op in OPERATORS.items() if type(op).__name__ in families)


POINTWISE, ACTIVATIONS = of_family("PointwiseLoss", "Composed"), of_family("Activation")
SOFTMAX = of_family("Softmax")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
M = 1 << 20
MODES = "forward", "forward+backward"


class Torchs:
    """torch's operators, and in its terms those that it does not have."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        setattr(self, op, getattr(F, op) if hasattr(F, op) else OPERATORS[op].reference)
        return getattr(self, op)


TORCH = Torchs()


class Compiled:
    """torch's operators, each compiled by itself, as Inductor does by default."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        setattr(self, op, torch.compile(getattr(TORCH, op)))
        return getattr(self, op)


# What pyfused is compared with: a name for the reports, and where its operators are.
PEERS: dict[str, Any] = {torch_in(CURRENT): TORCH}
if AS_IT_COMES:
    PEERS["torch.compile"] = Compiled()


@dataclass(frozen=True)
class Case:
    """One call of an operator. Of losses over classes the shape is (N, C, d1, ..., dk)."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    weight: bool = False
    further: bool = False  # the operand that a pointwise loss may do without
    smoothing: float = 0.0
    probabilities: bool = False
    ignored: float = 0.0  # the share of the targets
    reduction: str = "mean"
    autocast: bool = False
    headline: bool = False  # in the README's table, and run by `-m quick`
    curve: str = ""  # a point of the picture of time against "elements" or "classes"

    @property
    def name(self) -> str:
        options = {
            "weight": self.weight,
            "further operand": self.further,
            f"smoothing {self.smoothing}": self.smoothing,
            "probability target": self.probabilities,
            f"{self.ignored:.0%} ignored": self.ignored,
            f"reduction {self.reduction}": self.reduction != "mean",
            "autocast": self.autocast,
        }
        shape = ", ".join(_count(size) for size in self.shape)
        dtype = str(self.dtype).removeprefix("torch.")
        chosen = [f"{self.op} ({shape}) {dtype}", *(name for name, on in options.items() if on)]
        return ", ".join(chosen)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def traffic(self, mode: str) -> int:
        """How many tensors of the input's size must at least be read or written."""
        backward = mode != "forward"
        if self.op in (*ACTIVATIONS, *SOFTMAX):
            return 5 if backward else 2
        if self.op == "nll_loss":
            return int(backward)
        if self.op in POINTWISE:
            return len(variables(self)) + backward
        return 1 + self.probabilities + backward


def variables(case: Case) -> tuple[Operand, ...]:
    """The operands of a pointwise loss that a case gives."""
    op: Any = OPERATORS[case.op]
    variables = getattr(op, "of", op).variables
    return tuple(o for o in variables if case.further or not o.optional)


def _count(size: int) -> str:
    return f"{size // M} M" if size >= M and size % M == 0 else str(size)


CASES = (
    Case("cross_entropy", (1024, 32000), headline=True),
    Case("cross_entropy", (1024, 32000), BF16, headline=True),
    Case("cross_entropy", (1024, 32000), BF16, autocast=True),
    Case("cross_entropy", (1024, 32000), ignored=0.5),
    Case("cross_entropy", (1024, 128256)),
    Case("cross_entropy", (8192, 1000), headline=True),
    Case("cross_entropy", (8192, 1000), BF16),
    Case("cross_entropy", (8192, 1000), weight=True, smoothing=0.1),
    Case("cross_entropy", (8192, 1000), probabilities=True, headline=True),
    Case("cross_entropy", (8192, 1000), reduction="none"),
    Case("cross_entropy", (256, 1000)),
    Case("cross_entropy", (65536, 10), headline=True),
    Case("cross_entropy", (64, 10)),
    Case("cross_entropy", (8, 21, 256, 256), headline=True),
    Case("nll_loss", (1024, 32000), headline=True),
    Case("nll_loss", (64, 10)),
    Case("multi_margin_loss", (8192, 1000), headline=True),
    Case("multi_margin_loss", (64, 10)),
    *(Case(op, (1024, 32000), dtype) for op in SOFTMAX for dtype in (F32, BF16)),
    *(Case(op, (8, 16, 512, 512), headline=True) for op in SOFTMAX),
    *(Case(op, (64, 10)) for op in SOFTMAX),
    *(Case(op, (n,)) for op in POINTWISE for n in (100, M)),
    *(Case(op, (32 * M,), headline=True) for op in POINTWISE),
    *(Case(op, (32 * M,), BF16) for op in POINTWISE),
    Case("binary_cross_entropy_with_logits", (32 * M,), further=True),
    *(
        Case(op, (n,), dtype)
        for op in ACTIVATIONS
        for n, dtype in ((100, F32), (M, F32), (M, BF16))
    ),
    *(Case(op, (32 * M,), headline=True) for op in ACTIVATIONS),
    *(Case(op, (32 * M,), BF16) for op in ACTIVATIONS),
)

OPS = tuple(dict.fromkeys(case.op for case in CASES))

SIZES = (*(1 << k for k in range(10, 28, 2)), 100 * 10**6)
CURVES = (
    *(Case("cross_entropy", (n // 1000 or 1, 1000), curve="elements") for n in SIZES),
    *(Case(op, (n,), curve="elements") for op in ("mse_loss", "relu") for n in SIZES),
    *(Case("cross_entropy", ((1 << 24) >> k, 1 << k), curve="classes") for k in range(1, 19)),
)


@dataclass
class Arguments:
    input: Tensor
    others: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    grad_output: Tensor | None = None  # the gradient of a result that is no scalar

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same values in another dtype, on a leaf of its own."""

        def convert(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return Arguments(
            self.input.detach().to(dtype).requires_grad_(),
            tuple(map(convert, self.others)),
            {name: convert(value) for name, value in self.options.items()},
            convert(self.grad_output),
        )


def draw(case: Case, device: str = "cpu") -> Arguments:
    """Arguments of full scale, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    here: dict[str, Any] = {"generator": generator, "device": device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **here).to(case.dtype)

    def within(operand: Operand) -> Tensor:
        """Values of the bounds that the operand declares."""
        if operand.sign:
            return normal(*case.shape).sign()
        if math.isinf(operand.low):
            return normal(*case.shape)
        span = min(operand.high - operand.low, 2.0)
        return (operand.low + span * torch.rand(case.shape, **here)).to(case.dtype)

    first = OPERATORS[case.op].operands[0]
    input = (within(first) if first.enforced else normal(*case.shape)).requires_grad_()
    if case.op in ACTIVATIONS:
        return Arguments(input, grad_output=normal(*case.shape))
    if case.op in SOFTMAX:
        return Arguments(input, options={"dim": -1}, grad_output=normal(*case.shape))
    grad_output, options = None, {}
    if case.op in POINTWISE:
        target, *further = map(within, variables(case)[1:])
        others, shape = (target,), case.shape
        options = {o.name: x for o, x in zip(variables(case)[2:], further, strict=True)}
    else:
        classes, shape = case.shape[1], case.shape[:1] + case.shape[2:]
        options = {"label_smoothing": case.smoothing} if case.smoothing else {}
        if case.weight:
            options["weight"] = normal(classes).abs()
        if case.probabilities:
            others = (normal(*case.shape).softmax(1),)
        else:
            indices = torch.randint(classes, shape, **here)
            ignored = torch.rand(shape, **here) < case.ignored
            others = (indices.masked_fill(ignored, -100),)
    if case.reduction == "none":
        grad_output = normal(*shape)
    return Arguments(input, others, options | {"reduction": case.reduction}, grad_output)


def operator(operators: Any, case: Case) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(operators, case.op)
    return torch.autocast("cpu", torch.bfloat16)(function) if case.autocast else function


def step(operators: Any, case: Case, arguments: Arguments, mode: str) -> Step:
    """One call as a user makes it, of one peer."""
    function, a = operator(operators, case), arguments
    if mode != "forward":
        return training_step(function, a)
    constant = a.input.detach()

    def forward() -> None:
        function(constant, *a.others, **a.options)

    return forward


def training_step(function: Callable[..., Tensor], arguments: Arguments) -> Step:
    """Forward and backward as in a loop: the last step's gradient is freed, a new one is made.

    On a leaf of its own with the arguments' values, so that nobody frees the gradient of another.
    """
    a = arguments
    leaf = a.input.detach().requires_grad_()

    def forward_and_backward() -> None:
        leaf.grad = None
        function(leaf, *a.others, **a.options).backward(a.grad_output)

    return forward_and_backward


def assert_right(case: Case, arguments: Arguments) -> None:
    """Value and gradient are torch's, bit for bit or within a rounding of a wider torch."""
    wide = arguments.to(F64 if arguments.input.numel() <= 8 * M else F32)
    exact = evaluate(getattr(TORCH, case.op), wide)
    native = evaluate(operator(TORCH, case), arguments)
    ours = evaluate(operator(pyfused.functional, case), arguments)
    for got, of_torch, expected in zip(ours, native, exact, strict=True):
        assert got.dtype == of_torch.dtype
        if not torch.equal(got, of_torch):
            scale = expected.abs().max().item()
            rtol = max(1e-5, 2 * torch.finfo(got.dtype).eps)
            torch.testing.assert_close(
                got.to(expected.dtype), expected, rtol=rtol, atol=1e-6 * scale
            )


def evaluate(function: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, Tensor]:
    a = arguments
    value = function(a.input, *a.others, **a.options)
    (gradient,) = torch.autograd.grad(value, a.input, a.grad_output)
    return value.detach(), gradient
