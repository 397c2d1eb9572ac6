"""Options of the closed loop at the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitknap.cli.options import common
from bitknap.cli.options.declare import options_of
from bitknap.cli.options.estimating import computing_of
from bitknap.cli.options.solving import given, limits_of, pinned
from bitknap.disk.atomic import beside
from bitknap.errors import InputError

refining = options_of(common.refine, common.refine_driver, common.refine_tokens)


def check_refining(options: dict[str, Any]) -> None:
    """Refuse invalid numbers of plans, before spending minutes on estimation."""
    if options["refine"] < 0:
        raise InputError(
            f"--refine {options['refine']}: must be a number of plans; give 0 for none"
        )


def run_refine(model: str, table: Any, budget: str, options: dict[str, Any], out: Path) -> Any:
    """Return the outcome of the closed loop and its gate; measurements are kept beside `out`."""
    from bitknap.allocation import Budget, profile
    from bitknap.allocation.tradeoffs.profile_price import under
    from bitknap.api.refining import refine
    from bitknap.api.requests import (
        CALIBRATION_TOKENS,
        REFINE_TOKENS,
        Calibration,
        Refinement,
        Resume,
    )
    from bitknap.cli.terminal import progress_bars

    table = pinned(table, options)
    limits = [limit for file in options["limits"] for limit in limits_of(file, table)]
    with progress_bars() as progress:
        return refine(
            model,
            under(table, profile(options["profile"])),
            [Budget.parse(budget), *limits],
            refinement=Refinement(
                evaluations=options["refine"],
                driver=options["refine_driver"],
                tokens=given(options["refine_tokens"], REFINE_TOKENS),
                seed=options["seed"],
            ),
            calibration=Calibration(
                text=options["text"][0],
                tokens=given(options["tokens"], CALIBRATION_TOKENS),
                seed=options["seed"],
                **computing_of(options),
            ),
            resume=Resume(journal=refine_journal(out)),
            progress=progress,
        )


def refine_journal(out: Path) -> Path:
    """Return the path where measured plans are kept until `out` is finished."""
    return beside(out, "refine.journal", hidden=False)
