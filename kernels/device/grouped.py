"""The path for many tokens: pairs are sorted by expert on the device; a tile has one expert.

Only the device knows the number of tiles; grids have the largest possible size (`most_tiles`), and
programs past the last tile do nothing. Experts with the most bits come first: the longest tiles
should not start last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.accumulate import load_tail, load_words, locate, weights_of
from bitknap.kernels.device.constants import (
    bits_of,
    chunk_of,
    has_tail,
    kept_of,
    main_blocks,
    sums_of,
    tail_begin,
    tiles_of,
    words_in,
)
from bitknap.kernels.device.products import intermediate, one_expert, rows_of
from bitknap.kernels.device.unpack import (
    known_id,
    load_codes,
)


@triton.jit(do_not_specialize=["pairs"])
def sort_pairs(
    index_ptr,
    counts_ptr,
    starts_ptr,
    sorted_ptr,
    pairs,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each expert's pairs in ascending order, their start and their count. Grid: experts.

    Ids of no expert are left out. Programs are independent: each counts the smaller ids itself, so
    one launch is enough, without atomics and with the same result every time.
    """
    expert = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    at = tl.arange(0, BLOCK)
    for first in range(0, pairs, BLOCK):
        ids = tl.load(index_ptr + first + at, mask=first + at < pairs, other=-1)
        ids = known_id(ids, EXPERTS)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
        own += (ids == expert).to(tl.int32)
    start = tl.sum(before, axis=0)
    count = tl.sum(own, axis=0)
    tl.store(counts_ptr + expert, count)
    tl.store(starts_ptr + expert, start)
    if count > 0:
        place = start
        for first in range(0, pairs, BLOCK):
            ids = tl.load(index_ptr + first + at, mask=first + at < pairs, other=-1)
            ids = known_id(ids, EXPERTS)
            mine = (ids == expert).to(tl.int32)
            rank = tl.cumsum(mine, axis=0)
            tl.store(sorted_ptr + place + rank - 1, first + at, mask=mine == 1)
            place += tl.sum(mine, axis=0)


