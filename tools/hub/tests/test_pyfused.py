"""The kernel in this folder gives torch's values and gradients. Run pytest in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import get_local_kernel

pyfused = get_local_kernel(Path(__file__).parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss, inputs)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits = torch.randn(16, 300, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(300, (16,), device=DEVICE)
    ours = results(pyfused.functional.cross_entropy(logits, target), logits)
    theirs = F.cross_entropy(logits.float(), target).to(dtype)
    # torch's operator, if it runs, rounds log-probabilities of less than 16 by up to 2**-5.
    rtol = 2**-4 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, results(theirs, logits), rtol=rtol, atol=1e-5)


@pytest.mark.kernels_ci
def test_linear_cross_entropy() -> None:
    hidden = torch.randn(16, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(300, 8, device=DEVICE, requires_grad=True)
    target = torch.randint(300, (16,), device=DEVICE)
    ours = pyfused.functional.linear_cross_entropy(hidden, weight, target)
    theirs = F.cross_entropy(F.linear(hidden, weight), target)
    torch.testing.assert_close(results(ours, hidden, weight), results(theirs, hidden, weight))


@pytest.mark.kernels_ci
def test_layers_are_stateless() -> None:
    plain = set(dir(torch.nn.Module))
    for name in pyfused.layers.__all__:
        layer = getattr(pyfused.layers, name)
        assert issubclass(layer, torch.nn.Module)
        assert layer.__init__ is torch.nn.Module.__init__
        assert set(dir(layer)) - plain <= {"can_torch_compile", "has_backward"}


@pytest.mark.kernels_ci
def test_causal_lm_loss() -> None:
    logits = torch.randn(2, 8, 300, device=DEVICE, requires_grad=True)
    labels = torch.randint(300, (2, 8), device=DEVICE)
    ours = pyfused.layers.ForCausalLMLoss()(logits, labels, vocab_size=300)
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(results(ours, logits), results(theirs, logits))
