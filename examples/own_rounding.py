"""Write your own way of rounding: from weights to codes and a grid.

Run it with `python examples/own_rounding.py`. It reads a bundled model and takes seconds.

A way of rounding gets equally shaped matrices and a format. It returns codes, and for each group
of weights the scale and the zero point that read them back. The guide is the docstring of
`bitknap.quantization.rounding.rounding`.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

import bitknap
from bitknap.quantization.rounding.grid import Grid, Quantized
from bitknap.quantization.rounding.magnitude import in_range
from bitknap.quantization.rounding.rounding import Inputs


class MinMax:
    """Each group's grid spans its least and its largest weight; no search, no inputs."""

    name = "min-max"
    needs_inputs = False

    def quantize(
        self,
        weights: Tensor,
        format: bitknap.Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""
        # `in_range` brings each matrix to a magnitude whose scales fp16 can hold.
        return in_range(weights, lambda some: _rounded(some.flatten(0, 1), format), exponents)


def _rounded(rows: Tensor, format: bitknap.Format) -> Quantized:
    """Round rows [R, cols], all of ordinary magnitude."""
    cols = rows.shape[1]
    size = min(format.group_size or cols, cols)
    if cols % size:
        raise bitknap.BitknapError(f"min-max: {cols} columns are not in groups of {size}")
    groups = rows.float().unflatten(1, (-1, size))  # [R, G, size]
    levels = 2**format.bits - 1
    if format.symmetric:
        scale, zero = 2 * groups.abs().amax(2) / levels, torch.zeros(groups.shape[:2])
    else:
        # An integer zero point needs a range that 0 is in.
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = (high - low) / levels
        zero = -low / scale.clamp_min(1e-8)
    # Scales and zeros are rounded as they are stored; then the codes are chosen on that grid.
    grid = Grid.stored(format, cols, scale.clamp_min(1e-8), zero)
    return Quantized(grid=grid, codes=grid.codes(rows.float()))


def main() -> dict[str, float]:
    """Compare with rounding to nearest that searches, and write a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 64, 256, generator=generator)
    format = bitknap.formats(bits=3, group_size=64)[0]
    errors = {}
    for way in (MinMax(), bitknap.Rtn()):
        rounded = way.quantize(weights, format).dequantize().view_as(weights)
        errors[way.name] = float((rounded - weights).square().mean())
        print(f"{way.name}: mean squared error {errors[way.name]:.5f}")

    # A plan says which method it is made for, in its table's provenance.
    table = bitknap.estimate(
        "reference:mixtral", estimator=bitknap.DataFree(), formats=bitknap.formats(bits=(3, 4))
    )
    plan = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(4))).plan
    with tempfile.TemporaryDirectory() as folder:
        # `force`, since the costs of `DataFree` are those of rounding to nearest.
        sizes = bitknap.quantize(
            "reference:mixtral",
            plan,
            Path(folder) / "out",
            packing=bitknap.Packing(rounding=MinMax(), force=True),
        )
    print(f"packed by {sizes['method']}: {sizes['written']:,} bytes")
    return errors


if __name__ == "__main__":
    main()