@triton.jit
def find_tile(
    counts_ptr,
    starts_ptr,
    sorted_ptr,
    order_ptr,
    tile,
    EXPERTS: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    """Return (expert, pairs [BM], which of them exist, whether the tile exists)."""
    i = tl.arange(0, EP)
    order = tl.load(order_ptr + i, mask=i < EXPERTS, other=0)
    counts = tl.load(counts_ptr + order, mask=i < EXPERTS, other=0)
    tiles = (counts + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    slot = tl.sum((ends <= tile).to(tl.int32), axis=0)
    busy = slot < EXPERTS
    here = i == slot
    expert = tl.sum(tl.where(here, order, 0), axis=0)
    first = (tile - tl.sum(tl.where(here, ends - tiles, 0), axis=0)) * BM
    count = tl.sum(tl.where(here, counts, 0), axis=0)
    rank = first + tl.arange(0, BM)
    ok = rank < count  # count is 0 if the tile does not exist
    pair = tl.load(sorted_ptr + tl.load(starts_ptr + expert) + rank, mask=ok, other=0)
    return expert, pair, ok, busy


@triton.jit
def grouped_gate_up(
    x_ptr,
    counts_ptr,
    starts_ptr,
    sorted_ptr,
    hidden_ptr,
    sums_ptr,
    gate,
    up,
    order_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    EP: tl.constexpr,
    KINDS: tl.constexpr,
    GATE_KINDS: tl.constexpr,
    CUT: tl.constexpr,
    GATED: tl.constexpr,
    TIED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fill hidden [tokens · TOPK, INNER] by pair. Grid: most tiles · tiles of an expert's rows."""
    NT: tl.constexpr = tiles_of(INNER, CUT, HALF)
    pid = tl.program_id(0)
    expert, pair, ok, busy = find_tile(
        counts_ptr, starts_ptr, sorted_ptr, order_ptr, pid // NT, EXPERTS, EP, BM
    )
    if busy:
        token = (pair // TOPK).to(tl.int64)
        entry, n, there, rows = rows_of(expert, pid % NT, INNER, CUT, HALF)
        sums = sums_ptr + token * sums_of(HIDDEN)
        value = intermediate(
            gate,
            up,
            entry,
            n,
            x_ptr + token * HIDDEN,
            ok,
            sums,
            KINDS,
            GATE_KINDS,
            HIDDEN,
            INNER // CUT,
            BM,
            GATED,
            TIED,
            BIASED,
            ACTIVATION,
            WIDEST,
            POST,
            CT,
            ASM,
        )
        at = hidden_ptr + pair.to(tl.int64)[None, :] * INNER + rows[:, None]
        value = value.to(hidden_ptr.dtype.element_ty)
        tl.store(at, value, mask=ok[None, :] & there[:, None])


@triton.jit
def grouped_down(
    hidden_ptr,
    weights_ptr,
    counts_ptr,
    starts_ptr,
    sorted_ptr,
    part_ptr,
    sums_ptr,
    down,
    order_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    EP: tl.constexpr,
    KINDS: tl.constexpr,
    CUT: tl.constexpr,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fill part [tokens · TOPK, HIDDEN] with weighted outputs by pair.

    Grid: most tiles · tiles of an expert's rows.
    """
    NT: tl.constexpr = tiles_of(HIDDEN, CUT, BN)
    pid = tl.program_id(0)
    expert, pair, ok, busy = find_tile(
        counts_ptr, starts_ptr, sorted_ptr, order_ptr, pid // NT, EXPERTS, EP, BM
    )
    if busy:
        entry, n, there, rows = rows_of(expert, pid % NT, HIDDEN, CUT, BN)
        row = pair.to(tl.int64)
        sums = sums_ptr + row * sums_of(INNER)
        y = one_expert(
            down,
            entry,
            n,
            hidden_ptr + row * INNER,
            ok,
            sums,
            0,
            main_blocks(INNER),
            True,
            KINDS,
            INNER,
            BM,
            WIDEST,
            POST,
            CT,
            ASM,
        )
        if BIASED:
            bias = tl.load(down[5] + entry.to(tl.int64) * (HIDDEN // CUT) + n)
            y += bias.to(tl.float32)[:, None]
        y *= tl.load(weights_ptr + pair, mask=ok, other=0.0).to(tl.float32)[None, :]
        at = part_ptr + pair.to(tl.int64)[None, :] * HIDDEN + rows[:, None]
        y = y.to(part_ptr.dtype.element_ty)
        tl.store(at, y, mask=ok[None, :] & there[:, None])


@triton.jit
def combine(
    part_ptr,
    index_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up each token's pairs, in their order. Grid: tokens, ⌈HIDDEN / BLOCK⌉."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(TOPK):
        expert = tl.load(index_ptr + token * TOPK + j)
        end = tl.where((expert >= 0) & (expert < EXPERTS), HIDDEN, 0)
        at = part_ptr + (token * TOPK + j) * HIDDEN + n
        total += tl.load(at, mask=n < end, other=0.0).to(tl.float32)
    at = out_ptr + token * HIDDEN + n
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=n < HIDDEN)


@triton.jit
def store_block(
    out,
    W,
    words,
    scale,
    first,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store one block's weights in the rows at pointers `out` [rows]."""
    CHUNK: tl.constexpr = chunk_of(KIND, 16 * LANES, WIDEST)
    COUNT: tl.constexpr = CHUNK // LANES
    PER_WORD: tl.constexpr = 16 * LANES // CHUNK // words_in(KIND, COLS, 16 * LANES)
    ROWS: tl.constexpr = out.shape[0]
    for c in tl.static_range(16 * LANES // CHUNK):
        word = words[c // PER_WORD]
        w = weights_of(W, word, scale, c * COUNT, COUNT, LANES, KIND, ROWS, True, CT, ASM)
        k = first + c * CHUNK + tl.arange(0, CHUNK)
        at = out[:, None] + k[None, :]
        tl.store(at, w.to(out.dtype.element_ty), mask=(k < COLS)[None, :])


@triton.jit
def store_expert(
    out,
    table,
    expert,
    n,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store rows `n` of one expert at pointers `out` [rows]."""
    codes, words, scale = locate(table, expert, n, COLS, KIND)
    if kept_of(KIND):
        for first in range(0, COLS, 256):
            k = first + tl.arange(0, 256)
            inner = (k < COLS)[None, :]
            w = tl.load(codes[:, None] + k[None, :], mask=inner, other=0.0)
            w = w.to(tl.float32).to(out.dtype.element_ty)
            tl.store(out[:, None] + k[None, :], w, mask=inner)
    else:
        BITS: tl.constexpr = bits_of(KIND)
        at = codes[:, None] + (n % 64 * 16)[:, None] + tl.arange(0, 16)[None, :]
        for block in range(main_blocks(COLS)):
            W = load_codes(at + block * (1024 * BITS), BITS, 16)
            own = load_words(words, block * 256, COLS, 256, KIND)
            store_block(out, W, own, scale, block * 256, 16, KIND, COLS, WIDEST, CT, ASM)
        store_tail(out, codes, words, scale, n % 64, 8, KIND, COLS, WIDEST, CT, ASM)
        store_tail(out, codes, words, scale, n % 64, 4, KIND, COLS, WIDEST, CT, ASM)
        store_tail(out, codes, words, scale, n % 64, 2, KIND, COLS, WIDEST, CT, ASM)


@triton.jit
def store_tail(
    out,
    codes,
    words,
    scale,
    inside,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store the narrower block of LANES, if there is one."""
    if has_tail(COLS, LANES):
        W = load_tail(codes, inside, LANES, bits_of(KIND), COLS)
        FIRST: tl.constexpr = tail_begin(COLS, LANES)
        own = load_words(words, FIRST, COLS, 16 * LANES, KIND)
        store_block(out, W, own, scale, FIRST, LANES, KIND, COLS, WIDEST, CT, ASM)


@triton.jit
def dequantize(
    out_ptr,
    table,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KINDS: tl.constexpr,
    BN: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fill out [entries, ROWS, COLS] with weights. Grid: entries, ⌈ROWS / BN⌉."""
    expert = tl.program_id(0)
    # Rows past the last repeat the last one and store the same values.
    n = tl.minimum(tl.program_id(1) * BN + tl.arange(0, BN), ROWS - 1)
    out = out_ptr + (expert.to(tl.int64) * ROWS + n) * COLS
    kind = tl.load(table[4] + expert)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            store_expert(out, table, expert, n, KINDS[i], COLS, WIDEST, CT, ASM)
