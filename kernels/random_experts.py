"""Random experts of any kinds, so that the tuner, benchmarks and tests need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.kernels.experts import Activation, Experts
from bitknap.kernels.experts_table import ExpertsTable
from bitknap.kernels.layout.exponents import with_exponent
from bitknap.kernels.layout.scale_words import ALIGNMENT, Recipe, pack_words, tiled_rows
from bitknap.kernels.layout.tiled_codes import pack_tiles, padded, tile_bytes

_EXPONENT = -8  # exponent of matrices that have one


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The structure of a layer of random experts beyond its up projections.

    Attributes:
        gate: recipes of gate projections; those of up projections if None.
        down: recipes of down projections; those of up projections if None.
        activation: the function between gate and down.
        gated: whether there is a gate.
        biased: whether all projections have biases.
        kept: dtype of experts in source precision, and of biases.
        blocks: number of row blocks in each matrix.
    """

    gate: Sequence[Recipe] | None = None
    down: Sequence[Recipe] | None = None
    activation: Activation = "silu"
    gated: bool = True
    biased: bool = False
    kept: torch.dtype = torch.bfloat16
    blocks: int = 1


def made_up_experts(
    recipes: Sequence[Recipe],
    hidden: int,
    intermediate: int,
    structure: Structure | None = None,
    *,
    device: str = "cpu",
    seed: int | None = 0,
) -> Experts:
    """Return experts with random weights of about 1 / √inputs, the same for the same seed.

    Args:
        recipes: recipes of up projections, one per row block. Groups longer than a row, and the
            bytes of kept matrices, are adjusted for each projection.
        hidden: H.
        intermediate: I.
        structure: the rest of the layer; gated, without biases, if None.
        device: device of the result.
        seed: random seed; None makes all-zero weights, which is fast, for compiling.
    """
    how = structure or Structure()
    random = None if seed is None else torch.Generator().manual_seed(seed)

    def table(which: Sequence[Recipe], rows: int, cols: int) -> ExpertsTable:
        return made_up_table(which, rows, cols, random, how.kept, device, how.blocks)

    def bias(rows: int) -> Tensor | None:
        shape = len(recipes) // how.blocks, rows
        if not how.biased:
            return None
        if random is None:
            return torch.zeros(shape, dtype=how.kept, device=device)
        return torch.randn(shape, generator=random).to(device, how.kept)

    return Experts(
        gate=table(how.gate or recipes, intermediate, hidden) if how.gated else None,
        up=table(recipes, intermediate, hidden),
        down=table(how.down or recipes, hidden, intermediate),
        activation=how.activation,
        gate_bias=bias(intermediate) if how.gated else None,
        up_bias=bias(intermediate),
        down_bias=bias(hidden),
    )


def made_up_table(
    recipes: Sequence[Recipe],
    rows: int,
    cols: int,
    random: torch.Generator | None,
    kept: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    blocks: int = 1,
) -> ExpertsTable:
    """Return the table of random or zero experts [rows, cols], in row blocks."""
    long = rows // blocks
    fitting = [_fitting(recipe, long, cols, kept) for recipe in recipes]
    if random is None:
        size = sum(sum(recipe.part_bytes(long, cols)) for recipe in fitting)
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        return ExpertsTable.of(buffer, fitting, rows, cols, kept, blocks)
    streams = [
        _kept(recipe, long, cols, random, kept)
        if recipe.kept
        else _coded(recipe, long, cols, random)
        for recipe in fitting
    ]
    return ExpertsTable.of(torch.cat(streams).to(device), fitting, rows, cols, kept, blocks)


def _fitting(recipe: Recipe, rows: int, cols: int, kept: torch.dtype) -> Recipe:
    size = kept.itemsize
    return Recipe(
        bits=8 * size if recipe.kept else recipe.bits,
        group=min(recipe.group, cols),
        share=recipe.share,
        symmetric=recipe.symmetric,
        kept=size * rows * cols if recipe.kept else 0,
        scaled=recipe.scaled,
    )


def _coded(recipe: Recipe, rows: int, cols: int, random: torch.Generator) -> Tensor:
    groups, levels = -(-cols // recipe.group), 2**recipe.bits - 1
    # Uniform weights in ± √(3 / cols) have a standard deviation of 1 / √cols.
    step = 2 * (3 / cols) ** 0.5 / levels
    steps = (torch.rand(rows, groups, generator=random) + 0.5) * step
    middle = torch.rand(rows, groups, generator=random) * levels / 4 + levels * 3 / 8
    parts = [_tiles(recipe.bits, rows, cols, random)]
    exponent = _EXPONENT if recipe.scaled else 0
    steps *= 2.0**-exponent
    if recipe.share:
        scale = steps.amax(1, keepdim=True).half()
        most = 2**recipe.share - 1
        shares = (steps / scale.float() * most).round().clamp(1, most).to(torch.uint8)
        zeros = None if recipe.symmetric else middle.round().to(torch.uint8)
        parts += [pack_words(shares, zeros, recipe), tiled_rows(with_exponent(scale, exponent))]
    else:
        offsets = None if recipe.symmetric else (-steps * middle).half()
        parts.append(pack_words(with_exponent(steps.half(), exponent), offsets, recipe))
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def _tiles(bits: int, rows: int, cols: int, random: torch.Generator) -> Tensor:
    """Return random tiles: any bits are valid codes; those past the last column or row are 0."""
    height, width = padded(rows, cols)
    if (height, width) == (rows, cols):
        size = (tile_bytes(rows, cols, bits) // 2,)
        tiles = torch.randint(-(2**15), 2**15, size, generator=random)
        return tiles.to(torch.int16)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=random)
    return pack_tiles(codes.to(torch.uint8), bits)


def _kept(
    recipe: Recipe, rows: int, cols: int, random: torch.Generator, kept: torch.dtype
) -> Tensor:
    weights = (torch.randn(rows, cols, generator=random) / cols**0.5).to(kept)
    stream = weights.view(-1).view(torch.uint8)
    return torch.nn.functional.pad(stream, (0, -len(stream) % ALIGNMENT))
