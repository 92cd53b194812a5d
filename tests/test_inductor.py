"""What is left of a compiled graph: no float32 copy of the logits, one operator of few classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, evaluate
from processes import python
from test_compiled_operators import Graphs
from torch import Tensor
from torch._inductor import config, metrics

from pyfused import functional as fused
from pyfused.ops import custom_operator, inductor, sizes
from pyfused.types import CrossEntropyOptions

pytestmark = [
    # torch 2.13 compiles with functions that Python 3.11 and later have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        torch.__version__ < "2.12", reason="to torch 2.11 a compiled call is an exported one"
    ),
]

N, C = 12, 7
INDICES = torch.arange(N) % C
PROBABILITIES = torch.linspace(-2, 2, N * C).view(N, C).softmax(1)
close = torch.testing.assert_close

Step = Callable[[Any, Tensor], Any]
Dtypes = list[torch.dtype]
MERGED_OPERATOR, PAIR = (
    ["pyfused.cross_entropy_with_gradients.default"],
    ["pyfused.cross_entropy.default", "pyfused.cross_entropy_backward.default"],
)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Seen:
    """The dtypes of what a joint graph holds at last."""

    nodes: list[Any]

    def operators(self) -> list[str]:
        return [name for node in self.nodes if (name := str(node.target)).startswith("pyfused.")]

    def casts(self) -> Dtypes:
        return [n.args[1] for n in self.nodes if "convert_element_type" in str(n.target)]

    def given_to_operators(self) -> Dtypes:
        """What forward and backward read, in this order."""
        return [
            node.args[name == "pyfused.cross_entropy_backward.default"].meta["val"].dtype
            for node in self.nodes
            if (name := str(node.target)).startswith("pyfused.")
        ]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    import torch._inductor.compile_fx  # as it is where Inductor compiles

    monkeypatch.setitem(sizes.COMPILED, "cross_entropy", (0, 0))
    torch.compiler.reset()
    seen = Seen()

    def pass_of_the_user(graph: torch.fx.Graph) -> None:
        graph.eliminate_dead_code()
        seen.nodes = list(graph.nodes)

    with config.patch(joint_custom_post_pass=pass_of_the_user):
        yield seen


def compiled_and_eager(step: Step, x: Tensor, **options: Any) -> tuple[Outcome, Outcome]:
    """Where there is a joint graph, no code is generated from what Inductor makes of it."""
    if x.requires_grad:
        options["backend"] = Graphs().backend
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, **options)
    return evaluate(compiled, x), evaluate(lambda x: step(F, x), x)


def assert_same(outcomes: tuple[Outcome, Outcome]) -> None:
    got, expected = outcomes
    close(got.value, expected.value)  # dtypes, too
    close(got.gradients, expected.gradients)


def logits(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(N, C) * 3).to(dtype).requires_grad_()


# ---- logits made float32 -------------------------------------------------------------------------


VIEWED: dict[str, Step] = {
    "as_it_is": lambda f, x: f.cross_entropy(x.float(), INDICES),
    "sum": lambda f, x: f.cross_entropy(x.float(), INDICES, reduction="sum"),
    "none": lambda f, x: f.cross_entropy(x.float(), INDICES, reduction="none").square().sum(),
    "rows_of_a_sequence": lambda f, x: f.cross_entropy(
        x.view(3, 4, C).float().view(-1, C), INDICES
    ),
    "labels_shifted_as_transformers_does": lambda f, x: f.cross_entropy(
        x.view(3, 4, C).float().view(-1, C),
        F.pad(INDICES.view(3, 4), (0, 1), value=-100)[:, 1:].contiguous().view(-1),
    ),
    "transposed": lambda f, x: f.cross_entropy(
        x.view(3, 4, C).float().transpose(1, 2), INDICES.view(3, 4)
    ),
}


@pytest.fixture
def many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of classes is one where the forward pass computes no gradient."""
    monkeypatch.setattr(inductor, "_FEW_CLASSES", 0)


@halves
@pytest.mark.usefixtures("many_classes")
@pytest.mark.parametrize("step", VIEWED.values(), ids=VIEWED.keys())
def test_the_operator_reads_and_writes_the_half(step: Step, dtype: torch.dtype, seen: Seen) -> None:
    assert_same(compiled_and_eager(step, logits(dtype)))
    assert seen.given_to_operators() == [dtype, dtype]
    assert not seen.casts()


