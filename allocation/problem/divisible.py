"""Forbid formats that a runtime cannot run because groups do not divide the rows of a matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError

# Matrices that tensor parallelism splits along input features; it splits others along outputs.
_SPLIT_INPUTS = frozenset({"down", "down_proj", "w2", "wo", "o", "o_proj", "out_proj"})


def divisible(table: CostTable, tensor_parallel: int = 1, multiple_of: int = 1) -> CostTable:
    """Return a table that forbids the formats whose group size does not divide the rows.

    Bitknap's own kernels take short last groups; others refuse them (vLLM's Marlin kernels, most
    runtimes under tensor parallelism) or fall back to another format in silence (llama.cpp's
    k-quants). Rows of 1408 split over two devices are 704 long: groups of 128 fail there, groups of
    64 work. Formats with one scale per row and kept formats need no groups.

    Args:
        table: units with shapes.
        tensor_parallel: devices that share each matrix: down and output projections are split
            along their inputs, all others along their outputs.
        multiple_of: every row length must be a multiple of this for any quantized format; 256 for
            llama.cpp's k-quants.

    Raises:
        InputError: shapes are unknown, a matrix cannot be split, or a unit is left without a
            format.
    """
    for name, value in {"tensor_parallel": tensor_parallel, "multiple_of": multiple_of}.items():
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    units = table.units
    if not units.has_shapes:
        raise InputError("divisible: the units have no shapes; give units with rows and cols")
    by_input = np.array([name in _SPLIT_INPUTS for name in units.projections])[units.projection]
    split = np.where(by_input, units.cols, units.rows)
    uneven: Bools = split % tensor_parallel != 0
    _refuse(table, uneven, f"{tensor_parallel} devices do not divide it")
    cols = np.where(by_input, units.cols // tensor_parallel, units.cols)
    grid = np.array([item.kind == "grid" for item in table.formats])
    groups = np.array(
        [max(item.group_size, 1) if item.kind == "grid" else 1 for item in table.formats]
    )
    wrong = (cols[:, None] % groups != 0) | (grid & (cols % multiple_of != 0)[:, None])
    cost = np.where(wrong, np.inf, table.cost)
    stuck: Bools = np.asarray(np.isinf(cost).all(axis=1) & np.isfinite(table.cost).any(axis=1))
    _refuse(table, stuck, "no group size left divides it; add a smaller one, or row")
    return replace(table, cost=cost)


def _refuse(table: CostTable, wrong: Bools, why: str) -> None:
    if wrong.any():
        unit = int(wrong.argmax())
        shape = f"{table.units.rows[unit]} x {table.units.cols[unit]}"
        raise InputError(f"divisible: {table.units.label(unit)} is {shape}, {why}")
