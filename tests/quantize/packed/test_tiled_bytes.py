"""One unit's bytes in the layout for kernels: the same codes, scales and zeros, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Format, formats
from bitknap.errors import FileError, InputError
from bitknap.kernels.experts_table import dequantize_tiles
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.tiled_bytes import (
    decode_tiles,
    encode_tiles,
    experts_table,
    tiled_bytes,
    to_plain,
    to_tiles,
)
from bitknap.quantization.rounding.grid import Grid, Quantized
from bitknap.quantization.rounding.rtn import quantize

METADATA = ("fp16", "compact", "compact6")
EVERY = formats(range(1, 9), (8, 32, 64, "row"), (False, True), METADATA)
KEEP = Format.keep("bf16")


def random_unit(format, rows, cols, seed):
    """Return codes and grids drawn from all that can be stored, not only what rounding makes."""
    random = torch.Generator().manual_seed(seed)
    groups = int(format.groups(cols))

    def whole(bits, *shape, low=0):
        return torch.randint(low, 2**bits, shape, generator=random, dtype=torch.int64)

    scale = whole(10, rows, 1 if format.compact else groups, low=1).half() / 512
    share = zero = None
    if format.compact and groups > 1:
        share = whole(format.share_bits, rows, groups).to(torch.uint8)
    if not format.symmetric and format.compact:
        zero = whole(format.bits, rows, groups).to(torch.uint8)
    elif not format.symmetric:
        zero = (whole(10, rows, groups).half() - 512) / 32
    grid = Grid(format=format, cols=cols, scale=scale, share=share, zero=zero)
    return Quantized(grid=grid, codes=whole(format.bits, rows, cols).to(torch.uint8))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(EVERY), st.integers(1, 140), st.integers(1, 600), st.integers(0, 99))
def test_every_format_goes_there_and_back(format, rows, cols, seed):
    unit = random_unit(format, rows, cols, seed)
    plain = encode(unit)
    tiles = to_tiles(plain, format, rows, cols)
    assert tiles.dtype == torch.uint8
    assert len(tiles) == tiled_bytes(format, rows, cols)
    assert len(tiles) % 64 == 0
    assert torch.equal(tiles, encode_tiles(unit))
    assert torch.equal(to_plain(tiles, format, rows, cols), plain)
    assert torch.equal(decode_tiles(tiles, format, rows, cols).dequantize(), unit.dequantize())


def test_a_kept_matrix_is_filled_up_and_cut_off_again():
    stream = torch.arange(3 * 5 * 2, dtype=torch.uint8)
    tiles = to_tiles(stream, KEEP, 3, 5)
    assert len(tiles) == tiled_bytes(KEEP, 3, 5) == 64
    assert torch.equal(to_plain(tiles, KEEP, 3, 5), stream)


@pytest.mark.parametrize("format", [Format(3, 64), Format(2, 0, metadata="compact6"), KEEP])
def test_tiles_of_another_length_are_refused(format):
    size = int(tiled_bytes(format, 70, 40))
    for wrong in (size - 1, size + 64):
        with pytest.raises(FileError) as error:
            to_plain(torch.zeros(wrong, dtype=torch.uint8), format, 70, 40)
        assert str(error.value) == (f"tiled unit 70x40 {format.name}: {wrong} bytes, not {size}")


def test_a_kept_matrix_of_another_length_is_refused():
    with pytest.raises(FileError, match="packed unit 3x5 keep-bf16: 31 bytes, not 30"):
        to_tiles(torch.zeros(31, dtype=torch.uint8), KEEP, 3, 5)


def test_tiles_may_lie_anywhere_in_a_buffer():
    format = Format(5, 32)
    tiles = encode_tiles(random_unit(format, 9, 50, 0))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), tiles])[1:]  # odd address
    assert torch.equal(
        decode_tiles(shifted, format, 9, 50).dequantize(),
        decode_tiles(tiles, format, 9, 50).dequantize(),
    )


@pytest.mark.parametrize("format", formats(range(1, 9), (32, 64), (False, True)))
@pytest.mark.parametrize(("rows", "cols"), [(2048, 1408), (768, 2048), (2880, 2880)])
def test_models_of_usual_shapes_pay_nothing_for_tiles(format, rows, cols):
    assert tiled_bytes(format, rows, cols) == format.nbytes(rows, cols)


def test_what_compact_metadata_takes_in_tiles():
    # 2 groups of 64 rows: a byte holds 8 or 6 bits of share, and 6 + 2 bits of share and zero.
    codes = {bits: 64 * 128 * bits // 8 for bits in (2, 3)}
    for name, words in (
        ("int3-g64-sym-compact", 1),
        ("int3-g64-sym-compact6", 1),
        ("int2-g64-asym-compact6", 1),
        ("int3-g64-asym-compact6", 2),
        ("int3-g64-asym-compact", 2),
    ):
        format = Format.parse(name)
        expected = codes[format.bits] + 64 * 2 * words + 64 * 2
        assert tiled_bytes(format, 64, 128) == expected


def test_sizes_of_many_matrices_at_once():
    found = tiled_bytes(Format(3, 64), np.array([[64], [65]]), np.array([32, 33, 32]))
    assert found.dtype == np.int64
    one = [int(tiled_bytes(Format(3, 64), r, c)) for r in (64, 65) for c in (32, 33, 32)]
    assert found.ravel().tolist() == one
    with pytest.raises(InputError, match="a made-up format has no bytes"):
        tiled_bytes(Format.made_up(0), 64, 32)


@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (70, 130), (65, 1)])
def test_one_table_holds_every_format_side_by_side(rows, cols):
    options = EVERY[::3]
    units = [random_unit(f, rows, cols, i) for i, f in enumerate(options)]
    kept = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    stack = [encode_tiles(unit) for unit in units]
    stack.append(to_tiles(kept.view(torch.uint8).view(-1), KEEP, rows, cols))
    table = experts_table(torch.cat(stack), (*options, KEEP), rows, cols)
    assert len(table) == len(options) + 1
    assert [table.buffer.dtype, table.bits.dtype, table.codes_at.dtype] == [
        torch.int32,
        torch.int32,
        torch.int64,
    ]
    weights = dequantize_tiles(table)
    assert weights.shape == (len(table), rows, cols)
    for found, unit in zip(weights, units, strict=False):
        assert torch.equal(found, unit.dequantize())  # to the last bit
    assert torch.equal(weights[-1], kept.float())


def test_a_table_reads_the_stack_where_it_lies():
    stack = encode_tiles(random_unit(Format(4, 32), 64, 64, 0))
    table = experts_table(stack, [Format(4, 32)], 64, 64)
    assert table.buffer.data_ptr() == stack.data_ptr()


def test_a_table_that_cannot_be():
    stack = encode_tiles(random_unit(Format(4, 32), 64, 64, 0))
    with pytest.raises(InputError, match=r"experts 2 x 64x64: 2560 bytes, not 5120; pass a stack"):
        experts_table(stack, [Format(4, 32)] * 2, 64, 64)
    with pytest.raises(InputError, match="kept in fp8: kernels read only one of bf16, fp16, fp32"):
        experts_table(stack, [Format.keep("fp8")], 64, 64)


def test_rounding_meets_both_layouts():
    x = torch.randn(100, 96, generator=torch.Generator().manual_seed(0))
    for format in formats((2, 4), (32,), (False, True), METADATA):
        unit = quantize(x, format)
        assert torch.equal(to_plain(encode_tiles(unit), format, 100, 96), encode(unit))
