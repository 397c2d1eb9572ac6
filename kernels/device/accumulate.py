"""The inner loop of every product: rows of one expert times a tile of tokens, from tiles in memory.

Products are out^T = W · x^T: weights go on the side of the matrix units that is always 64 wide,
tokens on the side that may be 8, so that few tokens waste little. Two ways to apply steps and
zeros:

    POST   sums of raw codes are scaled group by group:  s · (W_q x) + m · (1 x)
           Codes need no subtraction and no multiplication, and the sums of x are at hand (`sums`).
           For few tokens, whose sums take little beside the weights.
    else   every weight is s q + m in float32, rounded to CT once. For many tokens, where scaling
           sums would cost more than an operation or two a weight.

Words of the next block are loaded while this one is multiplied: they are loaded without
asynchronous copies, so every round would otherwise wait for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.constants import (
    bits_of,
    chunk_of,
    excess_of,
    group_of,
    groups_of,
    has_tail,
    kept_of,
    main_blocks,
    planes_of,
    scale_of,
    scaled_of,
    share_of,
    sums_at,
    tail_begin,
    tile_size,
    words_in,
)
from bitknap.kernels.device.unpack import (
    in_columns,
    join_slots,
    load_codes,
    matrix_scale,
    opaque,
    open_word,
    row_scale,
    word_pointer,
)


@triton.jit
def locate(table, expert, n, COLS: tl.constexpr, KIND: tl.constexpr):
    """Return where rows `n` [rows] of an expert lie: codes, words, and their final scale.

    Codes are pointers to the first row of each row's tile, or, for kept matrices, to the row.
    """
    buffer = table[0]
    codes_at = tl.multiple_of(tl.load(table[1] + expert), 16)
    if kept_of(KIND):
        at = buffer + codes_at
        if kept_of(KIND) == 1:
            codes = at.to(tl.pointer_type(tl.bfloat16)) + n.to(tl.int64) * COLS
        elif kept_of(KIND) == 2:
            codes = at.to(tl.pointer_type(tl.float16)) + n.to(tl.int64) * COLS
        else:
            codes = at.to(tl.pointer_type(tl.float32)) + n.to(tl.int64) * COLS
        words = codes
        scale = tl.full(n.shape, 1.0, tl.float32)
    else:
        tile = n // 64
        SIZE: tl.constexpr = tile_size(COLS, bits_of(KIND))
        codes = (buffer + codes_at).to(tl.pointer_type(tl.int16)) + tile * SIZE
        words_at = tl.load(table[2] + expert)
        GROUPS: tl.constexpr = groups_of(KIND, COLS)
        words = word_pointer(buffer, words_at, KIND) + (tile * GROUPS * 64 + n % 64)
        if share_of(KIND):
            scale = row_scale(buffer, tl.load(table[3] + expert), tile, n % 64, KIND)
        else:
            scale = tl.full(n.shape, 1.0, tl.float32)
        if scaled_of(KIND):
            scale *= matrix_scale(buffer, words_at, tl.load(table[3] + expert), KIND)
    return codes, words, scale


@triton.jit
def load_words(words, first, COLS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Return the words of the block that begins at column `first`, [rows] each."""
    COUNT: tl.constexpr = words_in(KIND, COLS, WIDTH)
    GROUP: tl.constexpr = group_of(KIND, COLS)
    r = ()
    for i in tl.static_range(COUNT):
        r = r + (tl.load(words + (first + i * (WIDTH // COUNT)) // GROUP * 64),)
    return r


@triton.jit
def load_tail(codes, inside, LANES: tl.constexpr, BITS: tl.constexpr, COLS: tl.constexpr):
    """Return the words of the narrower block of LANES in tiles at `codes`, rows `inside`."""
    FIRST: tl.constexpr = tail_begin(COLS, LANES)
    lane = tl.arange(0, LANES)
    at = codes[:, None] + (FIRST * 4 * BITS + inside[:, None] * LANES + lane[None, :])
    return load_codes(at, BITS, LANES)


@triton.jit
def load_x(x, ok, k, COLS: tl.constexpr, CT: tl.constexpr):
    """Return columns `k` [n] of the rows at pointers `x` [tokens], CT [n, tokens]."""
    if COLS % 32 == 0:
        r = tl.load(x[None, :] + k[:, None], mask=ok[None, :], other=0.0)
    else:
        r = tl.load(x[None, :] + k[:, None], mask=ok[None, :] & (k < COLS)[:, None], other=0.0)
    return r.to(CT)


@triton.jit
def weights_of(
    W,
    word,
    scale,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISE: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the weights of COUNT slots from slot FIRST on, [ROWS, COUNT · LANES].

    In float32 if PRECISE. Otherwise in CT, two at a time: codes are exact, but steps and zeros are
    rounded to CT too (fp16 steps stay exact in fp16, and lose three bits in bf16).
    """
    BITS: tl.constexpr = bits_of(KIND)
    step, zero = open_word(word, KIND)
    if scale_of(KIND):
        step *= scale
        zero *= scale
    TYPE: tl.constexpr = tl.float32 if PRECISE else CT
    EXCESS: tl.constexpr = excess_of(BITS, CT, 0)
    q = in_columns(join_slots(W, FIRST, 1, COUNT, BITS, 0, CT, ASM), ROWS, LANES, COUNT)
    q = q.to(TYPE) - EXCESS
    if planes_of(BITS, CT) == 2:
        high = in_columns(join_slots(W, FIRST, 1, COUNT, BITS, 1, CT, ASM), ROWS, LANES, COUNT)
        q += high.to(TYPE) - excess_of(BITS, CT, 1)
    return q * step.to(TYPE)[:, None] + zero.to(TYPE)[:, None]


@triton.jit
def add_block(
    acc,
    W,
    words,
    scale,
    x,
    ok,
    first,
    sums,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return acc [rows, tokens] plus the products of one block of 16 · LANES columns.

    Args:
        acc: float32 [rows, tokens].
        W: codes of the block (`load_codes`).
        words: words of the block (`load_words`).
        scale: factor that steps and zeros still lack, [rows].
        x: pointers to rows of activations, [tokens].
        ok: which of these rows exist, [tokens].
        first: first column.
        sums: pointers to rows of their sums (`input_sums.write_sums`), [tokens]; read if POST.
        LANES: columns of a slot.
        KIND: kind of the expert.
        COLS: number of columns of a row.
        WIDEST: most columns multiplied at once.
        POST: whether sums are scaled instead of weights.
        CT: type of the product's operands.
        ASM: whether slots are read by inline PTX.
    """
    BITS: tl.constexpr = bits_of(KIND)
    # All planes of raw codes are in registers at the same time.
    MOST: tl.constexpr = WIDEST // planes_of(BITS, CT) if POST else WIDEST
    CHUNK: tl.constexpr = chunk_of(KIND, 16 * LANES, MOST)
    COUNT: tl.constexpr = CHUNK // LANES
    PER_WORD: tl.constexpr = 16 * LANES // CHUNK // words_in(KIND, COLS, 16 * LANES)
    ROWS: tl.constexpr = acc.shape[0]
    for c in tl.static_range(16 * LANES // CHUNK):
        xs = load_x(x, ok, first + c * CHUNK + tl.arange(0, CHUNK), COLS, CT)
        word = words[c // PER_WORD]
        if POST:
            step, zero = open_word(word, KIND)
            at = sums_at(COLS, CHUNK) + (first + c * CHUNK) // CHUNK
            total = tl.load(sums + at, mask=ok, other=0.0)
            part = tl.zeros(acc.shape, tl.float32)
            for plane in tl.static_range(planes_of(BITS, CT)):
                q = join_slots(W, c * COUNT, 1, COUNT, BITS, plane, CT, ASM)
                q = opaque(in_columns(q, ROWS, LANES, COUNT), LANES, ASM)
                part = tl.dot(q, xs, part)
            zero -= step * (excess_of(BITS, CT, 0) + excess_of(BITS, CT, 1))
            acc += step[:, None] * part + zero[:, None] * total[None, :]
        else:
            w = weights_of(W, word, scale, c * COUNT, COUNT, LANES, KIND, ROWS, False, CT, ASM)
            acc = tl.dot(w.to(CT), xs, acc)
    return acc


@triton.jit
def add_tail(
    acc,
    codes,
    words,
    scale,
    inside,
    x,
    ok,
    sums,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return acc plus the products of the narrower block of LANES, if there is one."""
    if has_tail(COLS, LANES):
        W = load_tail(codes, inside, LANES, bits_of(KIND), COLS)
        FIRST: tl.constexpr = tail_begin(COLS, LANES)
        own = load_words(words, FIRST, COLS, 16 * LANES, KIND)
        acc = add_block(
            acc, W, own, scale, x, ok, FIRST, sums, LANES, KIND, COLS, WIDEST, POST, CT, ASM
        )
    return acc


@triton.jit
def add_codes(
    acc,
    codes,
    words,
    scale,
    inside,
    x,
    ok,
    sums,
    begin,
    end,
    tail,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return acc plus the products of blocks `begin` to `end` - 1 and, if `tail`, of the rest."""
    BITS: tl.constexpr = bits_of(KIND)
    MAIN: tl.constexpr = main_blocks(COLS)
    if MAIN > 0:
        lane = tl.arange(0, 16)
        at = codes[:, None] + (inside[:, None] * 16 + lane[None, :])
        # Words of two blocks must fit into registers.
        AHEAD: tl.constexpr = words_in(KIND, COLS, 256) <= 4
        after = load_words(words, begin * 256, COLS, 256, KIND)
        for block in range(begin, end):
            own = after
            if AHEAD:
                # The last round reloads its own words instead of reading past the end.
                following = tl.minimum(block + 1, MAIN - 1) * 256
                after = load_words(words, following, COLS, 256, KIND)
            else:
                own = load_words(words, block * 256, COLS, 256, KIND)
            W = load_codes(at + block * (1024 * BITS), BITS, 16)
            acc = add_block(
                acc, W, own, scale, x, ok, block * 256, sums, 16, KIND, COLS, WIDEST, POST, CT, ASM
            )
    if tail:
        for i in tl.static_range(3):
            acc = add_tail(
                acc,
                codes,
                words,
                scale,
                inside,
                x,
                ok,
                sums,
                8 >> i,
                KIND,
                COLS,
                WIDEST,
                POST,
                CT,
                ASM,
            )
    if POST and scale_of(KIND):
        acc = acc * scale[:, None]
    return acc


@triton.jit
def add_kept(
    acc,
    rows,
    x,
    ok,
    begin,
    end,
    tail,
    COLS: tl.constexpr,
    CT: tl.constexpr,
):
    """Return acc plus the products of a matrix in source precision, rows at pointers `rows`."""
    WIDTH: tl.constexpr = 64
    first = begin * 256
    last = tl.where(tail, COLS, end * 256)
    for k0 in range(first, last, WIDTH):
        k = k0 + tl.arange(0, WIDTH)
        inner = k < COLS
        w = tl.load(rows[:, None] + k[None, :], mask=inner[None, :], other=0.0).to(CT)
        xs = tl.load(x[None, :] + k[:, None], mask=ok[None, :] & inner[:, None], other=0.0)
        acc = tl.dot(w, xs.to(CT), acc)
    return acc


@triton.jit
def add_expert(
    acc,
    at,
    n,
    x,
    ok,
    sums,
    begin,
    end,
    tail,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return acc plus the products of one expert's rows, located by `locate`.

    Args:
        acc: float32 [rows, tokens].
        at: the result of `locate`.
        n: rows, [rows].
        x: pointers to rows of activations, [tokens].
        ok: which of these rows exist, [tokens].
        sums: pointers to rows of their sums (`input_sums.write_sums`), [tokens]; read if POST.
        begin: first block of 256 columns.
        end: one past the last block.
        tail: whether this program also takes the columns after the whole blocks.
        KIND: kind of the expert.
        COLS: number of columns of the expert's matrix.
        WIDEST: most columns multiplied at once.
        POST: whether sums are scaled instead of weights.
        CT: type of the product's operands.
        ASM: whether slots are read by inline PTX.
    """
    if kept_of(KIND):
        acc = add_kept(acc, at[0], x, ok, begin, end, tail, COLS, CT)
    else:
        acc = add_codes(
            acc,
            at[0],
            at[1],
            at[2],
            n % 64,
            x,
            ok,
            sums,
            begin,
            end,
            tail,
            KIND,
            COLS,
            WIDEST,
            POST,
            CT,
            ASM,
        )
    return acc
