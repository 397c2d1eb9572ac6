"""`bitknap estimate`: the cost of every format for every unit of a model."""

from __future__ import annotations

from typing import Any

import click

from bitknap.cli.options.estimating import (
    check_kept,
    estimating,
    files_of,
    forget,
    journal_of,
    resumable,
    run_estimate,
)
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import as_json_option, free_path, overwrite_option
from bitknap.cli.terminal import present


@click.command()
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
    from bitknap.cli.views.tables import cost_table
    from bitknap.estimators.measuring.readings import telling
    from bitknap.report.table_facts import notes, table_summary

    check_options("estimate")
    path = free_path(out, overwrite, model=model, inputs=files_of(options))
    check_kept(options)
    with resumable(path):
        table = run_estimate(model, options, path, overwrite=overwrite)
        with telling(journal_of(path)):
            table.save(path)
    forget(path)
    present(as_json, table_summary(table) | {"path": out}, cost_table(table), notes(table))
