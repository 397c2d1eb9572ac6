"""Rounding with a memory: the same codes as without, each matrix rounded once."""

import pytest
import torch

from bitknap.allocation import Format
from bitknap.quantization.rounding.memo import Remembered
from bitknap.quantization.rounding.methods import RTN, Gptq
from bitknap.quantization.rounding.rounding import Inputs


class Counting:
    name, needs_inputs = "counting", False

    def __init__(self):
        self.matrices = 0

    def quantize(self, weights, format, inputs=None, exponents=None):
        self.matrices += len(weights)
        return RTN.quantize(weights, format)


def codes(rounded):
    return rounded.codes


@pytest.fixture
def weights():
    return torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["int3-row-sym", "int4-g8-asym-compact", "int2-g8-asym"])
def test_same_codes_whatever_the_company(weights, name):
    format, rounding = Format.parse(name), Remembered(rounding=RTN)
    rounding.quantize(weights[1:3], format)
    for some in (weights, weights[[3, 0]], weights[2:3]):
        ours, plain = rounding.quantize(some, format), RTN.quantize(some, format)
        assert torch.equal(codes(ours), codes(plain))
        assert torch.equal(ours.dequantize(), plain.dequantize())


def test_every_matrix_is_rounded_once(weights):
    counting = Counting()
    rounding, format = Remembered(rounding=counting), Format.parse("int3-row-sym")
    rounding.quantize(weights[:2], format)
    rounding.quantize(weights, format)
    rounding.quantize(weights, format)
    assert counting.matrices == 4
    rounding.quantize(weights, Format.parse("int2-row-sym"))
    rounding.quantize(weights + 1, format)
    assert counting.matrices == 12


def test_beyond_the_limit_nothing_new_is_kept(weights):
    counting = Counting()
    rounding, format = Remembered(rounding=counting, limit=600), Format.parse("int3-row-sym")
    rounding.quantize(weights[:1], format)
    for _ in range(2):
        assert torch.equal(
            codes(rounding.quantize(weights, format)), codes(RTN.quantize(weights, format))
        )
    assert counting.matrices == 1 + 3 + 3


def test_inputs_are_part_of_what_is_looked_up(weights):
    format, rounding = Format.parse("int2-row-sym"), Remembered(rounding=Gptq())
    draw = torch.randn(2, 4, 64, 32, generator=torch.Generator().manual_seed(1))
    one, other = (
        Inputs(moments=x.mT @ x / 64, tokens=torch.full((4,), 64)) for x in draw.unbind(0)
    )
    first = rounding.quantize(weights, format, one)
    assert not torch.equal(codes(first), codes(rounding.quantize(weights, format, other)))
    assert torch.equal(codes(first), codes(rounding.quantize(weights, format, one)))
    assert (rounding.name, rounding.needs_inputs) == ("gptq", True)
