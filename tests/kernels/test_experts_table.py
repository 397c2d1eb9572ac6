"""One table for experts of any widths: where a kernel finds what."""

import pytest
import torch

from bitknap.errors import InputError
from bitknap.kernels.experts_table import ExpertsTable, dequantize_tiles
from bitknap.kernels.layout.scale_words import Recipe, pack_words, tiled_rows
from bitknap.kernels.layout.tiled_codes import pack_tiles

ROWS, COLS = 70, 100
WIDE = Recipe(bits=3, group=64)
NARROW = Recipe(bits=2, group=32, share=6)
KEPT = Recipe(bits=32, group=COLS, kept=4 * ROWS * COLS)


def as_bytes(*parts):
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def experts():
    """Return codes, what they stand for, and the bytes of a wide, a narrow and a kept expert."""
    random = torch.Generator().manual_seed(0)
    q = [torch.randint(0, 2**bits, (ROWS, COLS), generator=random) for bits in (3, 2)]
    steps = torch.rand(ROWS, 2, generator=random).half()
    offsets = torch.randn(ROWS, 2, generator=random).half()
    shares = torch.randint(1, 64, (ROWS, 4), generator=random).to(torch.uint8)
    zeros = torch.randint(0, 4, (ROWS, 4), generator=random).to(torch.uint8)
    scales = torch.rand(ROWS, 1, generator=random).half()
    kept = torch.randn(ROWS, COLS, generator=random)
    streams = [
        as_bytes(pack_tiles(q[0], 3), pack_words(steps, offsets, WIDE)),
        as_bytes(pack_tiles(q[1], 2), pack_words(shares, zeros, NARROW), tiled_rows(scales)),
        torch.nn.functional.pad(as_bytes(kept), (0, -KEPT.kept % 64)),
    ]
    s, m = (x.float().repeat_interleave(64, 1)[:, :COLS] for x in (steps, offsets))
    t = (scales.float() * (shares.float() / 63)).repeat_interleave(32, 1)[:, :COLS]
    z = zeros.float().repeat_interleave(32, 1)[:, :COLS]
    return streams, torch.stack([q[0] * s + m, (q[1] - z) * t, kept])


def test_weights_are_read_back():
    streams, weights = experts()
    for order in ([0, 1, 2], [2, 0, 1, 1]):
        recipes = [(WIDE, NARROW, KEPT)[i] for i in order]
        stack = torch.cat([streams[i] for i in order])
        table = ExpertsTable.of(stack, recipes, ROWS, COLS, torch.float32)
        assert torch.equal(dequantize_tiles(table), weights[order])


def test_what_the_tables_say():
    streams, _ = experts()
    recipes = (WIDE, NARROW, KEPT)
    table = ExpertsTable.of(torch.cat(streams), recipes, ROWS, COLS, torch.float32)
    assert table.bits.tolist() == [3, 2, 32]
    assert table.group.tolist() == [64, 32, 100]
    assert table.word.tolist() == [32, 8, 0]
    assert table.share.tolist() == [0, 6, 0]
    assert table.symmetric.tolist() == [0, 0, 0]
    codes = [128 * 128 * bits // 32 for bits in (3, 2)]  # 70 x 100 filled up, in 32-bit words
    words, row_scales = [128 * 2, 128 * 4 // 4], 128 // 2
    second = codes[0] + words[0]
    third = second + codes[1] + words[1] + row_scales
    assert table.codes_at.tolist() == [0, second, third]
    assert table.words_at.tolist()[:2] == [codes[0], second + codes[1]]
    assert table.rows_at.tolist()[1] == second + codes[1] + words[1]
    assert len(table.buffer) == third + -(-KEPT.kept // 64) * 16
    expected = (torch.int64,) * 3 + (torch.int32,) * 6
    found = (table.codes_at, table.words_at, table.rows_at, table.bits, table.group, table.word)
    assert (
        *(t.dtype for t in found),
        table.share.dtype,
        table.symmetric.dtype,
        table.buffer.dtype,
    ) == expected


def test_a_table_copies_only_what_lies_badly():
    streams, weights = experts()
    whole = ExpertsTable.of(streams[0], [WIDE], ROWS, COLS)
    assert whole.buffer.data_ptr() == streams[0].data_ptr()
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), streams[0]])[1:]
    assert torch.equal(dequantize_tiles(ExpertsTable.of(shifted, [WIDE], ROWS, COLS)), weights[:1])


def test_a_stack_of_other_bytes_is_refused():
    streams, _ = experts()
    with pytest.raises(InputError) as error:
        ExpertsTable.of(streams[0], [WIDE, NARROW], ROWS, COLS)
    assert str(error.value) == (
        f"experts 2 x 70x100: {len(streams[0])} bytes, not {len(streams[0]) + len(streams[1])}; "
        "pass a stack in the layout for kernels"
    )


def test_kept_experts_need_their_dtype():
    streams, _ = experts()
    table = ExpertsTable.of(streams[2], [KEPT], ROWS, COLS)
    with pytest.raises(InputError, match="expert 0 is kept in source precision; pass its dtype"):
        dequantize_tiles(table)
