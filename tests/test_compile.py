"""torch.compile: one graph, with pyfused's operator where it is the faster one; torch.export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import TORCH as F
from compare import Outcome, evaluate
from conftest import KernelCalls
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused import backends
from pyfused import functional as fused
from pyfused.dispatch import call as dispatch
from pyfused.dispatch import sizes
from pyfused.ops.custom_operators import NAMESPACE, custom_operator
from pyfused.types import CrossEntropyOptions

# torch 2.13 compiles with functions that Python 3.11 and later have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

taken = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="to torch 2.11 a compiled call is an exported one"
)

N, C = 12, 7
INDICES = torch.arange(N) % C
PROBABILITIES = torch.linspace(-2, 2, N * C).view(N, C).softmax(1)
IMAGES = torch.ones(N, 3, dtype=torch.int64)
WEIGHT = torch.linspace(0.5, 1.5, C)
close = torch.testing.assert_close

Call = Callable[[Any, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "mean": lambda f, x: f.cross_entropy(x, INDICES[: len(x)]),
    "sum": lambda f, x: f.cross_entropy(x, INDICES[: len(x)], reduction="sum"),
    "none": lambda f, x: f.cross_entropy(x, INDICES[: len(x)], reduction="none"),
    "weight": lambda f, x: f.cross_entropy(x, INDICES[: len(x)], WEIGHT, label_smoothing=0.1),
    "ignored": lambda f, x: f.cross_entropy(x, INDICES[: len(x)], ignore_index=2),
    "probabilities": lambda f, x: f.cross_entropy(x, PROBABILITIES[: len(x)]),
    "kdim": lambda f, x: f.cross_entropy(x.unsqueeze(2).repeat(1, 1, 3), IMAGES[: len(x)]),
    "strided": lambda f, x: f.cross_entropy((x * 1).t().contiguous().t(), INDICES[: len(x)]),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of cross_entropy takes the operator."""
    monkeypatch.setitem(sizes.COMPILED, "cross_entropy", (0, 1 << 24))
    torch.compiler.reset()


