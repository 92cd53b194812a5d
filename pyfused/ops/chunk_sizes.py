"""How much of the logits exists at once: the policy of `chunked.py`, which has the loops.

There are two ways through the matrix of logits. By rows, each with all of its classes, takes three
matrix products: the logits, and the gradients of input and weight. By blocks of classes takes four,
as the log-sum-exp of all classes has to be known before any gradient. Then no sum over rows is ever
rounded to half precision, and memory can be as small as one likes.

By rows, the weight's gradient of each chunk is added to a sum in float32. That moves 20 bytes for
each of its elements, where the product takes two operations a row. With AVX-512 it is a few percent
of the products, from 256 rows on. With AMX the sums of 256 rows were seen to take twice as long as
all products (700 GFLOP/s beside 2.7 GB/s, as such sums leave the cache). There all rows at a time
are the fastest way, and a fourth product is cheaper than sums over less than 1500 rows.
"""

from __future__ import annotations

import functools
import os

import torch

from pyfused.backends import Backend, cpu
from pyfused.types import Head, HeadOptions

# Rows of logits at a time: of (1024, 512, 32000), with 64 the gradients take 1.6 times as long as
# with 512, with 128 1.3, with 256 1.1 times.
MOST_ROWS = 512
LEAST_ROWS = 96  # fewer cost more than the fourth product of the way by blocks
LEAST_ROWS_WITH_AMX = 1536  # of bfloat16
SHARE_OF_MEMORY = 32  # up to a 32nd of the machine's memory, all rows at a time with AMX
LEAST_BUDGET = 16 << 20  # bytes that are not worth saving
TILE = 1024  # rows, and classes, of a block


def product_dtype(head: Head, backend: Backend) -> torch.dtype:
    """Returns the dtype in which matrices are multiplied."""
    dtype = head.input.dtype
    if head.target.is_floating_point():
        dtype = torch.promote_types(dtype, head.target.dtype)
    best: torch.dtype = backend.product_dtype(dtype)
    return best


def has_slow_sums(dtype: torch.dtype, backend: Backend) -> bool:
    """Returns whether sums of products in a dtype take longer than the products."""
    return dtype is torch.bfloat16 and backend is cpu and cpu.HAS_AMX


@functools.cache
def memory_of_machine() -> int:
    """Returns the bytes of the machine's memory, 0 where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows_in_budget(
    n: int, row: int, memory_budget: int | None, dtype: torch.dtype, backend: Backend
) -> int:
    """Returns how many rows of ``row`` bytes fit; that may be more than n, or 0."""
    if memory_budget is not None:
        return memory_budget // row
    if has_slow_sums(dtype, backend) and n * row <= memory_of_machine() // SHARE_OF_MEMORY:
        return n
    return min(max(n * row // 4, LEAST_BUDGET) // row, MOST_ROWS)


def rows_at_once(head: Head, options: HeadOptions, backend: Backend) -> int:
    """Rows of logits that fit the budget; 0 where blocks of classes are the better way."""
    n, dtype = len(head.input), product_dtype(head, backend)
    row = head.columns * dtype.itemsize * (1 if options.softcap is None else 3)
    rows = rows_in_budget(n, row, options.memory_budget, dtype, backend)
    if not head.takes_blocks():
        return max(1, min(n, rows))
    least = LEAST_ROWS_WITH_AMX if has_slow_sums(dtype, backend) else LEAST_ROWS
    return 0 if dtype is not head.input.dtype or rows < min(n, least) else min(n, rows)


def tile_of(head: Head, options: HeadOptions, backend: Backend) -> int:
    """Rows and classes of a block, whose logits and matrices fit the budget."""
    tile, size, features = TILE, product_dtype(head, backend).itemsize, head.input.shape[1]
    if options.memory_budget is not None:
        while tile > 16 and size * tile * (tile + 3 * features) > options.memory_budget:
            tile //= 2
    return tile


LEAST_ROWS_OF_TILE = 16  # of fewer, all classes at a time take as little memory
# Rows of a product whose size is not to depend on the batch. A library takes rows in groups of 4,
# 6, 8 or 16 and may add the features up in another order for the rows that remain.
FIXED_ROWS = 96


def chunk_of_states(
    head: Head, memory_budget: int | None, fixed_sizes: bool, backend: Backend
) -> tuple[int, int]:
    """Returns all columns of some rows, or TILE classes of them.

    Results do not depend on where the classes are cut, as TILE is a multiple of kChunk.
    """
    n = len(head.input)
    rows = rows_at_once(head, HeadOptions(memory_budget=memory_budget), backend)
    if fixed_sizes:
        return max(1, rows // FIXED_ROWS) * FIXED_ROWS, head.columns
    if rows:
        return rows, head.columns
    if memory_budget is None:
        return TILE, TILE
    itemsize = product_dtype(head, backend).itemsize
    rows = memory_budget // (itemsize * TILE) - 3 * head.input.shape[1]
    if rows < LEAST_ROWS_OF_TILE:
        return max(1, min(n, memory_budget // (itemsize * head.columns))), head.columns
    return min(rows, TILE), TILE
