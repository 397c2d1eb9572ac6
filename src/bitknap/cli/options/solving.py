"""Options of commands that solve, and what their values mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import common
from bitknap.cli.options.declare import options_of
from bitknap.disk.outputs import Kind, check_output, writing
from bitknap.errors import InfeasibleError, InputError

solving = options_of(
    common.solver,
    common.gap,
    common.time_limit,
    common.profile,
    common.target,
    common.pin,
    common.limit,
    common.price,
)


def given(count: int | None, default: int) -> int:
    """Return the given count, or the default if it is None; 0 counts as given."""
    return default if count is None else count


def listed(text: str) -> list[str]:
    """Split at commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_solving(budget: str, options: dict[str, Any]) -> None:
    """Refuse values that the solver cannot use, before spending minutes on estimation."""
    from bitknap.allocation import Budget, profile
    from bitknap.disk.atomic import read_json

    Budget.parse(budget)
    profile(options["profile"])
    _solver(options)
    for pin in options["pin"]:
        _pin(pin)
    for file in options["limits"]:
        read_json(file)


def _solver(options: dict[str, Any]) -> Any:
    """Return the named solver with the given options."""
    from bitknap.allocation.catalog import DEFAULT, solver_of

    settings = {key: options[key] for key in ("gap", "time_limit", "seed")}
    return solver_of(options["solver"] or DEFAULT, **settings)


def _pin(text: str) -> tuple[str, dict[str, Any]]:
    """Return the pattern, and the bits or format that it is pinned to."""
    from bitknap.allocation import Format

    pattern, _, value = text.rpartition("=")
    if "=" in pattern and value.isdecimal():
        return pattern, {"bits": int(value)}
    try:
        if "=" in pattern:
            return pattern, {"format": Format.parse(value)}
        reason = "no bits"
    except InputError as error:
        reason = str(error)
    raise InputError(
        f"--pin {text!r}: write PATTERN=BITS or PATTERN=FORMAT, "
        f"such as layer=0,proj=down=8 ({reason})"
    )


def pinned(table: Any, options: dict[str, Any]) -> Any:
    """Return the table with the pins of the options."""
    for pin in options["pin"]:
        pattern, wanted = _pin(pin)
        table = table.pin(pattern, **wanted)
    return table


def run_solve(table: Any, budget: str, options: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return the solution that the options ask for, and the prices of all profiles if asked.

    Raises:
        InfeasibleError: no plan is within the limits; the message says if protection is the cause.
    """
    from bitknap.estimators.tables.super_expert_floor import unprotected

    try:
        return _solved(table, budget, options)
    except InfeasibleError as error:
        free = unprotected(table)
        if free is table or not _feasible(free, budget, options):
            raise
        held = table.provenance["protected"]
        raise InfeasibleError(
            f"{error}, or estimate with --protect-bits 0: {held['units']} units of super experts "
            f"are held to {held['bits']} bits"
        ) from None


def _feasible(table: Any, budget: str, options: dict[str, Any]) -> bool:
    try:
        _solved(table, budget, {**options, "price": False})
    except InfeasibleError:
        return False
    return True


def _solved(table: Any, budget: str, options: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    from bitknap.allocation import Budget, profile
    from bitknap.allocation.tradeoffs.profile_price import price
    from bitknap.api.planning import plan_for

    table, solver, wanted = pinned(table, options), _solver(options), Budget.parse(budget)
    limits = [limit for file in options["limits"] for limit in limits_of(file, table)]
    solution = plan_for(
        table, wanted, ties=profile(options["profile"]), solver=solver, limits=limits
    )
    prices = price(table, [wanted, *limits], solver=solver) if options["price"] else ()
    return solution, prices


def limits_of(file: Path, table: Any) -> tuple[Any, ...]:
    """Return the limits in a file, resolved for a table."""
    from bitknap.allocation.limits.from_file import read_limits

    return read_limits(file, table)


def solved(solution: Any) -> dict[str, Any]:
    """Return a solution as JSON values."""
    return {
        "status": solution.status.name,
        "cost": solution.cost,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": round(solution.seconds, 6),
        "solver": solution.solver,
        **solution.plan.totals,
    }


def uses(solution: Any) -> dict[str, Any]:
    """Return how much of each limit a plan uses, as JSON values under "limits"."""
    header = solution.plan.header
    bounds, floors = header["limits"], header.get("floors", ())
    return {
        "limits": {
            name: {
                "used": used,
                "bound": bounds.get(name),
                "rule": "at least" if name in floors else "at most",
            }
            for name, used in solution.used.items()
        }
    }


def device_of(table: Any, budget: str, choice: Any) -> dict[str, Any]:
    """Return what a device holds with a plan, JSON values under "device"; empty without --fit."""
    from bitknap.allocation import Budget

    ledger = Budget.parse(budget).ledger(table, choice)
    return {"device": ledger} if ledger else {}


def free_path(
    path: str | Path,
    overwrite: bool,
    *,
    kind: Kind = "file",
    model: str | None = None,
    inputs: Iterable[Path | str | None] = (),
) -> Path:
    """Return the path if it may be written, and lock it against other commands until this one ends.

    Args:
        path: the output.
        overwrite: whether an existing output may be replaced, if Bitknap wrote it.
        kind: the kind of output.
        model: MODEL that is read.
        inputs: other files that the command reads or writes; "builtin" and None are ignored.

    Raises:
        InputError: it may not be written, or another command is writing it.
    """
    out, read = Path(path), [Path(one) for one in inputs if one not in (None, "builtin")]
    copied_from = None
    if model is not None:
        from bitknap.quantization.source.checkpoint import places

        with contextlib.suppress(InputError):  # reported when the model is opened
            read += places(model)
            copied_from = read[-1]
    check_output(out, kind, overwrite=overwrite, inputs=read, copied_from=copied_from)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.with_resource(writing(out))
    return out
