"""Exponents of signals and gains of formats, fitted to the measured KL of groups of units.

The KL of a group in format f is modelled as gain_f × Σ base cost × exp(Σ θ z) over its units: a
log-linear mixture (methods.md#modifiers). Errors are measured on groups left out of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.group_kl.regression import Sums, each, log_sums
from bitknap.estimators.measuring.noise_floor import USUAL

# Noise over prior variance: log KL of a group is assumed known to 0.2, exponents within ±0.5.
_PENALTY = (0.2 / 0.5) ** 2
# Penalty of gains, which only keeps the equations solvable.
_FREE = 1e-9
# A standardised signal with less spread than this carries no information.
_ALIKE = 1e-9
# With more groups than _EACH, leave out folds instead of single groups.
_EACH, _FOLDS = 50, 10


class MeasuredGroup(NamedTuple):
    """Units stored in one format together, the format's column, and the KL in nats per token."""

    units: npt.NDArray[np.integer]
    format: int
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """How far a fit can be trusted.

    Attributes:
        groups: number of measurements used.
        parameters: number of exponents and gains to fit.
        error: root mean square error of log KL on groups left out, with the exponents; NaN if no
            group can be left out.
        error_without: the same with gains only and all exponents 0; exponents are useful only if
            `error` is below it.
        folds: number of parts that were left out in turn; equals `groups` if one at a time.
        dropped: signals that are constant over the measured units; their exponents are 0.
        fallback: why the exponents were not fitted; "" when they were.
    """

    groups: int
    parameters: int
    error: float
    error_without: float
    folds: int
    dropped: tuple[str, ...]
    fallback: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """What `fit_exponents` returns.

    Attributes:
        exponents: θ of each signal.
        gains: ratio of true to predicted KL for each column, above 0, float64[F]; 1 for a kept
            precision.
        report: the errors on groups left out, and what could not be fitted.
    """

    exponents: Mapping[str, float]
    gains: Floats
    report: FitReport


def fit_exponents(
    base_table: CostTable,
    signals_z: npt.ArrayLike,
    groups: Sequence[MeasuredGroup | tuple[npt.NDArray[np.integer], int, float]],
    *,
    names: Sequence[str] | None = None,
    penalty: float = _PENALTY,
    nonnegative: npt.ArrayLike = False,
    floor: float = USUAL,
) -> Fitted:
    """Fit θ of each signal and a gain of each format to the measured KL of groups of units.

    The KL of a group in format f is modelled as gain_f × Σ base cost × exp(Σ θ z) over its units;
    the squared error of its logarithm, plus penalty × θ², is minimised by Gauss-Newton (a
    log-linear mixture; methods.md#modifiers). Gains, fitted as logarithms without a penalty, are
    above 0 and keep KL non-decreasing in the base's mean cost over formats (isotonic). A column
    that was not measured gets a gain interpolated in logarithms, or the nearest one outside.

    Args:
        base_table: the costs to correct.
        signals_z: standardised log scores, float64[K,U].
        groups: (units, column, KL in nats per token) of each measurement.
        names: names of the signals; "signal 0", … when not given.
        penalty: pull of every θ to 0. The default, (0.2 / 0.5)², assumes log KL known to 0.2
            and θ within ±0.5.
        nonnegative: signals whose θ must not fall below 0, bool[K] or one for all.
        floor: KL below this is noise, and counts as this.

    Raises:
        InputError: shapes differ, there are no groups, a group has no units, a KL is not a number,
            or a group's base cost is 0 or infinite.
    """
    z = checked_z(signals_z, len(base_table.units))
    called = _names(names, len(z))
    if not (np.isfinite(penalty) and penalty >= 0):
        raise InputError(f"penalty: {penalty} is not a finite number of at least 0")
    measured = [_checked_group(base_table, at, group, floor) for at, group in enumerate(groups)]
    if not measured:
        raise InputError("groups: the list is empty; measure at least one group of units")
    touched = np.unique(np.concatenate([group.units for group in measured]))
    varies = np.ptp(z[:, touched], axis=1) > _ALIKE
    parameters = int(varies.sum()) + len({group.format for group in measured})
    few = bool(varies.any()) and len(measured) < parameters
    fit = _Fit(
        table=base_table,
        z=z,
        level=_levels(base_table, touched),
        use=np.flatnonzero(varies & (not few)),
        signs=each("nonnegative", nonnegative, len(z)) > 0,
        penalty=penalty,
    )
    theta, gains = fit.solve(measured)
    exponents = np.zeros(len(z))
    exponents[fit.use] = theta
    dropped = tuple(called[k] for k in np.flatnonzero(~varies))
    return Fitted(
        exponents=MappingProxyType(dict(zip(called, exponents.tolist(), strict=True))),
        gains=gains,
        report=_report(fit, measured, parameters=parameters, dropped=dropped, few=few),
    )


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    """Return the names of the signals; default names where none are given."""
    called = [f"signal {k}" for k in range(count)] if names is None else list(names)
    if len(called) != count or len(set(called)) != len(called):
        raise InputError(f"names: {called} must be {count} different names")
    return called


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fit:
    """One regression, solved on all groups and on parts of them."""

    table: CostTable
    z: Floats
    level: Floats
    use: Longs
    signs: Bools
    penalty: float

    def sums(self, groups: Sequence[MeasuredGroup], columns: Sequence[int]) -> Sums:
        """Return the groups' sums over θ of the used signals and the log gains of `columns`."""
        units = np.concatenate([group.units for group in groups])
        sizes = np.array([len(group.units) for group in groups])
        column = np.repeat([group.format for group in groups], sizes)
        gain = (column[:, None] == np.asarray(columns)).astype(np.float64)
        return Sums(
            base=self.table.cost[units, column],
            features=np.hstack([self.z[np.ix_(self.use, units)].T, gain]),
            start=np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        )

    def solve(self, groups: Sequence[MeasuredGroup]) -> tuple[Floats, Floats]:
        """Return θ of the used signals and the gains of all columns, float64[F]."""
        columns = sorted({group.format for group in groups})
        target = np.log([group.kl for group in groups])
        count = len(self.use)
        coefficients = log_sums(
            self.sums(groups, columns),
            target,
            penalty=np.array([self.penalty] * count + [_FREE] * len(columns)),
            nonnegative=np.concatenate(
                [self.signs[self.use], np.zeros(len(columns), dtype=np.bool_)]
            ),
        )
        weights = np.bincount([group.format for group in groups])[columns]
        return coefficients[:count], self._gains(columns, coefficients[count:], weights)

    def _gains(self, columns: Sequence[int], log_gain: Floats, weights: Longs) -> Floats:
        from scipy.optimize import isotonic_regression

        order = np.argsort(self.level[columns], kind="stable")
        x = self.level[columns][order]
        y = isotonic_regression(x + log_gain[order], weights=weights[order]).x
        known = np.isfinite(self.level)
        gains = np.ones(len(self.level))
        gains[known] = np.exp(np.interp(self.level[known], x, y - x))
        return gains

    def predicted(self, groups: Sequence[MeasuredGroup], theta: Floats, gains: Floats) -> Floats:
        """Return log KL of groups, float64[N]."""
        logs, _ = self.sums(groups, ()).log(theta)
        return logs + np.log(gains[[group.format for group in groups]])


