"""Fuzzy rules from sparse samples: each measured cell is a rule, other cells are interpolated.

There are two inferences. "idw" is that of FRI-MxMoE (ACL 2026, 2026.acl-long.982): the nearest
rules by inverse distance, crisp consequents, never beyond the measured range
(methods.md#fri-mxmoe). "tfri" is the scale-and-move interpolation of Huang and Shen on log losses
(methods.md#fuzzy-rules), which extrapolates and whose support is an uncertainty. Neighbours, eps,
widths and the scale of an antecedent are not given in the paper and are Bitknap's choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Longs, numbered
from bitknap.allocation.problem.checks import whole
from bitknap.estimators.sparse.cell_features import Antecedents, Fitted, nats
from bitknap.estimators.sparse.fuzzy_sets import deviation, representative, scale_and_move, triangle
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.scaled_features import Frame, equal, learned, standardised
from bitknap.names import check_name

# Avoids division by zero at a rule's own place (Bitknap's choice; the paper gives no value for
# eps).
_EPS = 1e-6
# Half the support of a rule's antecedent sets, as a share of the antecedent's range.
_WIDTH = 0.1
_CHUNK = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzyRules:
    """Rules interpolated to every cell.

    Attributes:
        kind: "tfri", or "idw" as published.
        neighbours: number of rules that are combined.
        weighted: for "tfri" only: weight antecedents by slopes fitted to the samples, and make
            categories antecedents with a fitted effect, so that gate, up and down share rules.
            Otherwise all antecedents have equal weight, as in Huang and Shen, and categories only
            count in distances.
    """

    kind: Literal["tfri", "idw"] = "tfri"
    neighbours: int = 8
    weighted: bool = True

    def __post_init__(self) -> None:
        check_name("kind", self.kind, ("tfri", "idw"))
        whole("neighbours", self.neighbours, 1)

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> Fitted:
        """Make one rule from every sample.

        Args:
            samples: measured losses.
            antecedents: antecedents of the same units and formats.
            target: residual logarithms to learn instead of the loss, float64[N]. Without them
                "tfri" learns log losses and "idw" losses.
        """
        points = antecedents.of(samples)
        if self.kind == "idw":
            values = samples.loss if target is None else target
            frame = standardised(points, antecedents)
            return _Nearest(
                frame=frame,
                points=frame.place(points),
                values=values,
                neighbours=min(self.neighbours, len(samples)),
                logarithmic=target is not None,
                floor=samples.floor,
            )
        values = samples.logs if target is None else target
        make = learned if self.weighted else equal
        frame = make(points, antecedents, values)
        return _ScaleAndMove.of(frame, points, values, samples, self.neighbours)


def _nearest(
    rules: Floats, queries: Floats, count: int, own: Longs | None = None
) -> Iterator[tuple[slice, Floats, Longs]]:
    """Yield (queries, distances [Q,n], rules [Q,n]) a chunk at a time, nearest first.

    Args:
        rules: scaled coordinates, [N,C].
        queries: scaled coordinates, [Q,C].
        count: number of rules, at most N.
        own: groups, int64[N], if the queries are the rules: no rule answers for its own group.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(rules) if rules.shape[1] else None
    wanted = count if own is None else min(len(rules), count + int(np.bincount(own).max()))
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(queries)))
        size = part.stop - part.start
        if tree is None:  # all rules look alike
            near = np.tile(np.arange(wanted), (size, 1))
            distance = np.zeros(near.shape)
        else:
            distance, near = tree.query(queries[part], k=np.arange(1, wanted + 1))
        if own is not None:
            order = np.argsort(own[near] == own[part, None], axis=1, kind="stable")[:, :count]
            distance = np.take_along_axis(distance, order, axis=1)
            near = np.take_along_axis(near, order, axis=1)
        yield part, distance, near


