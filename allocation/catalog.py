"""Solvers by the names that the command line knows; elsewhere they are instances."""

from __future__ import annotations

from typing import Any

from bitknap.allocation.solvers.solver import Solver
from bitknap.errors import InputError
from bitknap.names import Catalog, Entry

DEFAULT = "knapsack"
SOLVERS = Catalog(
    what="solver",
    group="bitknap.solvers",
    rows=(
        Entry(
            name=DEFAULT,
            about="Proven best plan: Lagrangian bound, then an exact search. The default.",
            place="bitknap.allocation.solvers.knapsack:Knapsack",
        ),
        Entry(
            name="ilp",
            about="Proven best plan of the integer program, by HiGHS or CBC.",
            place="bitknap.allocation.solvers.ilp:Ilp",
        ),
        Entry(
            name="greedy",
            about="Best gain per byte first; plans for larger budgets only add bits.",
            place="bitknap.allocation.solvers.greedy:Greedy",
        ),
        Entry(
            name="search",
            about="Optuna search over a few parameters, for costs that do not add up.",
            place="bitknap.allocation.search.solver:Search",
        ),
    ),
)


def solver_of(name: str, **settings: Any) -> Solver:
    """Return a new solver, by name.

    Args:
        name: a row of `SOLVERS`.
        settings: keywords for it, such as `gap`, `time_limit` or `seed`; those that are None are
            dropped. A solver without random draws is not given a `seed`.

    Raises:
        InputError: the name is unknown or offered twice, the solver cannot be imported or does
            not take a setting, or it is not a solver.
    """
    entry = SOLVERS.find(name)
    given = {key: value for key, value in settings.items() if value is not None}
    for key in [key for key in given if not entry.accepts(key)]:
        if key != "seed":
            takers = [one.name for one in SOLVERS.rows if one.accepts(key)]
            raise InputError(
                f"`{key}`: the solver {name} does not take it; leave it out, or use "
                f"{' or '.join(takers)}"
            )
        del given[key]
    solver: Solver = entry(**given)
    if not (callable(getattr(solver, "answer", None)) and isinstance(solver.name, str)):
        raise InputError(
            f"solver {name!r}: {entry.place} of {entry.package} must have name and "
            "answer(problem); see bitknap.allocation.solvers.solver"
        )
    return solver
