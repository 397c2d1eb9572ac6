"""Matrices of any magnitude lose what ordinary ones lose, in the same bytes, in every layout."""

import pytest
import torch

from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.kernels.experts_table import dequantize_tiles
from bitknap.quantization.packed.dequantize import dequantize_into, unpacked
from bitknap.quantization.packed.plain_bytes import decode, encode
from bitknap.quantization.packed.tiled_bytes import encode_tiles, experts_table, to_plain, to_tiles
from bitknap.quantization.rounding.magnitude import exponents_of, in_range, peaks
from bitknap.quantization.rounding.methods import Gptq, Hqq, Rtn, round_trip
from bitknap.quantization.rounding.rounding import Inputs

GRIDS = [
    "int1-row-sym",
    "int2-g32-asym",
    "int3-g32-sym-compact6",
    "int4-row-asym-compact",
    "int8-g32-asym",
    "int8-g32-sym",
    "int8-g32-asym-compact",
]
ROWS, COLS = 24, 96
WAYS = [Rtn(), Hqq(), Gptq()]


def gauss(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture(scope="module")
def inputs():
    x = torch.randn(400, COLS, generator=torch.Generator().manual_seed(1))
    return Inputs(moments=(x.T @ x / 400)[None], tokens=torch.tensor([400]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("name", GRIDS)
def test_a_power_of_two_changes_nothing_but_itself(name, way, inputs):
    format, x = Format.parse(name), gauss(1, ROWS, COLS)
    # The largest is that of an exponent: all magnitudes beyond are brought to the same numbers.
    found = [way.quantize(x * 2.0**k, format, inputs) for k in (-96, -40, 24, 64, 112)]
    first = found[0]
    for quantized, k in zip(found[1:], (-40, 24, 64, 112), strict=True):
        assert torch.equal(quantized.codes, first.codes)
        scaled = first.dequantize().double() * 2.0 ** (k + 96)
        assert torch.equal(quantized.dequantize().double(), scaled)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-9, 1e-3, 1e7, 1e12, 1e20, 1e30])
def test_any_magnitude_loses_what_ordinary_weights_lose(size, way, inputs):
    x = gauss(1, ROWS, COLS)
    large = (x.double() * size).float()
    for name in GRIDS:
        format = Format.parse(name)
        plain, found = (way.quantize(w, format, inputs).dequantize() for w in (x, large))
        lost = [
            float((a.double() - b[0].double()).norm() / b.double().norm())
            for a, b in ((plain, x), (found, large))
        ]
        assert lost[1] == pytest.approx(lost[0], rel=0.03)


def test_ordinary_matrices_have_no_exponent():
    largest = torch.tensor([0, 2.0**-8, 0.02, 1, 100, 2.0**15, 2.0**-9, 2.0**16, 3.4e38, 1e-45])
    found = exponents_of(largest)
    assert found[:6].tolist() == [0] * 6
    assert (found[6:] % 8 == 0).all() and found[6:].ne(0).all()
    x = gauss(3, ROWS, COLS)
    for name in GRIDS:
        quantized = Rtn().quantize(x, Format.parse(name))
        assert quantized.grid.exponent is None
        assert not encode(quantized.rows(0, ROWS)).equal(encode(quantized.rows(ROWS, 2 * ROWS)))
    assert peaks(x).tolist() == x.abs().amax((1, 2)).tolist()


@pytest.mark.parametrize("name", GRIDS)
def test_bytes_hold_the_exponent_and_are_not_one_more(name):
    format = Format.parse(name)
    stack = gauss(4, ROWS, COLS) * torch.tensor([1e7, 1, 1, 1e-9])[:, None, None]
    quantized = Rtn().quantize(stack, format)
    units = [quantized.rows(at, at + ROWS) for at in range(0, 4 * ROWS, ROWS)]
    plain = [encode(unit) for unit in units]
    for unit, stream in zip(units, plain, strict=True):
        assert len(stream) == format.nbytes(ROWS, COLS)
        expected = unit.dequantize()
        assert torch.equal(decode(stream, format, ROWS, COLS).dequantize(), expected)
        tiles = encode_tiles(unit)
        assert torch.equal(to_tiles(stream, format, ROWS, COLS), tiles)
        assert torch.equal(to_plain(tiles, format, ROWS, COLS), stream)
        assert torch.equal(unpacked(stream, format, ROWS, COLS), expected)
        assert torch.equal(unpacked(tiles, format, ROWS, COLS, "tiles"), expected)
    table = experts_table(torch.cat([encode_tiles(u) for u in units]), [format] * 4, ROWS, COLS)
    assert [r.scaled for r in table.recipes] == [True, False, False, True]
    assert torch.equal(dequantize_tiles(table), quantized.dequantize().view(4, ROWS, COLS))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("largest", [3.4028235e38, 3e38, 1e-38, 1e-45, 0.0])
def test_the_ends_of_float32_stay_finite(name, largest):
    format, x = Format.parse(name), gauss(1, ROWS, COLS)
    weights = (x / x.abs().max()).double().mul(largest).float()
    for way in (Rtn(), Hqq()):
        found = way.quantize(weights, format).dequantize()
        assert torch.isfinite(found).all()
        assert torch.isfinite(found.bfloat16()).all()
        if format.bits == 8 and largest > 1:
            assert (found - weights[0]).double().norm() < 0.02 * weights.double().norm()
        if largest < 1:
            assert found.abs().max() <= 3 * largest + (1e-43 if largest else 1e-7)


@pytest.mark.parametrize("name", ["int8-g32-asym", "int8-g32-sym", "int4-g32-asym-compact"])
@pytest.mark.parametrize("part", [(slice(0, 8), slice(None)), (slice(None), slice(0, 32))])
def test_a_part_of_a_matrix_may_be_far_larger(name, part):
    weights = gauss(1, ROWS, COLS)
    weights[0][part] *= 1e7
    found = round_trip(weights, Format.parse(name))
    assert torch.isfinite(found).all()
    bits = Format.parse(name).bits
    assert (found - weights).norm() < 3 * 2.0**-bits * weights.norm()
    if not Format.parse(name).compact:  # groups have scales of their own
        small = torch.ones(ROWS, COLS, dtype=torch.bool)
        small[part] = False
        assert (found - weights)[0][small].norm() < 0.05 * weights[0][small].norm()


def test_rows_of_a_larger_matrix_take_its_exponent():
    weights, format = gauss(1, ROWS, COLS), Format.parse("int4-g32-asym")
    weights[0, :8] *= 1e7
    exponents = exponents_of(peaks(weights))
    whole = Rtn().quantize(weights, format)
    parts = [Rtn().quantize(w, format, None, exponents) for w in weights.split(8, dim=1)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    # By itself the last block is ordinary.
    assert in_range(weights[:, 16:], lambda w: Rtn().quantize(w, format)).grid.exponent is None


def test_too_few_rows_for_an_exponent_are_said():
    quantized = Rtn().quantize(gauss(1, 3, COLS) * 1e9, Format.parse("int4-row-sym"))
    assert torch.isfinite(quantized.dequantize()).all()
    with pytest.raises(InputError, match="a matrix of 3 rows cannot store"):
        encode(quantized)


def test_float16_is_never_left():
    weights = torch.full((1, 8, 32), 65504.0)
    weights[0, :, ::2] = 60000
    format = Format.parse("int2-g32-sym")
    stream = encode(Rtn().quantize(weights, format))
    out = torch.empty(8, 32, dtype=torch.float16)
    dequantize_into(out, stream, format)
    assert torch.isfinite(out).all()
