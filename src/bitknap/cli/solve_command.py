"""`bitknap solve`: a plan for one budget, or the plans of all budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.allocation.tradeoffs.profile_price import priced
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import (
    as_json_option,
    check_solving,
    free_path,
    overwrite_option,
    pinned,
    run_solve,
    seed_option,
    solved,
    solving,
    uses,
)
from bitknap.cli.terminal import present
from bitknap.errors import InputError


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--budget", default=None, help="2.5bpw, 12GiB (whole checkpoint) or 40%.")
@click.option("--frontier", is_flag=True, help="Instead of a budget: every budget's plan.")
@solving
@click.option("-o", "out", required=True, help="PLAN or frontier to write, .json.")
@overwrite_option
@seed_option
@as_json_option
def solve(
    table: Path,
    budget: str | None,
    frontier: bool,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose a format for every unit of TABLE under a budget, or for all budgets at once.

    Example: bitknap solve table.safetensors --budget 2.5bpw -o plan.json
    """
    from bitknap.allocation import CostTable
    from bitknap.cli.views.tables import bits_table, facts_table, limits_table, price_table

    check_options("solve")
    inputs = [table, *options["limits"]]
    path = free_path(out, overwrite, inputs=inputs)
    if budget is None:
        _solve_frontier(table, path, overwrite, as_json, options)
        return
    check_solving(budget, options)
    solution, prices = run_solve(CostTable.load(table), budget, options)
    solution.plan.save(path)
    facts = solved(solution)
    tables = [bits_table(solution.plan), facts_table("solution", facts)]
    facts |= uses(solution)
    if len(solution.used) > 1:
        tables.append(limits_table(facts["limits"]))
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
        raise InputError(f"-o {path}: the picture goes there; name the frontier .json")
    free_path(picture, overwrite, inputs=[file, path, *options["limits"]])
    table = CostTable.load(file)
    found = frontier(under(pinned(table, options), profile(options["profile"])))
    figure = frontier_figure(found, uniform_costs(table))
    found.save(path)
    write_picture(figure, picture)
    paths = {"path": str(path), "picture": str(picture)}
    present(as_json, frontier_summary(found) | paths, frontier_table(found), str(picture))