def _report(
    fit: _Fit,
    groups: Sequence[MeasuredGroup],
    *,
    parameters: int,
    dropped: tuple[str, ...],
    few: bool,
) -> FitReport:
    """Return how far a fit can be trusted, measured on groups left out of it."""
    folds = len(groups) if len(groups) <= _EACH else _FOLDS
    fallback = (
        f"{len(groups)} groups for {parameters} exponents and gains; exponents stay 0, only gains "
        "were fitted; measure more groups"
    )
    return FitReport(
        groups=len(groups),
        parameters=parameters,
        error=_left_out(fit, groups, folds),
        error_without=_left_out(replace(fit, use=fit.use[:0]), groups, folds),
        folds=folds,
        dropped=dropped,
        fallback=fallback if few else "",
    )


def _left_out(fit: _Fit, groups: Sequence[MeasuredGroup], folds: int) -> float:
    """Return the root mean square error of log KL over groups left out in turn."""
    if len(groups) < 2:
        return float("nan")
    order = np.random.default_rng(0).permutation(len(groups))
    total = 0.0
    for part in range(folds):
        out = set(order[part::folds].tolist())
        theta, gains = fit.solve([g for i, g in enumerate(groups) if i not in out])
        left = [groups[i] for i in sorted(out)]
        target = np.log([group.kl for group in left])
        total += float(((target - fit.predicted(left, theta, gains)) ** 2).sum())
    return float(np.sqrt(total / len(groups)))


def _levels(table: CostTable, touched: npt.NDArray[np.integer]) -> Floats:
    """Return the log of each column's mean cost over some units; NaN where that is 0 or unknown."""
    cost = table.cost[touched]
    known = np.isfinite(cost)
    mean = np.where(known, cost, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.log(np.where(mean > 0, mean, np.nan))


def checked_z(signals_z: npt.ArrayLike, count: int) -> Floats:
    """Return standardised signals as float64[K,U].

    Raises:
        InputError: the shape is wrong, or a number is not finite.
    """
    z = np.asarray(signals_z, dtype=np.float64)
    z = z.reshape(0, count) if not z.size else np.atleast_2d(z)
    if z.ndim != 2 or z.shape[1] != count or not np.isfinite(z).all():
        raise InputError(f"signals: shape {z.shape}, expected [signals, {count}], finite")
    return z


def _checked_group(
    table: CostTable,
    index: int,
    group: MeasuredGroup | tuple[npt.NDArray[np.integer], int, float],
    floor: float,
) -> MeasuredGroup:
    units, column, kl = np.asarray(group[0]), int(group[1]), float(group[2])
    if units.ndim != 1 or not units.size or units.dtype.kind not in "iu":
        raise InputError(f"groups[{index}]: units must be a list of at least one number")
    if units.min() < 0 or units.max() >= len(table.units):
        raise InputError(f"groups[{index}]: a unit is outside 0 to {len(table.units) - 1}")
    if not 0 <= column < len(table.formats):
        raise InputError(f"groups[{index}]: format {column} is not one of {len(table.formats)}")
    if not np.isfinite(kl):
        raise InputError(f"groups[{index}]: KL {kl} is not a finite number")
    total = float(table.cost[units, column].sum())
    if not (np.isfinite(total) and total > 0):
        raise InputError(
            f"groups[{index}]: its cost in {table.formats[column]} is {total:g}, so no gain can "
            "be fitted; measure groups in formats that round"
        )
    return MeasuredGroup(units, column, max(kl, floor))
