"""The sizes of the blocks of logits that `heads.py` loops over.

There are two loops. The one over rows, each with all classes, computes three matrix products: the
logits, and the gradients of input and weight. The one over blocks of classes computes four, as the
gradients need the log-sum-exp of all classes. It never rounds a sum over rows to half precision,
and its memory can be arbitrarily small.

The loop over rows adds the weight's gradient of each chunk to a sum in float32. This moves 20 bytes
per element, while the product takes two operations per element and row. With AVX-512 the sums take
a few percent of the time of the products, from 256 rows on. With AMX the sums of 256 rows took
twice as long as all products (700 GFLOP/s beside 2.7 GB/s, as such sums leave the cache). There it
is fastest to compute all rows at once, and a fourth product is cheaper than sums over fewer than
1500 rows.
"""

from __future__ import annotations

import functools
import os

import torch

from pyfused.backends import Backend, cpu
from pyfused.types import CrossEntropyOptions, Head

# For (N, D, C) = (1024, 512, 32000) the gradients take 1.6 times as long with 64 rows as with 512,
# 1.3 times with 128, and 1.1 times with 256.
MAX_ROWS = 512
MAX_ROWS_GPU = 2048  # not measured: larger products, and fewer launches
MIN_ROWS = 96  # with fewer, the fourth product of the loop over blocks is cheaper
MIN_ROWS_AMX = 1536  # for bfloat16
MEMORY_FRACTION = 32  # with AMX, all rows at once up to 1/32 of the machine's memory
MIN_BUDGET = 16 << 20  # bytes
TILE = 1024  # rows and classes of a block


def product_dtype(head: Head, backend: Backend) -> torch.dtype:
    """Returns the dtype of the matrix products."""
    dtype = head.input.dtype
    if head.target.is_floating_point():
        dtype = torch.promote_types(dtype, head.target.dtype)
    best: torch.dtype = backend.product_dtype(dtype)
    return best


def has_slow_sums(dtype: torch.dtype, backend: Backend) -> bool:
    """Returns whether adding products of a dtype takes longer than computing them."""
    return dtype is torch.bfloat16 and backend is cpu and cpu.HAS_AMX


@functools.cache
def physical_memory() -> int:
    """Returns the size of the machine's memory in bytes, 0 if it is unknown."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows_in_budget(
    n: int, row: int, memory_budget: int | None, dtype: torch.dtype, backend: Backend
) -> int:
    """Returns the number of rows of ``row`` bytes that fit, which may exceed n or be 0."""
    if memory_budget is not None:
        return memory_budget // row
    if has_slow_sums(dtype, backend) and n * row <= physical_memory() // MEMORY_FRACTION:
        return n
    most = MAX_ROWS_GPU if backend.ASYNCHRONOUS else MAX_ROWS
    return min(max(n * row // 4, MIN_BUDGET) // row, most)


def rows_at_once(head: Head, options: CrossEntropyOptions, backend: Backend) -> int:
    """Returns the number of rows with all classes per block, 0 if blocks of classes are better."""
    n, dtype = len(head.input), product_dtype(head, backend)
    row = head.columns * dtype.itemsize * (1 if options.softcap is None else 3)
    rows = rows_in_budget(n, row, options.memory_budget, dtype, backend)
    if head.linear_weight.dim() > 2 or head.target.is_floating_point():
        return max(1, min(n, rows))
    min_rows = MIN_ROWS_AMX if has_slow_sums(dtype, backend) else MIN_ROWS
    return 0 if dtype is not head.input.dtype or rows < min(n, min_rows) else min(n, rows)


def tile_size(features: int, dtype: torch.dtype, memory_budget: int | None) -> int:
    """Returns the number of rows and of classes of a square block that fits the budget."""
    tile = TILE
    if memory_budget is not None:
        while tile > 16 and dtype.itemsize * tile * (tile + 3 * features) > memory_budget:
            tile //= 2
    return tile


MIN_TILE_ROWS = 16  # with fewer, all classes of a row take as little memory
# The rows of a product whose size does not depend on the batch. Libraries compute groups of 4, 6, 8
# or 16 rows, and may sum over features in another order for the remaining rows.
FIXED_ROWS = 96


def state_block_size(
    head: Head, memory_budget: int | None, fixed_sizes: bool, backend: Backend
) -> tuple[int, int]:
    """Returns the rows and the columns of the blocks over which row states are computed.

    Results do not depend on the boundaries between blocks of classes, as TILE is a multiple of
    kChunk.
    """
    n = len(head.input)
    rows = rows_at_once(head, CrossEntropyOptions(memory_budget=memory_budget), backend)
    if fixed_sizes:
        return max(1, rows // FIXED_ROWS) * FIXED_ROWS, head.columns
    if rows:
        return rows, head.columns
    if memory_budget is None:
        return TILE, TILE
    itemsize = product_dtype(head, backend).itemsize
    rows = memory_budget // (itemsize * TILE) - 3 * head.input.shape[1]
    if rows < MIN_TILE_ROWS:
        return max(1, min(n, memory_budget // (itemsize * head.columns))), head.columns
    return min(rows, TILE), TILE
