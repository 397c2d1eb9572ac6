"""Evolutionary search by level switches, as in EvoPress (arXiv 2410.14649), for comparison.

Each generation mutates the best plan: some units go one level up and others one down, so that the
plan stays within its limits. Offspring are selected in stages: all on the first part of a text, the
best quarter on the whole text; the best one replaces its parent if its loss is lower. The costs in
the problem are not used, except to see which formats are allowed.

Not reproduced: stages are the parts of one text, the authors' grow in tokens. There is one start,
where Algorithm 1 takes the fittest of several. Offspring may repeat; the authors' code draws again,
also for too many switches or too few bits.

Source: Sieberling et al., EvoPress, ICML 2025, arXiv 2410.14649, and its code. Algorithm 1 is the
search, as an account of the paper gives it; equation numbers are not given: the paper's text was
not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.refinement.history import Measure
from bitknap.errors import InputError
from bitknap.progress import Progress

# Offspring per generation, one in how many is measured on the whole text, and most switches.
_OFFSPRING, _SHARE, _SWITCHES = 16, 4, 3
# Attempts at down-switches to compensate for up-switches.
_TRIES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Search by mutation and selection only.

    Attributes:
        parts: measures of the parts of a text.
        evaluations: number of plans to measure, fully or partly.
        start: initial choice of each unit; two neighbouring levels, at random, when not given.
        seed: the random seed.
        progress: called with ("evolution", done, of).
    """

    parts: tuple[Measure, ...]
    evaluations: int = 640
    start: tuple[int, ...] | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError(
                "parts: the list is empty; give a measure of at least one part of a text"
            )
        if whole("evaluations", self.evaluations) < 1:
            raise InputError(f"evaluations: {self.evaluations} is below 1")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "evolution"

    def answer(self, problem: Problem) -> Answer:
        """Return the fittest plan; the only bound is that costs are not below 0."""
        generator = np.random.default_rng(self.seed)
        levels = _Levels(problem)
        best = levels.smallest()
        if not levels.fit(best):
            return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
        if self.start is None:
            best = _filled(levels, best, generator)
        else:
            first = np.unique(problem.row_of, return_index=True)[1]
            best = levels.of(np.asarray(self.start)[first])
        loss, done = self._loss(problem, levels, best), 1
        while done < self.evaluations:
            if self.progress:
                self.progress("evolution", done, self.evaluations)
            count = min(_OFFSPRING, self.evaluations - done)
            offspring = [_mutated(levels, best, generator) for _ in range(count)]
            done += count
            early = [self.parts[0](problem.expand(levels.choice(one))).mean() for one in offspring]
            for at in np.argsort(early, kind="stable")[: max(1, count // _SHARE)]:
                whole_loss = self._loss(problem, levels, offspring[at])
                if whole_loss < loss:
                    best, loss = offspring[at], whole_loss
        return Answer(choice=levels.choice(best), bound=0.0, status=Status.FEASIBLE)

    def _loss(self, problem: Problem, levels: _Levels, place: Longs) -> float:
        choice = problem.expand(levels.choice(place))
        return float(np.concatenate([part(choice) for part in self.parts]).mean())


class _Levels:
    """The allowed formats of each row from small to large; a place is an index into them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        finite = np.isfinite(problem.bounds)
        self.weights, self.bounds = problem.weights[finite], problem.bounds[finite]
        size = self.weights.sum(0) if len(self.weights) else np.zeros(problem.cost.shape)
        size = np.where(np.isfinite(problem.cost), size, np.inf)
        self.order = np.argsort(size, axis=1, kind="stable")
        self.count = np.isfinite(size).sum(axis=1)

    def smallest(self) -> Longs:
        return np.zeros(len(self.order), dtype=np.int64)

    def of(self, choice: Longs) -> Longs:
        places: Longs = np.argmax(self.order == choice[:, None], axis=1)
        return places

    def choice(self, place: Longs) -> Longs:
        columns: Longs = self.order[np.arange(len(place)), place]
        return columns

    def used(self, place: Longs) -> Floats:
        amounts: Floats = self.weights[:, np.arange(len(place)), self.choice(place)].sum(1)
        return amounts

    def fit(self, place: Longs) -> bool:
        return bool((self.used(place) <= self.bounds).all())


def _filled(levels: _Levels, place: Longs, generator: np.random.Generator) -> Longs:
    """Raise random rows of the lowest level by one while they fit, for a nearly uniform recipe."""
    place = place.copy()
    free = np.ones(len(place), dtype=np.bool_)
    while free.any():
        lowest = np.flatnonzero(free & (place == place[free].min()))
        row = int(generator.choice(lowest))
        place[row] += 1
        if place[row] >= levels.count[row] or not levels.fit(place):
            place[row] -= 1
            free[row] = False
    return place


def _mutated(levels: _Levels, place: Longs, generator: np.random.Generator) -> Longs:
    """Raise some rows by one level and lower as many others as needed to fit."""
    changed = place.copy()
    switches = int(min(generator.integers(1, _SWITCHES + 1, 2)))
    free = np.flatnonzero(changed + 1 < levels.count)
    raised = generator.choice(free, min(switches, len(free)), replace=False)
    changed[raised] += 1
    others = np.setdiff1d(np.arange(len(place)), raised)
    for _ in range(_TRIES):
        if levels.fit(changed):
            break
        row = generator.choice(others) if len(others) else int(raised[0])
        changed[row] = max(changed[row] - 1, 0)
    return changed if levels.fit(changed) else place.copy()
