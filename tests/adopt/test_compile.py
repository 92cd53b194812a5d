"""torch.compile: heads are custom operators, and a converted head breaks the graph once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, ours
from compare import Outcome, evaluate, flattened
from conftest import KernelCalls
from language_models import Model
from samples import every_second, transposed
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import backends
from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.ops.custom_operators import NAMESPACE

pytestmark = [
    # torch 2.13's compiler uses functions that are deprecated in Python 3.11 and later.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Raised by opcheck, and by Dynamo where it reads a tensor's attributes.
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.usefixtures("compiled_always"),
]

N, C = 12, 7
INDICES = torch.arange(N) % C
WEIGHTS = torch.randint(-4, 5, (C, C)).float()  # exact products in any order
TARGET = torch.randint(-4, 5, (N, C)).float()
close = torch.testing.assert_close
Step = Callable[[Any, Tensor], Tensor]


def recording(operators: list[str]) -> Any:
    """Returns a compiler backend that appends the operators of all graphs."""

    def compiled(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiled)


def assert_same(got: Outcome, expected: Outcome) -> None:
    close((got.value, *got.gradients), (expected.value, *expected.gradients), equal_nan=True)


def torchs_head(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.linear(x, weight), target, **options)


# ---- heads ---------------------------------------------------------------------------------------


OPTIONS = "cross_entropy-denominator=tensor", "cross_entropy-with_metrics=True"
CHECKED = (
    *(*sizes.COMPILED, "linear_cross_entropy-none", "linear_kl_div-none"),
    *[f"linear_{x}" for x in (*OPTIONS, "log_probs-return_entropy=True")],
)


def step_of(name: str, shape: tuple[int, int] = (N, C)) -> tuple[Callable[..., Any], list[Tensor]]:
    """Returns an example of a head as a function of the tensors with a gradient, and these."""
    call = EXAMPLES[name].call(shape=shape)
    step = lambda *x: flattened(ours(call, **call.given | dict(zip(call.leaves, x, strict=True))))  # noqa: E731
    return step, [*call.leaves.values()]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_large_heads(name: str, dynamic: bool, kernel_calls: KernelCalls) -> None:
    op, (step, leaves), operators = name.partition("-")[0], step_of(name), list[str]()
    assert hasattr(getattr(torch.ops, NAMESPACE), op)  # saved programs call it by name
    scaled = lambda x, *others: [3 * y for y in step(x * 0.5 + 0.25, *others)]  # noqa: E731
    backend = recording(operators)
    compiled = torch.compile(scaled, fullgraph=True, backend=backend, dynamic=dynamic)
    expected = scaled(*leaves)
    kernel_calls.clear()
    found = compiled(*leaves)
    assert kernel_calls
    close(found, expected)
    close(*[torch.autograd.grad(x[0].sum(), leaves) for x in (found, expected)])
    heads = {x.split(".")[1] for x in operators if x.startswith(f"{NAMESPACE}.")}
    assert op in heads <= {op, f"{op}_backward"}


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


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "transposed": transposed,
    "strided": every_second,
    "half": lambda x: x.half(),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "") for name in CHECKED), *((CHECKED[0], x) for x in LAYOUTS if x)],
)
def test_opcheck(name: str, layout: str) -> None:
    """Eager autograd runs forward and backward as two graphs with our operators."""
    step, leaves = step_of(name)
    leaves = [LAYOUTS[layout](x.detach()).requires_grad_() for x in leaves]
    found: list[str] = []
    eager = torch.compile(step, fullgraph=True, backend=lambda graph, _: Checked(graph, found).run)
    eager(*leaves)
    torch.compiler.reset()
    compiler = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(Checked(graph, found).run),
    )
    results = torch.compile(step, fullgraph=True, backend=compiler)(*leaves)
    sum(x.sum() for x in results if x.requires_grad).backward()
    assert found


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("rows", "has_gpu"), [(1 << 14, True), ((1 << 14) - 1, True), (1 << 14, False)]
)
def test_large_heads_on_a_gpu_use_the_operator(
    rows: int, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces with fake tensors, which need no GPU."""
    operators: list[str] = []
    monkeypatch.setitem(sizes.COMPILED, "linear_cross_entropy", (0, 1 << 24))
    if has_gpu:
        monkeypatch.setattr(backends, "_without_triton", lambda _: None)
    with FakeTensorMode():
        x = torch.empty(rows, 1 << 10, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(1 << 10, 1 << 10, dtype=torch.bfloat16, device="cuda")
        target = torch.empty(rows, dtype=torch.int64, device="cuda")
        head = torch.compile(
            fused.linear_cross_entropy, fullgraph=True, backend=recording(operators)
        )
        head(x, weight, target)
    assert any(NAMESPACE in name for name in operators) == (has_gpu and rows == 1 << 14)


@pytest.mark.parametrize("op", sizes.LINEAR)
def test_heads_with_float32_weights_under_autocast(op: str) -> None:
    step, leaves = step_of(op)
    autocast = torch.autocast("cpu", torch.bfloat16)
    got, expected = (
        evaluate(lambda *x, f=f: autocast(f)(*x)[0], *leaves)
        for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step)
    )
    # Where products of bfloat16 are computed in float32, eager heads do not round the weight.
    rounding = torch.finfo(torch.bfloat16).eps
    for x, y in zip(*[(each.value, *each.gradients) for each in (got, expected)], strict=True):
        close(x, y, rtol=0, atol=rounding * float(y.abs().max()))
    assert all(gradient.dtype == torch.float32 for gradient in got.gradients)


