"""Tiles: nothing lost, nothing wasted but the last corner, and the order that kernels rely on."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.kernels.layout.tiled_codes import (
    blocks,
    pack_tiles,
    padded,
    slot_fields,
    tile_bytes,
    unpack_tiles,
)

WIDTHS = range(1, 9)
# SHA-256 of the tiles that layout version 1 has for `known_codes`, first digits, by width.
GOLDEN = {
    1: "828f4fc30fe2cba1",
    2: "6a5de8dce4e106cc",
    3: "9a8fbe907db5f979",
    4: "d2d79b5d796010ac",
    5: "5872b08e231b6562",
    6: "a23f645be75444e3",
    7: "5a77316bf20e19f4",
    8: "89dcc34c0c5e8620",
}


def random_codes(bits, rows, cols, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, cols), generator=random).to(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(WIDTHS), st.integers(1, 200), st.integers(1, 700), st.integers(0, 99))
def test_tiles_round_trip_in_exactly_their_bytes(bits, rows, cols, seed):
    codes = random_codes(bits, rows, cols, seed)
    tiles = pack_tiles(codes, bits)
    assert tiles.dtype == torch.int16
    assert tiles.nbytes == tile_bytes(rows, cols, bits)
    back = unpack_tiles(tiles, bits, rows, cols)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_extremes_round_trip(bits):
    for value in (0, 2**bits - 1):
        codes = torch.full((65, 450), value, dtype=torch.uint8)
        assert torch.equal(unpack_tiles(pack_tiles(codes, bits), bits, 65, 450), codes)


@pytest.mark.parametrize(("rows", "cols"), [(2048, 1408), (768, 2048), (128, 768), (192, 2880)])
def test_shapes_of_models_waste_nothing(rows, cols):
    for bits in WIDTHS:
        assert 8 * tile_bytes(rows, cols, bits) == rows * cols * bits


def test_what_is_filled_up():
    assert padded(64, 256) == (64, 256)
    assert padded(65, 257) == (128, 288)
    assert padded(1, 1) == (64, 32)
    assert tile_bytes(65, 257, 3) == 128 * 288 * 3 // 8


def test_a_row_is_cut_into_blocks_of_256_and_a_tail():
    shapes = {cols: [(b.repeat, 16 * b.lanes) for b in blocks(cols)] for cols in (768, 1408, 2880)}
    assert shapes == {768: [(3, 256)], 1408: [(5, 256), (1, 128)], 2880: [(11, 256), (1, 64)]}
    assert [(b.first, b.width) for b in blocks(450)] == [(0, 256), (256, 128), (384, 64), (448, 32)]
    for cols in range(1, 700):
        found = blocks(cols)
        assert [b.first for b in found] == [
            sum(b.width for b in found[:i]) for i in range(len(found))
        ]
        assert 0 <= sum(b.width for b in found) - cols < 32


def test_every_bit_of_a_word_belongs_to_one_slot():
    for bits in WIDTHS:
        fields = [field for slot in slot_fields(bits) for field in slot]
        used = sorted((f.word, f.shift + i) for f in fields for i in range(f.width))
        assert used == [(word, bit) for word in range(bits) for bit in range(16)]
        for slot in slot_fields(bits):
            held = [f.at + i for f in slot for i in range(f.width)]
            assert held == list(range(bits))


def test_fields_by_hand():
    # 3 bits: five codes a word, and the top bits of the three words are the sixteenth.
    three = slot_fields(3)
    assert [tuple(f) for f in three[0]] == [(0, 0, 3, 0)]
    assert [tuple(f) for f in three[6]] == [(1, 3, 3, 0)]
    assert [tuple(f) for f in three[15]] == [(0, 15, 1, 0), (1, 15, 1, 1), (2, 15, 1, 2)]
    # 6 bits: two codes and four spare bits a word.
    assert [tuple(f) for f in slot_fields(6)[12]] == [(0, 12, 4, 0), (1, 12, 2, 4)]
    assert [tuple(f) for f in slot_fields(6)[13]] == [(1, 14, 2, 0), (2, 12, 4, 2)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("cols", [256, 608, 1000])
def test_a_code_is_where_kernels_look_for_it(bits, cols):
    rows = 130
    codes = random_codes(bits, rows, cols)
    words = [w & 0xFFFF for w in pack_tiles(codes, bits).tolist()]
    tile_words = len(words) // (padded(rows, cols)[0] // 64)
    fields = slot_fields(bits)
    random = torch.Generator().manual_seed(1)
    for row, col in torch.randint(0, 1 << 30, (200, 2), generator=random).tolist():
        row, col = row % rows, col % cols
        at = row // 64 * tile_words
        for block in blocks(cols):
            size = bits * 64 * block.lanes
            if col < block.first + block.width:
                number, inside = divmod(col - block.first, 16 * block.lanes)
                slot, lane = divmod(inside, block.lanes)
                at += number * size
                break
            at += block.repeat * size
        lanes = [words[at + (w * 64 + row % 64) * block.lanes + lane] for w in range(bits)]
        parts = [((lanes[f.word] >> f.shift) % (1 << f.width)) << f.at for f in fields[slot]]
        assert sum(parts) == codes[row, col]


def test_two_lanes_share_a_register():
    codes = torch.zeros(64, 256, dtype=torch.uint8)
    codes[0, 0], codes[0, 1], codes[1, 16] = 5, 6, 7  # row 1: slot 1 of lane 0
    words = pack_tiles(codes, 3).view(torch.int32)
    assert words[0] == 6 << 16 | 5
    assert words[8] == 7 << 3  # 16 lanes of row 0 take 8 registers
    assert words.count_nonzero() == 2


def test_what_is_filled_up_is_zero():
    tiles = pack_tiles(torch.full((3, 40), 7), 3)
    whole = unpack_tiles(tiles, 3, 64, 64)
    assert (whole[:3, :40] == 7).all()
    assert whole.sum() == 7 * 3 * 40


def known_codes(bits):
    """Return codes from a few sums and products, the same on any machine."""
    return (torch.arange(70 * 500) * 7919 % 10007 % 2**bits).view(70, 500)


@pytest.mark.parametrize("bits", GOLDEN)
def test_layout_version_1_stays_what_it_is(bits):
    tiles = pack_tiles(known_codes(bits), bits)
    assert hashlib.sha256(tiles.numpy().tobytes()).hexdigest()[:16] == GOLDEN[bits]
