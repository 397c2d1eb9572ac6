"""One unit's bytes: exactly as many as the format says, and read back bit by bit."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Format, formats
from bitknap.errors import FileError
from bitknap.quantization.packed.plain_bytes import decode, encode
from bitknap.quantization.rounding.grid import Grid, Quantized
from bitknap.quantization.rounding.rtn import quantize

EVERY = formats(range(1, 9), (8, 16, 64, "row"), (False, True), ("fp16", "compact", "compact6"))
# SHA-256 of the bytes that version 1.0 of the files has for `known_unit`, first digits.
GOLDEN = {
    "int1-row-sym": "506c1479011fe64d",
    "int1-g32-asym": "8ef4ec3f586bd8e6",
    "int1-g32-sym-compact": "243d82b83e5e438b",
    "int2-g32-asym": "05512edc05658c0a",
    "int3-g32-sym": "6f5b7efaffa228d3",
    "int3-g32-asym-compact": "d70601341b2cc584",
    "int4-row-asym": "31269cc6392a05e0",
    "int5-g32-asym-compact": "0639a7cfa27d33e5",
    "int6-row-asym-compact": "1e47cabde4524164",
    "int7-g32-sym-compact": "879927dde107e303",
    "int8-g32-asym": "5a311b430e6fc8fa",
    "int2-g32-asym-compact6": "404e315542372619",
    "int3-g32-sym-compact6": "d41ddc2138154fb1",
    "int3-row-asym-compact6": "82f83c394556cea6",
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(EVERY), st.integers(1, 7), st.integers(1, 70), st.integers(0, 99))
def test_a_unit_round_trips_in_exactly_its_bytes(format, rows, cols, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    unit = quantize(x, format)
    stream = encode(unit)
    assert stream.dtype == torch.uint8
    assert len(stream) == format.nbytes(rows, cols)
    back = decode(stream, format, rows, cols)
    assert torch.equal(back.codes, unit.codes)
    assert torch.equal(back.dequantize(), unit.dequantize())
    assert torch.equal(encode(back), stream)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(EVERY), st.data())
def test_a_stream_of_another_length_is_refused(format, data):
    stream = encode(quantize(torch.ones(3, 20), format))
    cut = data.draw(st.integers(0, len(stream) - 1))
    for wrong in (stream[:cut], torch.cat([stream, stream[:1]])):
        with pytest.raises(FileError, match="bytes, not") as error:
            decode(wrong, format, 3, 20)
        assert "\n" not in str(error.value)


def test_the_order_of_the_parts_by_hand():
    # Levels ±1.5: codes 1, 0, 1, 1 from the low bit, then the scale 3 in fp16 (0x4200).
    x = torch.tensor([[1.5, -1.5, 1.5, 1.5]])
    assert encode(quantize(x, Format(1, 0, symmetric=True))).tolist() == [0b1101, 0x00, 0x42]


def test_a_unit_may_lie_anywhere_in_a_buffer():
    format = Format(3, 8)
    unit = quantize(torch.randn(3, 21, generator=torch.Generator().manual_seed(0)), format)
    stream = encode(unit)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), stream])[1:]  # odd address
    assert torch.equal(decode(shifted, format, 3, 21).dequantize(), unit.dequantize())


def known_unit(name):
    """Return codes and grids from a few sums and products, the same on any machine."""
    format, rows, cols = Format.parse(name), 5, 75
    groups = int(format.groups(cols))

    def numbers(step, below, *shape):
        count = shape[0] * shape[1]
        return (torch.arange(count) * step % 10007 % below).view(shape)

    scale = (numbers(17, 61, rows, 1 if format.compact else groups) + 1).half() / 64
    share = zero = None
    if format.compact and groups > 1:
        share = numbers(29, 2**format.share_bits - 1, rows, groups).to(torch.uint8) + 1
    if not format.symmetric and format.compact:
        zero = numbers(31, 2**format.bits, rows, groups).to(torch.uint8)
    elif not format.symmetric:
        zero = -numbers(37, 53, rows, groups).half() / 32
    grid = Grid(format=format, cols=cols, scale=scale, share=share, zero=zero)
    codes = numbers(7919, 2**format.bits, rows, cols).to(torch.uint8)
    return Quantized(grid=grid, codes=codes)


@pytest.mark.parametrize("name", GOLDEN)
def test_files_of_version_1_stay_what_they_are(name):
    unit = known_unit(name)
    stream = encode(unit)
    assert hashlib.sha256(bytes(stream.tolist())).hexdigest()[:16] == GOLDEN[name]
    assert torch.equal(decode(stream, unit.format, 5, 75).dequantize(), unit.dequantize())


def test_shares_of_6_bits_are_63rds_of_the_row_scale():
    format = Format(4, 8, symmetric=True, metadata="compact6")
    scale = torch.tensor([[0.5, 0.25, 0.001]])
    grid = Grid.stored(format, 24, scale, torch.zeros(1, 3))
    assert grid.scale.tolist() == [[0.5]]
    assert grid.share is not None
    assert grid.share.tolist() == [[63, 32, 1]]  # never 0: a group must keep a scale
    assert torch.allclose(grid.steps() * 63, torch.tensor([[63, 32, 1]]) * 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coarser_shares_cost_little(bits):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(0.5, 2, 4).repeat_interleave(64)
    fine, coarse = (
        quantize(x, Format(bits, symmetric=True, metadata=metadata)).dequantize() - x
        for metadata in ("compact", "compact6")
    )
    assert coarse.square().mean() < 1.005 * fine.square().mean()
