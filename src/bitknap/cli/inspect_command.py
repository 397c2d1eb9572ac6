"""`bitknap inspect`: shows which plans are possible for a model, from headers alone."""

from __future__ import annotations

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import option
from bitknap.cli.options.solving import listed
from bitknap.cli.terminal import present
from bitknap.errors import InputError
from bitknap.quiet import silence_transformers


@click.command(
    cls=Command,
    examples=(
        "bitknap inspect reference:mixtral",
        "bitknap inspect reference:mixtral --fit 2GiB --context 256",
        "bitknap inspect reference:mixtral --device-memory 24GiB --cores 8",
    ),
)
@common.model
@common.include
@common.fitted
@option(
    "--probe",
    group="measuring",
    is_flag=True,
    help="Measure this machine for 20 seconds, for a forecast of memory and time.",
    more="Otherwise the forecast is for a typical machine of two cores. Nothing is kept.",
)
@option(
    "--device-memory",
    group="measuring",
    default=None,
    metavar="SIZE",
    help="Memory of the machine that the forecast is for, such as 24GiB.",
)
@option(
    "--cores",
    group="measuring",
    type=int,
    default=None,
    metavar="N",
    help="Cores of the machine that the forecast is for.",
)
@common.as_json
def inspect(
    model: str,
    include: str,
    budget: str | None,
    probe: bool,
    device_memory: str | None,
    cores: int | None,
    as_json: bool,
) -> None:
    """Show the size, the feasible budgets and the possible exports of MODEL.

    Only config.json and the headers of its files are read.
    """
    from bitknap.allocation import Budget
    from bitknap.allocation.problem.budget import parse_size
    from bitknap.api.forecasts.machine import TYPICAL
    from bitknap.api.inspection import inspect as look
    from bitknap.api.inspection import probe_of
    from bitknap.cli.views.tables import (
        exports_table,
        facts_table,
        forecast_table,
        ledger_table,
        steps_table,
    )

    silence_transformers()
    device = None if budget is None else Budget.parse(budget)
    memory = None if device_memory is None else parse_size(device_memory)
    if cores is not None and cores < 1:
        raise InputError(f"--cores {cores}: must be a whole number of at least 1")
    machine = (probe_of(model) if probe else TYPICAL).named(cores, memory)
    report = look(model, listed(include), budget=device, machine=machine)
    apart = ("uniform_bytes", "steps", "exports", "device", "forecast", "machine")
    facts = {name: value for name, value in report.items() if name not in apart}
    present(
        as_json,
        report,
        facts_table(model, facts),
        facts_table("all units in one format", report["uniform_bytes"]),
        steps_table(report["steps"], machine.cores),
        forecast_table(report["forecast"], report["machine"]),
        *([ledger_table(report["device"])] if "device" in report else []),
        exports_table(report["exports"]),
    )
