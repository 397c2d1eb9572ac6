"""A small integer program: pick one option per row under a few limits; and the solver protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitknap.allocation.problem.arrays import Bools, Floats, Longs

# Absolute tolerance on limits and objective that floating-point solvers can guarantee.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """Minimise the cost of the picked options, exactly one per row.

    Attributes:
        cost: float64[N].
        row: row of each option, 0, 1, 2, ... without holes, int[N].
        weights: float64[M,N].
        bounds: float64[M].
        start: an initial pick, bool[N], which may break the limits.
    """

    cost: Floats
    row: Longs
    weights: Floats
    bounds: Floats
    start: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The result of an integer solver.

    Attributes:
        picked: bool[N], or None when nothing was found.
        bound: lower bound on the cost, within `TOLERANCE`; -inf when the solver gives none.
        finished: whether the pick is optimal within the requested gap, or, without a pick, whether
            it is proven that none exists.
    """

    picked: Bools | None
    bound: float
    finished: bool


# Called with (program, absolute gap at which to stop, seconds).
Runner = Callable[[Program, float, float], Result]
