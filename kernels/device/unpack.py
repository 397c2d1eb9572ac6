"""Helpers of all kernels: read tiles and words in memory into floats in registers.

Constants: CT is the type that `tl.dot` multiplies in: bf16, fp16, or float32 in Triton's
interpreter, whose bf16 arithmetic is wrong. ASM says whether slots are read by inline PTX, two
lanes of a 32-bit register at once; otherwise by plain operations, for AMD and the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.device.constants import (
    bits_of,
    part_count,
    part_mask,
    part_shift,
    part_word,
    power_bits,
    scaled_of,
    share_of,
    slot_assembly,
    slot_constraints,
    symmetric_of,
    word_of,
)


@triton.jit
def known_id(value, EXPERTS: tl.constexpr):
    """Return an id as int32, -1 if it names no expert; all 64 bits are checked before the cast."""
    return tl.where((value >= 0) & (value < EXPERTS), value, -1).to(tl.int32)


@triton.jit
def read_field(word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Return (word >> SHIFT) & MASK, uint16; a negative SHIFT shifts up."""
    w = word.to(tl.uint16, bitcast=True)
    return ((w >> SHIFT) if SHIFT >= 0 else (w << -SHIFT)) & MASK


@triton.jit
def read_slot(
    W,
    SLOT: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return a slot's power + code, CT [rows, lanes], of words W, int16 [rows, lanes] each."""
    PARTS: tl.constexpr = part_count(BITS, SLOT, CT, PLANE)
    inputs = ()
    for at in tl.static_range(PARTS):
        inputs = inputs + (W[part_word(BITS, SLOT, CT, PLANE, at)],)
    if ASM:
        TEXT: tl.constexpr = slot_assembly(BITS, SLOT, CT, PLANE)
        NAMES: tl.constexpr = slot_constraints(BITS, SLOT, CT, PLANE)
        if tl.float16 == CT:
            r = tl.inline_asm_elementwise(
                TEXT, NAMES, inputs, dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            r = tl.inline_asm_elementwise(
                TEXT, NAMES, inputs, dtype=tl.bfloat16, is_pure=True, pack=2
            )
    else:
        u = tl.zeros(W[0].shape, tl.uint16)
        for at in tl.static_range(PARTS):
            u |= read_field(
                inputs[at],
                part_shift(BITS, SLOT, CT, PLANE, at),
                part_mask(BITS, SLOT, CT, PLANE, at),
            )
        if tl.float32 == CT:
            r = u.to(tl.float32)
        elif tl.float16 == CT:
            r = (u | power_bits(BITS, SLOT, CT, PLANE)).to(tl.float16, bitcast=True)
        else:
            r = (u | power_bits(BITS, SLOT, CT, PLANE)).to(tl.bfloat16, bitcast=True)
    return r


@triton.jit
def join_slots(
    W,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    CT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return slots FIRST, FIRST + STEP, …: [rows, lanes, 2, …, 2], lowest bit of the slot last."""
    if COUNT == 1:
        r = read_slot(W, FIRST, BITS, PLANE, CT, ASM)
    else:
        r = tl.join(
            join_slots(W, FIRST, STEP * 2, COUNT // 2, BITS, PLANE, CT, ASM),
            join_slots(W, FIRST + STEP, STEP * 2, COUNT // 2, BITS, PLANE, CT, ASM),
        )
    return r


@triton.jit
def in_columns(slots, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """Return joined slots as columns, [rows, COUNT · LANES]; no value moves between threads."""
    if COUNT == 2:
        r = tl.permute(slots, (0, 2, 1))
    elif COUNT == 4:
        r = tl.permute(slots, (0, 2, 3, 1))
    elif COUNT == 8:
        r = tl.permute(slots, (0, 2, 3, 4, 1))
    else:
        r = tl.permute(slots, (0, 2, 3, 4, 5, 1))
    return tl.reshape(r, (ROWS, COUNT * LANES))


@triton.jit
def opaque(q, LANES: tl.constexpr, ASM: tl.constexpr):
    """Return `q`, hidden from the compiler's optimizations for narrow blocks.

    On Blackwell, Triton 3.9 would move the work of `in_columns` to operands in shared memory, where
    it has no layout for fewer than 8 lanes, and abort.
    """
    if ASM and LANES < 8:
        q = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", (q,), dtype=q.dtype, is_pure=True, pack=2
        )
    return q


@triton.jit
def load_codes(at, BITS: tl.constexpr, LANES: tl.constexpr):
    """Return the words of one block, int16 [rows, LANES] each; `at` points to the first."""
    W = ()
    for word in tl.static_range(BITS):
        W = W + (tl.load(at + word * 64 * LANES),)
    return W


@triton.jit
def word_pointer(buffer, words_at, KIND: tl.constexpr):
    """Return a pointer to an expert's first word, typed by the words' width."""
    at = buffer + tl.multiple_of(words_at, 16)
    if word_of(KIND) == 16:
        r = at.to(tl.pointer_type(tl.int16))
    elif word_of(KIND) == 8:
        r = at.to(tl.pointer_type(tl.uint8))
    else:
        r = at
    return r


@triton.jit
def open_word(word, KIND: tl.constexpr):
    """Return step and value of code 0, float32 [rows].

    Compact ones must still be multiplied by `row_scale`, those of a matrix with an exponent by
    `matrix_scale`.
    """
    BITS: tl.constexpr = bits_of(KIND)
    SHARE: tl.constexpr = share_of(KIND)
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    if SHARE == 0:
        if symmetric_of(KIND):
            step = word.to(tl.float16, bitcast=True).to(tl.float32)
            if scaled_of(KIND):
                step = tl.abs(step)
            zero = step * -MIDDLE
        else:
            step = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            if scaled_of(KIND):
                step = tl.abs(step)
            high = (word >> 16).to(tl.int16)
            zero = high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        u = word.to(tl.int32)
        step = (u & ((1 << SHARE) - 1)).to(tl.float32)
        if symmetric_of(KIND):
            zero = step * -MIDDLE
        else:
            zero = step * -((u >> SHARE) & ((1 << BITS) - 1)).to(tl.float32)
    return step, zero


@triton.jit
def row_scale(buffer, rows_at, tile, inside, KIND: tl.constexpr):
    """Return the factor of compact steps and zeros, float32 [rows]."""
    MOST: tl.constexpr = (1 << share_of(KIND)) - 1
    at = (buffer + rows_at).to(tl.pointer_type(tl.float16)) + tile * 64 + inside
    scale = tl.load(at).to(tl.float32)
    if scaled_of(KIND):
        scale = tl.abs(scale)
    return scale * (1.0 / MOST)


@triton.jit
def matrix_scale(buffer, words_at, rows_at, KIND: tl.constexpr):
    """Return the power of two that a matrix is multiplied by, float32 (see `exponents`)."""
    row = tl.arange(0, 8)  # the power of two above the five rows that hold a bit
    if share_of(KIND):
        negative = tl.load((buffer + rows_at).to(tl.pointer_type(tl.int16)) + row) < 0
    elif symmetric_of(KIND):
        negative = tl.load((buffer + words_at).to(tl.pointer_type(tl.int16)) + row) < 0
    else:
        negative = (tl.load(buffer + words_at + row) & 0x8000) != 0
    value = tl.sum(tl.where(negative & (row < 5), 1 << row, 0), axis=0)
    value = tl.where(value < 16, value, value - 32)
    return ((value * 8 + 127) << 23).to(tl.float32, bitcast=True)
