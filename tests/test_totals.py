"""What the programs of a Triton kernel add up among themselves, whichever of them is last."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused import functional as fused

if not interpreter.ON:
    pytest.skip("of Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder

from pyfused.kernels import sums

Call = Callable[[Any, Tensor, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "cross_entropy": lambda f, x, t: f.cross_entropy(x, t),
    "smoothing": lambda f, x, t: f.cross_entropy(x, t, x[0].detach().exp(), label_smoothing=0.1),
    "few rows": lambda f, x, t: f.cross_entropy(x.reshape(2, -1), t[:2]),
    "nll_loss": lambda f, x, t: f.nll_loss(x, t),
    "multi_margin_loss": lambda f, x, t: f.multi_margin_loss(x, t),
    "mse_loss": lambda f, x, t: f.mse_loss(x, x.flip(0).detach()),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def results(functional: Any, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    x = torch.randn(90, 5).to(dtype).requires_grad_()
    loss = call(functional, x, torch.randint(5, (90,)))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.fixture(autouse=True)
def nothing_is_there_before() -> Iterator[None]:
    """New memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The counters that calls are given: one tensor for all, as on a stream of a GPU."""
    shared, calls = torch.zeros(1024, dtype=torch.int32), []

    def counters(device: torch.device, n: int) -> Tensor:
        calls.append(shared)
        return shared

    monkeypatch.setattr(sums, "counters", counters)
    return calls


@every_call
def test_the_order_in_which_programs_come_changes_no_bit(
    call: Call, given: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(fused, call, torch.float32)
    exact = tuple(each.float() for each in results(F, call, torch.float64))
    torch.testing.assert_close(expected, exact)
    assert given
    set_grid_idx = interpreter_builder.set_grid_idx
    draw = random.Random(7)
    orders: dict[int, list[int]] = {}

    def shuffled(x: int, *others: Any) -> None:
        programs = interpreter_builder.grid_dim[0]
        if x == 0:
            orders[programs] = draw.sample(range(programs), programs)
        set_grid_idx(orders[programs][x], *others)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
    for _ in range(3):
        for got, of_before in zip(results(fused, call, torch.float32), expected, strict=True):
            assert torch.equal(got, of_before)
    assert max(orders) > interpreter.GROUP


@every_call
def test_who_is_last_leaves_the_counters_as_they_were(call: Call, given: list[Tensor]) -> None:
    for _ in range(2):
        results(fused, call, torch.float32)
        assert not given[0].any()
