"""`bitknap inspect`: shows which plans are possible for a model, from headers alone."""

from __future__ import annotations

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.options.solving import listed
from bitknap.cli.terminal import present
from bitknap.quiet import silence_transformers


@click.command(
    cls=Command,
    examples=(
        "bitknap inspect reference:mixtral",
        "bitknap inspect reference:mixtral --fit 2GiB --context 256",
    ),
)
@common.model
@common.include
@common.fitted
@common.as_json
def inspect(model: str, include: str, budget: str | None, as_json: bool) -> None:
    """Show the size, the feasible budgets and the possible exports of MODEL.

    Only config.json and the headers of its files are read.
    """
    from bitknap.allocation import Budget
    from bitknap.api.inspection import inspect as look
    from bitknap.cli.views.tables import exports_table, facts_table, ledger_table, steps_table

    silence_transformers()
    device = None if budget is None else Budget.parse(budget)
    report = look(model, listed(include), budget=device)
    apart = ("uniform_bytes", "steps", "exports", "device")
    facts = {name: value for name, value in report.items() if name not in apart}
    present(
        as_json,
        report,
        facts_table(model, facts),
        facts_table("all units in one format", report["uniform_bytes"]),
        steps_table(report["steps"]),
        *([ledger_table(report["device"])] if "device" in report else []),
        exports_table(report["exports"]),
    )
