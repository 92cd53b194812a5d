"""Outputs larger than the cache, and tensors with more elements than 32-bit indices can address.

Most tests of 2**31 elements need little memory: pages that were never written take none
(`numpy.zeros` maps them lazily), and an expanded tensor has more elements than memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import widen
from conftest import KernelCalls
from torch import Tensor

from pyfused import functional
from pyfused.functional import cross_entropy
from pyfused.memory import physical_memory

WRAP = 2**31


def unwritten(elements: int) -> Tensor:
    """Returns bfloat16 zeros that take address space, but no memory until they are written."""
    try:
        memory = np.zeros(elements, dtype=np.int16)
    except MemoryError:
        pytest.skip("needs 4 GiB of address space")
    return torch.from_numpy(memory).view(torch.bfloat16)


def far_apart(values: Tensor) -> Tensor:
    """Returns the rows of `values`, with the last row more than 2**31 elements after the first."""
    rows, length = values.shape
    step = WRAP // (rows - 1) + 40
    memory = unwritten((rows - 1) * step + length)
    view = memory.as_strided((rows, length), (step, 1))
    view.copy_(values)
    return view


def columns_far_apart(values: Tensor) -> Tensor:
    return far_apart(values.T.contiguous()).T


BEYOND_CACHE = 17 * 2**20  # bytes; kernels use non-temporal stores from 16 MiB on
CALLS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda f, x, y: f.relu(x),
    "mse_loss": lambda f, x, y: f.mse_loss(x, y),
    "mse_loss-none": lambda f, x, y: f.mse_loss(x, y, reduction="none"),
    "cross_entropy": lambda f, x, y: f.cross_entropy(
        x.view(-1, 3, x.shape[1]), y.view(-1, 3, x.shape[1]).argmax(1), reduction="sum"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_outputs_larger_than_the_cache(
    call: Callable[..., Tensor], dtype: torch.dtype, isa: str
) -> None:
    """Rows have an odd length, so they start at different offsets in a cache line."""
    x, y = torch.randn(2, 129, BEYOND_CACHE // dtype.itemsize // 129 | 1).to(dtype)
    x.requires_grad_()
    got, expected = call(functional, x, y), call(F, widen(x), widen(y))
    grad_output = torch.full_like(got, 0.5)
    (gradient,) = torch.autograd.grad(got, x, grad_output)
    (wanted,) = torch.autograd.grad(expected, x, grad_output.to(expected.dtype))
    eps, close = torch.finfo(dtype).eps, torch.testing.assert_close
    close(got, expected.to(dtype), rtol=max(4 * eps, 1e-5), atol=8 * eps)
    close(gradient, wanted, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("layout", [far_apart, columns_far_apart])
@pytest.mark.parametrize("shape", [(3, 200), (5, 10)], ids=["rows", "columns"])
def test_cross_entropy_of_logits_with_distant_rows(
    layout: Callable[[Tensor], Tensor], shape: tuple[int, int], kernel_calls: KernelCalls
) -> None:
    values = torch.randn(shape).bfloat16()
    target = torch.arange(shape[0])
    logits = layout(values)
    assert max(logits.stride()) * (max(shape) - 1) > WRAP or logits.stride(0) > WRAP // shape[0]
    got = cross_entropy(logits, target, reduction="none")
    assert torch.equal(got, cross_entropy(values, target, reduction="none"))
    probabilities = torch.rand(shape).bfloat16()
    got = cross_entropy(values, layout(probabilities))
    assert torch.equal(got, cross_entropy(values, probabilities))
    assert kernel_calls["cross_entropy"] == 4


def test_cross_entropy_of_more_logits_than_2_31() -> None:
    """Rows share memory, so 4 GiB of logits take almost none."""
    classes = 65536
    rows = WRAP // classes + 3
    row = torch.randn(classes).bfloat16()
    target = torch.full((rows,), 7)
    target[-1] = 65535
    with torch.no_grad():
        got = cross_entropy(row.expand(rows, classes), target, reduction="none")
        expected = cross_entropy(row.expand(2, classes), torch.tensor([7, 65535]), reduction="none")
    assert torch.equal(got[:-1], expected[:1].expand(rows - 1))
    assert torch.equal(got[-1], expected[1])


@pytest.mark.large
@pytest.mark.skipif(physical_memory() < 12 << 30, reason="needs 10 GiB of memory")
@pytest.mark.parametrize("classes", [40, 65536], ids=["columns", "rows"])
def test_cross_entropy_gradient(classes: int, kernel_calls: KernelCalls) -> None:
    rows = WRAP // classes + 3
    logits = unwritten(rows * classes).view(rows, classes)
    with torch.no_grad():
        logits[-1] = torch.randn(classes).bfloat16()
    last = logits[-1:].clone().requires_grad_()
    target = torch.full((rows,), 3)
    loss = cross_entropy(logits.requires_grad_(), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(cross_entropy(last, target[:1], reduction="sum"), last)
    assert torch.equal(gradient[-1:], expected)
    assert gradient[-2, 3] < 0 < gradient[-2, 4]
    assert kernel_calls["cross_entropy"] == 2