def test_second_derivatives_of_a_head() -> None:
    def gradient_norm(head: Callable[..., Tensor], x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(head(x, WEIGHTS, INDICES), x, create_graph=True)
        return gradient.square().sum()

    compiled = torch.compile(fused.linear_cross_entropy, fullgraph=True, backend="eager")
    x = torch.randn(N, C, requires_grad=True)
    assert_same(*(evaluate(partial(gradient_norm, head), x) for head in (compiled, torchs_head)))


def test_errors_of_a_compiled_head() -> None:
    function = fused.linear_cross_entropy
    # With dynamic sizes, torch 2.11 reports the parts of a message instead of the message.
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    with pytest.raises(IndexError, match=r"got 9 at position \(0,\)"):
        compiled(torch.randn(N, C), WEIGHTS, torch.full((N,), 9))
    weight = torch.ones(N, 1)  # as many elements as rows
    for head in (compiled, function):
        with pytest.raises(Exception, match="token_weight: expected"):
            head(torch.randn(N, C), WEIGHTS, INDICES, token_weight=weight)
        with pytest.raises(Exception, match="target: expected"):
            head(torch.randn(3, 4, C), WEIGHTS, INDICES.view(4, 3))


# ---- converted heads -----------------------------------------------------------------------------

LENGTH = 5


def tokens(rows: int) -> Tensor:
    return torch.randint(40, (rows, LENGTH))


class Tagger(Model):
    """Returns logits, or their loss if it is given the classes."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.emb(x))
        return logits if target is None else loss_of(logits, target)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    rows = logits.float()[:, :-1].reshape(-1, logits.size(-1)) / 2
    return nn.functional.cross_entropy(rows, target[:, 1:].flatten())


def loss_of_output(logits_of: Any, loss: Any = loss_of) -> Step:
    return lambda x: loss(logits_of(x), x)


def loss_inside(model: Any, compiled: Any) -> Step:
    loss = compiled(model)
    return lambda x: loss(x, x)


def under_autocast(model: Any, compiled: Any) -> Step:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model(x), x)

    return compiled(step)


# Programs, options of torch.compile, whether the loss of a converted head is fused, and the number
# of breaks in each graph: one, and one in each function that calls the function with the head.
PROGRAMS: dict[str, tuple[Callable[[Any, Any], Step], dict[str, Any], bool, int]] = {
    "loss outside": (lambda model, c: loss_of_output(c(model)), {}, True, 1),
    "loss inside": (loss_inside, {}, True, 1),
    "loss apart": (lambda model, c: loss_of_output(c(model), c(loss_of)), {}, True, 1),
    "dynamic": (loss_inside, {"dynamic": True}, True, 1),
    "step": (lambda model, c: c(loss_of_output(model)), {}, True, 2),
    "autocast": (under_autocast, {}, True, 2),
    "fullgraph": (loss_inside, {"fullgraph": True}, False, 0),
    "no_grad": (lambda model, c: torch.no_grad()(loss_of_output(c(model))), {}, False, 0),
    "checkpoint": (
        lambda model, c: c(lambda x: checkpoint(model, x, x, use_reentrant=False)), {}, False, 0
    ),
    "vmap": (
        lambda model, c: c(lambda x: torch.func.vmap(lambda y: model(y))(x).sum()), {}, False, 0
    ),
}  # fmt: skip


def outcome_of(step: Step, x: Tensor, model: nn.Module) -> list[Tensor]:
    """Returns the value of a step, and the gradients of the model's parameters."""
    value = step(x)
    gradients = torch.autograd.grad(value, [*model.parameters()]) if value.requires_grad else ()
    return [value.detach(), *gradients]


@pytest.mark.parametrize(("program", "options", "fuses", "breaks"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_converted_head_breaks_the_graph_once(
    program: Any, options: Any, fuses: bool, breaks: int, losses: list[Tensor]
) -> None:
    """Unless the graph has to be whole; there are no more graphs than without the conversion."""
    batches = [tokens(rows) for rows in (4, 4, 3, 2, 4)]
    converted, graphs = pyfused.convert(Tagger(), head="head"), list[int]()
    eager = program(converted, lambda f: f)
    expected = [outcome_of(eager, x, converted) for x in batches]
    for model in (Tagger(), converted):
        torch.compiler.reset()
        counters.clear()
        losses.clear()
        step = program(model, partial(torch.compile, backend="aot_eager", **options))
        found = [outcome_of(step, x, model) for x in batches]
        graphs.append(counters["stats"]["unique_graphs"])
    close(found, expected)
    assert len(losses) == len(batches) * fuses
    assert graphs[1] <= graphs[0] * max(breaks, 1)  # autocast is a graph of its own
    compiled = 1 if "dynamic" in options else 2  # the first batch size, and all others
    assert counters["graph_break"].total() == breaks * compiled


def test_a_converted_sequential_is_a_whole_graph(losses: list[Tensor]) -> None:
    """Its class is torch's, whose forward Dynamo does not trace as a frame of its own."""
    model, x = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40)), tokens(4)
    compiled = torch.compile(pyfused.convert(model, head="1"), fullgraph=True, backend="aot_eager")
    counters.clear()
    loss_of(compiled(x), x).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not losses


def test_training_and_evaluation_are_compiled_once(losses: list[Tensor]) -> None:
    model: Any = pyfused.convert(Tagger(), head="head", metrics=True)
    compiled, x = torch.compile(model, backend="aot_eager"), tokens(4)
    frames = set[int]()
    for _ in range(3):
        for training, target in itertools.product((True, False), (None, x)):
            model.train(training)
            with torch.set_grad_enabled(training):
                compiled(x, target)
            assert (model.pyfused_metrics is None) == (target is None or not training)
        frames.add(counters["frames"]["total"])
    assert len(frames) == 1
    assert len(losses) == 3


@pytest.mark.parametrize(("rows", "breaks"), [(3, 0), (4, 1), (None, 0)])
def test_sizes_of_heads(rows: int | None, breaks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide about a break; a symbolic size has the value of the call that is traced."""
    monkeypatch.setitem(sizes.COMPILED, "linear_cross_entropy", (4 * LENGTH * 40,) * 2)
    model, x = pyfused.convert(Tagger(), head="head"), tokens(8)
    counters.clear()

    @torch.compile(backend="aot_eager", dynamic=True)
    def step(x: Tensor, mask: Tensor) -> Tensor:
        return model(x if rows else x[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (rows or 8, 2, 8):  # which do not compile the program again
            step(x[:count], torch.ones(count, dtype=torch.bool))
    assert counters["graph_break"].total() == 2 * breaks
    assert counters["stats"]["unique_graphs"] == 1 or rows is None


# ---- sizes and numbers that change ---------------------------------------------------------------


@pytest.mark.parametrize("op", sizes.COMPILED)
def test_heads_are_compiled_once_for_all_batch_sizes(op: str) -> None:
    calls = [EXAMPLES[op].call(shape=(rows, C)) for rows in (3, 4, 6, 12)]
    names, counter = [*calls[0].tensors], CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(*tensors: Tensor) -> Tensor:
        return calls[0].ours(**dict(zip(names, tensors, strict=True))).sum()

    for call in calls:
        step(*call.tensors.values()).backward()
    assert counter.frame_count <= 2  # the first batch size, and all others


def graphs_of(function: Callable[[float], Tensor], numbers: tuple[float, ...]) -> int:
    """Returns the number of graphs that are compiled for these numbers."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for number in numbers:  # Dynamo traces the second one as a symbol
        close(compiled(number), function(number))
    return counter.frame_count


@pytest.mark.parametrize(
    ("op", "name", "numbers"),
    [
        ("linear_cross_entropy", "ignore_index", (-100, 0, 1, 5)),
        ("linear_cross_entropy", "label_smoothing", (0.0, 0.1, 0.2)),
        ("linear_cross_entropy", "memory_budget", (1000, 2000, 3000, 4000)),
        ("linear_kl_div", "beta", (0.25, 0.5, 0.75)),
    ],
)
def test_a_number_that_changes_between_calls(op: str, name: str, numbers: Any) -> None:
    """A head is compiled no more often than torch's, and twice for all budgets."""
    call, in_torch = EXAMPLES[op].call(shape=(N, C)), name in ("ignore_index", "label_smoothing")
    call.given |= {"target": INDICES} if in_torch else {}
    graphs = graphs_of(lambda number: call.ours(**{name: number}), numbers)
    torchs = lambda number: torchs_head(*call.tensors.values(), **{name: number})  # noqa: E731
    assert not in_torch or graphs <= graphs_of(torchs, numbers)
    assert name != "memory_budget" or graphs == 2


def test_marked_sizes_are_not_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in sizes.COMPILED:  # a limit within the range of sizes
        monkeypatch.setitem(sizes.COMPILED, op, (8 * C, 8 * C))
    x, target = torch.randn(N, C, requires_grad=True), INDICES.clone()
    for tensor in (x, target):
        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=4096)
    compiled = torch.compile(fused.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for rows in (N, 3):
        calls = (evaluate(f, x[:rows], WEIGHTS, target[:rows]) for f in (compiled, torchs_head))
        assert_same(*calls)


@pytest.mark.parametrize("name", CHECKED)
def test_rows_selected_by_a_mask(name: str) -> None:
    """The number of rows is known only when the program runs, and may be 0."""
    call = EXAMPLES[name].call(shape=(N, C))
    by_row = [n for n, x in call.tensors.items() if x.shape[:1] == (N,)]
    leaves = [*call.leaves]

    def step(mask: Tensor, *tensors: Tensor) -> Tensor:
        given = call.tensors | dict(zip(leaves, tensors, strict=True))
        return call.ours(**given | {n: given[n][mask] for n in by_row})

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for rows in (5, 0):
            arguments = torch.arange(N) < rows, *call.leaves.values()
            assert_same(evaluate(compiled, *arguments), evaluate(step, *arguments))


# ---- compiled autograd, Inductor, saved programs -------------------------------------------------


EAGER: dict[str, Step] = {
    "cross_entropy": lambda f, x: f.cross_entropy(x, INDICES),
    "gelu": lambda f, x: f.gelu(x).sum(),
    "head": lambda f, x: f.linear_cross_entropy(x, WEIGHTS, INDICES),
}


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_call_in_a_compiled_backward_pass(name: str, kernel_calls: KernelCalls) -> None:
    """torch's compiled autograd traces the backward pass of calls that were not compiled."""
    layer = nn.Linear(C, C)

    def loss_of(x: Tensor) -> Tensor:
        return EAGER[name](fused, layer(x))

    def step(x: Tensor) -> None:
        loss = eager(x)
        loss.backward(retain_graph=True)
        loss.backward()

    x, eager = torch.randn(N, C), torch.compiler.disable(loss_of)
    expected = torch.autograd.grad(loss_of(x), [*layer.parameters()])
    kernel_calls.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x)
    assert kernel_calls
    close([x.grad for x in layer.parameters()], [2 * gradient for gradient in expected])


@pytest.mark.slow
def test_inductor(kernel_calls: KernelCalls) -> None:
    model = nn.Linear(C, C)

    def step(f: Any, x: Tensor) -> Tensor:
        return f.mse_loss(f.gelu(x), TARGET) + f.linear_cross_entropy(model(x), WEIGHTS, INDICES)

    x = torch.randn(N, C, requires_grad=True)
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True)
    got, expected = evaluate(compiled, x), evaluate(lambda x: step(fused, x), x)
    assert_same(got, expected)
    assert kernel_calls["cross_entropy"] == 2
