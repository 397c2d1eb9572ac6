"""Small regressions for combining estimates: ridge, and sums of exponentials.

NumPy and SciPy only. Sizes are numbers of measurements (tens to thousands), not of units; only
`log_sums` runs over units, and does so in arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.errors import InputError

_STEPS = 50
_HALVINGS = 20
# Steps end at this relative fall of the objective or this absolute change of the coefficients.
_TOLERANCE = 1e-10


def ridge(
    design: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    penalty: npt.ArrayLike = 0.0,
    prior: npt.ArrayLike = 0.0,
    nonnegative: npt.ArrayLike = False,
) -> Floats:
    """Return the x that minimises ‖Ax − y‖² + Σ penalty (x − prior)², float64[P].

    Args:
        design: A, float64[N,P].
        target: y, float64[N].
        penalty: strength of the pull of each coefficient to its prior, 0 or more, float64[P] or one
            for all; with the noise variance of y over the prior variance of x, the result is the
            most probable x.
        prior: prior value of each coefficient, float64[P] or one for all.
        nonnegative: which coefficients must not fall below 0, bool[P] or one for all.

    Raises:
        InputError: shapes differ, a number is not finite, or a penalty is negative.

    Source: Hoerl and Kennard (1970); for sign constraints Lawson and Hanson (1974), chapter 23.
    """
    a, y = np.asarray(design, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if a.ndim != 2 or y.shape != a.shape[:1] or not a.size:
        raise InputError(f"ridge: design {a.shape} and target {y.shape} must be [N,P] and [N]")
    count = a.shape[1]
    pull, to = each("penalty", penalty, count), each("prior", prior, count)
    if not (np.isfinite(a).all() and np.isfinite(y).all()) or (pull < 0).any():
        raise InputError("ridge: all numbers must be finite, and penalties at least 0")
    signs = each("nonnegative", nonnegative, count) > 0
    root = np.sqrt(pull)
    whole, wanted = np.vstack([a, np.diag(root)]), np.concatenate([y, root * to])
    if not signs.any():
        solution: Floats = np.linalg.lstsq(whole, wanted, rcond=None)[0]
        return solution
    return _signed(whole, wanted, signs)


def each(name: str, values: npt.ArrayLike, count: int) -> Floats:
    """Return `count` finite numbers, float64[count], from as many or from one.

    Raises:
        InputError: the shape is wrong, or a number is not finite.
    """
    try:
        numbers = np.broadcast_to(np.asarray(values, dtype=np.float64), (count,))
    except ValueError:
        raise InputError(f"{name}: shape {np.shape(values)}, expected ({count},)") from None
    if not np.isfinite(numbers).all():
        raise InputError(f"{name}: every number must be finite")
    return numbers


def _signed(whole: Floats, wanted: Floats, signs: Bools) -> Floats:
    from scipy.optimize import lsq_linear, nnls

    if signs.all():
        solution: Floats = nnls(whole, wanted)[0]
        return solution
    low = np.where(signs, 0.0, -np.inf)
    bounded: Floats = lsq_linear(whole, wanted, bounds=(low, np.inf), method="bvls").x
    # Active bounds may be violated by a rounding error.
    return np.where(signs, np.maximum(bounded, 0.0), bounded)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sums:
    """N sums of exponentials; sum n runs over the members from start[n] to start[n+1].

    Attributes:
        base: value of each member with all coefficients 0, 0 or more, float64[T].
        features: features of each member, float64[T,P].
        start: first member of each sum, int64[N]; each sum must have a member with a base above 0.
    """

    base: Floats
    features: Floats
    start: Longs

    def log(self, coefficients: Floats) -> tuple[Floats, Floats]:
        """Return log Σ base exp(features · x), float64[N], and its slopes in x, float64[N,P]."""
        terms = self.base * np.exp(self.features @ coefficients)
        total = np.add.reduceat(terms, self.start)
        moved = np.add.reduceat(terms[:, None] * self.features, self.start, axis=0)
        return np.log(total), moved / total[:, None]


def log_sums(
    sums: Sums,
    target: Floats,
    *,
    penalty: Floats,
    nonnegative: npt.ArrayLike = False,
) -> Floats:
    """Return the x whose log sums are the least-squares fit to `target`, float64[P].

    Minimises Σ (target − log Σ base exp(features · x))² + Σ penalty x² by Gauss-Newton: each step
    is a ridge with prior 0 on the linearised sums, halved until it improves.

    Args:
        sums: the members of each measured sum.
        target: logarithms of the measurements, float64[N].
        penalty: strength of the pull of each coefficient to 0, float64[P].
        nonnegative: which coefficients must not fall below 0, bool[P] or one for all.
    """
    at = np.zeros(sums.features.shape[1])

    def objective(x: Floats, logs: Floats) -> float:
        return float(((target - logs) ** 2).sum() + (penalty * x**2).sum())

    logs, slope = sums.log(at)
    value = objective(at, logs)
    for _ in range(_STEPS):
        goal = ridge(slope, target - logs + slope @ at, penalty=penalty, nonnegative=nonnegative)
        step = goal - at
        for _ in range(_HALVINGS):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                logs, slope = sums.log(at + step)
            after = objective(at + step, logs)
            if np.isfinite(after) and after <= value:
                break
            step = step / 2
        else:
            return at
        at = at + step
        if value - after <= _TOLERANCE * value or np.abs(step).max() <= _TOLERANCE:
            return at
        value = after
    return at


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return Spearman's rho of two sequences, with mean ranks for ties; NaN if one is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(values) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")
