"""How a slot's bits become a 16-bit float, for constants of kernels. No Triton here.

A field of b bits ORed onto a power of two whose last mantissa bits it fills is that power plus the
code, exactly: 128 + q in bf16 (7 bits of mantissa), 1024 + q in fp16 (10). Where the field lies
p bits above the lowest, the power is 2^p less, so fields that are within the mantissa after one
shift of the word need no shift of their own. The powers are taken out again where sums are scaled.

8 bits do not fit bf16's mantissa: there a code is two planes, 128 + low and 256 + 16 high.
"""

from __future__ import annotations

from typing import NamedTuple

from bitknap.kernels.tiles import SLOTS, slot_fields

_EXPONENTS = {7: 127, 10: 15}  # bias of the exponent by bits of mantissa
BOTH = 0x00010001  # a value in both lanes of a 32-bit register


class Part(NamedTuple):
    """One field of a slot: ((word >> shift) & mask), shifted up where `shift` is negative."""

    word: int
    shift: int
    mask: int


class Slot(NamedTuple):
    """How one slot is read.

    Attributes:
        parts: ORed together and onto the power.
        power: bits of the float that they are ORed onto, in one lane.
        value: of that power.
        scale: by which the code is multiplied in the result.
    """

    parts: tuple[Part, ...]
    power: int
    value: float


def planes(bits: int, mantissa: int) -> int:
    """Return into how many floats a code is cut."""
    return 1 if bits <= mantissa else 2


def read_slot(bits: int, slot: int, mantissa: int, plane: int = 0) -> Slot:
    """Return how a slot is read.

    Args:
        bits: of a code.
        slot: 0 to 15.
        mantissa: bits of the float's mantissa: 7 or 10.
        plane: of codes in two planes, 0 for the low four bits.
    """
    fields = slot_fields(bits)[slot]
    if planes(bits, mantissa) == 2:
        word, shift = fields[0].word, fields[0].shift
        if plane == 0:
            return Slot((Part(word, shift, 15), ), *_power(mantissa, 0))
        # Up three bits of the mantissa and one shift less: 2^8 + 16 q.
        return Slot((Part(word, shift + 1, 15 << 3),), *_power(mantissa, -1))
    if len(fields) == 1 and fields[0].width == bits:
        word, shift = fields[0].word, fields[0].shift
        base = _base(bits, shift, mantissa)
        up = shift - base
        return Slot((Part(word, base, (1 << bits) - 1 << up),), *_power(mantissa, up))
    parts = tuple(Part(f.word, f.shift - f.at, (1 << f.width) - 1 << f.at) for f in fields)
    return Slot(parts, *_power(mantissa, 0))


def powers(bits: int, mantissa: int, plane: int = 0) -> tuple[float, ...]:
    """Return what every slot's float is too great by."""
    return tuple(read_slot(bits, slot, mantissa, plane).value for slot in range(SLOTS))


def assembly(slot: Slot) -> str:
    """Return PTX that reads a slot of both lanes: $0 from words $1, $2, …, one a part."""
    lines, done = [".reg .b32 t, r;"], f"{slot.power * BOTH}"
    for at, (_, shift, mask) in enumerate(slot.parts, start=1):
        source, last = f"${at}", at == len(slot.parts)
        if shift:
            # Bits that cross from one lane into the other are none of the mask's.
            lines.append(f"sh{'r.u' if shift > 0 else 'l.b'}32 t, {source}, {abs(shift)};")
            source = "t"
        lines.append(f"lop3.b32 {'$0' if last else 'r'}, {source}, {mask * BOTH}, {done}, 0xea;")
        done = "r"
    return "{ " + " ".join(lines) + " }"


def _base(bits: int, shift: int, mantissa: int) -> int:
    """Return the shift that this field shares with those below it that fit the mantissa too."""
    first = 0
    for at in range(0, shift + 1, bits):
        if at - first + bits > mantissa:
            first = at
    return first


def _power(mantissa: int, up: int) -> tuple[int, float]:
    exponent = mantissa - up
    return exponent + _EXPONENTS[mantissa] << mantissa, 2.0**exponent
