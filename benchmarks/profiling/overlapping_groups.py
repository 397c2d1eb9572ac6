"""Several groups in one measurement: random parts of them together, and their KLs solved for.

A group is some units in one format. Reading each alone takes one measurement a group; here each
reading changes a random part of the groups of one format, and the KLs of single groups are solved
for from the sums. That takes KL as additive, which is an approximation: on a small trained model
the singles add up to 0.7 of the truth at 2 bits and 0.4 at 1 bit (methods.md#small-models), and
single digits of per cent below about 0.05 nats a token. Readings above that are listed.

Fewer readings than groups do not determine them. What makes up for it is the prediction: the gain
of a group (true over predicted) is a product of a few factors, such as one for its format, its
layer and its projection, times what is left, which is taken as small. Where what is left is a few
per cent a third of the readings recovers all gains within 10 %. It need not be: on the bundled
Mixtral reference (Fisher costs, 48 groups, 1 to 4 bits) factors leave a deviation of about 0.2,
and 16 readings bring groups no nearer their own (median error 0.21 of log KL) than one gain for
each format does (0.23). `Decoded.left` and `Decoded.deviation` tell; read groups alone where they
are large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs, frozen
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.group_kl.regression import Sums, log_sums, ridge
from bitknap.progress import Progress

if TYPE_CHECKING:
    from bitknap.estimators.evidence.evidence import Evidence

# Nats a token up to which KLs are taken as additive.
ADDITIVE = 0.05
# KL below this, in nats a token, is rounding noise of float32 logits.
_FLOOR = 1e-9
# What `decode` chooses from: standard deviations of log gains around their factors.
_DEVIATIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Standard deviation of the log of a factor around 1.
_FACTOR = 1.0
# Least share of its prior that a solved KL keeps; a group does not cost nothing.
_LEAST = 0.01
# Ridges in a row, and the factor that one may move a solution by.
_RENEWALS, _STRIDE = 8, 2.0


class Group(NamedTuple):
    """Units brought to one format together, and the column of that format."""

    units: npt.NDArray[np.integer]
    format: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Design:
    """Which groups each measurement changes.

    Attributes:
        groups: the N groups.
        sets: bool[M,N]; all groups of one set have one format and no unit in common.
    """

    groups: tuple[Group, ...]
    sets: Bools

    def units(self, measurement: int) -> npt.NDArray[np.integer]:
        """Return the units that a measurement changes, sorted, int[n]."""
        members = np.flatnonzero(self.sets[measurement])
        return np.unique(np.concatenate([self.groups[i].units for i in members]))

    def format(self, measurement: int) -> int:
        """Return the column that a measurement brings its units to."""
        return self.groups[int(self.sets[measurement].argmax())].format


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoded:
    """The KL of every group, solved for.

    Attributes:
        kl: nats a token, above 0, float64[N].
        gains: `kl` over the predicted sum, float64[N].
        deviation: standard deviation of log `kl` left by the readings, float64[N], under the
            noise and the prior that were assumed.
        left: deviation of log gains around what the features say, as given or as found.
        unread: groups that no measurement changed; theirs is the prior alone.
        above: measurements that read more than `ADDITIVE`, where sums mislead.
    """

    kl: Floats
    gains: Floats
    deviation: Floats
    left: float
    unread: tuple[int, ...]
    above: tuple[int, ...]


def design(
    groups: Sequence[Group | tuple[npt.NDArray[np.integer], int]],
    measurements: int,
    seed: int = 0,
    *,
    predicted: npt.ArrayLike | None = None,
    ceiling: float = ADDITIVE,
) -> Design:
    """Return which groups to measure together.

    Formats get measurements in proportion to their groups, since a wide format's KL would drown
    beside a narrow one's. Those of one format are cut at random into halves, or into more parts
    where a half is predicted above the ceiling and there are enough measurements to read every
    part. What measurements are left read random parts of that size.

    Args:
        groups: (units, column) of each; groups of one column share no unit.
        measurements: how many to make; as many as groups reads each alone.
        seed: of the cuts.
        predicted: KL of each group in nats a token, float64[N]; halves when not given.
        ceiling: nats a token that one measurement should stay below.

    Raises:
        InputError: too few or too many measurements, or two groups of a column share a unit.
    """
    given = tuple(_checked(index, group) for index, group in enumerate(groups))
    columns = sorted({group.format for group in given})
    if not len(columns) <= measurements <= len(given):
        raise InputError(
            f"measurements: {measurements} is not from {len(columns)}, one a format, to "
            f"{len(given)}, one a group"
        )
    if not ceiling > 0:
        raise InputError(f"ceiling: {ceiling} must be above 0")
    sums = np.zeros(len(given)) if predicted is None else _positive("predicted", predicted, given)
    members = [np.flatnonzero([group.format == column for group in given]) for column in columns]
    for which in members:
        _check_apart(given, which)
    if measurements == len(given):
        return Design(groups=given, sets=_sealed(np.eye(len(given), dtype=np.bool_)))
    generator = np.random.default_rng(seed)
    sets = []
    for which, count in zip(members, _shared(members, measurements), strict=True):
        parts = int(min(max(2, np.ceil(sums[which].sum() / ceiling)), count, len(which)))
        for cut in _cuts(which, parts, count, generator):
            row = np.zeros(len(given), dtype=np.bool_)
            row[cut] = True
            sets.append(row)
    return Design(groups=given, sets=_sealed(np.array(sets)))


def _shared(members: Sequence[Longs], measurements: int) -> list[int]:
    """Return how many measurements each format gets: at least 1, at most one a group."""
    counts = [1] * len(members)
    for _ in range(measurements - len(members)):
        lacking = [
            len(which) / count if count < len(which) else 0.0
            for which, count in zip(members, counts, strict=True)
        ]
        counts[int(np.argmax(lacking))] += 1
    return counts


def _cuts(
    which: Longs, parts: int, count: int, generator: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    if count == len(which):
        return list(which[:, None])
    found = np.array_split(generator.permutation(which), parts)
    # Parts of a second whole cut would add up to what those of the first do.
    while len(found) < count:
        found.append(generator.permutation(which)[: max(1, len(which) // parts)])
    return found


def factors(units: Units, groups: Sequence[Group | tuple[npt.NDArray[np.integer], int]]) -> Floats:
    """Return what gains are regressed on: each group's format, layer and projection, float64[N,K].

    One column for each of them, 0 or 1; a group of several layers or projections has the shares.
    """
    layers, numbers = np.unique(units.layer, return_inverse=True)
    vocabularies: list[tuple[npt.NDArray[np.integer], int]]
    vocabularies = [(numbers, len(layers)), (units.projection, len(units.projections))]
    parts = [_by_format(groups)]
    for column, width in vocabularies:
        counts = [np.bincount(column[np.asarray(group[0])], minlength=width) for group in groups]
        parts.append(np.array(counts) / [[np.size(group[0])] for group in groups])
    return np.hstack(parts)


def _by_format(groups: Sequence[Group | tuple[npt.NDArray[np.integer], int]]) -> Floats:
    columns = np.array([group[1] for group in groups])
    marks: Floats = (columns[:, None] == np.unique(columns)).astype(np.float64)
    return marks


def readings(
    plan: Design, evidence: Evidence, formats: Sequence[Format], progress: Progress | None = None
) -> Floats:
    """Return the KL of every measurement of a design on the live model, nats a token, float64[M].

    Args:
        plan: the design.
        evidence: with a live model.
        formats: the columns that the groups refer to.
        progress: called with (what, done, of).

    Raises:
        InputError: the evidence has no live model to measure.
    """
    from bitknap.quantization.stacks.apply import replaced, stacks

    if evidence.replay is None:
        raise InputError("groups need the live model; calibrate it in this process")
    runs = stacks(evidence.units)
    found = np.zeros(len(plan.sets))
    for done in range(len(found)):
        if progress:
            progress("measure groups", done, len(found))
        changed = plan.units(done)
        format = formats[plan.format(done)]
        with contextlib.ExitStack() as stack:
            for run in runs:
                some = run[np.isin(run, changed)]
                if len(some):
                    rounded = partial(evidence.round_trip, some, format=format)
                    part = replaced(evidence.replay.model, evidence.layout, some, rounded)
                    stack.enter_context(part)
            found[done] = evidence.replay.kl(int(evidence.units.layer[changed].min()))
    return found


def decode(
    plan: Design,
    predicted: npt.ArrayLike,
    measured: npt.ArrayLike,
    *,
    features: npt.ArrayLike | None = None,
    noise: float = 0.03,
    deviation: float | None = None,
) -> Decoded:
    """Solve for the KL of every group from the KLs of overlapping sets.

    First the log gains are regressed on the features (Gauss-Newton on the logs of the sums, a
    ridge of width 1 around 0); with the predictions they give each group's prior. Then the KLs
    over their priors are found by non-negative least squares on relative errors of the readings,
    with a ridge that stands for the normal prior of their logs and is renewed at each solution.

    Args:
        plan: the design.
        predicted: Σ of the table's costs over each group, above 0, float64[N].
        measured: the readings, nats a token, float64[M].
        features: of each group, float64[N,K], such as `factors`; one for each format when not
            given.
        noise: relative error of a reading, from what is read and from not being additive.
        deviation: standard deviation of a group's log gain around what the features say; the
            most likely of a few from 0.01 to 0.5 when not given.

    Raises:
        InputError: shapes differ, a number is not finite, or a prediction is not above 0.
    """
    count = len(plan.groups)
    sums = _positive("predicted", predicted, plan.groups)
    read = frozen("measured", measured, np.float64, (len(plan.sets),))
    if not np.isfinite(read).all():
        raise InputError("measured: a reading is not a finite number")
    for name, value in (("noise", noise), ("deviation", deviation)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}: {value} is not a finite number above 0")
    x = _by_format(plan.groups) if features is None else np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) != count or not np.isfinite(x).all():
        raise InputError(f"features: shape {x.shape}, expected [{count}, features], finite")
    read = np.maximum(read, _FLOOR)
    row, member = np.nonzero(plan.sets)
    whole = Sums(
        base=sums[member],
        features=x[member],
        start=np.searchsorted(row, np.arange(len(plan.sets))),
    )
    # The scale of the predictions is free: only ratios of factors are drawn to 1.
    level = float(np.median(np.log(read) - whole.log(np.zeros(x.shape[1]))[0]))
    target = np.log(read) - level
    widths = _DEVIATIONS if deviation is None else (deviation,)
    fits = [_regressed(plan, whole, x, target, noise, width) for width in widths]
    _, width, log_gain = max(fits, key=lambda fit: fit[0])
    prior = sums * np.exp(level + log_gain)
    relative = plan.sets * prior / read[:, None]
    ratio = _ratios(relative, (noise / width) ** 2)
    kl = prior * ratio
    shares = relative * ratio
    information = shares.T @ shares / noise**2 + np.eye(count) / width**2
    return Decoded(
        kl=kl,
        left=width,
        gains=kl / sums,
        deviation=np.sqrt(np.diag(np.linalg.inv(information))),
        unread=tuple(np.flatnonzero(~plan.sets.any(axis=0)).tolist()),
        above=tuple(np.flatnonzero(read > ADDITIVE).tolist()),
    )


def _regressed(
    plan: Design, whole: Sums, x: Floats, target: Floats, noise: float, width: float
) -> tuple[float, float, Floats]:
    """Return the log evidence of a deviation, the deviation, and the groups' log gains."""
    # A reading's noise, and the deviations of its members, averaged.
    shared = np.hypot(noise, width / np.sqrt(plan.sets.sum(axis=1).mean()))
    factor = log_sums(whole, target, penalty=np.full(x.shape[1], (shared / _FACTOR) ** 2))
    found, slope = whole.log(factor)
    terms = np.zeros(plan.sets.shape)
    terms[plan.sets] = whole.base * np.exp(whole.features @ factor)
    shares = terms / terms.sum(axis=1, keepdims=True)
    # To first order in the logs everything is normal: factors, deviations and noise.
    cover = noise**2 * np.eye(len(target)) + width**2 * shares @ shares.T
    cover += _FACTOR**2 * slope @ slope.T
    around = target - found + slope @ factor
    volume = float(np.linalg.slogdet(cover)[1])
    evidence = -0.5 * (float(around @ np.linalg.solve(cover, around)) + volume)
    return evidence, width, x @ factor


