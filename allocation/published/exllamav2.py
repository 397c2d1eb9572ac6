"""Simulated annealing over error norms, as ExLlamaV2 uses for the bits of its EXL2 files.

Source: ExLlamaV2's code, `optimize` and `sim_anneal`. The relative errors that it minimises are
computed in `bitknap.estimators.published.exllamav2`, which needs torch; this file does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.published.one_limit import bounded, lightest, single, within
from bitknap.errors import InputError

# Drift of thousands of fractional sums, relative to the bound.
_DRIFT = 1e-12
# Width of the second sweep around the best exponent of the first.
_NARROW = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """Minimise the sum of cost^n by annealing, with n chosen to minimise the largest cost.

    There are three stages of `runs` chains each: exponents evenly over `exponents`, then evenly
    around the one whose plan has the smallest maximum cost, then the best exponent alone, where the
    chain with the smallest sum wins. Every chain starts from the lightest options and proposes
    random options for random rows. Bitknap's version differs from ExLlamaV2's in four ways: it has
    a seed; the moves of a sweep are on different rows and are tried at once; energies are divided
    by their average range, since temperatures chosen for relative errors do not suit nats; and
    leftover bytes are spent on the options that save most per byte, where the version of ExLlamaV2
    that was read stops.

    The plan with the smallest maximum cost does not minimise the sum; the gap shows the difference.
    ExLlamaV2 treats a block of experts as one row; here the problem defines the rows.

    Attributes:
        seed: random seed.
        iterations: proposals per chain at each temperature, or one per row if that is less. The
            defaults take about 1 s for 36 rows and 10 s from 5,000 rows on, where they are too few:
            models in ExLlamaV2 have about a hundred rows.
        cooling: factor from one temperature to the next.
        hot: first temperature.
        cold: last temperature.
        runs: chains per stage; ExLlamaV2 uses 80, and 8 take about a tenth of the time.
        exponents: smallest and largest n.

    Source: ExLlamaV2, `optimize` and `sim_anneal`; its settings are the defaults, `runs` aside.
    """

    seed: int = 0
    iterations: int = 1000
    cooling: float = 0.995
    hot: float = 2.0
    cold: float = 1e-4
    runs: int = 8
    exponents: tuple[float, float] = (1.5, 3.5)

    def __post_init__(self) -> None:
        for name in ("iterations", "runs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be above 0")
        if not 0 < self.cooling < 1:
            raise InputError(f"cooling: {self.cooling} is not between 0 and 1")
        if not 0 < self.cold <= self.hot < np.inf:
            raise InputError(f"cold: {self.cold} must be above 0 and at most hot, {self.hot}")
        if not 0 < self.exponents[0] <= self.exponents[1] < np.inf:
            raise InputError(f"exponents: {self.exponents} must be above 0 and increasing")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "annealing"

    def answer(self, problem: Problem) -> Answer:
        """Return the plan of the winning chain, and a bound on all plans.

        Raises:
            InputError: not exactly one limit is finite.
        """
        weight, bound = single(problem, self.name)
        start = lightest(problem.cost, weight)
        if not within(weight, start, bound):
            return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
        chains = _Chains.of(problem.cost, weight, bound, start, settings=self)
        generator = np.random.default_rng(self.seed)
        norms = np.linspace(*self.exponents, self.runs)
        worst, norm = np.inf, float(norms[0])
        for stage in range(2):
            if stage:
                norms = np.linspace(norm - _NARROW / 2, norm + _NARROW / 2, self.runs)
            states = chains.annealed(norms, generator)
            largest = chains.errors(states).max(axis=1)
            if largest.min() < worst:
                worst, norm = float(largest.min()), float(norms[largest.argmin()])
        states = chains.annealed(np.full(self.runs, norm), generator)
        energies = (chains.errors(states) ** norm).sum(axis=1)
        choice = chains.option[chains.rows, states[energies.argmin()]]
        return bounded(problem, spent(problem.cost, weight, bound, choice))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chains:
    """One problem in the form that all chains use.

    Attributes:
        option: columns of each row, allowed ones first, int[R,F].
        count: number of allowed columns, int[R].
        error: cost of each option, at least 0, relative to the largest, float64[R,F]; 0 where
            forbidden.
        weight: weight of each option, float64[R,F].
        start: position of the first choice, int[R].
        room: weight left by the first choice.
        settings: settings of the schedule.
    """

    option: Longs
    count: Longs
    error: Floats
    weight: Floats
    start: Longs
    room: float
    settings: Annealing

    @classmethod
    def of(
        cls, cost: Floats, weight: Floats, bound: float, start: Longs, *, settings: Annealing
    ) -> _Chains:
        allowed = np.isfinite(cost)
        option = np.argsort(~allowed, axis=1, kind="stable")
        error = np.maximum(np.where(allowed, cost, 0), 0)
        scale = error.max() or 1.0
        used = weight[np.arange(len(start)), start]
        whole = np.array_equal(weight, np.floor(weight))
        drift = 0.0 if whole else _DRIFT * (abs(bound) + float(np.abs(used).sum()))
        return cls(
            option=option,
            count=allowed.sum(axis=1),
            error=np.take_along_axis(error, option, 1) / scale,
            weight=np.take_along_axis(weight, option, 1),
            start=(option == start[:, None]).argmax(axis=1),
            room=bound - float(used.sum()) - drift,
            settings=settings,
        )

    @property
    def rows(self) -> Longs:
        return np.arange(len(self.start))

    def errors(self, state: npt.NDArray[np.intp]) -> Floats:
        """Return the errors of the chains' choices, float64[C,R]."""
        chosen: Floats = self.error[self.rows, state]
        return chosen

    def annealed(self, norms: Floats, generator: np.random.Generator) -> npt.NDArray[np.intp]:
        """Return the last state of one chain for each exponent, int[C,R]."""
        chains, count = len(norms), len(self.start)
        state = np.tile(self.start, (chains, 1))
        room = np.full(chains, self.room)
        scale = np.array([_range(self.error, self.count, norm) for norm in norms.tolist()])[:, None]
        power = norms[:, None]
        temperature = self.settings.hot
        while temperature > self.settings.cold:
            size = min(self.settings.iterations, count)
            row = generator.choice(count, size, replace=False)
            old = state[:, row]
            new = (generator.random((chains, size)) * self.count[row]).astype(np.intp)
            rise = (self.error[row, new] ** power - self.error[row, old] ** power) / scale
            taken = generator.random((chains, size)) < np.exp(np.minimum(-rise / temperature, 0))
            added = np.where(taken, self.weight[row, new] - self.weight[row, old], 0)
            # Moves that free room go first; the others follow in random order of rows while they
            # fit.
            lighter, heavier = np.minimum(added, 0), np.maximum(added, 0)
            left = (room - lighter.sum(axis=1))[:, None]
            taken &= (added <= 0) | (np.cumsum(heavier, axis=1) <= left)
            state[:, row] = np.where(taken, new, old)
            room -= np.where(taken, added, 0).sum(axis=1)
            temperature *= self.settings.cooling
        return state


