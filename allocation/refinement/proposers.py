"""Where a closed loop gets costs to solve for: what it believes of its table, or Optuna."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.refinement.history import Rounds, Step, solved
from bitknap.allocation.search.optuna_trials import make_sampler, quietly
from bitknap.allocation.search.search_space import GROUPS, groups

# Trust region: the largest deviation of a cost from the table's, as a logarithm: at the start, the
# smallest and the largest; and the factors by which a success and a failure change it.
_REACH, _NEAREST, _FURTHEST = 1.0, 0.15, 2.0
_WIDER, _CLOSER = 1.5, 0.9
# Every fourth proposal, and the last four, use the posterior mean in place of a sample.
_EVERY, _LAST = 4, 4
# Plans that are drawn until one is new.
_DRAWS = 20


class Driver(Protocol):
    """Proposes plans, and learns what became of them."""

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return where a plan comes from and a plan that is new; None if there is none left.

        Args:
            rounds: what was measured so far.
            left: how many plans may still be measured.
        """
        ...

    def learn(self, step: Step) -> None:
        """Learn what became of the last proposal."""
        ...


class Thompson:
    """Solve for costs drawn from what measurements allow, in turn with the likeliest costs."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.reach = _REACH

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return where a plan comes from and a plan that is new; None if there is none left."""
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
        """Trust costs further from the table after a success, less far after a failure."""
        change = _WIDER if step.accepted else _CLOSER if step.gain < -step.error else 1.0
        self.reach = float(np.clip(self.reach * change, _NEAREST, _FURTHEST))

    def _near(self, factor: Floats) -> Floats:
        logarithm = np.log(factor)
        # What all costs share changes no plan.
        nearby: Floats = np.exp(np.clip(logarithm - logarithm.mean(), -self.reach, self.reach))
        return nearby


class Tilting:
    """Let an Optuna sampler tilt the costs of each layer's each projection."""

    def __init__(self, sampler: str, seed: int) -> None:
        import optuna

        with quietly():
            self.study = optuna.create_study(sampler=make_sampler(sampler, seed))
        self.trial: optuna.Trial | None = None

    def propose(self, rounds: Rounds, left: int) -> tuple[str, Ints] | None:
        """Return where a plan comes from and a plan that is new; None if there is none left."""
        table = rounds.problem.table
        label, names = groups(table, GROUPS)
        for _ in range(_DRAWS):
            with quietly():
                self.trial = self.study.ask()
                tilts = [self.trial.suggest_float(name, -_REACH, _REACH) for name in names]
            choice = solved(rounds.problem, table.cost * np.exp(np.array(tilts)[label])[:, None])
            if choice is not None and rounds.new(choice):
                return "optuna", choice
            # What is known already tells the sampler what it would have been told.
            self.study.tell(self.trial, _known(rounds, choice))
        return None

    def learn(self, step: Step) -> None:
        """Tell the sampler by how much the plan loses more than the best one."""
        if self.trial is not None:
            self.study.tell(self.trial, -step.gain)


def _known(rounds: Rounds, choice: Ints | None) -> float:
    """Return minus the gain of a plan that was measured; without a plan, the worst of all."""
    gains = [
        s.gain for s in rounds.steps if choice is not None and np.array_equal(s.choice, choice)
    ]
    return -(gains or [min(step.gain for step in rounds.steps)])[0]
