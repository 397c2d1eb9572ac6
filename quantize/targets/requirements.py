"""What a target requires of tables and plans: its formats, and ties between units."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitknap.allocation.plans.plan import CARRIED, BitPlan
from bitknap.allocation.problem.arrays import Bools, Floats, Ints, Longs
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.problem.table import CostTable, storage, widths
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitknap.allocation.problem.format import Format
    from bitknap.quantization.targets.target import Target

# Key of a table's provenance, and of a coarsened plan's header: the target it was made for.
TARGET = "target"


def check_plan(target: Target, plan: BitPlan) -> None:
    """Raise MismatchError unless a target can hold a plan; names the first unit and the ways out.

    Raises:
        MismatchError: the plan has row blocks, its costs are of another rounding, a format is not
            the target's, or units that must share a format do not.
    """
    check_blocks(target, plan.units)
    held = allowed(target, plan.units, plan.formats)[np.arange(len(plan.units)), plan.choice]
    if not held.all():
        unit = int(np.argmin(held))
        raise MismatchError(
            f"{target.name} cannot hold {plan.format_of(unit)} for {plan.units.label(unit)}; "
            f"{_ways_out(target, plan)}"
        )
    labels = profile(target.profile).labels(plan.units)
    first = np.unique(labels, return_index=True)[1][labels]
    apart = plan.choice != plan.choice[first]
    if apart.any():
        unit = int(np.argmax(apart))
        other = int(first[unit])
        raise MismatchError(
            f"{target.name} stores one format for {plan.units.label(other)} and "
            f"{plan.units.label(unit)}, the plan says {plan.format_of(other)} and "
            f"{plan.format_of(unit)}; {_ways_out(target, plan)}"
        )
    method = str(plan.header.get("method", "rtn"))
    if target.reads_weights and target.rounding not in ("", method):
        raise MismatchError(
            f"{target.name} rounds by {target.rounding}, the plan's costs are of rounding by "
            f"{method}; make a table with `target={target.name}`, or `coarsen` the plan"
        )


def check_blocks(target: Target, units: Units) -> None:
    """Raise MismatchError if units are row blocks of matrices and a target lacks those."""
    if units.block.any() and not target.cuts_rows:
        unit = int(np.argmax(units.block > 0))
        raise MismatchError(
            f"{target.name} stores one format a matrix, {units.label(unit)} is a part of one; make "
            "a table without `row_blocks`"
        )


def allowed(target: Target, units: Units, formats: Sequence[Format]) -> Bools:
    """Return which units a target can store in which formats, bool[U,F]."""
    sizes = np.stack([units.rows, units.cols])
    distinct, shape = np.unique(sizes, axis=1, return_inverse=True)
    held = np.stack([target.holds(one, *distinct) for one in formats], axis=1)
    return held[shape.reshape(-1)]


def restricted(table: CostTable, target: Target) -> CostTable:
    """Return a table with a target's formats alone, and its name in the provenance.

    Raises:
        InputError: a unit is left without a format.
        MismatchError: the units are row blocks.
    """
    check_blocks(target, table.units)
    held = allowed(target, table.units, table.formats)
    kept = np.flatnonzero(held.any(axis=0))
    cost = np.where(held, table.cost, np.inf)[:, kept]
    stuck = ~np.isfinite(cost).any(axis=1)
    if stuck.any():
        raise InputError(
            f"target {target.name}: it has none of the table's formats for "
            f"{table.units.label(int(np.argmax(stuck)))}; make a table with "
            f"`target={target.name}`"
        )
    return replace(
        table,
        formats=tuple(table.formats[column] for column in kept),
        cost=cost,
        nbytes=table.nbytes[:, kept],
        spread=None if table.spread is None else table.spread[:, kept],
        provenance={**table.provenance, TARGET: target.name},
    )


def coarsened(target: Target, plan: BitPlan) -> BitPlan:
    """Return a plan that a target can hold: each set of tied units gets one of its formats.

    It is the smallest format that has at least the bits and at least the bytes that the plan gives
    to each unit of the set.

    Raises:
        MismatchError: the plan has row blocks, or the target has no format that wide.
    """
    check_blocks(target, plan.units)
    units, menu = plan.units, target.menu(plan.units)
    labels = profile(target.profile).labels(units)
    sizes, total = _sizes_of_sets(target, plan, menu, labels)
    stuck = ~np.asarray(np.isfinite(total).any(axis=1))
    if stuck.any():
        unit = int(np.argmax(stuck[labels]))
        raise MismatchError(
            f"{target.name} has no format of as many bits as {plan.format_of(unit)} for "
            f"{units.label(unit)} and the units tied to it; make a plan with "
            f"`target={target.name}`"
        )
    choice = total.argmin(axis=1)[labels]
    header = {key: plan.header[key] for key in CARRIED if key in plan.header}
    header |= {"profile": target.profile, "solver": "coarsened", TARGET: target.name}
    if target.rounding:
        header["method"] = target.rounding
    return BitPlan.from_choice(
        units,
        menu,
        choice,
        nbytes=sizes[np.arange(len(units)), choice],
        model=plan.model,
        header=header,
    )


def _sizes_of_sets(
    target: Target, plan: BitPlan, menu: Sequence[Format], labels: Ints
) -> tuple[Longs, Floats]:
    """Return bytes of units, int64[U,F], and of whole tie sets, float64[S,F]; inf if not wide.

    Where two formats of a set take the same bytes, the one that the plan names is smaller by half.
    """
    sizes = storage(plan.units, menu)
    planned = widths(plan.formats)[plan.choice]
    wide = (widths(menu) >= planned[:, None]) & (sizes >= plan.nbytes[:, None])
    wide &= allowed(target, plan.units, menu)
    place = {one: column for column, one in enumerate(menu)}
    own = np.array([place.get(one, -1) for one in plan.formats])[plan.choice]
    same = np.arange(len(menu)) == own[:, None]
    total = np.zeros((int(labels.max()) + 1, len(menu)))
    np.add.at(total, labels, np.where(wide, sizes - 0.5 * same / len(plan.units), np.inf))
    return sizes, total


def _ways_out(target: Target, plan: BitPlan) -> str:
    """Say how a plan for the target comes about, and what the way without a table costs."""
    again = f"solve again with `target={target.name}` (profile {target.profile})"
    try:
        more = coarsened(target, plan).total_bytes - plan.total_bytes
    except MismatchError:
        return again
    return f"{again}, or `coarsen`: {more:,} bytes more ({more / plan.total_bytes:+.1%})"
