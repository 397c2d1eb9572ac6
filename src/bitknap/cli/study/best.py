"""`bitknap study best`: the plan with the smallest measured loss."""

from __future__ import annotations

from typing import Any

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
    name: str, storage: str, budget: str | None, out: str | None, as_json: bool, **options: Any
) -> None:
    """Write the plan of the study NAME with the smallest measured loss."""
    from bitknap.allocation.search.best_trials import best as least
    from bitknap.allocation.search.study import load, plan_of
    from bitknap.cli.views.study_view import present_study, row_of, trials_table
    from bitknap.cli.views.tables import bits_table

    table, features = options["table"], options["features"]
    path = None
    if out is not None:
        path = stored.free(out, options["overwrite"], storage, table, features)
    study = load(name, storage, table=table, features=features)
    if study.knobs.budget and budget is None:
        if path is not None:
            raise InputError(
                "the study has plans of several sizes; choose one with --budget, such as 3bpw"
            )
        present_study(study, as_json)
        return
    record = least(study, budget)
    plan = plan_of(study, record.params, record)
    document = {"study": name, "best": row_of(record)}
    if path is not None:
        plan.save(path)
        document["path"] = str(out)
    present(as_json, document, bits_table(plan), trials_table("best trial", [record]))
