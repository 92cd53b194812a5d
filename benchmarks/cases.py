"""Defines the benchmark cases and their arguments, and checks results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from timing import Step
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.dispatch.operator import Operand
from pyfused.ops.operators import OPERATORS


def of_family(*families: str) -> tuple[str, ...]:
    return tuple(name for name, op in OPERATORS.items() if op.family in families)


POINTWISE, ACTIVATIONS = of_family("PointwiseLoss"), of_family("Activation")
SOFTMAX, EMBEDDINGS = of_family("Softmax"), of_family("EmbeddingLoss")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
M = 1 << 20
MODES = FORWARD, TRAINING = "forward", "forward+backward"


class Torch:
    """torch's operators; operators that torch lacks are defined by torch code."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        setattr(self, op, getattr(F, op, None) or _by_torch(op))
        return getattr(self, op)


def _by_torch(op: str) -> Callable[..., Tensor]:
    """Returns the function of pyfused with torch's definition in place of `run`."""
    function = getattr(fused, op)
    definition = lambda op, tensors, *options: op.torch(*tensors, *options)  # noqa: E731
    names = {**vars(fused), "run": definition}
    copy = FunctionType(function.__code__, names, op, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


TORCH = Torch()


class Compiled:
    """Operators, each compiled separately with torch.compile's default options."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        setattr(self, op, torch.compile(getattr(TORCH, op)))
        return getattr(self, op)


# ---- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of an operator. The shape is (N, C, d1, ..., dk) for losses over classes."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    weight: bool = False
    optional: bool = False  # whether to pass the optional operands of a pointwise loss
    smoothing: float = 0.0
    probabilities: bool = False
    ignored: float = 0.0  # the fraction of ignored targets
    masked: float | None = None  # the value of half of the elements in each softmax
    padded: bool = False  # whether the last elements of each softmax, a random number, are -inf
    spread: float = 1.0  # standard deviation of the input; a large one saturates activations
    reduction: str = "mean"
    dim: int = -1  # the dimension of a softmax
    autocast: bool = False
    layouts: tuple[str, str] = ("", "")  # of the input and of other tensors of its shape
    headline: bool = False  # counted in docs/is-it-for-you.md; run by `-m quick`

    @property
    def name(self) -> str:
        options = {
            "weight": self.weight,
            "optional operands": self.optional,
            f"smoothing {self.smoothing}": self.smoothing,
            "probability target": self.probabilities,
            f"{self.ignored:.0%} ignored": self.ignored,
            f"half {self.masked}": self.masked is not None,
            "padded": self.padded,
            f"spread {self.spread:g}": self.spread != 1,
            f"reduction {self.reduction}": self.reduction != "mean",
            f"dim {self.dim}": self.dim != -1,
            "autocast": self.autocast,
            " and ".join(dict.fromkeys(filter(None, self.layouts))): any(self.layouts),
        }
        shape = ", ".join(_count(size) for size in self.shape)
        dtype = str(self.dtype).removeprefix("torch.")
        chosen = [f"{self.op} ({shape}) {dtype}", *(name for name, on in options.items() if on)]
        return ", ".join(chosen)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def traffic(self, mode: str) -> int:
        """Returns the minimum memory traffic, in multiples of the input's size."""
        backward = mode == TRAINING
        if self.op in (*ACTIVATIONS, *SOFTMAX):
            return 5 if backward else 2
        if self.op in EMBEDDINGS:
            return (3 if self.op == "triplet_margin_loss" else 2) + backward
        if self.op == "nll_loss":
            return int(backward)
        if self.op in POINTWISE:
            return len(operands(self)) + backward
        return 1 + self.probabilities + backward


def operands(case: Case) -> tuple[Operand, ...]:
    """Returns the operands of a pointwise loss that a case passes."""
    op: Any = OPERATORS[case.op]
    return tuple(o for o in getattr(op, "of", op).variables if case.optional or not o.optional)


def _count(size: int) -> str:
    return f"{size // M} M" if size >= M and size % M == 0 else str(size)


CASES = (
    Case("cross_entropy", (1024, 32000), headline=True),
    Case("cross_entropy", (1024, 32000), BF16, headline=True),
    Case("cross_entropy", (1024, 32000), BF16, autocast=True),
    Case("cross_entropy", (1024, 32000), ignored=0.5),
    Case("cross_entropy", (1024, 32000), masked=-math.inf),
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
    *(Case(op, (65536, 256), headline=True) for op in EMBEDDINGS),
    *(Case(op, (65536, 256), BF16) for op in EMBEDDINGS),
    *(Case(op, (16, 128)) for op in EMBEDDINGS),
    *(Case(op, (1024, 32000), dtype) for op in SOFTMAX for dtype in (F32, BF16)),
    *(Case(op, (8, 16, 512, 512), headline=True) for op in SOFTMAX),
    *(
        Case(op, (8, 16, 256, 256), masked=masked)
        for op in SOFTMAX
        for masked in (-math.inf, -1e4, -95.0)
    ),
    *(Case(op, (64, 10)) for op in SOFTMAX),
    *(Case(op, (n,)) for op in POINTWISE for n in (100, M)),
    *(Case(op, (32 * M,), headline=True) for op in POINTWISE),
    *(Case(op, (32 * M,), BF16) for op in POINTWISE),
    Case("binary_cross_entropy_with_logits", (32 * M,), optional=True),
    *(
        Case(op, (n,), dtype)
        for op in ACTIVATIONS
        for n, dtype in ((100, F32), (M, F32), (M, BF16))
    ),
    *(Case(op, (32 * M,), headline=True) for op in ACTIVATIONS),
    *(Case(op, (32 * M,), BF16) for op in ACTIVATIONS),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


# ---- arguments -----------------------------------------------------------------------------------


@dataclass
class Arguments:
    input: Tensor
    others: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    grad_output: Tensor | None = None  # None if the result is a scalar

    def to(self, dtype: torch.dtype) -> Arguments:
        """Returns a copy in another dtype, with a new leaf."""

        def convert(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return Arguments(
            self.input.detach().to(dtype).requires_grad_(),
            tuple(map(convert, self.others)),
            {name: convert(value) for name, value in self.options.items()},
            convert(self.grad_output),
        )


# Tensors of two or more dimensions as programs pass them, with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "sliced": lambda x: torch.cat([x, x[..., :8]], -1)[..., : x.shape[-1]],
    "chunk": lambda x: torch.cat([x, x], -1).chunk(2, -1)[1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "heads": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
}


def draw(case: Case, device: str = "cpu") -> Arguments:
    """Returns random arguments, which are the same in every run."""
    arguments = _contiguous(case, device)
    if not any(case.layouts):
        return arguments
    of_input, of_others = (LAYOUTS[name] for name in case.layouts)
    x = arguments.input.detach()
    others = [of_others(y) if y.shape == x.shape else y for y in arguments.others]
    return replace(arguments, input=of_input(x).requires_grad_(), others=tuple(others))


def _contiguous(case: Case, device: str) -> Arguments:
    generator = torch.Generator(device).manual_seed(0)
    here: dict[str, Any] = {"generator": generator, "device": device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **here).to(case.dtype)

    def within(operand: Operand) -> Tensor:
        """Returns values within the operand's declared bounds."""
        if operand.sign:
            return normal(*case.shape).sign()
        if math.isinf(operand.low):
            return normal(*case.shape)
        span = min(operand.high - operand.low, 2.0)
        return (operand.low + span * torch.rand(case.shape, **here)).to(case.dtype)

    first = OPERATORS[case.op].operands[0]
    input = within(first) if first.low == 0 else normal(*case.shape) * case.spread
    if case.masked is not None:
        input = torch.where(torch.rand(case.shape, **here) < 0.5, case.masked, input)
    if case.padded:
        dim = case.dim if case.op in SOFTMAX else 1
        kept = torch.rand_like(input.narrow(dim, 0, 1), dtype=F32) * case.shape[dim]
        scores = input.movedim(dim, -1)
        scores[torch.arange(case.shape[dim]) > kept.movedim(dim, -1)] = -math.inf
    input.requires_grad_()
    if case.op in ACTIVATIONS:
        return Arguments(input, grad_output=normal(*case.shape))
    if case.op in SOFTMAX:
        return Arguments(input, options={"dim": case.dim}, grad_output=normal(*case.shape))
    grad_output, options = None, {}
    if case.op in EMBEDDINGS:
        shape = case.shape[:1]
        others = tuple(
            normal(*shape).sign() if operand.sign else normal(*case.shape)
            for operand in OPERATORS[case.op].operands[1:]
        )
    elif case.op in POINTWISE:
        target, *optional = map(within, operands(case)[1:])
        others, shape = (target,), case.shape
        options = {o.name: x for o, x in zip(operands(case)[2:], optional, strict=True)}
    else:
        classes, shape = case.shape[1], case.shape[:1] + case.shape[2:]
        options = {"label_smoothing": case.smoothing} if case.smoothing else {}
        if case.weight:
            options["weight"] = normal(classes).abs()
        if case.probabilities:
            others = (normal(*case.shape).softmax(1),)
        else:
            indices = torch.randint(classes, shape, **here)
            if case.masked is not None or case.padded:  # targets are not masked
                input.detach().scatter_(1, indices.unsqueeze(1), 1.0)
            ignored = torch.rand(shape, **here) < case.ignored
            others = (indices.masked_fill(ignored, -100),)
    if case.reduction == "none":
        grad_output = normal(*shape)
    return Arguments(input, others, options | {"reduction": case.reduction}, grad_output)


# ---- calls ---------------------------------------------------------------------------------------


def operator(operators: Any, case: Case) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(operators, case.op)
    return torch.autocast("cpu", torch.bfloat16)(function) if case.autocast else function


def step(operators: Any, case: Case, arguments: Arguments, mode: str = TRAINING) -> Step:
    """Returns a function that runs the forward pass, or forward and backward as in training.

    A training step first frees the gradient of the previous step. Each step function has its own
    leaf, because it must not free another function's gradient.
    """
    function, a = operator(operators, case), arguments
    leaf = a.input.detach().requires_grad_(mode == TRAINING)

    def forward() -> None:
        function(leaf, *a.others, **a.options)

    def forward_and_backward() -> None:
        leaf.grad = None
        function(leaf, *a.others, **a.options).backward(a.grad_output)

    return forward_and_backward if mode == TRAINING else forward


def copy_step(case: Case, mode: str, device: str = "cpu") -> Step:
    """Returns a function that copies as many bytes as the case has to read and write."""
    source = torch.ones(case.traffic(mode) * case.bytes // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def assert_correct(
    case: Case, arguments: Arguments, ours: Any = fused, theirs: Any = TORCH
) -> None:
    """Checks that value and gradient equal torch's, or are about as accurate."""
    wide = arguments.to(F64 if arguments.input.numel() <= 8 * M else F32)
    exact = evaluate(getattr(theirs, case.op), wide)
    both = (evaluate(operator(operators, case), arguments) for operators in (ours, theirs))
    for got, expected, precise in zip(*both, exact, strict=True):
        assert got.dtype == expected.dtype
        if not torch.equal(got, expected):
            finite = expected.isfinite()  # float16 may overflow in torch's operator
            if not finite.any():
                continue
            got, expected, precise = got[finite], expected[finite], precise[finite]
            error = float((expected.to(precise.dtype) - precise).abs().max())
            assert_close(got.to(precise.dtype), precise, got.dtype, error)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, error: float = 0.0) -> None:
    """Checks that results agree within two roundings, or 1e-6 of the largest element.

    Args:
        error: An absolute error that is always allowed.
    """
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)
    atol = max(error, 1e-6 * expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def evaluate(function: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, Tensor]:
    a = arguments
    value = function(a.input, *a.others, **a.options)
    (gradient,) = torch.autograd.grad(value, a.input, a.grad_output)
    return value.detach(), gradient
