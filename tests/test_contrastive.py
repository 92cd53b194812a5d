"""contrastive_loss: the losses of CLIP and SigLIP."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import evaluate, exactly, products
from conftest import KernelCalls
from processes import python
from test_textbook import contrastive_loss
from torch import Tensor

import pyfused
from pyfused import functional as fused

N, D = 37, 6
BUDGET = 5000  # bytes, which give several blocks
KINDS = [False, True]
every_kind = pytest.mark.parametrize("has_bias", KINDS, ids=["softmax", "sigmoid"])


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


@every_kind
def test_autocast_rounds_the_embeddings(has_bias: bool) -> None:
    a, *others = given(has_bias)
    with torch.autocast("cpu", torch.bfloat16):
        of_rounded = fused.contrastive_loss(a.bfloat16().float(), *others)
        assert torch.equal(fused.contrastive_loss(a, *others), of_rounded)


@pytest.mark.cpu
def test_matrix_products() -> None:
    """The logits are computed once, or twice if several blocks need the softmax of all."""
    for has_bias in KINDS:
        arguments = given(has_bias)
        with products() as found:
            fused.contrastive_loss(*arguments).backward()
        assert sorted(found) == sorted([(N, D, N), *[(N, N, D)] * 2])
        with products() as found, torch.no_grad():
            fused.contrastive_loss(*arguments)
        assert found == [(N, D, N)]


@pytest.mark.thresholds
def test_large_calls_use_the_kernels() -> None:
    paths = {16: ("torch", "torch"), 1024: ("torch", "cpu"), 4096: ("cpu", "cpu")}
    for n, (of_softmax, of_sigmoid) in paths.items():
        x = torch.randn(n, D)
        assert pyfused.explain("contrastive_loss", x, x).backend == of_softmax
        assert pyfused.explain(pyfused.nn.ContrastiveLoss(), x, x, 20, -10).backend == of_sigmoid


@pytest.mark.cpu
@pytest.mark.slow
def test_memory() -> None:
    """torch would need 4 times 64 MiB for logits and their gradients.

    The limit is not the budget, because the C library keeps freed blocks: 2 to 79 MiB of them.
    """
    done = python("""
        import re
        from pathlib import Path
        import torch
        from pyfused.functional import contrastive_loss

        def peak():
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) >> 10

        a, b = torch.randn(2, 4096, 8, requires_grad=True)
        for bias in (None, -1.0):
            contrastive_loss(a[:512], b[:512], 2.0, bias).backward()
        for bias in (None, -1.0):
            before = peak()
            contrastive_loss(a, b, 2.0, bias, memory_budget=4 << 20).backward()
            print(peak() - before)
    """)
    assert done.returncode == 0, done.stderr
    assert all(int(megabytes) < 128 for megabytes in done.stdout.split()), done.stdout
