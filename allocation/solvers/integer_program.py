"""One small integer program, pick one option a row under a few limits, and who can solve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitknap.allocation.problem.arrays import Bools, Floats, Longs

# Absolute, on rows and on the objective: what solvers of floats can promise.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """Minimise the cost of the picked options, exactly one a row.

    Attributes:
        cost: float64[N].
        row: row of each option, 0, 1, 2, ... without holes, int[N].
        weights: float64[M,N].
        bounds: float64[M].
        start: a pick to begin with, bool[N], which need not be within the limits.
    """

    cost: Floats
    row: Longs
    weights: Floats
    bounds: Floats
    start: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What an integer solver says.

    Attributes:
        picked: bool[N], or None when nothing was found.
        bound: no pick costs less, within `TOLERANCE`; -inf when it does not tell.
        finished: the pick is optimal within the gap asked for, or, without one, none exists.
    """

    picked: Bools | None
    bound: float
    finished: bool


# Called with (program, absolute gap at which to stop, seconds).
Runner = Callable[[Program, float, float], Result]
