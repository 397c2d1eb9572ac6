"""`bitknap study create`: a study on a cost table, in a storage that workers share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitknap.cli.options import common, completing, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import OneOf, option
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import listed
from bitknap.cli.study import stored
from bitknap.errors import InputError
from bitknap.names import check_name

if TYPE_CHECKING:
    from bitknap.allocation.search.search_space import Knobs

_RANGE = re.compile(r"\s*(\d+\.?\d*)(?:bpw)?\s*-\s*(\d+\.?\d*)bpw\s*")


@click.command(
    cls=Command,
    examples=(
        "bitknap study create s --storage sqlite:///s.db \\\n"
        "             --table table.safetensors --budget 2.5bpw",
    ),
)
@stored.name
@stored.storage
@stored.moved.but(required=True, usual=None, help="Cost table to search with.")
@stored.features
@common.budget.but(
    help="Size of every plan, or for nsga2 a range: 2bpw-4bpw.",
)
@option("--budgets", group="limits", default=None, hidden=True)
@common.profile
@option(
    "--sampler",
    group="solving",
    type=OneOf(("tpe", "cmaes", "nsga2")),
    default=None,
    usual="tpe, or nsga2 with a range",
    metavar="NAME",
    help="tpe, cmaes or nsga2.",
)
@option(
    "--knobs",
    group="solving",
    default=None,
    usual="tilts, and what tables allow",
    metavar="NAMES",
    help="What the sampler may change.",
    more=f"Some of {','.join(completing.KNOBS)}; risk and exponents need tables that have them.",
    shell_complete=completing.knobs,
)
@measuring.seed.but(group="solving")
@common.as_json
def create(
    name: str,
    storage: str,
    table: Path,
    budget: str | None,
    budgets: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Create the study NAME; its first trial is the plan of the knapsack solver."""
    from bitknap.allocation import Budget
    from bitknap.allocation import profile as profile_of
    from bitknap.allocation.search.study import create as make
    from bitknap.allocation.search.study_design import Design, Sampler
    from bitknap.cli.views.study_view import present_study

    if budget is not None and budgets is None and _RANGE.fullmatch(budget.lower()):
        budget, budgets = None, budget
        click.get_current_context().params.update(budget=budget, budgets=budgets)
    check_options("study create")
    sampler, features = options["sampler"], options["features"]
    made = make(
        name,
        storage,
        table,
        Design(
            budget=None if budget is None else Budget.parse(budget),
            profile=profile_of(options["profile"]),
            sampler=Sampler(sampler or ("nsga2" if budgets else "tpe"), options["seed"]),
            knobs=_knobs(options["knobs"], table, features, budgets),
        ),
        features=features,
    )
    present_study(made, as_json)


def _knobs(
    words: str | None, table: Path, features: tuple[Path, ...], budgets: str | None
) -> Knobs:
    """Return the knobs that the words name; what the table and the features allow if none do."""
    from bitknap.allocation import CostTable
    from bitknap.allocation.search.search_space import GROUPS, Knobs

    if words is None:
        spread = CostTable.load(table).spread is not None
        names = ["tilts", *["risk"] * spread, *["exponents"] * bool(features)]
    else:
        names = listed(words)
    for name in names or [""]:
        check_name("--knobs", name, completing.KNOBS)
    return Knobs(
        exponents=tuple(path.stem for path in features) if "exponents" in names else (),
        risk="risk" in names,
        formats="formats" in names,
        floor="floor" in names,
        cap="cap" in names,
        tilts=GROUPS if "tilts" in names else (),
        budget=None if budgets is None else _range(budgets),
    )


def _range(text: str) -> tuple[float, float]:
    ends = _RANGE.fullmatch(text.lower())
    if not ends:
        raise InputError(f"--budgets {text!r}: write LOW-HIGH in bits per weight: 2bpw-4bpw")
    return float(ends[1]), float(ends[2])
