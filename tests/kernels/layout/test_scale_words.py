"""Words of scales and zeros: what each bit is, and where one tile's words lie."""

import torch

from bitknap.kernels.layout.scale_words import Recipe, pack_words, tiled_rows, unpack_words

STEPS = torch.tensor([[0.5, 2.0, 0.25], [1.0, 4.0, 8.0]]).half()
SHARES = torch.tensor([[1, 2, 63], [4, 5, 6]], dtype=torch.uint8)


def test_a_word_is_as_narrow_as_it_can_be():
    def word(bits, share, symmetric):
        return Recipe(bits=bits, group=64, share=share, symmetric=symmetric).word

    assert [word(4, 0, False), word(4, 0, True)] == [32, 16]
    assert [word(b, 6, False) for b in (2, 3, 8)] == [8, 16, 16]
    assert [word(8, 8, True), word(2, 8, False), word(8, 8, False)] == [8, 16, 16]
    assert Recipe(bits=16, group=64, kept=100).word == 0


def test_a_wide_word_is_step_below_offset():
    recipe = Recipe(bits=4, group=64)
    words = pack_words(STEPS, -STEPS, recipe)
    assert (words.dtype, words.shape) == (torch.int32, (1, 3, 64))
    assert int(words[0, 0, 0]) & 0xFFFFFFFF == 0xB800_3800  # -0.5 and 0.5 in fp16
    assert int(words[0, 2, 1]) & 0xFFFFFFFF == 0xC800_4800  # row 1, group 2: 8
    assert words[0, :, 2:].count_nonzero() == 0
    steps, offsets = unpack_words(words.view(-1).view(torch.uint8), recipe, 2)
    assert torch.equal(steps, STEPS)
    assert offsets is not None
    assert torch.equal(offsets, -STEPS)


def test_a_symmetric_word_is_the_step():
    recipe = Recipe(bits=4, group=64, symmetric=True)
    words = pack_words(STEPS, None, recipe)
    assert words[0, :, 1].tolist() == STEPS[1].view(torch.int16).tolist()
    steps, zeros = unpack_words(words.view(-1).view(torch.uint8), recipe, 2)
    assert torch.equal(steps, STEPS)
    assert zeros is None


def test_a_narrow_word_is_share_below_zero():
    for bits, share in ((2, 6), (3, 6), (2, 8), (8, 8)):
        recipe = Recipe(bits=bits, group=64, share=share)
        zeros = torch.tensor([[0, 1, 2**bits - 1], [1, 0, 1]], dtype=torch.uint8)
        words = pack_words(SHARES, zeros, recipe)
        assert words[0, 1, 0] == 2 | 1 << share
        shares, back = unpack_words(words.view(-1).view(torch.uint8), recipe, 2)
        assert torch.equal(shares, SHARES)
        assert back is not None
        assert torch.equal(back, zeros)


def test_one_tiles_words_are_one_run():
    values = torch.arange(130 * 3).view(130, 3)
    tiles = tiled_rows(values)
    assert tiles.shape == (3, 3, 64)
    assert tiles[1, 2].tolist() == values[64:128, 2].tolist()
    assert tiles[2, 0].tolist() == [*values[128:, 0].tolist(), *[0] * 62]


def test_every_part_begins_where_wide_loads_may():
    for recipe in (
        Recipe(bits=3, group=64),
        Recipe(bits=7, group=8, symmetric=True),
        Recipe(bits=1, group=32, share=6, symmetric=True),
        Recipe(bits=5, group=8, share=8),
        Recipe(bits=16, group=64, kept=150),
    ):
        for rows, cols in ((1, 1), (65, 100), (64, 1408)):
            assert [size % 64 for size in recipe.part_bytes(rows, cols)] == [0, 0, 0]
