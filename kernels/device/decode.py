"""The path for few tokens: two launches (four if inputs are summed separately), no sorting.

A tile is one expert and all tokens that chose it; with at most 16 tokens, token t is column t.
Each program finds these tokens in the ids itself. Programs of down store partial results in
float32, and the last one to finish some output columns adds them up in the order of the tokens'
ids: the weighted sum over experts needs no third launch and is the same every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.constants import main_blocks, sums_of, tiles_of
from bitknap.kernels.device.input_sums import own_sums
from bitknap.kernels.device.products import intermediate, one_expert, rows_of
from bitknap.kernels.device.unpack import known_id

_NONE = tl.constexpr(1 << 30)


@triton.jit
def ids_of(
    index_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
):
    """Return all ids int32 [BM, KP], -1 where an id is missing or names no expert."""
    t = tl.arange(0, BM)
    j = tl.arange(0, KP)
    there = (t < tokens)[:, None] & (j < TOPK)[None, :]
    ids = tl.load(index_ptr + t[:, None] * TOPK + j[None, :], mask=there, other=-1)
    return known_id(ids, EXPERTS)


@triton.jit
def pick(
    ids,
    index_ptr,
    order_ptr,
    slot,
    TOPK: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
):
    """Return (expert, pair of each token [BM], whether this program has work).

    Slots are experts, most bits first, or pairs if there are fewer: then the first pair of an
    expert stands for it and the others do nothing. A token's pair is its first with this expert, or
    `_NONE`.
    """
    if BY_EXPERT:
        expert = tl.load(order_ptr + slot).to(tl.int32)
    else:
        expert = known_id(tl.load(index_ptr + slot), EXPERTS)
    t = tl.arange(0, BM)
    j = tl.arange(0, KP)
    pair = tl.min(tl.where(ids == expert, t[:, None] * TOPK + j[None, :], _NONE), axis=1)
    first = tl.min(pair, axis=0)
    if BY_EXPERT:  # noqa: SIM108 - Triton has no conditional expression over constants
        busy = first < _NONE
    else:
        busy = (first == slot) & (expert >= 0)
    return expert, pair, busy


@triton.jit(do_not_specialize=["tokens"])
def decode_gate_up(
    x_ptr,
    index_ptr,
    hidden_ptr,
    arrived_ptr,
    sums_ptr,
    gate,
    up,
    order_ptr,
    tokens,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    KP: tl.constexpr,
    KINDS: tl.constexpr,
    GATE_KINDS: tl.constexpr,
    CUT: tl.constexpr,
    GATED: tl.constexpr,
    TIED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    OWN_SUMS: tl.constexpr,
    COUNTERS: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fill hidden [tokens · TOPK, INNER]: each expert's activated intermediate.

    A token's row for an expert is that of its first pair with it. Grid: slots · tiles of an expert.
    """
    NT: tl.constexpr = tiles_of(INNER, CUT, HALF)
    pid = tl.program_id(0)
    if pid == 0:
        # Arrival counters of the down projection, which runs after this whole launch.
        c = tl.arange(0, COUNTERS)
        tl.store(arrived_ptr + c, tl.zeros((COUNTERS,), tl.int32))
    ids = ids_of(index_ptr, tokens, EXPERTS, TOPK, KP, BM)
    expert, pair, busy = pick(
        ids, index_ptr, order_ptr, pid // NT, TOPK, KP, BM, EXPERTS, BY_EXPERT
    )
    if busy:
        ok = pair < _NONE
        t = tl.arange(0, BM).to(tl.int64)
        x = x_ptr + t * HIDDEN
        sums = sums_ptr + t * sums_of(HIDDEN)
        if OWN_SUMS:
            own_sums(x_ptr, sums_ptr, t, ok, tokens, 0, HIDDEN, HIDDEN)
        entry, n, there, rows = rows_of(expert, pid % NT, INNER, CUT, HALF)
        value = intermediate(
            gate,
            up,
            entry,
            n,
            x,
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
            True,
            CT,
            ASM,
        )
        at = hidden_ptr + pair.to(tl.int64)[None, :] * INNER + rows[:, None]
        value = value.to(hidden_ptr.dtype.element_ty)
        tl.store(at, value, mask=ok[None, :] & there[:, None])


