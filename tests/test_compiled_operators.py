"""Which custom operators Inductor's graphs keep, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
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
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from pyfused import functional as fused
from pyfused.ops import custom_operator, sizes
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

NEVER = sizes.NEVER, sizes.NEVER
# The operators that have a custom operator of this name, or of the loss that they are made of.
CUSTOM = {
    name: name
    for name in OPERATORS
    if name not in (*sizes.OF_LOGITS, *sizes.LINEAR) and sizes.COMPILED.get(name, NEVER) != NEVER
}
CUSTOM |= {
    "rmse_loss": "mse_loss",
    "multilabel_soft_margin_loss": "binary_cross_entropy_with_logits",
}
# A mean of kl_div warns, and losses that are not reduced are left to Inductor.
WITH_REDUCTION = {"kl_div": "kl_div-batchmean", "sigmoid_focal_loss": "sigmoid_focal_loss-sum"}
every_operator = pytest.mark.parametrize("op", CUSTOM)
FAMILIES = "mse_loss", "gelu", "softmax", "nll_loss"


EXAMPLE = {op: EXAMPLES[WITH_REDUCTION.get(op, op)].call(shape=(N, C)) for op in CUSTOM}
OURS = {op: example.of_first(Call.ours, bounded=False) for op, example in EXAMPLE.items()}
OF_TORCH = {op: example.of_first(Call.reference, bounded=False) for op, example in EXAMPLE.items()}


def call(functional: Any, op: str, x: Tensor) -> Tensor:
    return (OURS if functional is fused else OF_TORCH)[op](x)


def input_of(op: str) -> Tensor:
    return EXAMPLE[op].first.clone()


class Graphs:
    """Compiles as Inductor does up to its joint graph, and keeps the names of our operators."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=self.partition,
            decompositions=select_decomp_table(),
        )

    def partition(self, graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes

        joint_graph_passes(graph)
        targets = [str(node.target).split(".") for node in graph.graph.nodes]
        self.operators += [target[1] for target in targets if target[0] == "pyfused"]
        return min_cut_rematerialization_partition(graph, *args, **kwargs)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Every size takes the operators: the measured table would leave small ones to Inductor."""
    import torch._inductor.compile_fx  # as it is where Inductor compiles

    for op in OPERATORS:
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
def test_an_operator_stays_between_inputs_and_outputs(
    op: str, dynamic: bool, graphs: Graphs, kernel_calls: KernelCalls
) -> None:
    assert_torchs(lambda f, x: call(f, op, x), input_of(op), graphs, dynamic=dynamic)
    assert sorted(graphs.operators) == [CUSTOM[op], f"{CUSTOM[op]}_backward"]
    assert kernel_calls.total() == 2


@every_operator
def test_an_operator_of_what_is_computed_is_torchs(
    op: str, graphs: Graphs, kernel_calls: KernelCalls
) -> None:
    def step(functional: Any, x: Tensor) -> Tensor:
        return call(functional, op, x * 0.5 + 0.25)

    assert_torchs(step, input_of(op), graphs)
    if op in ("gaussian_nll_loss", "multilabel_margin_loss"):  # torch's graph is none, or is wrong
        assert kernel_calls.total() == 2
    else:
        assert not graphs.operators
        assert not kernel_calls


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's of torch 2.15
@pytest.mark.parametrize("op", [op for op, custom in CUSTOM.items() if custom == op])
def test_opcheck(op: str) -> None:
    opcheck(op, input_of(op))


@pytest.mark.parametrize("op", ["relu", "gelu", "mse_loss", "softmax", "nll_loss"])
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
    saved = output if getattr(declared, "saves", None) == "output" or "softmax" in op else first
    backward = custom_operator(f"{op}_backward").default
    wanted = [True] + [False] * (sum(o.differentiated for o in declared.operands) - 1)
    arguments = (torch.rand_like(output), saved, *others, wanted)
    torch.library.opcheck(backward, arguments, **options)


# ---- neighbours ----------------------------------------------------------------------------------


def small_integers(*shape: int) -> Tensor:
    """Their products are exact, in whatever order a processor adds them up."""
    return torch.randint(-4, 5, shape).float()


WEIGHTS, BIAS = small_integers(C, C), small_integers(C)
TARGET = small_integers(N, C)
PROBABILITIES = TARGET.softmax(1)
Names = list[str]
NEIGHBOURS: dict[str, tuple[Step, Names]] = {
    "between_products": (
        lambda f, x: F.linear(f.relu(F.linear(x, WEIGHTS, BIAS)), WEIGHTS).sum(),
        ["relu", "relu_backward"],
    ),
    "loss_of_a_product": (
        lambda f, x: f.mse_loss(F.linear(x, WEIGHTS, BIAS), TARGET),
        ["mse_loss", "mse_loss_backward"],
    ),
    "loss_of_a_view": (
        lambda f, x: f.mse_loss(F.linear(x, WEIGHTS).view(-1, 2), TARGET.view(-1, 2)) * 3,
        ["mse_loss", "mse_loss_backward"],
    ),
    "softmax_between_products": (
        lambda f, x: f.softmax(x @ WEIGHTS, -1) @ WEIGHTS,
        ["softmax", "softmax_backward"],
    ),
    "before_arithmetic": (lambda f, x: f.relu(F.linear(x, WEIGHTS)) + 1, []),
    "of_a_computed_target": (lambda f, x: f.mse_loss(x, TARGET * 2), []),
    "an_activation_before_a_loss": (lambda f, x: f.mse_loss(f.relu(x @ WEIGHTS), TARGET), []),
    "gradients_that_meet": (
        lambda f, x: f.mse_loss(x @ WEIGHTS, TARGET) + f.l1_loss(x @ WEIGHTS, TARGET * 2),
        ["mse_loss", "mse_loss_backward"],
    ),
    "two_losses_of_one_tensor": (lambda f, x: f.mse_loss(x, TARGET) + f.l1_loss(x, TARGET), []),
    "rows_with_gaps": (lambda f, x: f.relu(x[:, ::2]), []),
    "another_order": (lambda f, x: f.mse_loss(x, TARGET.t().contiguous().t()), []),
    "a_constant_target": (lambda f, x: f.mse_loss(x, torch.zeros_like(x)), []),
}


@pytest.mark.parametrize(("step", "stay"), NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_decide(step: Step, stay: Names, graphs: Graphs) -> None:
    assert_torchs(step, small_integers(N, C), graphs)
    assert sorted(graphs.operators) == stay


def test_what_stayed_in_another_program_does_not_decide(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor lists the operators for which it has generated a call as they are."""
    from torch._inductor import lowering

    operators = [custom_operator(name).default for name in ("mse_loss", "mse_loss_backward")]
    monkeypatch.setattr(lowering, "fallbacks", lowering.fallbacks.union(operators))
    step, stay = NEIGHBOURS["an_activation_before_a_loss"]
    assert_torchs(step, small_integers(N, C), graphs)
    assert sorted(graphs.operators) == stay


# ---- calls that take none ------------------------------------------------------------------------

HALF = TARGET.bfloat16()
NONE: dict[str, Step] = {
    "none": lambda f, x: f.mse_loss(x, TARGET, reduction="none"),
    "inplace": lambda f, x: f.relu(x * 1, inplace=True),
    "another dtype": lambda f, x: f.mse_loss(x, TARGET.double()),
    "another shape": lambda f, x: f.margin_ranking_loss(x, TARGET[:, :1], TARGET.sign()),
    "a number": lambda f, x: f.gaussian_nll_loss(x, TARGET, 0.7),
    "dtype": lambda f, x: f.softmax(x, 1, dtype=torch.float64),
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


@pytest.mark.parametrize("below", [N * C, N * C + 1])
def test_a_graph_without_backward_has_a_table_of_its_own(
    below: int, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.COMPILED, "mse_loss", (0, below))
    step: Step = lambda f, x: f.mse_loss(x.detach(), TARGET) + x.sum()  # noqa: E731
    assert_torchs(step, torch.randn(N, C), graphs)
    assert graphs.operators == ["mse_loss"] * (below == N * C)


@pytest.mark.thresholds
def test_the_table_has_a_row_for_every_operator() -> None:
    assert set(sizes.COMPILED) == set(OPERATORS)
    small = torch.zeros(4, requires_grad=True)
    compiled = torch.compile(fused.mse_loss, fullgraph=True, backend="eager")
    assert "MseLoss" in type(compiled(small, torch.ones(4)).grad_fn).__name__  # torch's own


# ---- derivatives, and Inductor's own code --------------------------------------------------------


@pytest.mark.parametrize("op", ["mse_loss", "nll_loss", "tanh", "gelu", "log_softmax"])
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
    assert kernel_calls == {"gelu": 1, "gelu_backward": 1, "mse_loss": 2}
