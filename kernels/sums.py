"""Sums over runs of an input's columns: zeros are multiplied by them where sums are scaled.

s (W_q x) + m (1 x) needs, for each group, the sum of x over the group's columns. It has nothing to
do with any expert, so it is taken once, for runs of 128, 64 and 32 columns, and not by matrix units
beside every product: on an H200 a product of 64 rows with 8 or 16 tokens keeps them busy for 25 to
30 cycles at whatever width, which was what bound few tokens (`benchmarks/results/kernels.md`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.constants import sums_at, sums_of

_STEP = tl.constexpr(512)


@triton.jit
def write_sums(x, ok, out, first, last, COLS: tl.constexpr):
    """Write sums of columns `first` (a multiple of 128) to `last` - 1.

    Args:
        x: pointers to rows, [rows].
        ok: which of them there are, [rows].
        out: pointers to rows of sums float32, [rows].
        first: first column.
        last: one past the last.
        COLS: of a row.
    """
    ROWS: tl.constexpr = x.shape[0]
    for begin in range(first, last, _STEP):
        k = begin + tl.arange(0, _STEP)
        there = ok[:, None] & (k < last)[None, :]
        total = tl.load(x[:, None] + k[None, :], mask=there, other=0.0).to(tl.float32)
        total = tl.sum(tl.reshape(total, (ROWS, _STEP // 32, 32)), axis=2)
        store_sums(out, ok, total, begin, last, 32, COLS)
        total = tl.sum(tl.reshape(total, (ROWS, _STEP // 64, 2)), axis=2)
        store_sums(out, ok, total, begin, last, 64, COLS)
        total = tl.sum(tl.reshape(total, (ROWS, _STEP // 128, 2)), axis=2)
        store_sums(out, ok, total, begin, last, 128, COLS)


@triton.jit
def store_sums(out, ok, total, begin, last, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Store sums [rows, n] of runs of WIDTH columns, the first of which begins at `begin`."""
    n = begin // WIDTH + tl.arange(0, total.shape[1])
    at = out[:, None] + (sums_at(COLS, WIDTH) + n)[None, :]
    tl.store(at, total, mask=ok[:, None] & (n * WIDTH < last)[None, :])


@triton.jit
def row_sums(x_ptr, out_ptr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sums of every row. Grid: rows, ⌈COLS / BLOCK⌉."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(1) * BLOCK
    last = tl.minimum(first + BLOCK, COLS)
    out = out_ptr + row * sums_of(COLS)
    write_sums(x_ptr + row * COLS, row >= 0, out, first, last, COLS)