class Graphs:
    """A backend that keeps the operators of the graphs that it is given, forward and backward."""

    def __init__(self) -> None:
        self.count = 0
        self.operators: set[str] = set()
        self.backend = aot_autograd(fw_compiler=self.compile)

    def compile(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        self.operators |= {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
        return make_boxed_func(graph.forward)

    def of_pyfused(self) -> set[str]:
        return {name for name in self.operators if name.startswith(NAMESPACE)}


BOTH = {f"{NAMESPACE}.cross_entropy.default", f"{NAMESPACE}.cross_entropy_backward.default"}


def assert_same(got: Outcome, expected: Outcome) -> None:
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)


# ---- one graph ----------------------------------------------------------------------------------


@taken
@every_call
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_forward_and_backward_take_the_operator(
    call: Call, dynamic: bool, kernel_calls: KernelCalls
) -> None:
    graphs = Graphs()
    compiled = torch.compile(
        lambda x: call(fused, x * 2), fullgraph=True, dynamic=dynamic, backend=graphs.backend
    )
    for rows in (N, N - 3):
        x = torch.randn(rows, C, requires_grad=True)
        assert_same(evaluate(compiled, x), evaluate(lambda x: call(F, x * 2), x))
    assert graphs.of_pyfused() == BOTH
    assert kernel_calls["cross_entropy"] == 4


GPU_CALLS: dict[str, tuple[int, Any, str | None]] = {
    "cross_entropy": (1 << 14, fused.cross_entropy, "cross_entropy"),
    "kl_div": (1 << 14, lambda x, _: fused.kl_div_with_logits(x, x), "kl_div_with_logits"),
    "small": ((1 << 14) - 1, fused.cross_entropy, None),
    "elementwise": (1 << 14, lambda x, _: fused.mse_loss(x, x), None),
}


@pytest.mark.cpu
@pytest.mark.parametrize(("rows", "call", "operator"), GPU_CALLS.values(), ids=GPU_CALLS.keys())
def test_large_logits_on_a_gpu_take_the_operator(
    rows: int, call: Any, operator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with fake tensors, which ask for no GPU."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.update(str(n.target) for n in graph.graph.nodes if "pyfused" in str(n.target))
        return graph.forward

    with FakeTensorMode():
        x = torch.empty(rows, 1 << 10, dtype=torch.bfloat16, device="cuda")
        target = torch.empty(rows, dtype=torch.int64, device="cuda")
        torch.compile(call, fullgraph=True, backend=backend)(x, target)
        assert not found  # without a GPU
        monkeypatch.setattr(backends, "_without_triton", lambda _: None)
        torch.compiler.reset()
        torch.compile(call, fullgraph=True, backend=backend)(x, target)
    assert found == ({f"{NAMESPACE}.{operator}"} if operator else set())


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_each_side_of_the_limit_has_its_program(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "takes_triton", lambda _: gpu)
    limits = (sizes.NEVER, 5 * C) if gpu else (5 * C, sizes.NEVER)
    monkeypatch.setitem(sizes.COMPILED, "cross_entropy", limits)
    graphs = Graphs()
    options = {"fullgraph": True, "dynamic": True, "backend": graphs.backend}
    compiled = torch.compile(fused.cross_entropy, **options)
    for rows, count in ((3, 1), (4, 1), (5, 2), (12, 2), (2, 2)):
        x = torch.randn(rows, C)
        close(compiled(x, INDICES[:rows]), F.cross_entropy(x, INDICES[:rows]))
        assert (graphs.count, bool(graphs.of_pyfused())) == (count, count == 2)


def test_a_compiled_gradient_has_memory_of_its_own() -> None:
    def step(x: Tensor) -> Tensor:
        return fused.cross_entropy(x * 2, INDICES, inplace=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, C, requires_grad=True)
    assert_same(evaluate(compiled, x), evaluate(lambda x: F.cross_entropy(x * 2, INDICES), x))


COLUMN = torch.linspace(-1, 1, N).view(N, 1)
WARNING: dict[str, Call] = {
    "broadcast": lambda f, x: f.huber_loss(x, COLUMN),
    "of_labels": lambda f, x: f.multilabel_soft_margin_loss(x, PROBABILITIES, size_average=False),
    "deprecated": lambda f, x: f.cross_entropy(x, INDICES, size_average=True, reduce=True),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", WARNING.values(), ids=WARNING.keys())
def test_what_warns_is_one_graph(call: Call) -> None:
    """Operands that broadcast, and deprecated arguments; the compiler cannot trace a warning."""
    x = torch.randn(N, C, requires_grad=True)
    compiled = torch.compile(lambda x: call(fused, x), fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, x), evaluate(lambda x: call(torch.nn.functional, x), x)
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    def step(functional: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.cross_entropy(x, INDICES)

    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, backend="aot_eager")
    x = torch.randn(N, C, dtype=dtype)
    got, expected = compiled(x), step(F, x)
    assert got.dtype == expected.dtype == torch.float32
    close(got, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_function_transforms_take_torchs(transform: Any) -> None:
    def step(functional: Any, x: Tensor) -> Tensor:
        loss = lambda x: functional.cross_entropy(x, INDICES)  # noqa: E731
        return transform(loss)(x if transform is not torch.func.vmap else x.expand(2, N, C))

    graphs = Graphs()
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, backend=graphs.backend)
    x = torch.randn(N, C)
    close(compiled(x), step(F, x))
    assert not graphs.of_pyfused()


def test_a_lazily_negated_input() -> None:
    z = torch.randn(N, C, dtype=torch.complex64)
    compiled = torch.compile(
        lambda z: fused.cross_entropy(z.conj().imag, INDICES), fullgraph=True, backend="aot_eager"
    )
    close(compiled(z), F.cross_entropy(-z.imag, INDICES))


@pytest.mark.thresholds
def test_a_small_loss_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    graphs = Graphs()
    compiled = torch.compile(fused.cross_entropy, fullgraph=True, backend=graphs.backend)
    compiled(torch.randn(N, C), INDICES)
    assert not graphs.of_pyfused()


# ---- the operator -------------------------------------------------------------------------------


IMAGE_TARGET = torch.ones(2, 4, 3, dtype=torch.int64)
LAST = torch.channels_last
SAMPLES: dict[str, tuple[Tensor, Tensor, Tensor | None, str, float]] = {
    "indices": (torch.randn(N, C), INDICES, None, "mean", 0.0),
    "weight": (torch.randn(N, C), INDICES, WEIGHT, "sum", 0.1),
    "probabilities": (torch.randn(N, C), PROBABILITIES, WEIGHT, "none", 0.1),
    "channels_last": (torch.randn(2, C, 4, 3).to(memory_format=LAST), IMAGE_TARGET, None, "sum", 0),
    "permuted": (torch.randn(3, 4, 2, C).permute(2, 3, 1, 0), IMAGE_TARGET, None, "mean", 0.0),
    "half": (torch.randn(N, C).half(), INDICES, None, "mean", 0.1),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's of torch 2.15
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_opcheck(sample: tuple[Any, ...]) -> None:
    input, target, weight, reduction, smoothing = sample
    options = CrossEntropyOptions(-100, reduction, label_smoothing=smoothing)
    arguments = (target, weight, *options.values())
    forward, backward = map(custom_operator, ("cross_entropy", "cross_entropy_backward"))
    torch.library.opcheck(forward.default, (input.clone().requires_grad_(), *arguments))
    grad_output = torch.rand_like(forward(input, *arguments))
    wanted = [True, target.is_floating_point()]
    torch.library.opcheck(backward.default, (grad_output, input, *arguments, wanted))


@taken
def test_an_index_out_of_range_is_found_in_a_compiled_call() -> None:
    compiled = torch.compile(fused.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"got 9 at position \(0,\)"):
        compiled(torch.randn(N, C), torch.full((N,), 9))


# ---- patched code -------------------------------------------------------------------------------


def patched_step(x: Tensor, target: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(x.relu(), target)
    return loss + torch.relu(x).sum() + F.mse_loss(x, F.relu(x))


def operators_of_patched_step() -> set[str]:
    graphs = Graphs()
    torch.compiler.reset()
    for rows in (5, 6, 7):
        x, target = torch.randn(rows, 4, requires_grad=True), torch.ones(rows).long()
        compiled = torch.compile(patched_step, fullgraph=True, backend=graphs.backend)
        assert_same(evaluate(compiled, x, target), evaluate(patched_step, x, target))
    return graphs.of_pyfused()


@taken
def test_patched_code() -> None:
    with pyfused.patch():
        assert operators_of_patched_step() == BOTH
    assert not operators_of_patched_step()


@taken
def test_code_patched_before_the_compiler_is_imported() -> None:
    """torch.compile knows torch's functions by name, and learns these names at its first use."""
    code = """
import sys, torch, pyfused
assert "torch._dynamo" not in sys.modules
with pyfused.patch():
    import test_compile as test
    test.sizes.COMPILED["cross_entropy"] = 0, 0
    assert test.operators_of_patched_step() == test.BOTH
assert not test.operators_of_patched_step()
"""
    options = ("-W", "error", "-W", "ignore::DeprecationWarning")
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- export -------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(C, C), pyfused.nn.ReLU())
        self.criterion = pyfused.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.net(x), target)


def torchs_loss(model: Model, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.relu(model.net[0](x)), target, label_smoothing=0.1)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_needs_no_pyfused(strict: bool) -> None:
    model, rows = Model(), torch.export.Dim("rows")
    exported = torch.export.export(
        model,
        (torch.randn(N, C), INDICES),
        dynamic_shapes=({0: rows}, {0: rows}),
        strict=strict,
    )
    assert "pyfused" not in exported.graph_module.code
    for count in (2, 10):
        x, target = torch.randn(count, C), INDICES[:count]
        close(exported.module()(x, target), torchs_loss(model, x, target))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_package_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = Model()
    x = torch.randn(N, C)
    exported = torch.export.export(model, (x, INDICES))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    close(torch._inductor.aoti_load_package(package)(x, INDICES), torchs_loss(model, x, INDICES))
