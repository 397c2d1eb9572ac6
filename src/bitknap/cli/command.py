"""The command line: a thin shell over the public verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bitknap.allocation.tradeoffs.profile_price import priced
from bitknap.cli.compare_command import compare
from bitknap.cli.estimate_options import (
    estimating,
    files_of,
    forget,
    journal_of,
    resumable,
    run_estimate,
)
from bitknap.cli.option_rules import check_options
from bitknap.cli.quantize_command import quantize
from bitknap.cli.show_command import show
from bitknap.cli.solve_options import (
    as_json_option,
    check_solving,
    free_path,
    given,
    include_option,
    listed,
    overwrite_option,
    pinned,
    run_solve,
    seed_option,
    solved,
    solving,
    text_option,
    uses,
)
from bitknap.cli.study_commands import study
from bitknap.cli.terminal import fail, present, print_any_name, progress_bars, quiet
from bitknap.disk.append_log import no_room
from bitknap.errors import BitknapError, InputError
from bitknap.quiet import silence_transformers
from bitknap.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every error on purpose is one line on stderr and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print_any_name()
    try:
        with quiet():
            bitknap.main(args=None if argv is None else list(argv), standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        fail(error.format_message())
    except BitknapError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'output'}: {no_room(error) or error.strerror or error}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def bitknap() -> None:
    """Choose bits for every expert of a Mixture-of-Experts model, prove it, pack it.

    Example: bitknap quantize reference:mixtral --budget 2.5bpw -o out
    """


bitknap.add_command(study)
bitknap.add_command(compare)
bitknap.add_command(quantize)
bitknap.add_command(show)


@bitknap.command()
@click.argument("model")
@include_option
@as_json_option
def inspect(model: str, include: str, as_json: bool) -> None:
    """Show units, formats and the feasible budgets of MODEL from its headers alone.

    Example: bitknap inspect reference:mixtral
    """
    from bitknap.api.inspection import inspect as look
    from bitknap.cli.tables import exports_table, facts_table, steps_table

    silence_transformers()
    report = look(model, listed(include))
    apart = ("uniform_bytes", "steps", "exports")
    facts = {name: value for name, value in report.items() if name not in apart}
    present(
        as_json,
        report,
        facts_table(model, facts),
        facts_table("all units in one format", report["uniform_bytes"]),
        steps_table(report["steps"]),
        exports_table(report["exports"]),
    )


@bitknap.command()
@click.argument("model")
@estimating
@click.option("-o", "out", required=True, help="TABLE to write, .safetensors.")
@overwrite_option
@as_json_option
def estimate(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Fill a cost table: what every format would cost every unit of MODEL.

    What is measured is kept in TABLE.journal, and layers that are finished within --max-memory in
    TABLE.journal.files: a stopped or killed run goes on when the command is repeated.

    Example: bitknap estimate reference:mixtral --formats 2,3,4 -o table.safetensors
    """
    from bitknap.cli.tables import cost_table
    from bitknap.estimators.measuring.readings import telling
    from bitknap.report.table_facts import notes, table_summary

    check_options("estimate")
    path = free_path(out, overwrite, model=model, inputs=files_of(options))
    with resumable(path):
        table = run_estimate(model, options, path, overwrite=overwrite)
        with telling(journal_of(path)):
            table.save(path)
    forget(path)
    present(as_json, table_summary(table) | {"path": out}, cost_table(table), notes(table))


@bitknap.command()
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
    from bitknap.cli.tables import bits_table, facts_table, limits_table, price_table

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
    from bitknap.cli.tables import frontier_summary, frontier_table, uniform_costs
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


@bitknap.command()
@click.argument("model")
@click.option("--reference", default=None, help="What KL and agreement refer to.")
@click.option("--uniform", is_flag=True, help="Also the best uniform recipe at the same bytes.")
@text_option("Evaluation")
@click.option("--tokens", type=int, default=None, help="Evaluation tokens. Default: 32768.")
@seed_option
@as_json_option
def evaluate(
    model: str,
    reference: str | None,
    uniform: bool,
    text: str,
    tokens: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure MODEL's perplexity; with a reference also KL, its standard error and agreement.

    Example: bitknap evaluate out --reference reference:mixtral
    """
    from bitknap.api import quantizing
    from bitknap.api.evaluation import rows_for
    from bitknap.cli.tables import losses_table

    check_options("evaluate")
    silence_transformers()
    with progress_bars() as progress:
        count = given(tokens, quantizing.EVALUATION_TOKENS)
        rows = rows_for(model, reference, text, count, uniform=uniform, progress=progress)
    present(as_json, rows, losses_table(rows))


@bitknap.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["plain", "tiles"]), required=True, help="Of streams.")
@click.option("-o", "out", required=True, help="OUT folder to write.")
@overwrite_option
@as_json_option
def convert(folder: Path, layout: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Write the packed checkpoint FOLDER in another layout, without rounding anything again.

    Tiles are what kernels read; plain streams are as small as can be.

    Example: bitknap convert out --layout tiles -o out-tiles
    """
    from bitknap.cli.tables import facts_table
    from bitknap.quantization.packed.convert_layout import convert as rewrite

    path = free_path(out, overwrite, kind="folder", inputs=[folder])
    sizes = rewrite(folder, layout, path, overwrite=overwrite)
    facts = {
        "layout": layout,
        "bytes_of_plan": sizes["plan"],
        "bytes_on_disk": sizes["written"],
        "checkpoint_bytes": sizes["checkpoint"],
    }
    present(as_json, facts | {"path": out}, facts_table(out, facts))
