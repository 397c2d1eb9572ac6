"""Sums over runs of an input's columns, which zeros are multiplied by where sums are scaled.

s (W_q x) + m (1 x) needs, for each group, the sum of x over the group's columns. It does not depend
on the expert, so it is computed once, for runs of 128, 64 and 32 columns, and not by matrix units
along with every product: on an H200 a product of 64 rows with 8 or 16 tokens occupies them for
about 32 cycles at any width, which was the bottleneck for few tokens
(`benchmarks/results/kernels.md`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.constants import sums_at, sums_of

# Columns per load: whole rows of most models, since a program waits for each load.
STEP = tl.constexpr(4096)


@triton.jit
def write_sums(x, out, first, last, COLS: tl.constexpr):
    """Write a row's sums of columns `first` (a multiple of 128) to `last` - 1.

    Args:
        x: pointer to the row.
        out: pointer to its sums, float32.
        first: first column.
        last: one past the last column.
        COLS: number of columns of the row.
    """
    for begin in range(first, last, STEP):
        k = begin + tl.arange(0, STEP)
        total = tl.load(x + k, mask=k < last, other=0.0).to(tl.float32)
        total = tl.sum(tl.reshape(total, (STEP // 32, 32)), axis=1)
        store_sums(out, total, begin, last, 32, COLS)
        total = tl.sum(tl.reshape(total, (STEP // 64, 2)), axis=1)
        store_sums(out, total, begin, last, 64, COLS)
        total = tl.sum(tl.reshape(total, (STEP // 128, 2)), axis=1)
        store_sums(out, total, begin, last, 128, COLS)


@triton.jit
def store_sums(out, total, begin, last, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Store sums [n] of runs of WIDTH columns, the first of which begins at `begin`."""
    n = begin // WIDTH + tl.arange(0, total.shape[0])
    tl.store(out + sums_at(COLS, WIDTH) + n, total, mask=n * WIDTH < last)


@triton.jit
def row_sums(x_ptr, out_ptr, COLS: tl.constexpr):
    """Write the sums of every row. Grid: rows, ⌈COLS / 4096⌉."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * STEP
    last = tl.minimum(first + STEP, COLS)
    write_sums(x_ptr + row * COLS, out_ptr + row * sums_of(COLS), first, last, COLS)


@triton.jit
def own_sums(x_ptr, out_ptr, row, ok, tokens, first, last, COLS: tl.constexpr):
    """Write the sums of the rows that this program reads.

    Other programs may write the same numbers to the same place.

    Args:
        x_ptr: rows of inputs.
        out_ptr: rows of their sums.
        row: row of each token, int64 [BM].
        ok: which of these tokens exist, [BM].
        tokens: largest number of tokens.
        first: first column, a multiple of 128.
        last: one past the last column.
        COLS: number of columns of a row.
    """
    t = tl.arange(0, row.shape[0])
    for token in range(tokens):
        here = (t == token) & ok
        if tl.sum(here.to(tl.int32), axis=0) > 0:
            mine = tl.sum(tl.where(here, row, 0), axis=0)
            write_sums(x_ptr + mine * COLS, out_ptr + mine * sums_of(COLS), first, last, COLS)
    # The values read next were written by other threads of this program.
    tl.debug_barrier()
