"""Symmetric grids with a code for zero."""

from typing import Any

import pytest
import torch

from bitknap.allocation import Format
from bitknap.errors import InputError
from bitknap.quantization.rounding.methods import RTN, method

MIDTREAD = method("midtread")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 32, 40])
def test_values_are_whole_steps_around_zero(bits, group):
    weights = drawn(2, 8, 80)
    rounded: Any = MIDTREAD.quantize(weights, Format(bits, group, symmetric=True))
    scale = rounded.grid.scale.float()
    assert (scale > 0).all()
    assert int(rounded.codes.max()) < 2**bits
    size = group or 80
    steps = scale.repeat_interleave(size, dim=1)[:, :80]
    known = (rounded.codes.float() - 2 ** (bits - 1)) * steps
    assert torch.equal(rounded.dequantize(), known)


@pytest.mark.parametrize("bits", range(2, 9))
def test_it_loses_little_more_than_grids_without_a_code_for_zero(bits):
    weights, format = drawn(4, 64, 256), Format(bits, 64, symmetric=True)
    loss, other = (
        float((way.quantize(weights, format).dequantize().view_as(weights) - weights).norm())
        for way in (MIDTREAD, RTN)
    )
    assert loss < (1.15 if bits == 2 else 1.05) * other


def test_every_row_is_rounded_by_itself_and_zeros_stay():
    weights, format = drawn(1, 16, 64), Format(3, 32, symmetric=True)
    weights[0, 3] = 0
    whole = MIDTREAD.quantize(weights, format).dequantize()
    parts = [MIDTREAD.quantize(row, format).dequantize() for row in weights.split(4, dim=1)]
    assert torch.equal(whole, torch.cat(parts))
    assert not whole[3].any()


def test_small_matrices_keep_their_magnitude():
    weights, format = drawn(1, 8, 64) * 2.0**-30, Format(4, 32, symmetric=True)
    rounded = MIDTREAD.quantize(weights, format).dequantize().view_as(weights)
    assert (rounded - weights).norm() < 0.15 * weights.norm()


@pytest.mark.parametrize(
    "format",
    [
        Format(4, 32),
        Format(1, 32, symmetric=True),
        Format(4, 32, symmetric=True, metadata="compact"),
    ],
)
def test_other_grids_are_refused(format):
    with pytest.raises(InputError, match="not a symmetric grid of 2 to 8 bits with fp16 scales"):
        MIDTREAD.quantize(drawn(1, 8, 64), format)
