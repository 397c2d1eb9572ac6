"""`bitknap solve`: finds the plan for one budget, or the plans for all budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import common, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import argument, option
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import (
    check_solving,
    device_of,
    free_path,
    pinned,
    run_solve,
    solved,
    solving,
    uses,
)
from bitknap.cli.options.targeting import aimed
from bitknap.cli.terminal import present
from bitknap.errors import InputError


@click.command(
    cls=Command,
    examples=("bitknap solve table.safetensors --budget 2.5bpw -o plan.json",),
    usual=(
        "table",
        "budget",
        "fit",
        "context",
        "frontier",
        "profile",
        "target",
        "pin",
        "limits",
        "solver",
        "out",
        "overwrite",
        "as_json",
    ),
)
@argument("table", "Cost table that bitknap estimate wrote.", type=click.Path(path_type=Path))
@common.sized
@option(
    "--frontier",
    group="limits",
    is_flag=True,
    help="Write the plans of all budgets, and a picture.",
)
@solving
@measuring.seed.but(group="solving")
@common.output("PLAN", "Plan or frontier to write, .json.")
@common.overwrite
@common.as_json
def solve(
    table: Path,
    budget: str | None,
    frontier: bool,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose the format of each matrix in TABLE so that the plan fits a budget."""
    from bitknap.allocation import CostTable
    from bitknap.allocation.tradeoffs.profile_price import priced
    from bitknap.cli.views.tables import (
        bits_table,
        facts_table,
        ledger_table,
        limits_table,
        price_table,
    )

    check_options("solve")
    inputs = [table, *options["limits"]]
    path = free_path(out, overwrite, inputs=inputs)
    if budget is None:
        _solve_frontier(table, path, overwrite, as_json, options)
        return
    check_solving(budget, options)
    costs = aimed(CostTable.load(table), options)
    solution, prices = run_solve(costs, budget, options)
    solution.plan.save(path)
    facts = solved(solution)
    tables = [bits_table(solution.plan), facts_table("solution", facts)]
    facts |= uses(solution) | device_of(costs, budget, solution.choice)
    if len(solution.used) > 1:
        tables.append(limits_table(facts["limits"]))
    if "device" in facts:
        tables.append(ledger_table(facts["device"]))
    if prices:
        tables.append(price_table(prices, options["profile"]))
    present(as_json, facts | priced(prices, options["profile"]) | {"path": out}, *tables)


def _solve_frontier(
    file: Path, path: Path, overwrite: bool, as_json: bool, options: dict[str, Any]
) -> None:
    from bitknap.allocation import CostTable, profile
    from bitknap.allocation.tradeoffs.frontier_path import frontier
    from bitknap.allocation.tradeoffs.profile_price import under
    from bitknap.cli.views.tables import frontier_summary, frontier_table, uniform_costs
    from bitknap.report.figure_files import frontier_figure, write_picture

    picture = path.with_suffix(".svg")
    if picture == path:
        raise InputError(f"-o {path}: this is where the picture goes; name the frontier .json")
    free_path(picture, overwrite, inputs=[file, path, *options["limits"]])
    table = aimed(CostTable.load(file), options)
    plans = frontier(under(pinned(table, options), profile(options["profile"])))
    figure = frontier_figure(plans, uniform_costs(table))
    plans.save(path)
    write_picture(figure, picture)
    paths = {"path": str(path), "picture": str(picture)}
    present(as_json, frontier_summary(plans) | paths, frontier_table(plans), str(picture))
