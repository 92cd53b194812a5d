"""Time compiled code with pyfused's operators beside the same code with torch's.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --only cross_entropy --seconds 10

pyfused leaves `mse_loss` and `relu` to Inductor, and small cross-entropies (`COMPILED_BELOW` in
pyfused/ops/dispatch.py). The rows marked "if it were" are the reason: they force an operator there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import BF16, MODES, Arguments, M, training_step
from measure import Step, by_turns, plan, quartiles, ratios, settle_allocator, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.backends import Want, cpu

# ---- operators that pyfused does not have -------------------------------------------------------


@torch.library.custom_op("walled::relu", mutates_args=())
def walled_relu(input: Tensor) -> Tensor:
    return cpu.activation("relu", input)


@torch.library.custom_op("walled::relu_backward", mutates_args=())
def walled_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return cpu.activation_backward("relu", grad_output, output)


@torch.library.custom_op("walled::mse_loss", mutates_args=())
def walled_mse_loss(input: Tensor, target: Tensor) -> Tensor:
    return _mse_loss(input, target, Want())[0]


@torch.library.custom_op("walled::mse_loss_backward", mutates_args=())
def walled_mse_loss_backward(grad_output: Tensor, input: Tensor, target: Tensor) -> Tensor:
    return _mse_loss(input, target, Want(False, (True, False)), grad_output.expand_as(input))[1][0]


def _mse_loss(input: Tensor, target: Tensor, *want: Any) -> Any:
    size = float(input.numel())
    return cpu.pointwise_loss("mse_loss", (input, target), (), None, "mean", size, *want)


walled_relu.register_fake(torch.empty_like)
walled_relu_backward.register_fake(lambda _, output: torch.empty_like(output))
walled_mse_loss.register_fake(lambda input, _: input.new_empty(()))
walled_mse_loss_backward.register_fake(lambda _, input, __: torch.empty_like(input))
walled_relu.register_autograd(
    lambda ctx, grad_output: walled_relu_backward(grad_output, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),  # noqa: ARG005
)
walled_mse_loss.register_autograd(
    lambda ctx, grad_output: (walled_mse_loss_backward(grad_output, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),  # noqa: ARG005
)


def walled_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return torch.ops.pyfused.cross_entropy(input, target, None, -100, "mean", 0.0)


# ---- the cases ----------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    before: Callable[[Tensor], Tensor] | None = None  # what the compiler could fuse the loss with
    walled: Callable[..., Tensor] | None = None


CASES = (
    Case("cross_entropy (1024, 32000)", "cross_entropy", (1024, 32000)),
    Case("cross_entropy (1024, 32000) bfloat16", "cross_entropy", (1024, 32000), BF16),
    Case(
        "cross_entropy (1024, 32000) of bfloat16.float()",
        "cross_entropy",
        (1024, 32000),
        BF16,
        Tensor.float,
    ),
    Case("cross_entropy (8192, 1000)", "cross_entropy", (8192, 1000)),
    Case("cross_entropy (65536, 10)", "cross_entropy", (65536, 10)),
    Case("cross_entropy (8, 21, 256, 256)", "cross_entropy", (8, 21, 256, 256)),
    Case("cross_entropy (1024, 1000)", "cross_entropy", (1024, 1000)),
    Case(
        "if it were: cross_entropy (64, 1000)",
        "cross_entropy",
        (64, 1000),
        walled=walled_cross_entropy,
    ),
    Case("if it were: mse_loss (1 M)", "mse_loss", (M,), walled=walled_mse_loss),
    Case("if it were: mse_loss (32 M)", "mse_loss", (32 * M,), walled=walled_mse_loss),
    Case(
        "if it were: mse_loss (32 M) of 2 x + 1",
        "mse_loss",
        (32 * M,),
        before=lambda x: 2 * x + 1,
        walled=walled_mse_loss,
    ),
    Case("if it were: relu (32 M)", "relu", (32 * M,), walled=walled_relu),
    Case(
        "if it were: relu (32 M) of 2 x + 1",
        "relu",
        (32 * M,),
        before=lambda x: 2 * x + 1,
        walled=walled_relu,
    ),
)


def steps(case: Case, mode: str) -> tuple[Step, Step]:
    """A call of torch's and of pyfused's operator, each compiled, on the same arguments."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(case.shape, generator=generator).to(case.dtype).requires_grad_()
    rest: tuple[Tensor, ...] = ()
    if case.op == "cross_entropy":
        rest = (torch.randint(case.shape[1], (case.shape[:1] + case.shape[2:])),)
    elif case.op == "mse_loss":
        rest = (torch.randn(case.shape, generator=generator),)
    grad_output = torch.randn(case.shape, generator=generator) if case.op == "relu" else None
    before = case.before or (lambda x: x)

    def step(operator: Callable[..., Tensor]) -> Step:
        compiled = torch.compile(
            lambda input, *rest: operator(before(input), *rest), fullgraph=True, dynamic=False
        )

        def forward() -> None:
            with torch.no_grad():
                compiled(input, *rest)

        if mode == "forward":
            return forward
        return training_step(compiled, Arguments(input, rest, grad_output=grad_output))

    return step(getattr(F, case.op)), step(case.walled or getattr(fused, case.op))


def measure(case: Case, mode: str, seconds: float) -> list[str]:
    torch.compiler.reset()
    pair = steps(case, mode)
    rounds, calls = plan(pair, seconds)
    times = by_turns([partial(timed, call, calls) for call in pair], rounds)
    ms = [f"{1e3 * quartiles(all_)[1] / calls:.3f}" for all_ in times]
    low, median, high = ratios(*times)
    return [case.name, mode, *ms, f"{median:.2f} ({low:.2f} to {high:.2f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=5, help="a case, default: %(default)s")
    options = parser.parse_args()
    settle_allocator()
    table = Table("case", "mode", title="compiled by torch.compile, fullgraph=True")
    for name in ("torch, ms", "pyfused, ms", "torch / pyfused"):
        table.add_column(name, justify="right")
    for case in CASES:
        if options.only in case.name:
            for mode in MODES:
                table.add_row(*measure(case, mode, options.seconds))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
