"""The contract of every operator in traced programs, at the sizes of normal use.

A compiled call is one graph without breaks for every batch size, and a traced or exported program
computes all batch sizes. test_compile.py compiles heads as custom operators at all sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import Call, Example, every_compiled
from compare import evaluate
from samples import SAMPLES, Sample
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from pyfused import functional as fused
from pyfused.ops.elementwise import L1_LOSS

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.thresholds,
    pytest.mark.usefixtures("compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BATCHES, CLASSES = (6, 7, 8, 24), 5
OF_ONE_SIZE = (
    *("binary_cross_entropy-everything", "cross_entropy-probabilities"),
    "linear_cross_entropy-probabilities",
)
close = torch.testing.assert_close


class Batches:
    """Calls of an example that differ in the batch size.

    Attributes:
        calls: A call for each batch size.
        dims: The dimensions of each tensor that depend on the batch size, by argument.
    """

    def __init__(self, example: Example) -> None:
        if SAMPLES.get(example.op.name, Sample()).branches:
            pytest.skip("torch cannot trace its function")
        if torch.__version__ < "2.12" and example.id in OF_ONE_SIZE:
            pytest.skip("torch 2.11 traces its function for one batch size")
        self.calls = [example.call(shape=(batch, CLASSES)) for batch in BATCHES]
        if example.op is L1_LOSS:  # torch drops the weight in traced programs
            for call in self.calls:
                call.given.pop("weight", None)
        first, second, *_ = [call.tensors for call in self.calls]
        self.dims = {
            name: [i for i, n in enumerate(x.shape) if n != second[name].shape[i]]
            for name, x in first.items()
        }

    def of(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Returns the result of pyfused's function."""
        return self.calls[0].ours(**dict(zip(self.dims, tensors, strict=True)))

    def tensors(self, call: Call, convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return tuple([convert(call.given[name]) for name in self.dims])


@every_compiled
def test_one_graph_for_all_batch_sizes(example: Example) -> None:
    batches, counter = Batches(example), CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(*tensors: Tensor) -> Tensor:
        return batches.of(tensors)

    def step(*tensors: Tensor) -> Tensor:
        for x, dims in zip(tensors, batches.dims.values(), strict=True):
            torch._dynamo.mark_dynamic(x, dims)
        return compiled(*tensors)

    for call in batches.calls:
        tensors = batches.tensors(call, lambda x: x)
        got, expected = evaluate(step, *tensors), evaluate(lambda *x: batches.of(x), *tensors)
        close((got.value, *got.gradients), (expected.value, *expected.gradients))
    assert counter.frame_count == 1


def test_gaussian_nll_loss_breaks_the_graph() -> None:
    """It branches on the variance, as torch's does."""
    x, target, var = torch.randn(3, 8).unbind()
    operands = x.requires_grad_(), target, var.exp()
    compiled = torch.compile(fused.gaussian_nll_loss, backend="aot_eager")
    got, expected = (evaluate(f, *operands) for f in (compiled, fused.gaussian_nll_loss))
    close(got.results, expected.results)


class Program(nn.Module):
    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.batches.of(tensors)


@every_compiled
def test_export_with_a_dynamic_batch(example: Example) -> None:
    """The program computes another batch size."""
    batches, dynamic = Batches(example), torch.export.Dim.DYNAMIC
    shapes = tuple([dict.fromkeys(dims, dynamic) for dims in batches.dims.values()])
    first, *_, last = [batches.tensors(call, Tensor.detach) for call in batches.calls]
    program = torch.export.export(Program(batches), first, dynamic_shapes=(shapes,))
    assert "pyfused" not in program.graph_module.code
    close(program.module()(*last), batches.of(last))


TRACERS: dict[str, Callable[..., Any]] = {
    "jit.trace": lambda step, tensors: torch.jit.trace(step, tensors, check_trace=False),
    "make_fx": lambda step, tensors: make_fx(step, tracing_mode="symbolic")(*tensors),
}


@every_compiled
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_with_another_batch_size(example: Example, trace: Callable[..., Any]) -> None:
    batches = Batches(example)
    first, *_, last = [batches.tensors(call, Tensor.detach) for call in batches.calls]
    traced = trace(lambda *tensors: batches.of(tensors), first)
    close(traced(*last), batches.of(last))
