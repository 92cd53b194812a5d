"""Which calls are custom operators in a compiled program, and what these compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
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

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.ops.custom_operators import NAMESPACE, TORCH_OPS, custom_operator
from pyfused.ops.operators import OPERATORS

pytestmark = [
    # torch 2.13 compiles with functions that Python 3.11 and later have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        torch.__version__ < "2.12", reason="to torch 2.11 a compiled call is an exported one"
    ),
]

N, C = 12, 7
close = torch.testing.assert_close

# The losses that are a custom operator of this name where they are large, or of their part's.
CUSTOM = {name: name for name in sizes.COMPILED if name not in (*sizes.OF_LOGITS, *sizes.LINEAR)}
CUSTOM |= {
    "rmse_loss": "mse_loss",
    "multilabel_soft_margin_loss": "binary_cross_entropy_with_logits",
}
# A mean of kl_div warns, and losses that are not reduced are left to Inductor.
WITH_REDUCTION = {"kl_div": "kl_div-batchmean", "sigmoid_focal_loss": "sigmoid_focal_loss-sum"}
every_operator = pytest.mark.parametrize("op", CUSTOM)
FAMILIES = "mse_loss", "nll_loss", "triplet_margin_loss", "multilabel_margin_loss"


EXAMPLE = {op: EXAMPLES[WITH_REDUCTION.get(op, op)].call(shape=(N, C)) for op in OPERATORS}
OURS = {op: example.of_first(Call.ours, bounded=False) for op, example in EXAMPLE.items()}
OF_TORCH = {op: example.of_first(Call.reference, bounded=False) for op, example in EXAMPLE.items()}


def call(functional: Any, op: str, x: Tensor) -> Tensor:
    return (OURS if functional is fused else OF_TORCH)[op](x)


def input_of(op: str) -> Tensor:
    return EXAMPLE[op].first.clone()


class Graphs:
    """Compiles as Inductor does but for its code, and keeps the names of pyfused's operators."""

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
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Every size takes the operators: the measured table would leave small ones to Inductor."""
    for op in sizes.COMPILED:
        monkeypatch.setitem(sizes.COMPILED, op, (0, 0))
    torch.compiler.reset()
    return Graphs()


Step = Callable[[Any, Tensor], Tensor]


def assert_torchs(step: Step, x: Tensor, graphs: Graphs, **options: Any) -> None:
    """Value and gradient of a step, compiled as one graph, are those of eager torch."""
    options = {"fullgraph": True, "backend": graphs.backend} | options
    compiled = torch.compile(lambda x: step(fused, x), **options)
    x = x.detach().requires_grad_()
    got, expected = evaluate(compiled, x), evaluate(lambda x: step(F, x), x)
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)


# ---- every operator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dynamic"), [*((op, False) for op in CUSTOM), *((op, True) for op in FAMILIES)]
)
def test_a_large_loss_is_an_operator(
    op: str, dynamic: bool, graphs: Graphs, kernel_calls: KernelCalls
) -> None:
    """Of an input, and of what the program computes."""
    assert_torchs(lambda f, x: call(f, op, x), input_of(op), graphs, dynamic=dynamic)
    step: Step = lambda f, x: 3 * call(f, op, x * 0.5 + 0.25)  # noqa: E731
    assert_torchs(step, input_of(op), graphs, dynamic=dynamic)
    assert sorted(graphs.operators) == [CUSTOM[op]] * 2 + [f"{CUSTOM[op]}_backward"] * 2
    assert kernel_calls.total() == 4


@pytest.mark.parametrize("op", sorted(OPERATORS.keys() - sizes.COMPILED.keys()))
def test_an_activation_is_never_an_operator(op: str, graphs: Graphs) -> None:
    custom_operator("cross_entropy")  # registers all
    assert not hasattr(TORCH_OPS, op)
    assert_torchs(lambda f, x: call(f, op, x), input_of(op), graphs)
    assert not graphs.operators


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's of torch 2.15
@pytest.mark.parametrize("op", [op for op, custom in CUSTOM.items() if custom == op])
def test_opcheck(op: str) -> None:
    opcheck(op, input_of(op))


@pytest.mark.parametrize("op", ["mse_loss", "huber_loss", "nll_loss"])
def test_opcheck_of_strides_and_half_precision(op: str) -> None:
    x = input_of(op)
    opcheck(op, x.t().contiguous().t(), test_utils="test_faketensor")
    opcheck(op, x.repeat(2, 2)[::2, ::2], test_utils="test_faketensor")
    if "target" not in EXAMPLE[op].tensors:
        opcheck(op, x.half(), test_utils="test_faketensor")


def opcheck(op: str, x: Tensor, **options: Any) -> None:
    declared = OPERATORS[op]
    names, defaults = declared.arguments, declared.defaults
    tensors = {name: tensor.detach() for name, tensor in EXAMPLE[op].tensors.items()}
    given = dict(zip(names[1:], defaults, strict=True)) | EXAMPLE[op].given | tensors
    given[names[0]] = x
    first, *others = [given[name] for name in names]
    forward = custom_operator(op).default
    torch.library.opcheck(forward, (first.clone().requires_grad_(), *others), **options)
    output = forward(first, *others)
    backward = custom_operator(f"{op}_backward").default
    wanted = [True] + [False] * (sum(o.differentiated for o in declared.operands) - 1)
    arguments = (torch.rand_like(output), first, *others, wanted)
    torch.library.opcheck(backward, arguments, **options)


# ---- calls that take none ------------------------------------------------------------------------

WEIGHTS = torch.randint(-4, 5, (C, C)).float()  # whose products are exact in any order
TARGET = torch.randint(-4, 5, (N, C)).float()
PROBABILITIES, HALF = TARGET.softmax(1), TARGET.bfloat16()
NONE: dict[str, Step] = {
    "none": lambda f, x: f.mse_loss(x, TARGET, reduction="none"),
    "another dtype": lambda f, x: f.mse_loss(x, TARGET.double()),
    "another shape": lambda f, x: f.margin_ranking_loss(x, TARGET[:, :1], TARGET.sign()),
    "a number": lambda f, x: f.gaussian_nll_loss(x, TARGET, 0.7),
    "a tensor for a number": lambda f, x: f.huber_loss(x, TARGET, delta=torch.tensor(0.5)),
    "no gradient": lambda f, x: f.mse_loss(x.detach(), TARGET) + x.sum(),
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f.mse_loss)(x @ WEIGHTS, HALF),
}


@pytest.mark.parametrize("step", NONE.values(), ids=NONE.keys())
def test_calls_that_take_no_operator(step: Step, graphs: Graphs) -> None:
    assert_torchs(step, torch.randn(N, C), graphs)
    assert not graphs.operators


WARNED: dict[str, Step] = {
    "mean": lambda f, x: f.kl_div(x, PROBABILITIES),
    "legacy": lambda f, x: f.mse_loss(x, TARGET, reduce=False),
}


@pytest.mark.filterwarnings("ignore:(reduction|size_average):UserWarning")
@pytest.mark.parametrize("step", WARNED.values(), ids=WARNED.keys())
def test_a_warning_is_torchs(step: Step, graphs: Graphs) -> None:
    assert_torchs(step, torch.randn(N, C), graphs)
    assert not graphs.operators


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_small_call_is_torchs(
    dynamic: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.COMPILED, "mse_loss", (N * C + 1, N * C + 1))
    step: Step = lambda f, x: f.mse_loss(x, TARGET)  # noqa: E731
    assert_torchs(step, torch.randn(N, C), graphs, dynamic=dynamic)
    assert not graphs.operators
    monkeypatch.setitem(sizes.COMPILED, "mse_loss", (N * C, N * C))
    torch.compiler.reset()
    assert_torchs(step, torch.randn(N, C), graphs, dynamic=dynamic)
    assert len(graphs.operators) == 2


def test_a_small_composed_loss_is_torchs_function() -> None:
    """The same bits as torch's compiled function, of half precision too: not those of a part."""
    ours, of_torch = (
        torch.compile(f.multilabel_soft_margin_loss, fullgraph=True, backend="aot_eager")
        for f in (fused, torch.nn.functional)
    )
    for scale in (0.5, 2, 8, 16):
        x, target = (scale * torch.randn(5)).half(), torch.rand(5).half()
        assert torch.equal(ours(x, target), of_torch(x, target)), (x, target)


