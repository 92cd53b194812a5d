"""contrastive_loss: the losses of CLIP and SigLIP."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import evaluate, exactly, products
from conftest import KernelCalls
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pyfused import functional as fused
from pyfused.dispatch.sizes import every_size

N, D = 37, 6
BUDGET = 5000  # bytes, which give several blocks
every_kind = pytest.mark.parametrize("has_bias", [False, True], ids=["softmax", "sigmoid"])


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    bias: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Returns the loss of SigLIP if there is a bias, else that of CLIP."""
    logits, target = scale * a @ b.T, torch.arange(len(a))
    if bias is not None:
        each = -F.logsigmoid((2 * torch.eye(len(a)) - 1).to(a) * (logits + bias)).sum(1)
    else:
        both = logits, logits.T
        each = sum(F.cross_entropy(x, target, reduction="none") for x in both) / 2
    return each if reduction == "none" else getattr(each, reduction)()


def given(has_bias: bool, dtype: torch.dtype = torch.float32, n: int = N) -> list[Tensor]:
    """Returns embeddings, some pairs of which are similar, the scale, and the bias if any."""
    a = torch.randn(n, D)
    b = torch.where(torch.arange(n)[:, None] % 3 == 0, a, torch.randn(n, D))
    numbers = [torch.tensor(3.0), torch.tensor([-1.5])][: 1 + has_bias]
    embeddings = [F.normalize(x) for x in (a, b)]
    return [x.to(dtype).requires_grad_() for x in (*embeddings, *numbers)]


@pytest.mark.parametrize("n", [1, 17])
def test_a_block_of_one_row(n: int, kernel_calls: KernelCalls) -> None:
    """The transposed block of a single row has the same layout, but its own memory."""
    arguments = given(False, torch.float64, n)
    call = partial(fused.contrastive_loss, memory_budget=1)  # blocks of 16 rows
    got, expected = evaluate(call, *arguments), evaluate(contrastive_loss, *arguments)
    torch.testing.assert_close(got.gradients, expected.gradients)
    assert kernel_calls.total() or n == 1


@every_kind
@pytest.mark.parametrize("number", [math.nan, torch.tensor(math.nan)], ids=["float", "tensor"])
def test_a_number_that_is_nan(number: Any, has_bias: bool) -> None:
    a, b, *_ = given(False)
    arguments = (1.0, number) if has_bias else (number,)
    with every_size():
        large = fused.contrastive_loss(a, b, *arguments)
    assert large.isnan()
    assert fused.contrastive_loss(a, b, *arguments).isnan()


@pytest.mark.interpreted
@every_kind
def test_large_logits(has_bias: bool) -> None:
    """Exponentials of the logits overflow; rows and columns have different maxima."""
    arguments = given(has_bias)
    arguments[2] = torch.tensor(1000.0)
    arguments[0].data[:5] *= 10
    got = evaluate(partial(fused.contrastive_loss, memory_budget=BUDGET), *arguments)
    exact = evaluate(contrastive_loss, *arguments, convert=exactly)
    torch.testing.assert_close(got.value, exact.value.float())
    expected = [x.float() for x in exact.gradients]
    torch.testing.assert_close(got.gradients, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.cpu
@every_kind
def test_matrix_products(has_bias: bool) -> None:
    """The logits are computed once, or in blocks within the budget, which are not saved."""
    arguments, saved = given(has_bias), list[int]()
    hooks = saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with products() as found, hooks:
        fused.contrastive_loss(*arguments, memory_budget=BUDGET).backward()
    assert max(4 * m * n for m, k, n in found if k == D) <= BUDGET < 4 * N * N
    assert sum(saved) < N * N
    with products() as found:
        fused.contrastive_loss(*arguments).backward()
    assert sorted(found) == sorted([(N, D, N), *[(N, N, D)] * 2])
    with products() as found, torch.no_grad():
        fused.contrastive_loss(*arguments)
    assert found == [(N, D, N)]
