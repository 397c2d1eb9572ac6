"""A part of a unit's bytes stands for exactly that part of its matrix."""

import pytest
import torch

from bitknap.allocation import Format
from bitknap.errors import InputError
from bitknap.kernels.experts_table import expert_weights
from bitknap.quantization.packed.dequantize import unpacked
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.tiled_bytes import experts_table, to_tiles
from bitknap.quantization.rounding.magnitude import in_range
from bitknap.quantization.rounding.rtn import quantize
from bitknap.quantization.vllm.unit_parts import tiles_of_part

ROWS, COLS = 24, 96
NAMES = (
    *("int3-g32-sym", "int2-g32-asym", "int4-g32-asym-compact", "int5-g32-sym-compact6"),
    *("int1-row-asym", "int8-row-sym-compact", "int4-g256-sym", "keep-bf16", "keep-fp32"),
)


def stored(name, seed=0, factor=1.0):
    """Return a random matrix's format, and its bytes in the plain layout."""
    format = Format.parse(name)
    matrix = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * factor
    if format.kind == "keep":
        kept = matrix.to(torch.bfloat16 if format.source == "bf16" else torch.float32)
        return format, kept.view(torch.uint8).reshape(-1)
    return format, encode(in_range(matrix[None], lambda some: quantize(some[0], format)))


def weights(tiles, format, rows, cols):
    """Return the matrix that a kernel reads from bytes in tiles."""
    return expert_weights(experts_table(tiles, [format], rows, cols), 0)


@pytest.mark.parametrize("layout", ["plain", "tiles"])
@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_that_part_of_the_matrix(name, layout):
    format, plain = stored(name)
    stream = plain if layout == "plain" else to_tiles(plain, format, ROWS, COLS)
    whole = unpacked(plain, format, ROWS, COLS)
    step = 32 if format.group_size == 32 else 8
    parts = [(range(ROWS), range(COLS)), (range(8, 20), range(COLS))]
    if format.group_size != 256:
        parts += [(range(ROWS), range(step, 3 * step)), (range(6, 12), range(step, 2 * step))]
    for rows, cols in parts:
        tiles = tiles_of_part(stream, format, (ROWS, COLS), (rows, cols), layout)
        found = weights(tiles, format, len(rows), len(cols))
        expected = whole[rows.start : rows.stop, cols.start : cols.stop]
        assert torch.equal(found, expected), (rows, cols)


def test_a_part_keeps_the_power_of_two_of_its_matrix():
    format, plain = stored("int4-g32-sym", factor=2.0**40)
    whole = unpacked(plain, format, ROWS, COLS)
    assert whole.abs().max() > 2.0**39
    cut = (range(6, 24), range(32, 64))
    tiles = tiles_of_part(plain, format, (ROWS, COLS), cut, "plain")
    assert torch.equal(unpacked(tiles, format, 18, 32, "tiles"), whole[6:, 32:64])


@pytest.mark.parametrize(("start", "stop", "at"), [(16, 64, 16), (0, 48, 48), (32, 80, 80)])
def test_a_part_ends_where_groups_do(start, stop, at):
    format, plain = stored("int3-g32-sym")
    with pytest.raises(InputError, match=f"column {at} is inside a group of 32"):
        tiles_of_part(plain, format, (ROWS, COLS), (range(ROWS), range(start, stop)), "plain")
