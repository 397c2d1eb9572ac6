"""What kernels are compiled for: constants worked out from a kind, a width and a type."""

from __future__ import annotations

import triton
import triton.language as tl

from bitknap.kernels.layout import code_fields


@triton.constexpr_function
def opened(kind):
    """Return the `Kind` that an integer stands for."""
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
    """Return whether no zero is stored."""
    return opened(kind).symmetric


@triton.constexpr_function
def scaled_of(kind):
    """Return whether the matrix has an exponent."""
    return opened(kind).scaled


@triton.constexpr_function
def scale_of(kind):
    """Return whether steps and zeros lack a factor: of their row, or of the whole matrix."""
    return bool(opened(kind).share or opened(kind).scaled)


@triton.constexpr_function
def kept_of(kind):
    """Return 0 for codes, 1, 2, 3 for a matrix in bf16, fp16, fp32."""
    return opened(kind).kept


@triton.constexpr_function
def group_of(kind, cols):
    """Return the weights that share a word."""
    return opened(kind).group or cols


@triton.constexpr_function
def groups_of(kind, cols):
    """Return the groups of a row."""
    return -(-cols // group_of(kind, cols))


@triton.constexpr_function
def words_in(kind, cols, width):
    """Return words that a block of `width` columns needs of each row: one, or one a chunk."""
    group = group_of(kind, cols)
    return 1 if group == cols or group % 256 == 0 else width // chunk_of(kind, width, 256)


@triton.constexpr_function
def chunk_of(kind, width, widest):
    """Return columns of a block of `width` that are multiplied at once: they share a word."""
    return min(opened(kind).chunk, width, widest)


@triton.constexpr_function
def word_of(kind):
    """Return bits of a word."""
    known = opened(kind)
    if not known.share:
        return 16 if known.symmetric else 32
    return 8 if known.share + (0 if known.symmetric else known.bits) <= 8 else 16


@triton.constexpr_function
def tile_size(cols, bits):
    """Return 16-bit words of one tile of 64 rows."""
    return -(-cols // 32) * 32 * 4 * bits


@triton.constexpr_function
def main_blocks(cols):
    """Return whole blocks of 256 columns; what is left takes one block each of 128, 64 and 32."""
    return -(-cols // 32) * 32 // 256


@triton.constexpr_function
def has_tail(cols, lanes):
    """Return whether there is a block of 16 · `lanes` columns after those of 256."""
    return (-(-cols // 32) * 32) // (16 * lanes) % 2 == 1


@triton.constexpr_function
def tail_begin(cols, lanes):
    """Return first column of that block."""
    return (-(-cols // 32) * 32) // (32 * lanes) * (32 * lanes)


@triton.constexpr_function
def mantissa_of(ct):
    """Return the bits of mantissa that codes are read into."""
    return 10 if ct == tl.float16 else 7


@triton.constexpr_function
def planes_of(bits, ct):
    """Return into how many floats a code is cut."""
    return 1 if ct == tl.float32 else code_fields.planes(bits, mantissa_of(ct))


@triton.constexpr_function
def excess_of(bits, ct, plane):
    """Return what a plane's floats are greater than its part of the code."""
    if ct == tl.float32 or plane >= planes_of(bits, ct):
        return 0.0
    return code_fields.excess(mantissa_of(ct), plane)


@triton.constexpr_function
def slot_of(bits, slot, ct, plane):
    """Return how a slot is read."""
    return code_fields.read_slot(bits, slot, 10 if ct == tl.float32 else mantissa_of(ct), plane)


@triton.constexpr_function
def part_count(bits, slot, ct, plane):
    """Return the fields of a slot."""
    return len(slot_of(bits, slot, ct, plane).parts)


@triton.constexpr_function
def part_word(bits, slot, ct, plane, at):
    """Return the word of a slot's field."""
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
    """Return what a slot's fields are ORed onto."""
    return slot_of(bits, slot, ct, plane).power


@triton.constexpr_function
def slot_assembly(bits, slot, ct, plane):
    """Return PTX that reads a slot of two lanes."""
    return code_fields.assembly(bits, slot, mantissa_of(ct), plane)


@triton.constexpr_function
def slot_constraints(bits, slot, ct, plane):
    """Return the registers of that PTX."""
    return "=r" + ",r" * part_count(bits, slot, ct, plane)


@triton.constexpr_function
def tiles_of(rows, blocks, tall):
    """Return the tiles of `tall` rows of a matrix in blocks of rows; none is of two of them."""
    return blocks * -(-(rows // blocks) // tall)


@triton.constexpr_function
def sums_at(cols, width):
    """Return where sums of runs of `width` columns begin among those of a row: widest first."""
    return sum(-(-cols // wider) for wider in (128, 64, 32) if wider > width)


@triton.constexpr_function
def sums_of(cols):
    """Return the sums of a row of columns."""
    return sums_at(cols, 0)
