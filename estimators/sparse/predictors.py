"""Simpler ways to fill a table from samples, which fuzzy rules have to beat.

The log-linear model log c = layer × format + unit has 3 to 6 % error on the published Mixtral table
(methods.md#log-linear), so it is the baseline. `Residual` puts any other predictor on top of it.
The published inverse distance is `FuzzyRules(kind="idw")`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs, numbered
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.sparse.cell_features import Antecedents, Predictor, nats
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples

_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinear:
    """Ridge on log loss = layer × format + projection × format + unit.

    Penalties are ratios of variances, noise over effect: 0.1 fits effects whose deviation
    is about three times the noise's. Layers form a random walk: the step from each to the next is
    shrunk, so a layer without samples lies between its neighbours. With fewer samples than
    effects the ridge still has a unique solution: other effects without samples are 0, so a unit
    without samples gets the curves of its layer and projection.

    Attributes:
        main: penalty of formats, layers and projections.
        interaction: penalty of layer × format and of projection × format.
        unit: penalty of a unit's own effect.
    """

    main: float = 0.01
    interaction: float = 0.1
    unit: float = 0.1

    def __post_init__(self) -> None:
        for name in ("main", "interaction", "unit"):
            if not number(name, getattr(self, name)) > 0:
                raise InputError(
                    f"{name}: {getattr(self, name)} is not above 0; use 1e-6 for almost no "
                    "shrinkage"
                )

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> FittedLogLinear:
        """Fit the effects; the antecedents are not used.

        Args:
            samples: measured losses.
            antecedents: antecedents of the same units and formats.
            target: values to learn instead of log losses, float64[N].
        """
        antecedents.of(samples)
        values = samples.logs if target is None else target
        blocks = _blocks(samples.units, samples.unit, samples.column, len(samples.formats))

        def learn(kept: Bools) -> Floats:
            mean, *parts = self._solve(blocks, values, kept)
            terms = [part[block.code] for part, block in zip(parts, blocks, strict=True)]
            predicted: Floats = mean + np.sum(terms, axis=0)
            return predicted

        groups = (np.arange(len(values)), samples.unit, samples.units.layer[samples.unit])
        deviations = [_rms(left_out(values, numbered(group), learn)) for group in groups]
        return FittedLogLinear(
            samples=samples,
            coefficients=self._solve(blocks, values, np.ones(len(values), dtype=np.bool_)),
            deviations=np.maximum.accumulate(deviations),
            note=_note(len(samples), sum(len(np.unique(block.code)) for block in blocks)),
        )

    def _solve(self, blocks: Sequence[_Block], values: Floats, kept: Bools) -> tuple[Floats, ...]:
        """Return the mean [1] and the coefficients of every block.

        Unit effects, the only ones that grow with the samples, are eliminated first: with one
        column a unit, their part of the normal equations is diagonal.
        """
        from scipy.sparse import csr_array, hstack

        penalty = {"main": self.main, "interaction": self.interaction}
        scales = [1 / np.sqrt(penalty[block.kind]) for block in blocks[:-1]]
        *columns, own = (_columns(block, kept) for block in blocks)
        # A penalised effect is an effect of penalty 1 on a scaled column.
        design = hstack([s * c for s, c in zip(scales, columns, strict=True)]).tocsr()
        mean = values[kept].mean()
        centred = values[kept] - mean
        share = 1 / (self.unit + np.bincount(blocks[-1].code[kept], minlength=blocks[-1].size))
        across = csr_array(own.T @ design)
        gram = design.T @ design - across.T @ (across * share[:, None])
        right = design.T @ centred - across.T @ (share * (own.T @ centred))
        solution = np.linalg.solve(gram.toarray() + np.eye(len(right)), right)
        parts = [np.array([mean])]
        cuts = np.cumsum([block.size for block in blocks[:-2]])
        for block, scale, part in zip(blocks, scales, np.split(solution, cuts), strict=False):
            parts.append(scale * (np.cumsum(part) if block.walks else part))
        return (*parts, share * (own.T @ (centred - design @ solution)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedLogLinear:
    """Effects of a `LogLinear`.

    Attributes:
        samples: the samples that were fitted.
        coefficients: the mean, and the blocks of effects.
        deviations: cross-validated deviation of the logarithm for units with samples, for other
            units of layers with samples, and for other layers.
        note: a warning if there are fewer samples than effects, else empty.
    """

    samples: LossSamples
    coefficients: tuple[Floats, ...]
    deviations: Floats
    note: str

    def shared(self) -> Floats:
        """Return the logarithm of every cell without its unit's own effect, float64[U,F]."""
        units, width = self.samples.units, len(self.samples.formats)
        unit = np.repeat(np.arange(len(units)), width)
        column = np.tile(np.arange(width), len(units))
        mean, *parts = self.coefficients
        logs = np.full(len(unit), mean[0])
        for block, part in zip(_blocks(units, unit, column, width), parts, strict=True):
            if block.kind != "unit":
                logs += part[block.code]
        return logs.reshape(len(units), width)

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and deviation of the logarithm."""
        mean = self.shared() + self.coefficients[-1][:, None]
        return mean, np.broadcast_to(self.deviations[self.distance()][:, None], mean.shape)

    def distance(self) -> Longs:
        """Return 0 for units with samples, 1 for others in layers with samples, 2 for the rest."""
        seen, layer = self.samples.seen, self.samples.units.layer
        return np.where(seen, 0, np.where(np.isin(layer, layer[seen]), 1, 2))

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return loss and spread."""
        return nats(*self.logs(antecedents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """The log-linear curve of each layer and projection, and a predictor of its residuals.

    Units with samples use their own fitted effect; for the others the inner predictor estimates it
    from their antecedents.

    Attributes:
        inner: learns each sample's log loss minus the curve.
        base: fits the curves and the effects of measured units.
    """

    inner: Predictor = field(default_factory=FuzzyRules)
    base: LogLinear = field(default_factory=LogLinear)

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> FittedResidual:
        """Fit the curves, then the inner predictor to the residuals."""
        values = samples.logs if target is None else target
        base = self.base.fit(samples, antecedents, values)
        left = values - base.shared()[samples.unit, samples.column]
        return FittedResidual(base=base, inner=self.inner.fit(samples, antecedents, left))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedResidual:
    """A fitted base, and a fitted predictor of its residuals."""

    base: FittedLogLinear
    inner: Any

    @property
    def note(self) -> str:
        """The note of the base."""
        return self.base.note

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and deviation of the logarithm."""
        known, spread = self.base.logs(antecedents)
        left, unsure = self.inner.logs(antecedents)
        seen = self.base.samples.seen[:, None]
        # The inner predictor ignores the error of the curve of a layer without samples.
        beyond = np.where(self.base.distance() == 2, self.base.deviations[2], 0.0)
        unsure = np.hypot(unsure, beyond[:, None])
        return np.where(seen, known, self.base.shared() + left), np.where(seen, spread, unsure)

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return loss and spread."""
        return nats(*self.logs(antecedents))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientBoosting:
    """Boosted regression trees on the antecedents, by scikit-learn.

    Attributes:
        trees: number of trees.
        depth: depth of each tree.
        rate: share of each tree's prediction that is added.
        seed: random seed of ties between splits.
    """

    trees: int = 200
    depth: int = 3
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        whole("trees", self.trees, 1)
        whole("depth", self.depth, 1)
        number("rate", self.rate, 0, 1)

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> FittedTrees:
        """Grow the trees.

        Raises:
            InputError: scikit-learn is not installed.
        """
        points = antecedents.of(samples)
        values = samples.logs if target is None else target

        def learn(kept: Bools) -> Floats:
            predicted: Floats = self._grown(points[kept], values[kept]).predict(points)
            return predicted

        return FittedTrees(
            trees=self._grown(points, values),
            deviation=_rms(left_out(values, numbered(samples.unit), learn)),
        )

    def _grown(self, points: Floats, values: Floats) -> Any:
        try:
            ensemble = importlib.import_module("sklearn.ensemble")
        except ImportError:
            raise InputError(
                "gradient boosting needs scikit-learn, which is not installed; "
                "pip install scikit-learn, or use LogLinear or FuzzyRules"
            ) from None
        trees = ensemble.GradientBoostingRegressor(
            n_estimators=self.trees,
            max_depth=self.depth,
            learning_rate=self.rate,
            random_state=self.seed,
        )
        return trees.fit(points, values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedTrees:
    """Fitted trees, and the cross-validated deviation of left-out units."""

    trees: Any
    deviation: float

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and deviation of the logarithm."""
        shape = antecedents.values.shape
        mean = self.trees.predict(antecedents.values.reshape(-1, shape[2])).reshape(shape[:2])
        return mean, np.full(mean.shape, self.deviation)

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return loss and spread."""
        return nats(*self.logs(antecedents))


def left_out(
    values: Floats, groups: npt.NDArray[np.integer[Any]], learn: Callable[[Bools], Floats]
) -> Floats:
    """Return the prediction of each value without its fold, minus the value; float64[N].

    Args:
        values: float64[N].
        groups: group of every value, 0, 1, 2, …; a group is left out as a whole.
        learn: maps the mask of usable values to predictions of all values.
    """
    count = int(groups.max()) + 1
    if count < 2:
        centred: Floats = values.mean() - values
        return centred
    folds = min(_FOLDS, count)
    differences = np.empty(len(values))
    # Groups are ordered by layer; a fixed shuffle spreads layers over the folds.
    fold = (np.random.default_rng(0).permutation(count) % folds)[groups]
    for out in range(folds):
        mine = fold == out
        differences[mine] = learn(~mine)[mine] - values[mine]
    return differences


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _note(samples: int, effects: int) -> str:
    if samples >= effects:
        return ""
    return f"{samples} samples for {effects} effects: the ridge shrinks those it cannot tell apart"


class _Block(NamedTuple):
    """A block of effects: penalty, each cell's effect, number of effects, whether they walk."""

    kind: str
    code: Longs
    size: int
    walks: bool = False


def _columns(block: _Block, kept: Bools) -> Any:
    """Return the columns of a block for the kept cells, sparse [cells, size]."""
    from scipy.sparse import csr_array

    code = block.code[kept]
    shape = (len(code), block.size)
    one = csr_array((np.ones(len(code)), (np.arange(len(code)), code)), shape=shape)
    return csr_array(one @ np.tri(block.size)) if block.walks else one


def _blocks(units: Units, unit: Longs, column: Longs, width: int) -> list[_Block]:
    """Return the blocks of effects of cells; the units' own effects are last."""
    layer = np.unique(units.layer, return_inverse=True)[1]
    sort = numbered(units.role, units.projection).astype(np.int64)
    layers, sorts = int(layer.max()) + 1, int(sort.max()) + 1
    return [
        _Block("main", column, width),
        _Block("main", layer[unit], layers, walks=True),
        _Block("main", sort[unit], sorts),
        _Block("interaction", layer[unit] * width + column, layers * width),
        _Block("interaction", sort[unit] * width + column, sorts * width),
        _Block("unit", unit, len(units)),
    ]
