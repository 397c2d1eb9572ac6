"""`bitknap show`: shows the contents of a file, or the differences between two plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import argument, option
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import free_path
from bitknap.cli.terminal import present
from bitknap.errors import InputError


@click.command(
    cls=Command,
    examples=("bitknap show out", "bitknap show plan-a.json --diff plan-b.json"),
)
@argument(
    "path",
    "Plan, cost table, frontier or packed checkpoint.",
    type=click.Path(path_type=Path),
)
@option(
    "--diff",
    "other",
    group="output",
    metavar="PLAN",
    type=click.Path(path_type=Path),
    default=None,
    help="Show what differs in this other plan or packed checkpoint.",
)
@option(
    "--picture",
    group="output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="Draw the map of a cost table into FILE, .png or .svg.",
)
@common.overwrite
@common.as_json
def show(
    path: Path, other: Path | None, picture: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Show what a plan, a cost table, a frontier or a packed checkpoint contains."""
    from bitknap.allocation import BitPlan, CostTable
    from bitknap.allocation.tradeoffs.frontier_file import is_frontier
    from bitknap.allocation.tradeoffs.frontier_path import Frontier
    from bitknap.cli.views.tables import (
        bits_table,
        frontier_summary,
        frontier_table,
        plan_summary,
        widths_table,
    )

    check_options("show")
    if other is not None:
        _show_diff(path, other, as_json)
        return
    if picture is not None:
        free_path(picture, overwrite, inputs=[path])
    if path.suffix == ".safetensors":
        _show_table(CostTable.load(path), picture, as_json)
        return
    if picture is not None:
        raise InputError(
            f"--picture: {path} is not a cost table; draw a frontier with solve --frontier"
        )
    file = _file(path)
    if is_frontier(file):
        frontier = Frontier.load(file)
        present(as_json, frontier_summary(frontier), frontier_table(frontier))
        return
    plan = BitPlan.load(file)
    present(as_json, plan_summary(plan), bits_table(plan), widths_table(plan))


def _file(path: Path) -> Path:
    """Return the plan of a packed checkpoint, or the file itself."""
    file = path / "bitknap_plan.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(
            f"{path}: no bitknap_plan.json; pass a plan, a table or a packed checkpoint"
        )
    return file


def _show_diff(path: Path, other: Path, as_json: bool) -> None:
    from bitknap.allocation import BitPlan
    from bitknap.allocation.plans.plan_diff import plan_diff
    from bitknap.allocation.tradeoffs.frontier_file import is_frontier
    from bitknap.cli.views.plan_diff_tables import diff_summary, diff_tables

    plans = []
    for one in (path, other):
        if one.suffix == ".safetensors" or is_frontier(_file(one)):
            raise InputError(f"--diff: {one} is not a plan; pass two plans or packed checkpoints")
        plans.append(BitPlan.load(_file(one)))
    difference = plan_diff(*plans)
    present(as_json, diff_summary(difference), *diff_tables(difference, str(path), str(other)))


def _show_table(table: Any, picture: Path | None, as_json: bool) -> None:
    from bitknap.allocation import ROLES
    from bitknap.cli.views.tables import cost_table
    from bitknap.estimators.tables.super_expert_floor import comparable
    from bitknap.report.figure_files import write_picture
    from bitknap.report.sensitivity_map import heat, heat_figure, text_of
    from bitknap.report.table_facts import notes, table_summary

    routed = (table.units.role == ROLES.index("routed")).any()
    maps = heat(comparable(table)) if routed or picture is not None else ()
    if picture is not None:
        write_picture(heat_figure(maps, table.provenance.get("unit", "nats/token")), picture)
    shown = [text_of(maps)] if maps else []
    present(as_json, table_summary(table), cost_table(table), *shown, notes(table))
