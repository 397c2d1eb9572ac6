"""Proposals of costs for a closed loop: from the posterior, or from an Optuna sampler."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.refinement.history import Rounds, Step, solved
from bitknap.allocation.search.optuna_trials import make_sampler, quietly
from bitknap.allocation.search.search_space import GROUPS, groups

# Trust region: initial, min and max log-deviation of a cost from the table's; growth on success,
# shrink on failure.
_REACH, _NEAREST, _FURTHEST = 1.0, 0.15, 2.0
_WIDER, _CLOSER = 1.5, 0.9
# Every fourth proposal, and the last four, use the posterior mean in place of a sample.
_EVERY, _LAST = 4, 4
# Most plans drawn in search of a new one.
_DRAWS = 20


class Driver(Protocol):
    """Proposes plans and learns from their measurements."""

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return the origin of a new plan and the plan; None if no new plan turned up.

        Args:
            rounds: the measurements so far.
            left: how many plans may still be measured.
        """
        ...

    def learn(self, step: Step) -> None:
        """Learn from the measurement of the last proposal."""
        ...


class Thompson:
    """Solve for costs sampled from the posterior, and at times for its mean."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.reach = _REACH

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return the origin of a new plan and the plan; None if no new plan turned up."""
        posterior, cost = rounds.posterior(), rounds.problem.table.cost
        if left <= _LAST or len(rounds.steps) % _EVERY == 0:
            choice = solved(rounds.problem, cost * self._near(posterior.mean()))
            if choice is not None and rounds.new(choice):
                return "mean", choice
        for _ in range(_DRAWS):
            choice = solved(rounds.problem, cost * self._near(posterior.sample(self.generator)))
            if choice is not None and rounds.new(choice):
                return "sample", choice
            self.reach = min(_WIDER * self.reach, _FURTHEST)
        return None

    def learn(self, step: Step) -> None:
        """Grow the trust region after a success, shrink it after a failure."""
        change = _WIDER if step.accepted else _CLOSER if step.gain < -step.error else 1.0
        self.reach = float(np.clip(self.reach * change, _NEAREST, _FURTHEST))

    def _near(self, factor: Floats) -> Floats:
        logarithm = np.log(factor)
        # A factor common to all costs changes no plan.
        nearby: Floats = np.exp(np.clip(logarithm - logarithm.mean(), -self.reach, self.reach))
        return nearby


class Tilting:
    """Let an Optuna sampler tilt the costs of each projection of each layer."""

    def __init__(self, sampler: str, seed: int) -> None:
        import optuna

        with quietly():
            self.study = optuna.create_study(sampler=make_sampler(sampler, seed))
        self.trial: optuna.Trial | None = None

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return the origin of a new plan and the plan; None if no new plan turned up."""
        table = rounds.problem.table
        label, names = groups(table, GROUPS)
        for _ in range(_DRAWS):
            with quietly():
                self.trial = self.study.ask()
                tilts = [self.trial.suggest_float(name, -_REACH, _REACH) for name in names]
            choice = solved(rounds.problem, table.cost * np.exp(np.array(tilts)[label])[:, None])
            if choice is not None and rounds.new(choice):
                return "optuna", choice
            # A plan measured before reports its known value to the sampler.
            self.study.tell(self.trial, _known(rounds, choice))
        return None

    def learn(self, step: Step) -> None:
        """Report to the sampler how much more the plan loses than the best one."""
        if self.trial is not None:
            self.study.tell(self.trial, -step.gain)


def _known(rounds: Rounds, choice: Ints | None) -> float:
    """Return the negated gain of a measured plan; for no plan, the worst of all."""
    gains = [
        s.gain for s in rounds.steps if choice is not None and np.array_equal(s.choice, choice)
    ]
    return -(gains or [min(step.gain for step in rounds.steps)])[0]