def _ratios(relative: Floats, pull: float) -> Floats:
    """Return the x >= 0 with the least ‖relative x − 1‖² + pull ‖log x‖², by renewed ridges."""
    x = np.ones(relative.shape[1])
    for _ in range(_RENEWALS):
        # (log x)² to first order at the last solution x₀: ((x − x₀) / x₀ + log x₀)².
        goal, weight = x * (1 - np.log(x)), pull / x**2
        found = ridge(
            relative, np.ones(len(relative)), penalty=weight, prior=goal, nonnegative=True
        )
        x = np.clip(found, np.maximum(x / _STRIDE, _LEAST), x * _STRIDE)
    return x


def _checked(index: int, group: Group | tuple[npt.NDArray[np.integer], int]) -> Group:
    units = np.asarray(group[0])
    if units.ndim != 1 or not units.size or units.dtype.kind not in "iu":
        raise InputError(f"groups[{index}]: units must be a list of at least one number")
    return Group(units, int(group[1]))


def _check_apart(groups: Sequence[Group], which: Longs) -> None:
    units = np.concatenate([groups[i].units for i in which])
    values, counts = np.unique(units, return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"groups: unit {values[counts.argmax()]} is in two groups of format "
            f"{groups[which[0]].format}; groups of one format must share no unit"
        )


def _positive(name: str, values: npt.ArrayLike, groups: Sequence[Group]) -> Floats:
    found = frozen(name, values, np.float64, (len(groups),))
    if not (np.isfinite(found) & (found > 0)).all():
        index = int((~(np.isfinite(found) & (found > 0))).argmax())
        raise InputError(f"{name}[{index}]: {found[index]} is not a finite number above 0")
    return found


def _sealed(sets: Bools) -> Bools:
    sets.setflags(write=False)
    return sets
