"""Antecedents as coordinates of fuzzy rules: oriented, scaled for distances, with slopes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.estimators.sparse.cell_features import Antecedents

# Minimum weight of an antecedent in distances, as a share of the largest weight, so that an
# antecedent with a fitted slope of 0 still separates rules.
_LEAST = 0.1
# Ridge per sample, in squared ranges; keeps the slopes of collinear antecedents finite.
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """How antecedents become coordinates: C oriented numbers, and S that only count in distances.

    Attributes:
        numbers: which antecedents are numbers that vary, int64[C1].
        classes: for every category the antecedent, its known values, and a table [values + 1, K] of
            coordinates, whose last row is for values without a sample.
        slopes: change of the learned value per unit of each of the C, [C].
        distance: factor of every coordinate in distances, [C + S].
        ranges: ranges of the C over the samples, [C].
        whole: whether a rule has one weight, by total distance; otherwise each antecedent has its
            own weight, by its own distance.
    """

    numbers: Longs
    classes: tuple[tuple[int, Floats, Floats], ...]
    slopes: Floats
    distance: Floats
    ranges: Floats
    whole: bool = False

    def place(self, points: Floats) -> Floats:
        """Return coordinates [Q,C+S] of points [Q,D]."""
        parts = [points[:, self.numbers]]
        for which, known, table in self.classes:
            at = np.minimum(np.searchsorted(known, points[:, which]), len(known) - 1)
            at = np.where(known[at] == points[:, which], at, len(known))
            parts.append(table[at])
        return np.concatenate(parts, axis=1)

    @property
    def inner(self) -> int:
        """Number of coordinates that shift a consequent; the others only count in distances."""
        return len(self.slopes)


def _varying(points: Floats, antecedents: Antecedents) -> Longs:
    numbers = ~antecedents.mask(antecedents.discrete) & (np.ptp(points, axis=0) > 0)
    return np.flatnonzero(numbers).astype(np.int64)


def _one_hot(points: Floats, antecedents: Antecedents) -> list[tuple[int, Floats, Floats]]:
    """Return categories as points at distance 1 from each other and from unknown values."""
    categories = []
    for which in np.flatnonzero(antecedents.mask(antecedents.discrete)):
        known = np.unique(points[:, which])
        categories.append((int(which), known, np.eye(len(known) + 1) / np.sqrt(2)))
    return categories


def standardised(points: Floats, antecedents: Antecedents) -> Frame:
    """Return the published frame: numbers over their standard deviation, categories 0 or 1."""
    numbers, classes = _varying(points, antecedents), _one_hot(points, antecedents)
    extra = sum(table.shape[1] for _, _, table in classes)
    return Frame(
        numbers=numbers,
        classes=tuple(classes),
        slopes=np.zeros(len(numbers)),
        distance=np.concatenate([1 / points[:, numbers].std(axis=0), np.ones(extra)]),
        ranges=np.ptp(points[:, numbers], axis=0),
    )


def equal(points: Floats, antecedents: Antecedents, values: Floats) -> Frame:
    """Return Huang and Shen's frame: equal weights of antecedents, relative to their ranges.

    A free antecedent takes the sign of its correlation with the values.
    """
    numbers, classes = _varying(points, antecedents), _one_hot(points, antecedents)
    ranges = np.ptp(points[:, numbers], axis=0)
    centred = points[:, numbers] - points[:, numbers].mean(axis=0)
    sign = np.where(centred.T @ (values - values.mean()) < 0, -1.0, 1.0)
    sign[~antecedents.mask(antecedents.free)[numbers]] = 1.0
    extra = sum(table.shape[1] for _, _, table in classes)
    return Frame(
        numbers=numbers,
        classes=tuple(classes),
        slopes=sign * np.ptp(values) / (ranges * max(1, len(numbers))),
        distance=np.concatenate([1 / ranges, np.ones(extra)]),
        ranges=ranges,
    )


def learned(points: Floats, antecedents: Antecedents, values: Floats) -> Frame:
    """Return the frame of weighted T-FRI: regression slopes, not negative unless free."""
    from scipy.optimize import lsq_linear

    numbers = _varying(points, antecedents)
    ranges = np.ptp(points[:, numbers], axis=0)
    classes = _one_hot(points, antecedents)
    hot = [(points[:, which, None] == known).astype(float) for which, known, _ in classes]
    design = np.concatenate([points[:, numbers] / ranges, *hot], axis=1)
    design = design - design.mean(axis=0)
    width = design.shape[1]
    low = np.full(width, -np.inf)
    low[: len(numbers)][~antecedents.mask(antecedents.free)[numbers]] = 0.0
    ridge = np.sqrt(_RIDGE * len(values)) * np.eye(width)
    solution = loose = np.zeros(width)
    if width:
        left = np.concatenate([design, ridge])
        right = np.concatenate([values - values.mean(), np.zeros(width)])
        solution = lsq_linear(left, right, bounds=(low, np.inf)).x
        loose = np.linalg.lstsq(left, right, rcond=None)[0]
    slopes, at = [solution[: len(numbers)] / ranges], len(numbers)
    spans, tables = [ranges], []
    for which, known, _ in classes:
        effect = solution[at : at + len(known)]
        at += len(known)
        if np.ptp(effect) > 0:
            tables.append((which, known, np.append(effect, effect.mean())[:, None]))
            slopes.append(np.ones(1))
            spans.append(np.array([np.ptp(effect)]))
    slope, span = np.concatenate(slopes), np.concatenate(spans)
    reach = np.abs(slope) * span
    # An antecedent with the wrong sign has slope 0, but still separates rules.
    reach[: len(numbers)] = np.maximum(reach[: len(numbers)], np.abs(loose[: len(numbers)]))
    least = _LEAST * reach.max() if reach.any() else 1.0
    return Frame(
        numbers=numbers,
        classes=tuple(tables),
        slopes=slope,
        distance=np.maximum(reach, least) / span,
        ranges=span,
        whole=True,
    )
