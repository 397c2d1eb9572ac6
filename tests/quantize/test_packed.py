"""One unit's bytes: exactly as many as the format says, and read back bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Format, formats
from bitknap.errors import FileError
from bitknap.quantize.packed import decode, encode
from bitknap.quantize.rtn import quantize

EVERY = formats(range(1, 9), (8, 16, 64, "row"), (False, True), ("fp16", "compact"))


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
