"""torch.compile uses custom operators where they are faster, without graph breaks; torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, Call
from catalogue import TORCH as F
from compare import Outcome, evaluate
from conftest import KernelCalls
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode

import pyfused
from pyfused import backends
from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.ops.custom_operators import NAMESPACE

pytestmark = [
    # torch 2.13's compiler uses functions that are deprecated in Python 3.11 and later.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("compiled_always"),
]


def lacks_2_11(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.__version__ < "2.12", reason=f"torch 2.11 lacks {feature}")


N, C = 12, 7
INDICES = torch.arange(N) % C
SOFT = torch.linspace(-2, 2, N * C).view(N, C).softmax(1)
close = torch.testing.assert_close
Step = Callable[[Any, Tensor], Tensor]


class Graphs:
    """A compiler backend like Inductor without code generation; records custom operators."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.count = 0
        self.backend = aot_autograd(fw_compiler=self.compile, decompositions=select_decomp_table())

    def compile(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        targets = [str(node.target).split(".") for node in graph.graph.nodes]
        self.operators += [target[1] for target in targets if target[0] == NAMESPACE]
        return make_boxed_func(graph.forward)


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def assert_same(got: Outcome, expected: Outcome) -> None:
    close((got.value, *got.gradients), (expected.value, *expected.gradients))


def assert_equals_eager(step: Step, x: Tensor, backend: Any = "aot_eager", **options: Any) -> None:
    """Compiles a step as one graph, and compares value and gradient with eager torch."""
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, backend=backend, **options)
    x = x.detach().requires_grad_()
    assert_same(evaluate(compiled, x), evaluate(lambda x: step(F, x), x))


# ---- every operator ------------------------------------------------------------------------------

# Losses whose large calls are a custom operator, and the operator's name.
CUSTOM = {name: name for name in sizes.COMPILED if name not in (*sizes.OF_LOGITS, *sizes.LINEAR)}
CUSTOM["cross_entropy"] = "cross_entropy"
# The mean of kl_div warns; losses without reduction are left to Inductor.
WITH_REDUCTION = {"kl_div": "kl_div-batchmean", "sigmoid_focal_loss": "sigmoid_focal_loss-sum"}
FAMILIES = "cross_entropy", "mse_loss", "nll_loss", "triplet_margin_loss"


def example(op: str) -> Call:
    return EXAMPLES[WITH_REDUCTION.get(op, op)].call(shape=(N, C))


def step_of(op: str) -> Step:
    ours, theirs = (example(op).of_first(f, bounded=False) for f in (Call.ours, Call.reference))
    return lambda functional, x: (ours if functional is fused else theirs)(x)


@pytest.mark.parametrize(
    ("op", "dynamic"), [*((op, False) for op in CUSTOM), *((op, True) for op in FAMILIES)]
)
def test_a_large_loss_is_an_operator(
    op: str, dynamic: bool, graphs: Graphs, kernel_calls: KernelCalls
) -> None:
    step = step_of(op)
    assert_equals_eager(
        lambda f, x: 3 * step(f, x * 0.5 + 0.25), example(op).first, graphs.backend, dynamic=dynamic
    )
    assert sorted(graphs.operators) == [CUSTOM[op], f"{CUSTOM[op]}_backward"]
    assert kernel_calls.total() == 2


@pytest.mark.parametrize("op", ["relu", "swiglu", "softmax"])
def test_an_activation_is_never_an_operator(op: str, graphs: Graphs) -> None:
    assert_equals_eager(step_of(op), example(op).first, graphs.backend)
    assert not graphs.operators


class Checked(torch.fx.Interpreter):
    """Runs a graph with torch's opcheck on each custom operator."""

    def __init__(self, graph: torch.fx.GraphModule, found: list[str]) -> None:
        super().__init__(graph)
        self.found = found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target).startswith(NAMESPACE):
            self.found.append(str(target))
            torch.library.opcheck(getattr(target, "default", target), args, kwargs)
        return super().call_function(target, args, kwargs)


