"""The loop over blocks of a head's logits, compared with all logits at once."""

from __future__ import annotations

import pytest
import torch
from grid import grid
from torch import Tensor

from pyfused.backends import cpu
from pyfused.ops.chunk_sizes import BlockSize
from pyfused.ops.head_loop import HeadLoop, Layer, rows_that_count

pytestmark = pytest.mark.cpu
N, CLASSES, FEATURES = 7, 11, 3


@grid(
    size=[BlockSize(N), BlockSize(3), BlockSize(3, 4), BlockSize(100, 100)],
    dtype=[torch.float32, torch.bfloat16],
    needs=[(True, True, True), (True, False, False), (False, True, False)],
)
def test_blocks_cover_all_logits_once(
    size: BlockSize, dtype: torch.dtype, needs: tuple[bool, ...]
) -> None:
    """Small integers are exact in every dtype, so the order of sums has no effect."""
    shapes = (N, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    layer = Layer(*[torch.randint(-3, 4, shape).to(dtype) for shape in shapes])
    grads = torch.randint(-3, 4, (N, CLASSES)).to(dtype)
    found, seen = torch.zeros(N, CLASSES, dtype=dtype), torch.zeros(N, CLASSES)

    def step(logits: Tensor, rows: slice, classes: slice) -> Tensor:
        found[rows, classes] = logits
        seen[rows, classes] += 1
        return logits.copy_(grads[rows, classes])

    gradients = HeadLoop(cpu, dtype, lambda _: size, needs).run(layer, step)
    x, weight, bias = layer
    assert found.equal(x @ weight.t() + bias)
    assert seen.eq(1).all()
    expected = grads @ weight, grads.t() @ x, grads.sum(0)
    for gradient, best, need in zip(gradients, expected, needs, strict=True):
        assert gradient is None if not need else torch.equal(gradient, best)


def test_memory_holds_the_logits_of_the_first_block() -> None:
    """A backward pass reuses the last logits of a forward pass, whose rows come in reverse."""
    layer = Layer(torch.randn(N, FEATURES), torch.randn(CLASSES, FEATURES), None)
    loop, firsts, kept = HeadLoop(cpu, torch.float32, lambda _: BlockSize(3), (False,) * 3), [], []

    def step(logits: Tensor, rows: slice, _: slice) -> None:
        firsts.append((rows.start, float(logits[0, 0])))
        kept[:] = [logits.flatten()]

    assert loop.run(layer, step, backwards=True) == (None, None, None)
    assert [start for start, _ in firsts] == [6, 3, 0]
    kept[0][0] = 5.0
    loop.run(layer, step, logits=kept[0])
    assert firsts[3:] == [(0, 5.0), firsts[1], firsts[0]]


@pytest.mark.parametrize("valid", [[True] * 4, [False, True, True, False], [False] * 4])
def test_rows_are_selected_and_scattered(valid: list[bool]) -> None:
    mask, values = torch.tensor(valid), torch.arange(8.0).view(4, 2) + 1
    rows = rows_that_count(mask, cpu)
    taken = rows.take(values)
    assert taken.shape[0] == (sum(valid) or 1)  # one row if none counts
    assert rows.counts is None or not rows.counts.any()
    computed = mask if any(valid) else torch.arange(4) == 0
    expected = values.where(computed[:, None], 0)
    assert rows.spread(taken).equal(expected)
    assert rows.spread(rows.take(values.t(), 1), 1).equal(expected.t())
    assert rows.take(None) is None is rows.spread(None)
