"""While torch is patched, definitions in torch code still run torch's own functions.

A definition that called a patched function would recurse into the operator that it defines, or
compute a part with another kernel. Results must therefore be bitwise equal with and without a
patch, with a shallow stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from catalogue import Call, Example, every_family, every_operator
from compare import evaluate
from test_torch_modes import steps
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import pyfused

pytestmark = [
    # torch compiles its forward-mode decompositions with torch.jit at their first use.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    # Raised by vmap of torch's in-place operators.
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]
Function = Callable[..., Tensor]


@contextmanager
def few_frames() -> Iterator[None]:
    """Limits the recursion depth."""
    before, depth = sys.getrecursionlimit(), len(inspect.stack(0))
    sys.setrecursionlimit(depth + 300)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def has_torchs_name(call: Call) -> bool:
    """Returns whether torch has a Python function of this name that accepts the arguments."""
    function = inspect.unwrap(getattr(F, call.op.name, None))
    names = inspect.signature(function).parameters if inspect.isfunction(function) else ()
    return call.given.keys() <= {*names}


def by_torchs_name(call: Call, **changed: Any) -> Tensor:
    return getattr(F, call.op.name)(**call.given | changed)


# ---- derivatives, transforms and compilation -----------------------------------------------------


def second(call: Call, function: Function) -> list[Tensor]:
    value, leaves = function(call), [*call.leaves.values()]
    gradients = torch.autograd.grad(value.square().sum(), leaves, create_graph=True)
    total = sum(gradient.square().sum() for gradient in gradients)
    rest = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*gradients, *rest]


def forward_mode(call: Call, function: Function) -> list[Tensor]:
    x = call.first
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.linspace(-1, 1, x.numel()).view_as(x))
        return [*forward_ad.unpack_dual(call.of_first(function)(dual))]


def vmapped(call: Call, function: Function) -> list[Tensor]:
    step = call.of_first(function)
    batch = torch.stack([call.first, call.first * 0.5])
    return [torch.vmap(step)(batch), torch.vmap(torch.func.grad(lambda x: step(x).sum()))(batch)]


WAYS = second, forward_mode, vmapped
every_way = pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])


def bits(way: Any, call: Call, function: Function) -> list[Tensor] | type[Exception]:
    """Returns the results without NaN, or the error if torch has no such derivative."""
    try:
        return [result.detach().nan_to_num(7.0) for result in way(call, function)]
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise
        return type(error)


def assert_same_bits(way: Any, call: Call) -> None:
    expected = bits(way, call, Call.ours)
    with pyfused.patch(), few_frames():
        for function in (Call.ours, by_torchs_name)[: 1 + has_torchs_name(call)]:
            got = bits(way, call, function)
            if isinstance(expected, type):
                assert got is expected
            else:
                assert [x.dtype for x in got] == [x.dtype for x in expected]
                assert all(map(torch.equal, got, expected))


@every_operator
@every_way
def test_results_are_bitwise_identical_while_torch_is_patched(example: Example, way: Any) -> None:
    assert_same_bits(way, example.call())


@pytest.mark.thresholds
@every_operator
def test_sizes_above_the_limits(example: Example) -> None:
    """Many operators run kernels at this size; others fall back."""
    assert_same_bits(second, example.call(shape=(1024, 130)))


@every_family
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch 2.13's compiler
def test_compiled_while_torch_is_patched(example: Example) -> None:
    if example.id == "kl_div":
        pytest.skip("the compiler cannot trace torch's warning")
    with pyfused.patch():
        ours, of_torch, x = steps(example)
        got = evaluate(torch.compile(ours, fullgraph=True, backend="aot_eager"), x.requires_grad_())
    expected = evaluate(of_torch, x)
    torch.testing.assert_close(got.value, expected.value)
    torch.testing.assert_close(got.gradients, expected.gradients)