def test_each_side_of_the_limit_has_its_program(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.COMPILED, "mse_loss", (5 * C, sizes.NEVER))
    options = {"fullgraph": True, "dynamic": True, "backend": graphs.backend}
    compiled = torch.compile(fused.mse_loss, **options)
    for rows, count in ((3, 2), (4, 2), (5, 4), (12, 4), (2, 4)):  # forward and backward
        x, target = torch.randn(rows, C, requires_grad=True), torch.randn(rows, C)
        got, expected = evaluate(compiled, x, target), evaluate(F.mse_loss, x, target)
        close((got.value, got.gradients), (expected.value, expected.gradients))
        assert (graphs.count, len(graphs.operators)) == (count, count - 2)


MARGIN: dict[str, Step] = {
    "mean": lambda f, x: f.multilabel_margin_loss(x, LABELS),
    "sum": lambda f, x: f.multilabel_margin_loss(x, LABELS, reduction="sum"),
    "none": lambda f, x: f.multilabel_margin_loss(x, LABELS, reduction="none"),
    "row": lambda f, x: f.multilabel_margin_loss(x[1], LABELS[1], reduction="none"),
    "computed": lambda f, x: f.multilabel_margin_loss(x * 2 + 1, LABELS),
    "detached": lambda f, x: f.multilabel_margin_loss(x.detach(), LABELS) + x.sum(),
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f.multilabel_margin_loss)(
        x.bfloat16(), LABELS
    ),
}
# What follows the first -1 does not count; a decomposition of torch's counts it.
LABELS = torch.tensor([[1, 2, -1, 5, 0, 3, 4], [0, -1, 1, 2, 3, 4, 5]]).repeat(N // 2, 1)


@pytest.mark.parametrize("step", MARGIN.values(), ids=MARGIN.keys())
def test_multilabel_margin_loss_is_an_operator_in_any_size_and_reduction(
    step: Step, kernel_calls: KernelCalls
) -> None:
    assert_torchs(step, torch.randn(N, C), Graphs())
    assert kernel_calls["multilabel_margin_loss"]


@pytest.mark.thresholds
def test_the_table_has_a_row_for_every_loss() -> None:
    heads_and_logits = {*sizes.OF_LOGITS, *sizes.LINEAR}
    losses = {name for name in OPERATORS if "loss" in name or name in ("kl_div", "cross_entropy")}
    losses |= {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
    assert set(sizes.COMPILED) == losses | heads_and_logits
    small = torch.zeros(4, requires_grad=True)
    compiled = torch.compile(fused.mse_loss, fullgraph=True, backend="eager")
    assert "MseLoss" in type(compiled(small, torch.ones(4)).grad_fn).__name__  # torch's own


# ---- derivatives, and Inductor's own code --------------------------------------------------------


@pytest.mark.parametrize("op", ["mse_loss", "nll_loss", "log_cosh_loss"])
def test_a_second_derivative_where_the_compiler_leaves_autograd_alone(
    op: str, graphs: Graphs
) -> None:
    def second(step: Callable[[Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(step(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    X = input_of(op) / 4  # noqa: N806
    compiled = torch.compile(lambda x: call(fused, op, x), fullgraph=True, backend="eager")
    close(second(compiled), second(lambda x: call(F, op, x)))


def test_both_operands_take_gradients(graphs: Graphs) -> None:
    x, target = torch.randn(N, C, requires_grad=True), TARGET.t().contiguous().t().requires_grad_()
    compiled = torch.compile(fused.mse_loss, fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, x, target), evaluate(F.mse_loss, x, target)
    close(got.gradients, expected.gradients)
    assert [g.stride() for g in got.gradients] == [x.stride(), target.stride()]


def test_an_error_of_values_in_a_compiled_call(graphs: Graphs) -> None:
    compiled = torch.compile(fused.binary_cross_entropy, fullgraph=True, backend=graphs.backend)
    x = torch.rand(N, C, requires_grad=True)
    with pytest.raises(RuntimeError, match="target"):
        compiled(x, torch.full((N, C), 2.0))


def test_inductor(graphs: Graphs, kernel_calls: KernelCalls) -> None:
    model = nn.Linear(C, C)

    def step(f: Any, x: Tensor) -> Tensor:
        loss = f.mse_loss(F.linear(f.gelu(model(x)), WEIGHTS), TARGET)
        return loss + f.smooth_l1_loss(2 * x + 1, TARGET)

    x = torch.randn(N, C, requires_grad=True)
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True)
    got: Outcome = evaluate(compiled, x)
    expected = evaluate(lambda x: step(F, x), x)
    close(got.value, expected.value)
    close(got.gradients, expected.gradients)
    assert kernel_calls == {"mse_loss": 2, "smooth_l1_loss": 2}


def test_operators_are_named_by_the_version(graphs: Graphs) -> None:
    """As keys of programs on disk are made of these names."""
    assert f"pyfused_{pyfused.__version__.replace('.', '_')}" == NAMESPACE
    assert str(custom_operator("cross_entropy").default) == f"{NAMESPACE}.cross_entropy.default"


@pytest.mark.large
def test_a_program_of_another_version_is_not_reused(tmp_path: Path) -> None:
    """Inductor and AOTAutograd keep programs on disk, by what is in their graphs."""
    code = """
        import torch
        from importlib.machinery import SourceFileLoader

        class Loader(SourceFileLoader):
            def get_data(self, path):
                return super().get_data(path).replace(b'__version__ = "', b'__version__ = "VERSION')

        import importlib.util, sys
        spec = importlib.util.find_spec("pyfused")
        spec.loader = Loader(spec.name, spec.origin)
        sys.modules["pyfused"] = pyfused = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pyfused)
        from pyfused.dispatch import sizes

        sizes.COMPILED["cross_entropy"] = 0, 0
        x, target = torch.linspace(-1, 1, 40).view(8, 5), torch.arange(8) % 5
        torch.compile(pyfused.functional.cross_entropy)(x, target)
        counters = torch._dynamo.utils.counters
        hits = counters["inductor"]["fxgraph_cache_hit"]
        print(pyfused.__version__, bool(hits + counters["aot_autograd"]["autograd_cache_hit"]))
    """
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    lines = []
    for version in ("", "", "9."):
        done = subprocess.run(
            [sys.executable, "-c", dedent(code.replace("VERSION", version))],
            env=os.environ | caches,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.split()[-2:])
    assert [hit for _, hit in lines] == ["False", "True", "False"]
    assert lines[2][0] == f"9.{lines[0][0]}"