@triton.jit(do_not_specialize=["tokens", "slots"])
def decode_down(
    hidden_ptr,
    index_ptr,
    weights_ptr,
    part_ptr,
    arrived_ptr,
    out_ptr,
    sums_ptr,
    down,
    order_ptr,
    tokens,
    slots,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    KP: tl.constexpr,
    KINDS: tl.constexpr,
    CUT: tl.constexpr,
    BIASED: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    OWN_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDEST: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Fill out [tokens, HIDDEN]: each token's weighted sum over its experts.

    Columns of the inputs are cut into SPLIT runs; part float32 [SPLIT, tokens · TOPK, HIDDEN] takes
    the partial results. Grid: slots · SPLIT · tiles of an expert.
    """
    NT: tl.constexpr = tiles_of(HIDDEN, CUT, BN)
    BLOCKS: tl.constexpr = main_blocks(INNER)
    pid = tl.program_id(0)
    nt = pid % NT
    run = pid // NT % SPLIT
    ids = ids_of(index_ptr, tokens, EXPERTS, TOPK, KP, BM)
    expert, pair, busy = pick(
        ids, index_ptr, order_ptr, pid // NT // SPLIT, TOPK, KP, BM, EXPERTS, BY_EXPERT
    )
    entry, n, inside, rows = rows_of(expert, nt, HIDDEN, CUT, BN)
    there = inside[:, None]
    if busy:
        ok = pair < _NONE
        begin = run * BLOCKS // SPLIT
        end = (run + 1) * BLOCKS // SPLIT
        row = tl.where(ok, pair, 0).to(tl.int64)
        x = hidden_ptr + row * INNER
        sums = sums_ptr + row * sums_of(INNER)
        if OWN_SUMS:
            last = tl.where(run == SPLIT - 1, INNER, end * 256)
            own_sums(hidden_ptr, sums_ptr, row, ok, tokens, begin * 256, last, INNER)
        y = one_expert(
            down,
            entry,
            n,
            x,
            ok,
            sums,
            begin,
            end,
            run == SPLIT - 1,
            KINDS,
            INNER,
            BM,
            WIDEST,
            True,
            CT,
            ASM,
        )
        if BIASED:
            bias = tl.load(down[5] + entry.to(tl.int64) * (HIDDEN // CUT) + n).to(tl.float32)
            y += tl.where(run == 0, bias, 0.0)[:, None]
        at = (run * tokens * TOPK + pair).to(tl.int64)[None, :] * HIDDEN + rows[:, None]
        tl.store(part_ptr + at, y, mask=ok[None, :] & there)
    # All threads' stores must precede the count that announces them.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + nt, 1, sem="acq_rel", scope="gpu")
    if before == slots * SPLIT - 1:
        t = tl.arange(0, BM)
        j = tl.arange(0, KP)
        total = tl.zeros((BN, BM), tl.float32)
        for i in range(TOPK):
            mine = t * TOPK + i
            own = known_id(tl.load(index_ptr + mine, mask=t < tokens, other=-1), EXPERTS)
            same = ids == own[:, None]
            first = tl.min(tl.where(same, t[:, None] * TOPK + j[None, :], _NONE), axis=1)
            there_is = own >= 0
            w = tl.load(weights_ptr + mine, mask=t < tokens, other=0.0).to(tl.float32)
            for s in tl.static_range(SPLIT):
                at = (s * tokens * TOPK + first).to(tl.int64)[None, :] * HIDDEN + rows[:, None]
                # Other programs wrote this, so stale values in the first-level cache must be
                # bypassed.
                y = tl.load(
                    part_ptr + at,
                    mask=there_is[None, :] & there,
                    other=0.0,
                    cache_modifier=".cg",
                )
                total += w[None, :] * y
        at = out_ptr + t.to(tl.int64)[None, :] * HIDDEN + rows[:, None]
        total = total.to(out_ptr.dtype.element_ty)
        tl.store(at, total, mask=(t < tokens)[None, :] & there)
