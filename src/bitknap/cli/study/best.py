"""`bitknap study best`: the plan with the smallest measured loss."""

from __future__ import annotations

from pathlib import Path

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.study import stored
from bitknap.cli.terminal import present
from bitknap.errors import InputError


@click.command(
    cls=Command, examples=("bitknap study best s --storage sqlite:///s.db -o best.json",)
)
@stored.name
@stored.storage
@stored.moved
@stored.features
@common.budget.but(help="Size of the plan, if the study has a range of sizes.")
@common.output("PLAN", "Plan to write, .json.", required=False)
@common.overwrite
@common.as_json
def best(
    name: str,
    storage: str,
    budget: str | None,
    out: str | None,
    table: Path | None,
    features: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the plan of the study NAME with the smallest measured loss."""
    from bitknap.allocation.search.best_trials import best as least
    from bitknap.allocation.search.study import load, plan_of
    from bitknap.cli.views.study_view import present_study, row_of, trials_table
    from bitknap.cli.views.tables import bits_table

    path = None if out is None else stored.free(out, overwrite, storage, table, features)
    found = load(name, storage, table=table, features=features)
    if found.knobs.budget and budget is None:
        if path is not None:
            raise InputError("the study trades size against loss; say which with --budget 3bpw")
        present_study(found, as_json)
        return
    record = least(found, budget)
    plan = plan_of(found, record.params, record)
    document = {"study": name, "best": row_of(record)}
    if path is not None:
        plan.save(path)
        document["path"] = str(out)
    present(as_json, document, bits_table(plan), trials_table("best trial", [record]))
