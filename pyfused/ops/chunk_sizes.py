"""The sizes of the blocks of logits that `heads.py` loops over.

There are two loops. The loop over blocks of rows with all classes computes three matrix products:
the logits, and the gradients of input and weight. The loop over blocks of classes computes the
logits twice, because the gradients need the log-sum-exp of all classes: four products. It never
rounds a sum over rows to half precision, and its memory can be arbitrarily small.

The loop over rows adds the weight's gradient of each chunk to a sum in float32. This moves 20 bytes
per element, while the product takes two operations per element and row. With AVX-512 and 256 or
more rows, the sums take a few percent of the time of the products. With AMX the sums of 256 rows
took twice as long as all products: products reach 700 GFLOP/s, but sums, which exceed the cache,
only 2.7 GB/s. With AMX it is fastest to compute all rows at once, and a fourth product is cheaper
than sums over fewer than 1500 rows.

On a GPU, blocks are so large that kernels take longer than their launches, and sums take a few
percent of the time of the products. In half precision, the three products of r rows take 6 r
operations per element of the weight, and its sum in float32 moves 8 bytes. On an H100, with 7e14
operations and 3e12 bytes per second, the sum takes 300 / r of the time of the products. All rows
are computed at once if this takes no more memory than blocks and sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from pyfused.backends import Backend, cpu
from pyfused.memory import physical_memory
from pyfused.types import Head

# For (N, D, C) = (1024, 512, 32000) the gradients take 1.6 times as long with 64 rows as with 512,
# 1.3 times with 128, and 1.1 times with 256.
MAX_ROWS = 512
MAX_ROWS_GPU = {2: 8192, 4: 2048, 8: 2048}  # by bytes per element
SQUARE_GPU = 8192  # rows and classes of a square block
LOGITS_GPU = SQUARE_GPU**2  # logits of a chunk of few classes
# In half precision, the classes of products are padded to a multiple of it. An H100 took 3.7 times
# as long for the head 8192 x 768 x 50257 as for 50304 classes, where cuBLAS has faster kernels.
CLASSES_GPU = 8
# Blocks of classes hold a multiple of it. An H100 took 6 times as long for (8192, 4096, 128256) in
# blocks of 6,103 classes as in blocks of 6,144.
ALIGNED_GPU = 64
MIN_ROWS = 96  # with fewer, the fourth product of the loop over blocks is cheaper
MIN_ROWS_AMX = 1536  # for bfloat16
MIN_ROWS_GPU = 1024  # for half precision
MEMORY_FRACTION_GPU = 16  # at most 1/16 of the GPU's memory for a block
MEMORY_FRACTION = 32  # with AMX, all rows at once up to 1/32 of the machine's memory
MIN_BUDGET = 16 << 20  # bytes
TILE = 1024  # rows and classes of a block
MOST_SIZES = 64  # numbers of rows whose block sizes are kept


def has_slow_sums(dtype: torch.dtype, backend: Backend) -> bool:
    """Returns whether adding products of a dtype takes longer than computing them."""
    return dtype is torch.bfloat16 and backend is cpu and cpu.HAS_AMX


@functools.cache
def device_memory() -> int:
    """Returns the bytes of the current GPU's memory, or of the machine's if there is no GPU."""
    if not torch.cuda.is_available():
        return physical_memory()
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def rows_in_budget(
    n: int,
    shape: tuple[int, int],
    memory_budget: int | None,
    dtype: torch.dtype,
    backend: Backend,
    bytes_per_logit: int | None = None,
) -> int:
    """Returns the number of rows with all classes of a block, which may exceed n or be 0.

    Args:
        shape: The shape of the weight, whose gradient is a sum over blocks.
        bytes_per_logit: The memory of a block, for each logit; None for one element.
    """
    (classes, features), itemsize = shape, dtype.itemsize
    row = classes * (bytes_per_logit or itemsize)
    if memory_budget is not None:
        return memory_budget // row
    if backend.ASYNCHRONOUS:
        most = max(LOGITS_GPU // classes, MAX_ROWS_GPU[itemsize] * classes * itemsize // row)
        most = max(1, min(most, device_memory() // MEMORY_FRACTION_GPU // row))
        blocks = -(-n // most)
        rows = -(-n // (blocks * TILE)) * TILE if blocks > 1 else n
        sums = 4 * classes * features if itemsize == 2 else 0  # for several blocks
        return rows if rows * row + sums < n * row else n
    if has_slow_sums(dtype, backend) and n * row <= physical_memory() // MEMORY_FRACTION:
        return n
    # The weight's gradient takes memory anyway. With 256 of 256 rows, (256, 768, 50257) in float32
    # took 0.71 times as long as in blocks of classes, and (256, 2048, 128256) 0.76 times.
    quarter = max(n * row, classes * features * itemsize) // 4
    rows = min(max(quarter, MIN_BUDGET) // row, MAX_ROWS)
    return n if n <= 2 * rows else rows


def rows_at_once(
    head: Head,
    dtype: torch.dtype,
    budget: int | None,
    backend: Backend,
    has_softcap: bool = False,
) -> Callable[[int], int]:
    """Returns the number of rows with all classes per block, as a function of the number of rows.

    The number is 0 if blocks of classes are better.

    Args:
        dtype: The dtype of the matrix products.
        budget: The option ``memory_budget``.
        has_softcap: Whether a capped copy of the logits is made.
    """
    shape = head.columns, head.input.shape[-1]
    bytes_per_logit = dtype.itemsize * (3 if has_softcap else 1)
    has_all_classes = head.target.is_floating_point()
    min_rows = MIN_ROWS_AMX if has_slow_sums(dtype, backend) else MIN_ROWS
    if backend.ASYNCHRONOUS and dtype.itemsize == 2:
        min_rows = MIN_ROWS_GPU
    converts = dtype is not head.input.dtype

    def rows_of(n: int) -> int:
        rows = rows_in_budget(n, shape, budget, dtype, backend, bytes_per_logit)
        if has_all_classes:
            return max(1, min(n, rows))
        return 0 if converts or rows < min(n, min_rows) else min(n, rows)

    return functools.lru_cache(MOST_SIZES)(rows_of)


def tile_size(
    shape: Sequence[int], dtype: torch.dtype, memory_budget: int | None, backend: Backend
) -> tuple[int, int]:
    """Returns the number of rows and of classes of a block that fits the budget.

    Args:
        shape: The shape (N, D) of the input.
    """
    (n, features), tile = shape, TILE
    if backend.ASYNCHRONOUS and memory_budget is not None:  # makes few partial sums over rows
        logits = memory_budget // dtype.itemsize
        rows = max(1, min(n, logits // tile))
        return rows, aligned(max(1, logits // rows))
    if memory_budget is not None:
        while tile > 16 and dtype.itemsize * tile * (tile + 3 * features) > memory_budget:
            tile //= 2
    return tile, tile


def aligned(size: int) -> int:
    """Returns the largest multiple of ALIGNED_GPU up to a size, or the size if it is smaller."""
    return max(size - size % ALIGNED_GPU, min(size, ALIGNED_GPU))


MIN_TILE_ROWS = 16  # fewer rows with all classes take no more memory


def state_block_size(
    head: Head, dtype: torch.dtype, memory_budget: int | None, backend: Backend
) -> Callable[[int], tuple[int, int]]:
    """Returns the rows and the columns of the blocks over which row states are computed.

    The result is a function of the number of rows. TILE is a multiple of kChunk, so results do not
    depend on the boundaries between blocks of classes.
    """
    rows_of = rows_at_once(head, dtype, memory_budget, backend)
    columns, features = head.columns, head.input.shape[-1]

    def size(n: int) -> tuple[int, int]:
        rows = rows_of(n)
        if rows:
            return rows, columns
        if memory_budget is None:
            return TILE, TILE
        if backend.ASYNCHRONOUS:
            return tile_size((n, features), dtype, memory_budget, backend)
        rows = memory_budget // (dtype.itemsize * TILE) - 3 * features
        if rows < MIN_TILE_ROWS:
            return max(1, min(n, memory_budget // (dtype.itemsize * columns))), columns
        return min(rows, TILE), TILE

    return functools.lru_cache(MOST_SIZES)(size)