def _range(error: Floats, count: Longs, norm: float) -> float:
    """Return the average over rows of the largest minus the least energy; 1 if that is 0."""
    energy = error**norm
    there = np.arange(error.shape[1]) < count[:, None]
    low = np.where(there, energy, np.inf).min(axis=1)
    return float((energy.max(axis=1) - low).mean()) or 1.0


def spent(cost: Floats, weight: Floats, bound: float, choice: Longs) -> Longs:
    """Return the choice after taking cheaper options while they fit, most saved per weight first.

    Args:
        cost: float64[R,F], +inf forbids.
        weight: float64[R,F].
        bound: bound on the sum of weights.
        choice: initial choice within the bound, int[R].
    """
    rows = np.arange(len(choice))
    result = choice.copy()
    while True:
        used = weight[rows, result]
        room = bound - float(used.sum())
        saved = cost[rows, result][:, None] - cost
        added = weight - used[:, None]
        good = (saved > 0) & (added <= max(room, 0.0))
        # Options that are cheaper and no heavier come before all others.
        rate = np.where(good, saved / np.where(added > 0, added, 1e-300), -np.inf)
        option = rate.argmax(axis=1)
        row = np.flatnonzero(good.any(axis=1))
        if not len(row):
            return result
        row = row[np.argsort(-rate[row, option[row]], kind="stable")]
        step = added[row, option[row]]
        # The first option always fits alone, so every pass moves at least one row to a cheaper
        # option.
        fits = np.cumsum(step) <= max(room, 0.0)
        fits[0] = True
        row = row[: len(fits) if fits.all() else int(fits.argmin())]
        result[row] = option[row]
