"""Compile-time constants of kernels, computed from a kind, a width and a type."""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.layout import code_fields


@triton.constexpr_function
def opened(kind):
    """Return the `Kind` encoded by an integer."""
    from bitknap.kernels.layout.kinds import Kind  # Triton refuses plain functions of modules

    return Kind.of(kind)


@triton.constexpr_function
def bits_of(kind):
    """Return the bits of a code, or of a kept weight."""
    return opened(kind).bits


@triton.constexpr_function
def share_of(kind):
    """Return the bits of a group's share of its row's scale, 0 if it has none."""
    return opened(kind).share


@triton.constexpr_function
def symmetric_of(kind):
    """Return whether no zero point is stored."""
    return opened(kind).symmetric


@triton.constexpr_function
def scaled_of(kind):
    """Return whether the matrix has an exponent."""
    return opened(kind).scaled


@triton.constexpr_function
def scale_of(kind):
    """Return whether steps and zeros lack a factor, per row or for the whole matrix."""
    return bool(opened(kind).share or opened(kind).scaled)


@triton.constexpr_function
def kept_of(kind):
    """Return 0 for codes, 1, 2, 3 for a matrix in bf16, fp16, fp32."""
    return opened(kind).kept


@triton.constexpr_function
def group_of(kind, cols):
    """Return the number of weights that share a word."""
    return opened(kind).group or cols


@triton.constexpr_function
def groups_of(kind, cols):
    """Return the number of groups in a row."""
    return -(-cols // group_of(kind, cols))


@triton.constexpr_function
def words_in(kind, cols, width):
    """Return the number of words per row in a block of `width` columns: one, or one per chunk."""
    group = group_of(kind, cols)
    return 1 if group == cols or group % 256 == 0 else width // chunk_of(kind, width, 256)


@triton.constexpr_function
def chunk_of(kind, width, widest):
    """Return how many columns of a block of `width` are multiplied at once: they share a word."""
    return min(opened(kind).chunk, width, widest)


@triton.constexpr_function
def word_of(kind):
    """Return the bits of a word."""
    known = opened(kind)
    if not known.share:
        return 16 if known.symmetric else 32
    return 8 if known.share + (0 if known.symmetric else known.bits) <= 8 else 16


@triton.constexpr_function
def tile_size(cols, bits):
    """Return the number of 16-bit words in one tile of 64 rows."""
    return -(-cols // 32) * 32 * 4 * bits


@triton.constexpr_function
def main_blocks(cols):
    """Return the number of 256-column blocks; the rest takes one block each of 128, 64 and 32."""
    return -(-cols // 32) * 32 // 256


@triton.constexpr_function
def has_tail(cols, lanes):
    """Return whether a block of 16 · `lanes` columns follows the 256-column blocks."""
    return (-(-cols // 32) * 32) // (16 * lanes) % 2 == 1


@triton.constexpr_function
def tail_begin(cols, lanes):
    """Return the first column of that block."""
    return (-(-cols // 32) * 32) // (32 * lanes) * (32 * lanes)


@triton.constexpr_function
def mantissa_of(ct):
    """Return the number of mantissa bits that codes are read into."""
    return 10 if ct == tl.float16 else 7


@triton.constexpr_function
def planes_of(bits, ct):
    """Return the number of floats that a code is split into."""
    return 1 if ct == tl.float32 else code_fields.planes(bits, mantissa_of(ct))


@triton.constexpr_function
def excess_of(bits, ct, plane):
    """Return the excess of a plane's floats over its part of the code."""
    if ct == tl.float32 or plane >= planes_of(bits, ct):
        return 0.0
    return code_fields.excess(mantissa_of(ct), plane)


@triton.constexpr_function
def slot_of(bits, slot, ct, plane):
    """Return how a slot is read."""
    return code_fields.read_slot(bits, slot, 10 if ct == tl.float32 else mantissa_of(ct), plane)


@triton.constexpr_function
def part_count(bits, slot, ct, plane):
    """Return the number of fields of a slot."""
    return len(slot_of(bits, slot, ct, plane).parts)


@triton.constexpr_function
def part_word(bits, slot, ct, plane, at):
    """Return the index of the word with a slot's field."""
    return slot_of(bits, slot, ct, plane).parts[at].word


@triton.constexpr_function
def part_shift(bits, slot, ct, plane, at):
    """Return how far down a slot's field is shifted."""
    return slot_of(bits, slot, ct, plane).parts[at].shift


@triton.constexpr_function
def part_mask(bits, slot, ct, plane, at):
    """Return the mask of a slot's field."""
    return slot_of(bits, slot, ct, plane).parts[at].mask


@triton.constexpr_function
def power_bits(bits, slot, ct, plane):
    """Return the bits that a slot's fields are ORed onto."""
    return slot_of(bits, slot, ct, plane).power


@triton.constexpr_function
def slot_assembly(bits, slot, ct, plane):
    """Return PTX that reads a slot of two lanes."""
    return code_fields.assembly(bits, slot, mantissa_of(ct), plane)


@triton.constexpr_function
def slot_constraints(bits, slot, ct, plane):
    """Return the register constraints of that PTX."""
    return "=r" + ",r" * part_count(bits, slot, ct, plane)


@triton.constexpr_function
def tiles_of(rows, blocks, tall):
    """Return the number of tiles of `tall` rows in a matrix; no tile spans two row blocks."""
    return blocks * -(-(rows // blocks) // tall)


@triton.constexpr_function
def sums_at(cols, width):
    """Return the offset of the sums over `width` columns within those of a row: widest first."""
    return sum(-(-cols // wider) for wider in (128, 64, 32) if wider > width)


@triton.constexpr_function
def sums_of(cols):
    """Return the number of sums of a row."""
    return sums_at(cols, 0)