@pytest.mark.usefixtures("many_classes")
def test_sizes_that_change(seen: Seen) -> None:
    step = VIEWED["rows_of_a_sequence"]
    assert_same(compiled_and_eager(step, logits(), dynamic=True))
    assert seen.given_to_operators() == [torch.bfloat16] * 2
    assert not seen.casts()


def test_without_a_gradient(seen: Seen) -> None:
    assert_same(compiled_and_eager(VIEWED["as_it_is"], logits().detach()))
    assert seen.given_to_operators() == [torch.bfloat16]
    assert not seen.casts()


def test_a_half_with_gaps_is_read_where_it_is(seen: Seen) -> None:
    metrics.reset()
    target = INDICES % 5
    step = lambda f, x: f.cross_entropy(x[:, :5].float(), target)  # noqa: E731
    assert_same(compiled_and_eager(step, logits().detach()))
    assert seen.given_to_operators() == [torch.bfloat16]
    assert metrics.generated_kernel_count == 0


def test_two_losses_of_one_copy(seen: Seen) -> None:
    """Their gradients meet in float32, and are rounded after."""

    def step(f: Any, x: Tensor) -> Tensor:
        x = x.float()
        return f.cross_entropy(x, INDICES) + f.cross_entropy(x, INDICES.flip(0))

    assert_same(compiled_and_eager(step, logits()))
    assert sorted(map(str, seen.given_to_operators())) == [
        *["torch.bfloat16"] * 2,
        *["torch.float32"] * 2,
    ]


