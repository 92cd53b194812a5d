"""Training loops give the same results with pyfused and with torch patched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import operators_of_torch
from conftest import KernelCalls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyfused

pytestmark = pytest.mark.thresholds
ROWS = 1 << 15  # half of the rows exceed the size limit
X = torch.linspace(-2, 2, ROWS * 5).view(ROWS, 5)
TARGET = torch.arange(ROWS) % 3
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), target)


def autocast(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.cross_entropy(model(x), target)


def checkpointed(reentrant: bool) -> Loss:
    def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        output = checkpoint(model, x, use_reentrant=reentrant)
        return checkpoint(F.cross_entropy, output, target, use_reentrant=reentrant)

    return loss


LOSSES: dict[str, Loss] = {
    "plain": plain,
    "autocast": autocast,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
}


def train(loss_of: Loss, scaled: bool) -> list[float]:
    """Runs four steps of two accumulated batches, with clipped and unscaled gradients."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=scaled)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        for half in (slice(0, None, 2), slice(1, None, 2)):
            loss = loss_of(model, X[half], TARGET[half]) / 2
            scaler.scale(loss).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        scaler.step(optimizer)
        scaler.update()
    with torch.inference_mode():
        losses.append(loss_of(model, X, TARGET).item() if loss_of is plain else 0.0)
    return losses


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
def test_patched_training(loss_of: Loss, scaled: bool, kernel_calls: KernelCalls) -> None:
    expected = train(loss_of, scaled)
    assert not kernel_calls
    with pyfused.patch():
        got = train(loss_of, scaled)
    assert got == pytest.approx(expected, rel=2e-2 if loss_of is autocast else 1e-4)
    assert kernel_calls["cross_entropy"] >= 8


def test_autocast_makes_no_float32_copy_of_the_logits() -> None:
    """The kernel reads half-precision logits; torch converts them first."""
    logits = torch.randn(ROWS, 3, dtype=torch.bfloat16, requires_grad=True)
    copies = []
    for functional in (pyfused.functional, F):
        with operators_of_torch("aten::_to_copy") as casts, torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(logits, TARGET)
            (gradient,) = torch.autograd.grad(loss, logits)
        assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        copies.append(sum(shapes[0] == [ROWS, 3] for shapes in casts))
    assert copies[0] == 0 < copies[1]
