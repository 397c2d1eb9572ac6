"""How a slot's bits become a 16-bit float, as constants for kernels.

A field of b bits ORed into the last mantissa bits of a power of two gives exactly that power plus
the code: 128 + q in bf16 (7 bits of mantissa), 1024 + q in fp16 (10). The power is subtracted again
where sums are scaled.

8 bits do not fit the mantissa of bf16: there a code is split into two planes, 128 + low and 256 +
16 high.

Tried and rejected: reading several fields after one shift, onto a smaller power for fields higher
in the mantissa. The saved shifts (2 bits, sm_90: 0.31 instructions per weight) are outweighed by
the second constant operand needed to subtract unequal powers (0.34).

Functions are Triton functions, so that a change of fields invalidates kernels compiled earlier.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

_BIASES = {7: 127, 10: 15}  # of the exponent, by bits of mantissa
BOTH = 0x00010001  # a value in both lanes of a 32-bit register


class Part(NamedTuple):
    """One field of a slot: ((word >> shift) & mask), shifted up where `shift` is negative."""

    word: int
    shift: int
    mask: int


class Slot(NamedTuple):
    """How one slot is read.

    Attributes:
        parts: fields that are ORed together and onto the power.
        power: bits of the float that the fields are ORed onto, in one lane.
    """

    parts: tuple[Part, ...]
    power: int


@triton.constexpr_function
def planes(bits: int, mantissa: int) -> int:
    """Return the number of floats that a code is split into."""
    return 1 if bits <= mantissa else 2


@triton.constexpr_function
def read_slot(bits: int, slot: int, mantissa: int, plane: int = 0) -> Slot:
    """Return how a slot is read.

    Args:
        bits: number of bits of a code.
        slot: 0 to 15.
        mantissa: bits of the float's mantissa: 7 or 10.
        plane: plane of a code split into two, 0 for the low four bits.
    """
    from bitknap.kernels.layout.tiled_codes import (
        slot_fields,  # Triton refuses plain functions of modules
    )

    fields = slot_fields(bits)[slot]
    if planes(bits, mantissa) == 1:
        parts = tuple(Part(f.word, f.shift - f.at, (1 << f.width) - 1 << f.at) for f in fields)
        return Slot(parts, _float(mantissa, mantissa))
    word, shift = fields[0].word, fields[0].shift
    if plane == 0:
        return Slot((Part(word, shift, 15),), _float(mantissa, mantissa))
    # The high four bits go to bit 3 of the mantissa, whose unit is worth 2: 2^8 + 2 · 8 high.
    return Slot((Part(word, shift + 1, 15 << 3),), _float(mantissa + 1, mantissa))


@triton.constexpr_function
def excess(mantissa: int, plane: int) -> float:
    """Return the excess of a plane's floats over its part of the code."""
    return 2.0 ** (mantissa + plane)


@triton.constexpr_function
def assembly(bits: int, slot: int, mantissa: int, plane: int = 0) -> str:
    """Return PTX that reads a slot of both lanes: $0 from words $1, $2, …, one per part.

    Args:
        bits: number of bits of a code.
        slot: 0 to 15.
        mantissa: bits of the float's mantissa: 7 or 10.
        plane: plane of a code split into two, 0 for the low four bits.
    """
    # Access by position: Triton 3.6 turns named tuples into plain ones.
    parts, power = read_slot(bits, slot, mantissa, plane)
    lines, done = [".reg .b32 t, r;"], f"{power * BOTH}"
    for at, part in enumerate(parts, start=1):  # Triton does not support nested targets either
        _, shift, mask = part
        source, last = f"${at}", at == len(parts)
        if shift:
            # Bits that cross from one lane into the other are outside the mask.
            lines.append(f"sh{'r.u' if shift > 0 else 'l.b'}32 t, {source}, {abs(shift)};")
            source = "t"
        lines.append(f"lop3.b32 {'$0' if last else 'r'}, {source}, {mask * BOTH}, {done}, 0xea;")
        done = "r"
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _float(exponent, mantissa):
    """Return the bits of 2^exponent."""
    return exponent + _BIASES[mantissa] << mantissa