def assert_registered(step: Callable[..., Any], *inputs: Tensor) -> None:
    """Checks that eager autograd runs forward and backward as two graphs with our operators."""
    found: list[str] = []
    eager = torch.compile(step, fullgraph=True, backend=lambda graph, _: Checked(graph, found).run)
    eager(*inputs)
    torch.compiler.reset()
    compiler = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(Checked(graph, found).run),
    )
    results = torch.compile(step, fullgraph=True, backend=compiler)(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    sum(x.sum() for x in results if x.requires_grad).backward()
    assert found


CHECKED = (
    *(*FAMILIES[1:], *sizes.OF_LOGITS, *sizes.LINEAR, "linear_cross_entropy-none"),
    *("cross_entropy-probabilities", "linear_kl_div-none"),
)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised by opcheck
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    call = EXAMPLES[name].call(shape=(N, C))
    leaves = [*call.leaves]
    assert_registered(
        lambda *x: call.ours(**dict(zip(leaves, x, strict=True))), *call.leaves.values()
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat(2, 2)[::2, ::2],
    "half": lambda x: x.half(),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", ["cross_entropy", "huber_loss"])
def test_opcheck_of_strides_and_half_precision(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    given = [layout(x).detach() for x in (torch.randn(N, C), SOFT)]
    assert_registered(getattr(fused, op), given[0].requires_grad_(), given[1])


# ---- cross-entropy -------------------------------------------------------------------------------


GPU_CALLS: dict[str, tuple[int, Any, str | None]] = {
    "cross_entropy": (1 << 14, fused.cross_entropy, "cross_entropy"),
    "kl_div": (1 << 14, lambda x, _: fused.kl_div_with_logits(x, x), "kl_div_with_logits"),
    "small": ((1 << 14) - 1, fused.cross_entropy, None),
    "elementwise": (1 << 14, lambda x, _: fused.mse_loss(x, x), None),
}


@pytest.mark.cpu
@pytest.mark.parametrize(("rows", "call", "operator"), GPU_CALLS.values(), ids=GPU_CALLS.keys())
def test_large_logits_on_a_gpu_use_the_operator(
    rows: int, call: Any, operator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces with fake tensors, which need no GPU."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.update(str(n.target) for n in graph.graph.nodes if "pyfused" in str(n.target))
        return graph.forward

    with FakeTensorMode():
        x = torch.empty(rows, 1 << 10, dtype=torch.bfloat16, device="cuda")
        target = torch.empty(rows, dtype=torch.int64, device="cuda")
        torch.compile(call, fullgraph=True, backend=backend)(x, target)
        assert not found  # without a GPU
        for name, limit in (("cross_entropy", 1 << 24), ("mse_loss", sizes.NEVER)):
            monkeypatch.setitem(sizes.COMPILED, name, (0, limit))
        monkeypatch.setattr(backends, "_without_triton", lambda _: None)
        torch.compiler.reset()
        torch.compile(call, fullgraph=True, backend=backend)(x, target)
    assert found == ({f"{NAMESPACE}.{operator}"} if operator else set())


@pytest.mark.parametrize(
    "op",
    [pytest.param("cross_entropy", marks=lacks_2_11("dynamic sizes in cross_entropy")), "mse_loss"],
)
def test_small_and_large_calls_are_compiled_separately(
    op: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.COMPILED, op, (5 * C, sizes.NEVER))
    options = {"fullgraph": True, "dynamic": True, "backend": graphs.backend}
    compiled = torch.compile(getattr(fused, op), **options)
    for rows, count in ((3, 2), (4, 2), (5, 4), (12, 4), (2, 4)):  # forward and backward
        x, target = torch.randn(rows, C, requires_grad=True), SOFT[:rows]
        assert_same(evaluate(compiled, x, target), evaluate(getattr(F, op), x, target))
        assert (graphs.count, len(graphs.operators)) == (count, count - 2)


COLUMN = torch.linspace(-1, 1, N).view(N, 1)
WARNING: dict[str, Step] = {
    "broadcast": lambda f, x: f.huber_loss(x, COLUMN),
    "deprecated": lambda f, x: f.cross_entropy(x, INDICES, size_average=True, reduce=True),
    "mean": lambda f, x: f.kl_div(x, SOFT),
    "legacy": lambda f, x: f.mse_loss(x, TARGET, reduce=False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WARNING)
def test_warnings_cause_no_graph_break(name: str, graphs: Graphs) -> None:
    """Broadcasting operands and deprecated arguments warn, which the compiler cannot trace."""
    x, step = torch.randn(N, C, requires_grad=True), WARNING[name]
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, backend=graphs.backend)
    assert_same(evaluate(compiled, x), evaluate(lambda x: step(nn.functional, x), x))
    assert not graphs.operators or name not in ("mean", "legacy")


@pytest.mark.parametrize("op", sizes.LINEAR)
def test_heads_with_float32_weights_under_autocast(op: str) -> None:
    call = EXAMPLES[op].call(shape=(N, C))

    @torch.autocast("cpu", torch.bfloat16)
    def step(*tensors: Tensor) -> Tensor:
        return call.ours(**dict(zip(call.leaves, tensors, strict=True)))

    leaves = [*call.leaves.values()]
    got = evaluate(torch.compile(step, fullgraph=True, backend="aot_eager"), *leaves)
    expected = evaluate(step, *leaves)
    close(got.value, expected.value, rtol=0.02, atol=0.02)
    for ours, eager in zip(got.gradients, expected.gradients, strict=True):
        assert ours.dtype == torch.float32
        close(ours, eager, rtol=0.05, atol=0.02 * float(eager.abs().max()))


# ---- calls without a custom operator -------------------------------------------------------------

WEIGHTS = torch.randint(-4, 5, (C, C)).float()  # exact products in any order
TARGET = torch.randint(-4, 5, (N, C)).float()
HALF = TARGET.bfloat16()
NONE: dict[str, Step] = {
    "none": lambda f, x: f.mse_loss(x, TARGET, reduction="none"),
    "another dtype": lambda f, x: f.l1_loss(x, TARGET.double()),
    "another shape": lambda f, x: f.margin_ranking_loss(x, TARGET[:, :1], TARGET.sign()),
    "a number": lambda f, x: f.gaussian_nll_loss(x, TARGET, 0.7),
    "a number in a tensor": lambda f, x: f.huber_loss(x, TARGET, delta=torch.tensor(0.5)),
    "no gradient": lambda f, x: f.mse_loss(x.detach(), TARGET) + x.sum(),
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f.mse_loss)(x @ WEIGHTS, HALF),
}


@pytest.mark.parametrize("step", NONE.values(), ids=NONE.keys())
def test_calls_without_a_custom_operator(step: Step, graphs: Graphs) -> None:
    assert_equals_eager(step, torch.randn(N, C), graphs.backend)
    assert not graphs.operators


# ---- derivatives, and compiling with Inductor ----------------------------------------------------


@pytest.mark.parametrize("op", ["kl_div_with_logits", "linear_kl_div", "linear_topk_kl_div"])
def test_a_number_that_changes_between_calls(op: str) -> None:
    """Dynamo traces the second value as a symbol."""
    call = EXAMPLES[op].call()

    def step(beta: float) -> Tensor:
        return call.ours(beta=beta)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for beta in (0.25, 0.5, 0.75):
        close(compiled(beta), step(beta))


def test_errors_of_values_in_compiled_calls() -> None:
    compiled = torch.compile(fused.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"got 9 at position \(0,\)"):
        compiled(torch.randn(N, C), torch.full((N,), 9))
    compiled = torch.compile(fused.binary_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="target"):
        compiled(torch.rand(N, C, requires_grad=True), torch.full((N, C), 2.0))


@pytest.mark.slow
def test_inductor(kernel_calls: KernelCalls) -> None:
    model = nn.Linear(C, C)

    def step(f: Any, x: Tensor) -> Tensor:
        loss = f.mse_loss(F.linear(f.gelu(model(x)), WEIGHTS), TARGET)
        return loss + f.smooth_l1_loss(2 * x + 1, TARGET)

    x = torch.randn(N, C, requires_grad=True)
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True)
    assert_same(evaluate(compiled, x), evaluate(lambda x: step(F, x), x))
    assert kernel_calls == {"mse_loss": 2, "smooth_l1_loss": 2}


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
        model, (torch.randn(N, C), INDICES), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
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
