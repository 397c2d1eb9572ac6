"""What the closed loop is asked for at the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options.solving import given, limits_of, options_of, pinned
from bitknap.disk.atomic import beside
from bitknap.errors import InputError

refining = options_of(
    click.option(
        "--refine",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Measure N plans around the solved one, keep the best; never worse than uniform.",
    ),
    click.option(
        "--refine-driver",
        type=click.Choice(["belief", "tpe", "cmaes"]),
        default="belief",
        show_default=True,
        help="What proposes them: what is believed of the costs, or a sampler of Optuna's.",
    ),
    click.option(
        "--refine-tokens",
        type=int,
        default=None,
        help="Of the calibration text, to measure them on. Default: 16384.",
    ),
)


def check_refining(options: dict[str, Any]) -> None:
    """Refuse numbers of plans that mean nothing, before minutes go into estimating."""
    if options["refine"] < 0:
        raise InputError(f"--refine {options['refine']}: a number of plans, 0 for none")


def run_refine(model: str, table: Any, budget: str, options: dict[str, Any], out: Path) -> Any:
    """Return what the closed loop and its gate make of a table; kept beside `out` if killed."""
    from bitknap.allocation import Budget, profile
    from bitknap.allocation.tradeoffs.profile_price import under
    from bitknap.api.quantizing import CALIBRATION_TOKENS
    from bitknap.api.refining import REFINE_TOKENS, refine
    from bitknap.cli.terminal import progress_bars

    table = pinned(table, options)
    limits = [limit for file in options["limits"] for limit in limits_of(file, table)]
    with progress_bars() as progress:
        return refine(
            model,
            under(table, profile(options["profile"])),
            [Budget.parse(budget), *limits],
            evaluations=options["refine"],
            driver=options["refine_driver"],
            text=options["text"][0],
            tokens=given(options["tokens"], CALIBRATION_TOKENS),
            refine_tokens=given(options["refine_tokens"], REFINE_TOKENS),
            seed=options["seed"],
            journal=refine_journal(out),
            progress=progress,
        )


def refine_journal(out: Path) -> Path:
    """Return where measured plans are kept while `out` is in the making."""
    return beside(out, "refine.journal", hidden=False)
