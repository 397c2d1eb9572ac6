"""`bitknap estimate`: measures the cost of every format for every unit of a model."""

from __future__ import annotations

from typing import Any

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
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
from bitknap.cli.options.solving import free_path
from bitknap.cli.options.targeting import check_target
from bitknap.cli.terminal import present


@click.command(
    cls=Command,
    examples=("bitknap estimate reference:mixtral --formats 2,3,4 -o table.safetensors",),
    usual=(
        "model",
        "estimator",
        "text",
        "tokens",
        "max_memory",
        "target",
        "bits",
        "out",
        "overwrite",
        "as_json",
    ),
)
@common.model
@estimating
@common.target
@common.method
@common.output("TABLE", "Cost table to write, .safetensors.")
@common.overwrite
@common.as_json
def estimate(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Measure what each format would cost each matrix of MODEL.

    Measurements are kept in TABLE.journal until the table is written, so a run that was stopped
    or killed continues when the command is repeated.
    """
    from bitknap.cli.views.tables import cost_table
    from bitknap.estimators.measuring.readings import telling
    from bitknap.report.table_facts import notes, table_summary

    check_options("estimate")
    check_target(options)
    path = free_path(out, overwrite, model=model, inputs=files_of(options))
    check_kept(options)
    with resumable(path):
        table = run_estimate(model, options, path, overwrite=overwrite)
        with telling(journal_of(path)):
            table.save(path)
    forget(path)
    present(as_json, table_summary(table) | {"path": out}, cost_table(table), notes(table))
