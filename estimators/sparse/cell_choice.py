"""Which cells to measure, and when to stop measuring.

Three ways to pick anchors: by depth, middle layers densest, as published (FRI-MxMoE;
methods.md#fri-mxmoe); at random; and where the predictor is least sure. `grow` adds them until the
ranking of held-out cells stops improving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats, Longs, numbered
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.group_kl.regression import rank_correlation
from bitknap.estimators.sparse.cell_features import Antecedents, Predictor
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.progress import Progress

# Measures units [n] in the columns [n] of formats; yields places in these lists and losses in nats
# per token, in any order.
Measure = Callable[[Longs, Longs], Iterable[tuple[int, float]]]

# Growing stops unless two rounds add this much held-out rank correlation; Bitknap's choice.
_GAIN = 0.005
# Held-out cells, as a share of the budget, and their smallest useful number.
_HELD_OUT, _FEWEST = 0.1, 10


class Anchors(Protocol):
    """A way to pick the next cells to measure."""

    def pick(
        self, units: Units, free: Bools, spread: Floats | None, count: int, seed: int
    ) -> Longs:
        """Return up to `count` cells, unit × F + format, from those that are free.

        Args:
            units: U units.
            free: which cells may be measured, bool[U,F].
            spread: spread of the current prediction, float64[U,F]; None before the first one.
            count: maximum number of cells.
            seed: random seed.
        """
        ...


@dataclass(frozen=True, slots=True)
class ByDepth:
    """Picks whole experts, a share of each third of the depth, in all projections and formats.

    The published rule takes about every second expert of middle layers and every fourth of
    shallow ones; "sparser" for deep ones is taken as every sixth here. If the count
    differs from the sum of the shares, layers keep these proportions.

    Attributes:
        shares: shares of shallow, middle and deep layers' experts.
    """

    shares: tuple[float, float, float] = (1 / 4, 1 / 2, 1 / 6)

    def __post_init__(self) -> None:
        if len(self.shares) != 3 or not all(0 < share <= 1 for share in self.shares):
            raise InputError(f"shares: {self.shares} are not three numbers above 0 and up to 1")

    def pick(
        self, units: Units, free: Bools, spread: Floats | None, count: int, seed: int
    ) -> Longs:
        """Return cells of the next experts; any number of first experts has these proportions."""
        expert = numbered(units.layer, units.role, units.expert, units.block)
        layer_of = units.layer[np.unique(expert, return_index=True)[1]]
        generator = np.random.default_rng(seed)
        place = np.empty(len(layer_of))
        for layer in np.unique(layer_of):
            members = np.flatnonzero(layer_of == layer)
            # A random offset within the first step makes layers take turns.
            place[members] = generator.permutation(len(members)) + generator.random()
        place /= np.asarray(self.shares)[_third(layer_of)]
        rank = np.empty(len(place), dtype=np.int64)
        rank[np.argsort(place, kind="stable")] = np.arange(len(place))
        cells = np.flatnonzero(free)
        order = np.lexsort((cells, rank[expert[cells // free.shape[1]]]))
        picked: Longs = cells[order[:count]]
        return picked


@dataclass(frozen=True, slots=True)
class AtRandom:
    """Picks cells uniformly at random."""

    def pick(
        self, units: Units, free: Bools, spread: Floats | None, count: int, seed: int
    ) -> Longs:
        """Return free cells in random order."""
        cells = np.flatnonzero(free)
        drawn: Longs = np.random.default_rng(seed).permutation(cells)[:count]
        return drawn


@dataclass(frozen=True, slots=True)
class LeastSure:
    """Picks each unit's cell of largest spread, least certain units first; starts by depth.

    A round takes one cell per unit: its neighbours in the table are as uncertain and learn from it.
    """

    def pick(
        self, units: Units, free: Bools, spread: Floats | None, count: int, seed: int
    ) -> Longs:
        """Return the least certain cells; ties in random order."""
        if spread is None:
            return ByDepth().pick(units, free, None, count, seed)
        masked = np.where(free, spread, -np.inf)
        column = masked.argmax(axis=1)
        top = masked[np.arange(len(units)), column]
        drawn = np.random.default_rng(seed).permutation(len(units))
        order = drawn[np.argsort(-top[drawn], kind="stable")]
        order = order[np.isfinite(top[order])][:count]
        cells: Longs = order * free.shape[1] + column[order]
        return cells


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellSpace:
    """The cells of a model that can be measured: its units in some formats.

    Attributes:
        units: U units.
        formats: F formats; kept precisions cost nothing and are not measured.
        antecedents: antecedents of every cell.
        provenance: provenance of the samples.
        measurable: which units to measure, bool[U]; all when not given. An expert that no token
            reaches changes nothing, so measuring it says nothing.
    """

    units: Units
    formats: Sequence[Format]
    antecedents: Antecedents
    provenance: Mapping[str, Any]
    measurable: Bools | None = None

    def free(self) -> Bools:
        """Return which cells may be measured, bool[U,F]."""
        free = np.zeros((len(self.units), len(self.formats)), dtype=np.bool_)
        free[:, [f.kind != "keep" for f in self.formats]] = True
        if self.measurable is not None:
            free[~self.measurable] = False
        return free

    def samples(self, known: Mapping[int, float], cells: Longs) -> LossSamples:
        """Return measured cells, unit × F + format, as samples."""
        return LossSamples(
            units=self.units,
            formats=tuple(self.formats),
            unit=cells // len(self.formats),
            column=cells % len(self.formats),
            loss=np.array([known[cell] for cell in cells.tolist()]),
            provenance=self.provenance,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The number of cells to measure, and the way to pick them.

    Attributes:
        start: measurements before the first prediction, not counting held-out ones.
        step: measurements per round.
        stop: maximum number of measurements, including held-out ones.
        anchors: picks cells; at random if not given, since in separable tables single cells rank
            better than the same number of cells of whole experts.
        seed: random seed.
    """

    start: int
    step: int
    stop: int
    anchors: Anchors = field(default_factory=AtRandom)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "step", "stop"):
            whole(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grown:
    """The result of `grow`.

    Attributes:
        samples: all measurements, including held-out cells.
        held_out: the cells that no round learned from, unit × F + format, int64.
        spearman: rank correlation of prediction and measurement on held-out cells after each round.
        saturated: whether growing stopped by saturation, not because budget or cells ran out.
    """

    samples: LossSamples
    held_out: Longs
    spearman: tuple[float, ...]
    saturated: bool

    @property
    def measurements(self) -> int:
        """Number of cells that were measured."""
        return len(self.samples)


def grow(
    measure: Measure,
    space: CellSpace,
    predictor: Predictor,
    growth: Growth,
    *,
    progress: Progress | None = None,
) -> Grown:
    """Measure cells until the held-out rank correlation saturates or the budget is used.

    The correlation saturates when two rounds together add less than 0.005. A tenth of the budget,
    at least 10 cells, is drawn at random and measured first as the held-out cells.

    Args:
        measure: measures cells; all those of a round together.
        space: the cells.
        predictor: learns from the measurements.
        growth: number of cells to measure, and the way to pick them.
        progress: called with (what, done, of).

    Raises:
        InputError: the budget is too small for the held-out cells and the start.
    """
    free = space.free()
    budget = min(growth.stop, int(free.sum()))
    judged = _judged(growth, budget)
    known: dict[int, float] = {}

    def take(anchors: Anchors, spread: Floats | None, count: int) -> Longs:
        cells = anchors.pick(space.units, free, spread, count, growth.seed)
        width = len(space.formats)
        for place, loss in measure(cells // width, cells % width):
            known[int(cells[place])] = loss
            if progress:
                progress("measure cells", len(known), budget)
        free.ravel()[cells] = False
        return cells

    held_out = take(AtRandom(), None, judged)
    learned = take(growth.anchors, None, growth.start)
    scores: list[float] = []
    truth = np.array([known[cell] for cell in held_out.tolist()])
    while True:
        fitted = predictor.fit(space.samples(known, learned), space.antecedents)
        mean, spread = fitted.predict(space.antecedents)
        scores.append(float(np.nan_to_num(rank_correlation(mean.ravel()[held_out], truth))))
        saturated = len(scores) > 2 and scores[-1] - scores[-3] < _GAIN
        count = min(growth.step, budget - len(known))
        if saturated or not count:
            break
        learned = np.concatenate([learned, take(growth.anchors, spread, count)])
    return Grown(
        samples=space.samples(known, np.array(sorted(known), dtype=np.int64)),
        held_out=held_out,
        spearman=tuple(scores),
        saturated=saturated,
    )


def _judged(growth: Growth, budget: int) -> int:
    """Return the number of held-out cells, after checking that enough are left for the start."""
    judged = max(_FEWEST, round(_HELD_OUT * budget))
    if judged + growth.start > budget:
        raise InputError(
            f"stop: {budget} measurements are fewer than {judged} held out and {growth.start} to "
            "start with; raise stop or lower start"
        )
    return judged


def _third(layer: Any) -> Longs:
    """Return 0, 1 or 2 for layers of the first, second and last third of the depth."""
    place = np.unique(layer, return_inverse=True)[1]
    thirds: Longs = (place * 3 // (int(place.max()) + 1)).astype(np.int64)
    return thirds
