"""The sizes of the blocks of logits that ``head_loop.py`` loops over.

There are two loops. The loop over blocks of rows with all classes computes three matrix products:
the logits, and the gradients of input and weight. The loop over blocks of classes computes the
logits twice, because the gradients need the log-sum-exp of all classes: four products. It never
rounds a sum over rows to half precision, and its memory can be arbitrarily small.

The loop over rows adds the weight's gradient of each block to a sum, in float32 for half precision.
Adding a product moves at most 10 bytes per element of the weight, for two operations per row in
each of the three products. So the sum of a block costs what 20 to 150 rows cost in the products,
depending on the processor, and a fourth product is cheaper than sums over fewer rows. In half
precision, all rows at once need no sum, and often no more memory than a block and the sum.

On a GPU, blocks are so large that kernels take longer than their launches, and sums take a few
percent of the time of the products. In half precision, the three products of r rows take 6 r
operations per element of the weight, and its sum in float32 moves 8 bytes. On an H100, with 7e14
operations and 3e12 bytes per second, the sum takes 300 / r of the time of the products. All rows
are computed at once if this takes no more memory than blocks and sums.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyfused.backends import Backend
from pyfused.memory import physical_memory

# For (N, D, C) = (1024, 512, 32000) the gradients take 1.6 times as long with 64 rows as with 512,
# 1.3 times with 128, and 1.1 times with 256.
MAX_ROWS = 512
MAX_ROWS_GPU = {2: 8192, 4: 2048, 8: 2048}  # by bytes per element
LOGITS_GPU = 1 << 26  # logits of a chunk of few classes
# In half precision, the classes of products are padded to a multiple of it. An H100 took 3.7 times
# as long for the head 8192 x 768 x 50257 as for 50304 classes, where cuBLAS has faster kernels.
CLASSES_GPU = 8
# Blocks of classes hold a multiple of it. An H100 took 6 times as long for (8192, 4096, 128256) in
# blocks of 6,103 classes as in blocks of 6,144.
ALIGNED_GPU = 64
MIN_ROWS = 96  # with fewer, the fourth product of the loop over blocks is cheaper
MIN_ROWS_GPU = 1024  # for half precision
MEMORY_FRACTION_GPU = 16  # at most 1/16 of the GPU's memory for a block
MIN_BUDGET = 16 << 20  # bytes
TILE = 1024  # rows and classes of a block
MIN_TILE = 16, 64  # rows and classes of the smallest block
MOST_SIZES = 1024  # heads and numbers of rows whose block sizes are cached


@functools.cache
def device_memory() -> int:
    """Returns the bytes of the current GPU's memory, or of the machine's if there is no GPU."""
    if not torch.cuda.is_available():
        return physical_memory()
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


class BlockSize(NamedTuple):
    """The numbers of rows and classes of a block; None for all classes of these rows."""

    rows: int
    classes: int | None = None


@dataclass(frozen=True)
class HeadSizes:
    """Chooses the sizes of the blocks of a head's logits.

    Attributes:
        shape: The shape (C, D) of the weight, whose gradient is a sum over blocks.
        dtype: The dtype of the matrix products.
        memory_budget: The option of this name.
        bytes_per_logit: The memory of a block for each logit; None for one element.
        converts: Whether the input has another dtype than the products.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    backend: Backend
    memory_budget: int | None
    bytes_per_logit: int | None = None
    converts: bool = False

    def rows_in_budget(self, n: int) -> int:
        """Returns the number of rows with all classes of a block, which may exceed n or be 0."""
        (classes, features), itemsize = self.shape, self.dtype.itemsize
        row = classes * (self.bytes_per_logit or itemsize)
        if self.memory_budget is not None:
            return self.memory_budget // row
        if self.backend.ASYNCHRONOUS:
            most = max(LOGITS_GPU // classes, MAX_ROWS_GPU[itemsize] * classes * itemsize // row)
            most = max(1, min(most, device_memory() // MEMORY_FRACTION_GPU // row))
            blocks = -(-n // most)
            rows = -(-n // (blocks * TILE)) * TILE if blocks > 1 else n
            sums = 4 * classes * features if itemsize == 2 else 0  # for several blocks
            return rows if rows * row + sums < n * row else n
        # The weight's gradient takes memory anyway. With a quarter of the weight instead of half of
        # it, the loss of (512, 768, 50257) in float32 took 1.25 times as long, and the divergence
        # of (256, 768, 50257) 1.5 times.
        most = max(n * row // 4, classes * features * itemsize // 2, MIN_BUDGET)
        rows = min(most // row, MAX_ROWS)
        sums = 4 * classes * features if itemsize == 2 else 0
        return n if n <= 2 * rows or n * row <= rows * row + sums else rows

    @functools.lru_cache(MOST_SIZES)  # noqa: B019
    def row_blocks(self, n: int) -> BlockSize:
        """Returns the size of blocks of rows with all classes."""
        return BlockSize(max(1, min(n, self.rows_in_budget(n))))

    @functools.lru_cache(MOST_SIZES)  # noqa: B019
    def loss_blocks(self, n: int) -> BlockSize:
        """Returns the size of the blocks of a loss of class indices, and of its gradients."""
        rows = self._rows_at_once(n)
        return BlockSize(rows) if rows else self.tile(n)

    @functools.lru_cache(MOST_SIZES)  # noqa: B019
    def state_blocks(self, n: int) -> BlockSize:
        """Returns the size of the blocks over which the states of rows are computed.

        TILE is a multiple of kChunk, so results do not depend on the boundaries between blocks of
        classes.
        """
        rows, budget, itemsize = self._rows_at_once(n), self.memory_budget, self.dtype.itemsize
        if rows:
            return BlockSize(rows)
        if budget is None:
            return BlockSize(TILE, TILE)
        if self.backend.ASYNCHRONOUS:
            return self.tile(n)
        return BlockSize(max(MIN_TILE[0], min(n, budget // (itemsize * TILE))), TILE)

    def _rows_at_once(self, n: int) -> int:
        """Returns the rows with all classes of a block, or 0 if blocks of classes are better."""
        is_half_on_gpu = self.backend.ASYNCHRONOUS and self.dtype.itemsize == 2
        min_rows = MIN_ROWS_GPU if is_half_on_gpu else MIN_ROWS
        rows = self.rows_in_budget(n)
        # Several blocks would need a float32 sum of the weight's gradient.
        return 0 if rows < (n if self.converts else min(n, min_rows)) else min(n, rows)

    @functools.lru_cache(MOST_SIZES)  # noqa: B019
    def tile(self, n: int) -> BlockSize:
        """Returns the size of a block of classes whose logits fit the budget."""
        if self.memory_budget is None:
            return BlockSize(TILE, TILE)
        logits, (min_rows, min_classes) = self.memory_budget // self.dtype.itemsize, MIN_TILE
        if self.backend.ASYNCHRONOUS:
            rows = max(1, min(n, logits // TILE))
            return BlockSize(rows, aligned(max(1, logits // rows)))
        # All rows, if that leaves enough classes: the sum of a class's gradient needs no addition.
        classes = min(TILE, max(min_classes, logits // max(n, 1)))
        return BlockSize(max(min_rows, min(n, logits // classes)), classes)


def aligned(size: int) -> int:
    """Returns the largest multiple of ALIGNED_GPU up to a size, or the size if it is smaller."""
    return max(size - size % ALIGNED_GPU, min(size, ALIGNED_GPU))


head_sizes = functools.lru_cache(MOST_SIZES)(HeadSizes)  # making one takes microseconds