@halves
def test_a_copy_that_others_read_too(dtype: torch.dtype, seen: Seen) -> None:
    def step(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        return f.cross_entropy(x, INDICES) + x.square().sum(), x

    assert_same(compiled_and_eager(lambda f, x: step(f, x)[0], logits(dtype)))
    assert seen.given_to_operators() == [dtype, torch.float32]
    compiled = torch.compile(lambda x: step(fused, x)[1], fullgraph=True)
    x = logits(dtype)
    close(compiled(x), x.float())


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LEFT: dict[str, tuple[Step, torch.dtype, torch.dtype]] = {
    "bfloat16_to_float64": (lambda f, x: f.cross_entropy(x.double(), INDICES), BF16, F64),
    "float32_to_float64": (lambda f, x: f.cross_entropy(x.double(), INDICES), F32, F64),
    "float64_to_float32": (lambda f, x: f.cross_entropy(x.float(), INDICES), F64, F32),
    "probabilities": (lambda f, x: f.cross_entropy(x.float(), PROBABILITIES), BF16, F32),
    "rows_with_gaps": (
        lambda f, x: f.cross_entropy(x.view(3, 4, C)[:, :3].float().view(-1, C), INDICES[:9]),
        BF16,
        F32,
    ),
}


@pytest.mark.parametrize(("step", "before", "after"), LEFT.values(), ids=LEFT.keys())
def test_any_other_copy_is_left_alone(
    step: Step, before: torch.dtype, after: torch.dtype, seen: Seen
) -> None:
    assert_same(compiled_and_eager(step, logits(before)))
    assert set(seen.given_to_operators()) == {after}


# ---- gradients computed by the forward pass ------------------------------------------------------


WEIGHT = torch.linspace(0.5, 1.5, C)
MANY = inductor._FEW_CLASSES + 1
MERGED: dict[str, Step] = {
    "mean": lambda f, x: f.cross_entropy(x, INDICES),
    "weighted_sum": lambda f, x: f.cross_entropy(
        x, INDICES, WEIGHT.to(x.dtype), reduction="sum", ignore_index=2, label_smoothing=0.1
    ),
    "scaled": lambda f, x: f.cross_entropy(x * 2, INDICES) / 3 + x.square().sum(),
    "kdim": lambda f, x: f.cross_entropy(x.view(3, 4, C).transpose(1, 2), INDICES.view(3, 4)),
    "lone": lambda f, x: f.cross_entropy(x[3], INDICES[3]),
    "probabilities": lambda f, x: f.cross_entropy(x, PROBABILITIES.to(x.dtype)),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("step", MERGED.values(), ids=MERGED.keys())
def test_few_classes_take_one_operator(step: Step, dtype: torch.dtype, seen: Seen) -> None:
    assert_same(compiled_and_eager(step, logits(dtype)))
    assert seen.operators() == MERGED_OPERATOR


@pytest.mark.parametrize("other", [INDICES, INDICES.flip(0)], ids=["same", "other"])
def test_each_of_two_losses_takes_one_operator(other: Tensor, seen: Seen) -> None:
    def step(f: Any, x: Tensor) -> Tensor:
        return f.cross_entropy(x, INDICES) + 3 * f.cross_entropy(x, other.clone())

    assert_same(compiled_and_eager(step, logits(F32)))
    assert seen.operators() == MERGED_OPERATOR * 2


def test_a_loss_without_gradient_beside_one_with(seen: Seen) -> None:
    def step(f: Any, x: Tensor) -> Tensor:
        return f.cross_entropy(x, INDICES) + f.cross_entropy(x.detach(), INDICES.flip(0))

    assert_same(compiled_and_eager(step, logits(F32)))
    assert sorted(seen.operators()) == sorted([*MERGED_OPERATOR, PAIR[0]])


def test_a_bfloat16_gradient_is_computed_by_the_forward_pass(seen: Seen) -> None:
    x = logits(BF16)
    got, _ = compiled_and_eager(MERGED["mean"], x)
    expected = evaluate(lambda x: F.cross_entropy(x.float(), INDICES), x)
    assert seen.operators() == MERGED_OPERATOR
    close(got.value, expected.value.to(BF16))
    close(got.gradients, expected.gradients)


def test_a_gradient_to_probabilities_alone_and_with_the_logits(seen: Seen) -> None:
    target = PROBABILITIES.clone().requires_grad_()
    compiled = torch.compile(fused.cross_entropy, fullgraph=True)
    for x in (logits(F32), logits(F32).detach()):
        assert_same((evaluate(compiled, x, target), evaluate(F.cross_entropy, x, target)))
        assert seen.operators() == MERGED_OPERATOR


def test_a_graph_kept_for_a_second_backward(seen: Seen) -> None:
    x = logits(F32)
    compiled = torch.compile(MERGED["scaled"], fullgraph=True)
    loss = compiled(fused, x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert seen.operators() == MERGED_OPERATOR
    close(first, torch.autograd.grad(MERGED["scaled"](F, x), x)[0])
    assert torch.equal(first, second)


PAIRS: dict[str, tuple[Step, tuple[int, int], torch.dtype]] = {
    "many_classes": (lambda f, x: f.cross_entropy(x, INDICES), (N, MANY), F32),
    "new_memory": (lambda f, x: f.cross_entropy(x, INDICES.repeat(100_000)), (N * 100_000, C), F32),
    "float16_underflows": (lambda f, x: f.cross_entropy(x, INDICES), (N, C), torch.float16),
    "none": (lambda f, x: f.cross_entropy(x, INDICES, reduction="none").sum(), (N, C), F32),
}


@pytest.mark.parametrize(("step", "shape", "dtype"), PAIRS.values(), ids=PAIRS.keys())
def test_what_takes_two_operators(
    step: Step, shape: tuple[int, int], dtype: torch.dtype, seen: Seen
) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    assert_same(compiled_and_eager(step, x))
    assert seen.operators() == PAIR


def test_a_number_of_rows_that_changes_takes_two_operators(seen: Seen) -> None:
    assert_same(compiled_and_eager(MERGED["mean"], logits(F32), dynamic=True))
    assert seen.operators() == PAIR


# ---- a gradient that matrix products read --------------------------------------------------------

HEAD_INPUT = torch.randint(-2, 3, (N, 5)).float()
HEADS: dict[str, tuple[int, Step]] = {
    "head": (C, lambda f, w: f.cross_entropy(HEAD_INPUT @ w, INDICES)),
    "more_rows_than_classes": (3, lambda f, w: f.cross_entropy(HEAD_INPUT @ w, INDICES % 3)),
    "scaled": (C, lambda f, w: 8 * f.cross_entropy(HEAD_INPUT @ w, INDICES, reduction="sum")),
    "of_both": (C, lambda f, w: f.cross_entropy((HEAD_INPUT @ w.sin()) @ w.T @ w, INDICES)),
    "bias": (C, lambda f, w: f.cross_entropy(F.linear(HEAD_INPUT, w.T, w[0]), INDICES)),
}


@pytest.mark.usefixtures("many_classes")
@pytest.mark.parametrize(("classes", "step"), HEADS.values(), ids=HEADS.keys())
def test_a_gradient_that_products_read_is_not_multiplied(
    classes: int, step: Step, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs, as which the pass takes this machine."""
    weight = torch.randn(5, classes).requires_grad_()
    assert_same(compiled_and_eager(step, weight))
    assert seen.operators() == PAIR
    torch.compiler.reset()
    monkeypatch.setattr(inductor, "takes_triton", lambda _: True)
    assert_same(compiled_and_eager(step, weight))
    assert seen.operators() == MERGED_OPERATOR
    (operator,) = [n for n in seen.nodes if str(n.target) == MERGED_OPERATOR[0]]
    gradients = [n for n in operator.users if n.args[1] == 1]
    assert gradients
    assert not any("mul" in str(user.target) for n in gradients for user in n.users)


def test_a_graph_of_a_gpu_reads_the_half_and_merges_for_products_alone() -> None:
    """Traced with fake tensors: torch without CUDA runs neither autograd of them nor slices."""
    import torch._inductor.compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    options, table = CrossEntropyOptions(-100, "mean").values(), select_decomp_table()

    def step(x: Tensor, w: Tensor, labels: Tensor, of_weight: bool) -> Any:
        logits = (x @ w).float().view(-1, C)
        given = logits, labels.view(-1), None, *options
        loss = custom_operator("cross_entropy")(*given)
        backward = custom_operator("cross_entropy_backward")
        gradient = backward(loss.cos(), *given, [True, False])[0].view(3, 4, C).to(x.dtype)
        return loss, gradient.view(-1, C).T @ x.view(-1, 5) if of_weight else gradient

    with FakeTensorMode():
        x = torch.empty(3, 4, 5, dtype=BF16, device="cuda")
        w, labels = x.new_empty(5, C), x.new_empty(3, 4, dtype=torch.int64)
        for of_weight, expected in ((True, MERGED_OPERATOR), (False, PAIR)):
            graph = make_fx(partial(step, of_weight=of_weight), table)(x, w, labels)
            graph.graph.eliminate_dead_code()
            joint_graph_passes(graph)
            graph.graph.eliminate_dead_code()
            seen = Seen()
            seen.nodes = list(graph.graph.nodes)
            assert seen.operators() == expected
            assert set(seen.given_to_operators()) == {BF16}


# ---- without patterns ----------------------------------------------------------------------------


def test_a_torch_without_such_patterns(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import pattern_matcher
    from torch._inductor.fx_passes import joint_graph

    for name in ("cross_entropy", "cross_entropy_backward"):
        operator = custom_operator(name).default
        joint_graph.patterns.patterns.setdefault(("call_function", operator), [])
        monkeypatch.delitem(joint_graph.patterns.patterns, ("call_function", operator))
    monkeypatch.setattr(inductor, "_registered", False)
    monkeypatch.setattr(inductor, "COMPILED", table := dict(sizes.COMPILED))
    monkeypatch.delattr(pattern_matcher, "register_graph_pattern")
    assert_same(compiled_and_eager(VIEWED["as_it_is"], logits()))
    assert seen.given_to_operators() == [torch.float32] * 2
    assert seen.operators() == PAIR
    assert "cross_entropy" in table
    assert not table.keys() & inductor.in_torch.keys()  # Inductor's, from here on


def test_the_key_of_a_compiled_program_names_pyfused() -> None:
    code = """
        import torch
        torch.compiler.config.cache_key_tag = "mine"
        from pyfused.ops import custom_operators
        print(torch.compiler.config.cache_key_tag)
    """
    tags = [python(code, PYFUSED_BACKEND=backend).stdout for backend in ("", "", "torch")]
    assert all(tag.startswith("mine pyfused ") for tag in tags)
    assert tags[0] == tags[1] != tags[2]


def test_patterns_are_for_inductor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_registered", False)
    monkeypatch.delitem(sys.modules, "torch._inductor.fx_passes.joint_graph", raising=False)
    inductor.register()
    assert not inductor._registered
