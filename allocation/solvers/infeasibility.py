"""Explain why no plan is within the limits, and which changes would allow one."""

from __future__ import annotations

import math
import time

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Longs, slack
from bitknap.allocation.problem.budget import human
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.errors import BitknapError, InfeasibleError

# Total seconds for calls of the integer solver in search of the reason.
_PATIENCE = 30.0
# Most remedies that a message names.
_REMEDIES = 3


def check_each_reachable(problem: Problem) -> None:
    """Check that each limit alone can be met.

    Raises:
        InfeasibleError: a limit cannot be met; the message gives the least reachable.
    """
    allowed = np.isfinite(problem.cost)
    for limit, weight, bound in zip(problem.limits, problem.weights, problem.bounds, strict=True):
        least = np.where(allowed, weight, np.inf).min(axis=1)
        # Solvers use a tenth of the final check's tolerance.
        if least.sum() <= bound + 0.1 * slack(least):
            continue
        if _is_floor(limit):
            most, asked = _amount(limit, least.sum()), _amount(limit, bound)
            raise InfeasibleError(
                f"{limit.name}: the most any plan reaches is {most}, the limit asks for "
                f"{asked}{limit.note}; lower the limit or add formats"
            )
        needed = _amount(limit, least.sum()) + _rate(problem, limit, least.sum())
        raise InfeasibleError(
            f"{limit.name}: smallest plan needs {needed}, "
            f"limit is {_amount(limit, bound)}{limit.note}; "
            f"raise the limit or add {'a narrower format' if limit.unit else 'formats'}"
        )


def clash(problem: Problem, solver: str) -> BitknapError:
    """Return the error for an "infeasible" answer: the limits that clash, and what to relax."""
    deadline = time.monotonic() + _PATIENCE
    clashes = clashing(problem, deadline)
    names = [problem.limits[index].name for index in clashes]
    if not names:
        return BitknapError(f"{solver}: says infeasible, but a plan exists; report it")
    if len(names) == 1:
        return InfeasibleError(f"{names[0]}: no plan is within the limit; relax it or add formats")
    texts = [_remedy(problem, clashes, index, deadline) for index in clashes[:_REMEDIES]]
    remedies = [text for text in texts if text]
    joined = f"{', '.join(names[:-1])} and {names[-1]}"
    return InfeasibleError(
        f"limits {joined} clash: each can be met, but not together; "
        f"{', or '.join(remedies) or 'relax one'}, or add formats"
    )


def clashing(problem: Problem, deadline: float = np.inf) -> list[int]:
    """Return conflicting limits, reduced as far as time allows; empty if all can be met."""
    left = _finite(problem)
    if _cheapest(problem, left, deadline) is not None:
        return []
    # Later limits are removed first, so that those that people set first stay in the report.
    for limit in reversed(left):
        without = [other for other in left if other != limit]
        if time.monotonic() > deadline:
            break
        if without and _cheapest(problem, without, deadline) is None:
            left = without
    return left


def _remedy(problem: Problem, clashes: list[int], index: int, deadline: float) -> str:
    """Say how far one limit must move to make all limits feasible; "" if unknown."""
    for others in (_finite(problem), clashes):
        rest = [other for other in others if other != index]
        choice = _cheapest(problem, rest, deadline, least=index)
        if choice is not None:
            limit = problem.limits[index]
            enough = float(problem.weights[index][np.arange(len(choice)), choice].sum())
            verb = "lower" if _is_floor(limit) else "raise"
            old = _amount(limit, problem.bounds[index])
            return f"{verb} {limit.name} from {old} to {_exactly(limit, enough)}"
    return ""


def _finite(problem: Problem) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.isfinite(problem.bounds))]


def _cheapest(
    problem: Problem, limits: list[int], deadline: float, *, least: int | None = None
) -> Longs | None:
    """Return a choice within some of the limits; None if none exists or none is found in time.

    Args:
        problem: the problem.
        limits: which limits must hold.
        deadline: a time of `time.monotonic`.
        least: the limit whose weight the choice should (nearly) minimise, or None.
    """
    from bitknap.allocation.solvers.highs import run
    from bitknap.allocation.solvers.many_limits import answer

    # The costs of the problem break ties: without them, all options of equal weight would tie, and
    # the core would be the whole problem.
    cost = _shares(problem.cost)
    if least is not None:
        cost = 1e-3 * cost + _shares(problem.weights[least])
    cost = np.where(np.isfinite(problem.cost), cost, np.inf)
    if not limits:
        return np.asarray(cost.argmin(axis=1), dtype=np.int64)
    seconds = max(deadline - time.monotonic(), 0.1)
    weights, bounds = problem.weights[limits], problem.bounds[limits]
    gap = 0.99 if least is None else 1e-3
    choice = answer(cost, weights, bounds, run, gap=gap, time_limit=min(seconds, 60)).choice
    return None if choice is None else np.asarray(choice, dtype=np.int64)


def _shares(values: Floats) -> Floats:
    """Scale to a mean absolute value of 1 per row, ignoring forbidden entries."""
    finite = np.where(np.isfinite(values), values, 0.0)
    return finite / (np.abs(finite).mean() or 1.0)


def _is_floor(limit: Limit) -> bool:
    """Whether the limit is an "at least", stored negated: by its mark, or by its signs."""
    return limit.floor or bool(limit.bound < 0 and (limit.weight <= 0).all())


def _exactly(limit: Limit, value: float) -> str:
    """Return an amount as text with all significant digits, so that it can be used as a bound."""
    amount = -value if _is_floor(limit) else value
    if limit.unit == "bytes":
        return f"{human(amount)} ({math.ceil(amount):,} bytes)"
    return f"{amount:.12g}"


def _amount(limit: Limit, value: float) -> str:
    amount = -value if _is_floor(limit) else value
    return human(amount) if limit.unit == "bytes" else f"{amount:.6g}"


def _rate(problem: Problem, limit: Limit, value: float) -> str:
    """Return bytes of all units as text in bits per weight."""
    table = problem.table
    whole = limit.unit == "bytes" and np.array_equal(limit.weight, table.nbytes)
    if whole and table.units.has_shapes:
        return f" ({8 * value / table.weights:.3g} bpw)"
    return ""
