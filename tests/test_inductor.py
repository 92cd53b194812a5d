"""Logits made float32 within a compiled graph: Inductor writes no copy of them for the operator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, evaluate
from torch import Tensor
from torch._inductor import config

from pyfused import functional as fused
from pyfused.ops import dispatch, inductor

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
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Seen:
    """The dtypes of what a joint graph holds at last."""

    nodes: list[Any]

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
    monkeypatch.setitem(dispatch.COMPILED_BELOW, "cross_entropy", 0)
    torch.compiler.reset()
    seen = Seen()

    def pass_of_the_user(graph: torch.fx.Graph) -> None:
        graph.eliminate_dead_code()
        seen.nodes = list(graph.nodes)

    with config.patch(joint_custom_post_pass=pass_of_the_user):
        yield seen


def compiled_and_eager(step: Step, x: Tensor, **options: Any) -> tuple[Outcome, Outcome]:
    compiled = torch.compile(lambda x: step(fused, x), fullgraph=True, **options)
    return evaluate(compiled, x), evaluate(lambda x: step(F, x), x)


def assert_same(outcomes: tuple[Outcome, Outcome]) -> None:
    got, expected = outcomes
    close(got.value, expected.value)  # dtypes, too
    close(got.gradients, expected.gradients)


def logits(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(N, C) * 3).to(dtype).requires_grad_()


VIEWED: dict[str, Step] = {
    "as_it_is": lambda f, x: f.cross_entropy(x.float(), INDICES),
    "sum": lambda f, x: f.cross_entropy(x.float(), INDICES, reduction="sum"),
    "none": lambda f, x: f.cross_entropy(x.float(), INDICES, reduction="none").square().sum(),
    "rows_of_a_sequence": lambda f, x: f.cross_entropy(
        x.view(3, 4, C).float().view(-1, C), INDICES
    ),
    "transposed": lambda f, x: f.cross_entropy(
        x.view(3, 4, C).float().transpose(1, 2), INDICES.view(3, 4)
    ),
}


@halves
@pytest.mark.parametrize("step", VIEWED.values(), ids=VIEWED.keys())
def test_the_operator_reads_and_writes_the_half(step: Step, dtype: torch.dtype, seen: Seen) -> None:
    assert_same(compiled_and_eager(step, logits(dtype)))
    assert seen.given_to_operators() == [dtype, dtype]
    assert not seen.casts()


def test_sizes_that_change(seen: Seen) -> None:
    step = VIEWED["rows_of_a_sequence"]
    assert_same(compiled_and_eager(step, logits(), dynamic=True))
    assert seen.given_to_operators() == [torch.bfloat16] * 2
    assert not seen.casts()


def test_without_a_gradient(seen: Seen) -> None:
    assert_same(compiled_and_eager(VIEWED["as_it_is"], logits().detach()))
    assert seen.given_to_operators() == [torch.bfloat16]
    assert not seen.casts()


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
    assert seen.given_to_operators() == [after, after]


def test_a_torch_without_such_patterns(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import pattern_matcher
    from torch._inductor.fx_passes import joint_graph

    for name in ("cross_entropy", "cross_entropy_backward"):
        operator = getattr(torch.ops.pyfused, name).default
        joint_graph.patterns.patterns.setdefault(("call_function", operator), [])
        monkeypatch.delitem(joint_graph.patterns.patterns, ("call_function", operator))
    monkeypatch.setattr(inductor, "_registered", False)
    monkeypatch.delattr(pattern_matcher, "register_graph_pattern")
    assert_same(compiled_and_eager(VIEWED["as_it_is"], logits()))
    assert seen.given_to_operators() == [torch.float32] * 2


def test_patterns_are_for_inductor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_registered", False)
    monkeypatch.delitem(sys.modules, "torch._inductor.fx_passes.joint_graph", raising=False)
    inductor.register()
    assert not inductor._registered
