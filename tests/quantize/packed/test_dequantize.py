"""A few rows at a time give what the whole matrix does, to the bit."""

import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.quantization.packed.dequantize import dequantize_into, unpacked
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.tiled_bytes import to_tiles
from bitknap.quantization.rounding.rtn import quantize

# More rows than fit at once, and groups that do not divide a row.
ROWS, COLS = 331, 1000
FORMATS = formats(range(1, 9), (64,), (False,), ("fp16",))
OTHERS = formats((3, 4), (32, "row"), (False, True), ("fp16", "compact"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "tiles"])
@pytest.mark.parametrize("format", [*FORMATS, *OTHERS], ids=str)
def test_every_row(format, layout):
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(format.bits))
    unit = quantize(x, format)
    stream = encode(unit)
    if layout == "tiles":
        stream = to_tiles(stream, format, ROWS, COLS)
    expected = unit.dequantize()
    assert torch.equal(unpacked(stream, format, ROWS, COLS, layout), expected)
    # Rounded once to what is wanted, wherever that is.
    out = torch.zeros(COLS, 2 * ROWS, dtype=torch.bfloat16).T[::2]
    dequantize_into(out, stream, format, layout)
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize("layout", ["plain", "tiles"])
def test_streams_may_begin_at_any_byte(layout):
    format = Format(3, 64)
    unit = quantize(torch.randn(70, 100), format)
    stream = encode(unit)
    if layout == "tiles":
        stream = to_tiles(stream, format, 70, 100)
    shifted = torch.cat([stream[:3], stream])[3:]
    assert torch.equal(unpacked(shifted, format, 70, 100, layout), unit.dequantize())
