"""Slots as 16-bit floats: the bit tricks, checked with torch, which has bf16 where Triton's
interpreter has not."""

import pytest
import torch

from bitknap.kernels.layout.code_fields import BOTH, assembly, excess, planes, read_slot
from bitknap.kernels.layout.tiled_codes import SLOTS, pack_tiles

FLOATS = {7: torch.bfloat16, 10: torch.float16}


def read(words, slot):
    """Do what a kernel does with the words int32 [bits, n] of both lanes."""
    value = torch.full_like(words[0], slot.power)
    for word, shift, mask in slot.parts:
        moved = words[word] >> shift if shift >= 0 else words[word] << -shift
        value |= moved & mask
    return value


@pytest.mark.parametrize("mantissa", FLOATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_slot_is_its_power_and_the_code(bits, mantissa):
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 256), generator=random)
    words = pack_tiles(codes, bits).view(bits, 64, 16).int() & 0xFFFF
    for slot in range(SLOTS):
        total = torch.zeros(64, 16)
        for plane in range(planes(bits, mantissa)):
            how = read_slot(bits, slot, mantissa, plane)
            lanes = read(words, how).to(torch.int16).view(FLOATS[mantissa])
            total += lanes.float() - excess(mantissa, plane)
        assert torch.equal(total, codes[:, 16 * slot : 16 * slot + 16].float())


@pytest.mark.parametrize("mantissa", FLOATS)
def test_both_lanes_of_a_register_are_read_at_once(mantissa):
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (64, 256), generator=torch.Generator().manual_seed(1))
        words = pack_tiles(codes, bits).view(torch.int32).view(bits, 64, 8).long() & 0xFFFFFFFF
        for slot in range(SLOTS):
            how = read_slot(bits, slot, mantissa)
            both = how._replace(
                parts=tuple(p._replace(mask=p.mask * BOTH) for p in how.parts),
                power=how.power * BOTH,
            )
            whole = read(words, both) & 0xFFFFFFFF
            apart = read(pack_tiles(codes, bits).view(bits, 64, 16).int() & 0xFFFF, how)
            assert torch.equal(whole & 0xFFFF, apart[:, ::2].long())
            assert torch.equal(whole >> 16, apart[:, 1::2].long())


def test_assembly_by_hand():
    assert assembly(4, 0, 7) == ("{ .reg .b32 t, r; lop3.b32 $0, $1, 983055, 1124090624, 0xea; }")
    left = assembly(3, 15, 7)
    assert left == (
        "{ .reg .b32 t, r; shr.u32 t, $1, 15; lop3.b32 r, t, 65537, 1124090624, 0xea; "
        "shr.u32 t, $2, 14; lop3.b32 r, t, 131074, r, 0xea; "
        "shr.u32 t, $3, 13; lop3.b32 $0, t, 262148, r, 0xea; }"
    )
