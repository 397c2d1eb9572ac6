"""Tiles of the projections: gate and up followed by the activation, and down."""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.accumulate import add_expert, locate
from bitknap.kernels.device.constants import (
    main_blocks,
)


@triton.jit
def activated(gate, up, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return act(gate) · up, or act(up) where there is no gate, float32."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        r = (up + 1) * gate * tl.sigmoid(1.702 * gate)
    else:
        value = gate if GATED else up
        if ACTIVATION == "silu":
            r = value * tl.sigmoid(value)
        elif ACTIVATION == "gelu":
            r = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            # tanh(u) = 2 sigmoid(2 u) - 1
            u = 0.7978845608028654 * (value + 0.044715 * value * value * value)
            r = value * tl.sigmoid(2 * u)
        elif ACTIVATION == "relu":
            r = tl.maximum(value, 0.0)
        else:
            r = tl.maximum(value, 0.0)
            r = r * r
        if GATED:
            r = r * up
    return r


@triton.jit
def rows_of(expert, tile, ROWS: tl.constexpr, CUT: tl.constexpr, TALL: tl.constexpr):
    """Return where one of an expert's tiles of TALL rows lies; no tile spans two row blocks.

    Returns:
        The result is its entry in tables, rows within the block [TALL], which of them exist, and
        the rows in the whole matrix.
    """
    LONG: tl.constexpr = ROWS // CUT
    TILES: tl.constexpr = (LONG + TALL - 1) // TALL
    block = 0
    if CUT > 1:
        block = tile // TILES
        tile = tile % TILES
    inside = tile * TALL + tl.arange(0, TALL)
    return expert * CUT + block, tl.minimum(inside, LONG - 1), inside < LONG, block * LONG + inside


@triton.jit
def one_expert(
    table,
    expert,
    n,
    x,
    ok,
    sums,
    begin,
    end,
    tail,
    KINDS: tl.constexpr,
    COLS: tl.constexpr,
    BM: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return rows `n` of one expert's matrix times activations, float32 [rows, tokens]."""
    acc = tl.zeros((n.shape[0], BM), tl.float32)
    kind = tl.load(table[4] + expert)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            at = locate(table, expert, n, COLS, KINDS[i])
            acc = add_expert(
                acc, at, n, x, ok, sums, begin, end, tail, KINDS[i], COLS, WIDEST, POST, CT, ASM
            )
    return acc


@triton.jit
def choose(which, a, b, ALIGNED: tl.constexpr):
    """Return pointers `a` where `which`, else `b`, multiples of ALIGNED elements; any [rows].

    Computed as an offset from `a`: the compiler loses pointer alignment in a select.
    """
    SIZE: tl.constexpr = a.dtype.element_ty.primitive_bitwidth // 8
    apart = (b.to(tl.int64) - a.to(tl.int64)) // SIZE
    return a + tl.multiple_of(tl.where(which, 0, apart), ALIGNED)


@triton.jit
def both_experts(
    gate,
    up,
    expert,
    n,
    x,
    ok,
    sums,
    KINDS: tl.constexpr,
    COLS: tl.constexpr,
    BM: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return rows `n` of gate and of up times activations, where both are of one kind.

    This is one product of twice the rows, so that activations are read once and the codes of both
    matrices are loaded at the same time.
    """
    HALF: tl.constexpr = n.shape[0]
    acc = tl.zeros((2 * HALF, BM), tl.float32)
    row = tl.arange(0, 2 * HALF)
    is_gate = row < HALF
    # The rows `n`, repeated twice.
    twice = tl.reshape(tl.permute(tl.join(n, n), (1, 0)), (2 * HALF,))
    kind = tl.load(up[4] + expert)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            of_gate = locate(gate, expert, twice, COLS, KINDS[i])
            of_up = locate(up, expert, twice, COLS, KINDS[i])
            at = (
                choose(is_gate, of_gate[0], of_up[0], 8),
                choose(is_gate, of_gate[1], of_up[1], 1),
                tl.where(is_gate, of_gate[2], of_up[2]),
            )
            acc = add_expert(
                acc,
                at,
                twice,
                x,
                ok,
                sums,
                0,
                main_blocks(COLS),
                True,
                KINDS[i],
                COLS,
                WIDEST,
                POST,
                CT,
                ASM,
            )
    return tl.split(tl.permute(tl.reshape(acc, (2, HALF, BM)), (1, 2, 0)))


@triton.jit
def intermediate(
    gate,
    up,
    expert,
    n,
    x,
    ok,
    sums,
    KINDS: tl.constexpr,
    GATE_KINDS: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    GATED: tl.constexpr,
    TIED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDEST: tl.constexpr,
    POST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return rows `n` of one expert's activated intermediate, float32 [rows, tokens].

    Args:
        gate: table of gate projections: buffer, codes_at, words_at, rows_at, kind, bias.
        up: table of up projections.
        expert: index of the entry in the tables.
        n: rows of the entry, [rows].
        x: pointers to rows of activations, [tokens].
        ok: which of these rows exist, [tokens].
        sums: pointers to rows of their sums (`input_sums.write_sums`), [tokens]; read if POST.
        KINDS: kinds of up projections.
        GATE_KINDS: kinds of gate projections.
        COLS: inputs.
        ROWS: outputs of an entry.
        BM: tokens.
        GATED: whether there is a gate.
        TIED: whether gate and up of every expert are of one kind.
        BIASED: whether there are biases.
        ACTIVATION: activation on gate, or on up without a gate.
        WIDEST: most columns multiplied at once.
        POST: whether sums are scaled instead of weights.
        CT: type of the product's operands.
        ASM: whether slots are read by inline PTX.
    """
    BLOCKS: tl.constexpr = main_blocks(COLS)
    if GATED and TIED:
        a, b = both_experts(
            gate, up, expert, n, x, ok, sums, KINDS, COLS, BM, WIDEST, POST, CT, ASM
        )
    else:
        b = one_expert(
            up, expert, n, x, ok, sums, 0, BLOCKS, True, KINDS, COLS, BM, WIDEST, POST, CT, ASM
        )
        a = b
        if GATED:
            a = one_expert(
                gate,
                expert,
                n,
                x,
                ok,
                sums,
                0,
                BLOCKS,
                True,
                GATE_KINDS,
                COLS,
                BM,
                WIDEST,
                POST,
                CT,
                ASM,
            )
    if BIASED:
        b += tl.load(up[5] + expert.to(tl.int64) * ROWS + n).to(tl.float32)[:, None]
        if GATED:
            a += tl.load(gate[5] + expert.to(tl.int64) * ROWS + n).to(tl.float32)[:, None]
    return activated(a, b, GATED, ACTIVATION)
