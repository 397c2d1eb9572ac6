"""What --target means: the formats, the rounding and the profile of a runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bitknap.errors import InputError

if TYPE_CHECKING:
    from bitknap.allocation import CostTable, Units
    from bitknap.quantization.targets.target import Target


def target_of(options: dict[str, Any]) -> Target | None:
    """Return the runtime that --target names; None without the option."""
    from bitknap.quantization.targets.catalog import target_of as named

    return None if options["target"] is None else named(options["target"])


def check_target(options: dict[str, Any]) -> None:
    """Refuse another rounding than the runtime's, before anything is read."""
    target = target_of(options)
    if target is not None and options["method"] and target.rounding not in ("", options["method"]):
        raise InputError(
            f"--method {options['method']}: {target.name} rounds by {target.rounding}; leave it out"
        )


def aim(options: dict[str, Any], units: Units) -> None:
    """Let --target decide what a plan is solved under: set --profile where it was not given.

    Args:
        options: the options of `solving`; "profile" is changed.
        units: the units that are planned.

    Raises:
        InputError: --profile was given and allows what the runtime does not.
    """
    target = target_of(options)
    if target is None:
        return
    from bitknap.allocation import profile
    from bitknap.allocation.problem.profiles import implies

    given = click.get_current_context().get_parameter_source("profile")
    if given is not ParameterSource.COMMANDLINE:
        options["profile"] = target.profile
    elif not implies(profile(options["profile"]), profile(target.profile), units):
        raise InputError(
            f"--profile {options['profile']}: {target.name} needs {target.profile}, which ties "
            "units that this one leaves apart; leave it out"
        )


def aimed(table: CostTable, options: dict[str, Any]) -> CostTable:
    """Return a table with the formats of --target alone, after `aim`."""
    from bitknap.quantization.targets.requirements import restricted

    aim(options, table.units)
    target = target_of(options)
    return table if target is None else restricted(table, target)
