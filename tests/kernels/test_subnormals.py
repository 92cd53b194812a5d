"""Every load converts subnormal numbers alike, also after torch.set_flush_denormal(True)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from compare import FLOATS
from conftest import ISAS
from grid import grid
from torch import Tensor

from pyfused import functional as fused
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
ACTIVATIONS = [name for name, op in OPERATORS.items() if isinstance(op, Activation)]
LOSSES = "l1_loss", "smooth_l1_loss", "quantile_loss", "margin_ranking_loss", "mse_loss"
# Numbers of elements with tails, and views of one number.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.repeat(2 * 64 + 7),
    "every second": lambda x: x.repeat(2 * 75).view(75, 2)[:, 0],
    "transposed": lambda x: x.repeat(5 * 23).view(5, 23).t(),
    "columns": lambda x: x.repeat(40 * 20).view(40, 20)[:, 3:14],
    "expanded": lambda x: x.expand(77),
}


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flushed(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield request.param
    torch.set_flush_denormal(False)


def results(name: str, x: Tensor) -> list[Tensor]:
    """Returns the result of an operator, and the gradient for a grad_output like the input."""
    x = x.detach().requires_grad_()
    if name in ACTIVATIONS:
        result = getattr(fused, name)(x)
    else:
        others = [torch.zeros_like(x)] * (2 if name == "margin_ranking_loss" else 1)
        result = getattr(fused, name)(x, *others, reduction="none")
    return [result.detach(), *torch.autograd.grad(result, x, x.detach())]


@grid(name=[*ACTIVATIONS, *LOSSES], isa=ISAS, dtype=FLOATS)
def test_loads(name: str, isa: str, dtype: torch.dtype, flushed: bool) -> None:
    for fraction in (1.0, 0.5, 0.37, 2.0**-9):
        x = torch.tensor([torch.finfo(dtype).tiny], dtype=torch.float64) * fraction
        found = {layout: results(name, view(x.to(dtype))) for layout, view in LAYOUTS.items()}
        for layout, each in found.items():
            for result, first in zip(each, found["contiguous"], strict=True):
                assert torch.equal(result, first[:1].expand(result.shape)), (layout, fraction)
        if dtype is torch.float16:  # these are normal numbers in float32
            for result, wide in zip(
                found["contiguous"], results(name, x.half().float()), strict=True
            ):
                error = (result[0].float() - wide[0]).abs()
                assert error <= 2.0**-24 + 2.0**-11 * wide[0].abs(), (name, fraction)