def _inverse(distance: Floats, axis: int) -> Floats:
    """Return weights 1 / distance that sum to 1; rules at distance 0 get all the weight."""
    hit = distance <= 0
    weight = np.where(hit.any(axis=axis, keepdims=True), hit, 1 / np.where(hit, 1, distance))
    shares: Floats = weight / weight.sum(axis=axis, keepdims=True)
    return shares


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Nearest:
    """Published inference: y = Σ w y / Σ w over the nearest rules, w = 1 / (D + eps)."""

    frame: Frame
    points: Floats
    values: Floats
    neighbours: int
    logarithmic: bool
    floor: float

    def _answer(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        shape = antecedents.values.shape
        place = self.frame.place(antecedents.values.reshape(-1, shape[2])) * self.frame.distance
        mean, spread = np.empty(len(place)), np.empty(len(place))
        rules = self.points * self.frame.distance
        for part, distance, near in _nearest(rules, place, self.neighbours):
            weight = 1 / (distance + _EPS)
            weight /= weight.sum(axis=1, keepdims=True)
            mean[part] = (weight * self.values[near]).sum(axis=1)
            away = self.values[near] - mean[part, None]
            spread[part] = np.sqrt((weight * away**2).sum(axis=1))
        return mean.reshape(shape[:2]), spread.reshape(shape[:2])

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and deviation of the logarithm."""
        mean, spread = self._answer(antecedents)
        if self.logarithmic:
            return mean, spread
        kept = np.maximum(mean, self.floor)
        return np.log(kept), np.log1p(spread / kept)

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return the weighted mean of the nearest rules, and their weighted deviation."""
        mean, spread = self._answer(antecedents)
        return nats(mean, spread) if self.logarithmic else (np.maximum(mean, self.floor), spread)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _ScaleAndMove:
    """T-FRI: rules as triangular sets; an observation is wider the further it is from them.

    Attributes:
        frame: maps antecedents to coordinates.
        points: coordinates of the rules, [N,C+S].
        consequents: sets of the learned value, [N,3].
        neighbours: number of rules that are combined.
    """

    frame: Frame
    points: Floats
    consequents: Floats
    neighbours: int

    @classmethod
    def of(
        cls, frame: Frame, points: Floats, values: Floats, samples: LossSamples, neighbours: int
    ) -> _ScaleAndMove:
        """Build rules whose consequents are as wide as their errors in predicting each other.

        A set's deviation combines the error of its measurement with the root mean square difference
        between the prediction of the nearest rules of other units and the rule's own value.
        """
        place = frame.place(points)
        crisp = cls(
            frame=frame, points=place, consequents=triangle(values, 0.0), neighbours=neighbours
        )
        rough = 0.0
        own = numbered(samples.unit).astype(np.int64)
        if own.any():
            left_out = representative(crisp.sets(place, own)) - values
            rough = float(np.mean(left_out**2))
        # A symmetric triangle of half-width h has standard deviation h / sqrt(6).
        half = np.sqrt(6 * (rough + samples.log_errors**2))
        return cls(
            frame=frame, points=place, consequents=triangle(values, half), neighbours=neighbours
        )

    def sets(self, place: Floats, own: Longs | None = None) -> Floats:
        """Return the consequent at coordinates [Q,C+S], sets [Q,3].

        Args:
            place: coordinates at which to predict.
            own: groups, int64[N], if the places are the rules': no rule answers for its own group.
        """
        frame, inner = self.frame, self.frame.inner
        others = len(self.points) - (0 if own is None else int(np.bincount(own).max()))
        count = max(1, min(self.neighbours, others))
        reach = np.abs(frame.slopes) * frame.ranges
        total = reach.sum() if frame.whole else 0.0
        share = reach / total if total > 0 else np.full(inner, 1 / max(1, inner))
        answers = np.empty((len(place), 3))
        rules = self.points * frame.distance
        for part, distance, near in _nearest(rules, place * frame.distance, count, own):
            weight = _inverse(distance, 1)
            if not inner:
                answers[part] = np.einsum("qn,qnk->qk", weight, self.consequents[near])
                continue
            each = np.broadcast_to(weight[:, :, None], (*weight.shape, inner))
            at, known = place[part, :inner], self.points[near][:, :, :inner]
            away = np.abs(known - at[:, None])
            if not frame.whole:
                hit = np.any(distance <= 0, axis=1, keepdims=True)
                each = np.where(hit[:, :, None], each, _inverse(away, 1))
            half = _WIDTH * frame.ranges
            answers[part] = scale_and_move(
                triangle(known, half),
                self.consequents[near],
                triangle(at, half + away.min(axis=1)),
                each,
                frame.slopes,
                share,
            )
        return answers

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return the consequents' representative values and deviations."""
        shape = antecedents.values.shape
        sets = self.sets(self.frame.place(antecedents.values.reshape(-1, shape[2])))
        mean, spread = representative(sets), deviation(sets)
        return mean.reshape(shape[:2]), spread.reshape(shape[:2])

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return the loss and its spread."""
        return nats(*self.logs(antecedents))
