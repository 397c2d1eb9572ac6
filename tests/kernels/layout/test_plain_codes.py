"""The dense stream of bits: nothing lost, nothing wasted, and the order that the docstring says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.kernels.layout.plain_codes import pack_bits, packed_bytes, unpack_bits


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    return bits, torch.tensor(values, dtype=torch.uint8)


@pytest.mark.slow
@settings(deadline=None)
@given(codes())
def test_packing_round_trips(case):
    bits, values = case
    stream = pack_bits(values, bits)
    assert stream.dtype == torch.uint8
    assert len(stream) == packed_bytes(len(values), bits)
    back = unpack_bits(stream, bits, len(values))
    assert back.dtype == torch.uint8
    assert torch.equal(back, values)


@settings(deadline=None)
@given(codes())
def test_value_i_is_at_bit_i_times_b_low_bits_first(case):
    bits, values = case
    number = sum(int(v) << (i * bits) for i, v in enumerate(values.tolist()))
    expected = number.to_bytes(packed_bytes(len(values), bits), "little")
    assert bytes(pack_bits(values, bits).tolist()) == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_extremes_round_trip(bits):
    for value in (0, 2**bits - 1):
        values = torch.full((3, 11), value, dtype=torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(values, bits), bits, 33), values.view(-1))


def test_an_example_by_hand():
    # 5, 1, 6, 7 in 3 bits: 101, 001, 110, 111 from the low end is 0b111_110_001_101 = 0xF8D.
    assert pack_bits(torch.tensor([5, 1, 6, 7]), 3).tolist() == [0x8D, 0x0F]
    assert unpack_bits(torch.tensor([0x8D, 0x0F], dtype=torch.uint8), 3, 4).tolist() == [5, 1, 6, 7]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_bytes_are_bits_rounded_up(values, bits):
    assert 0 <= 8 * packed_bytes(values, bits) - values * bits < 8


def test_a_matrix_is_one_stream_without_padding_of_rows():
    values = torch.arange(21).view(3, 7) % 8
    assert len(pack_bits(values, 3)) == 8  # 63 bits
    assert torch.equal(pack_bits(values, 3), pack_bits(values.reshape(-1), 3))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_more_than_one_chunk(bits):
    random = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**bits, ((1 << 18) + 21,), generator=random).to(torch.uint8)
    stream = pack_bits(values, bits)
    assert torch.equal(unpack_bits(stream, bits, len(values)), values)
    assert torch.equal(stream[-bits:], pack_bits(values[-13:], bits)[-bits:])


def test_codes_and_streams_may_lie_anywhere():
    values = torch.arange(48, dtype=torch.uint8) % 8
    shifted = torch.cat([values[:3], values])[3:]
    assert torch.equal(pack_bits(shifted, 3), pack_bits(values, 3))
    assert torch.equal(pack_bits(values.view(6, 8).T, 3), pack_bits(values.view(6, 8).T.clone(), 3))
    doubled = pack_bits(values, 3).repeat_interleave(2)[::2]
    assert torch.equal(unpack_bits(doubled, 3, 48), values)
