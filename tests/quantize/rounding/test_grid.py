"""Grids as GPTQ's files keep them: an fp16 scale and an integer zero a group."""

from typing import Any

import pytest
import torch

from bitknap.allocation import Format
from bitknap.quantization.rounding.methods import method
from bitknap.quantization.rounding.rounding import Inputs


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_whole_steps_from_an_integer_zero(name, symmetric):
    weights = drawn(2, 8, 64)
    x = drawn(2, 96, 64)
    inputs = Inputs(moments=x.mT @ x / 96, tokens=torch.tensor([96, 96]))
    for bits in (2, 3, 4, 8):
        format = Format(bits, 32, symmetric=symmetric, metadata="gptq")
        rounded: Any = method(name).quantize(weights, format, inputs)
        zero = torch.full((16, 2), 2 ** (bits - 1)) if symmetric else rounded.grid.zero
        assert zero.shape == (16, 2)
        assert not zero.dtype.is_floating_point
        steps, zeros = (
            part.float().repeat_interleave(32, dim=1) for part in (rounded.grid.scale, zero)
        )
        assert torch.equal(rounded.dequantize(), (rounded.codes - zeros) * steps)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_they_lose_what_such_grids_must(bits):
    weights, rtn = drawn(1, 64, 256), method("rtn")

    def loss(**how):
        rounded = rtn.quantize(weights, Format(bits, 64, **how)).dequantize()
        return float((rounded - weights[0]).square().sum())

    asymmetric, symmetric = (loss(symmetric=even, metadata="gptq") for even in (False, True))
    assert loss() < asymmetric < symmetric  # real zeros; integers; the middle
    midtread = method("midtread").quantize(weights, Format(bits, 64, symmetric=True))
    best = float((midtread.dequantize() - weights[0]).square().sum())
    assert symmetric < 1.03 * best


def test_zero_rows_stay():
    weights = torch.zeros(1, 4, 64)
    for symmetric in (True, False):
        format = Format(3, 32, symmetric=symmetric, metadata="gptq")
        assert not method("rtn").quantize(weights, format).dequantize().any()
