"""The state of a closed loop: measured plans, the best of them, and the posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.refinement.cost_posterior import Posterior
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.errors import BitknapError, InfeasibleError

# Returns the loss of a plan on each block of one part of a text, float64[B], given its choice.
Measure = Callable[[Ints], Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One measured plan.

    Attributes:
        origin: source of the plan: "table", "other table", "sample" or "mean" of the posterior, or
            "optuna".
        choice: format of each unit, int32[U].
        losses: loss on each block it was run on, float64[B].
        predicted: loss predicted by costs corrected with all earlier steps.
        gain: mean reduction in loss against the previous best plan, on these blocks.
        error: standard error of the gain.
        accepted: whether it became the best plan.
    """

    origin: str
    choice: Ints
    losses: Floats
    predicted: float
    gain: float
    error: float
    accepted: bool


@dataclass(slots=True, kw_only=True)
class Rounds:
    """Measured plans of one problem.

    Attributes:
        problem: the costs and limits of all plans.
        parts: measures on parts of a text; a plan that is clearly worse on the first parts is not
            run on the rest.
        sure: gain, in standard errors, that a plan needs to become the best.
        steps: every measured plan, in order.
        best: the best of them.
        seen: digests of their choices.
    """

    problem: Problem
    parts: Sequence[Measure]
    sure: float
    steps: list[Step] = field(default_factory=list)
    best: Step | None = None
    seen: set[bytes] = field(default_factory=set)

    def take(self, origin: str, choice: Ints) -> Step:
        """Measure a plan and make it the best one if it passes a paired test.

        Raises:
            BitknapError: its loss is not a number.
        """
        factor = self.posterior().mean() if self.steps else None
        predicted = cost_of(self.problem, choice, factor)
        losses: Floats = np.zeros(0)
        gain = error = 0.0
        for part in self.parts:
            losses = np.concatenate([losses, _finite(part(choice))])
            if self.best is not None:
                gain, error = paired(self.best.losses[: len(losses)] - losses)
                if gain + error < 0:
                    break
        better = self.best is None or (
            len(losses) == len(self.best.losses) and gain > 0 and gain >= self.sure * error
        )
        step = Step(
            origin=origin,
            choice=choice,
            losses=losses,
            predicted=predicted,
            gain=gain,
            error=error,
            accepted=better,
        )
        self.seen.add(choice.tobytes())
        self.steps.append(step)
        self.best = step if better else self.best
        return step

    def new(self, choice: Ints | None) -> bool:
        """Return whether `choice` is a plan that has not been measured yet."""
        return choice is not None and choice.tobytes() not in self.seen

    def posterior(self) -> Posterior:
        """Return the posterior given all steps; partly measured plans count by their blocks."""
        if self.best is None:
            raise BitknapError("refine: nothing was measured yet")
        losses, level = self.best.losses, float(self.best.losses.mean())
        above = [float((step.losses - losses[: len(step.losses)]).mean()) for step in self.steps]
        choices = [step.choice for step in self.steps]
        return Posterior.of(self.problem.table, choices, level + np.array(above))


def solved(problem: Problem, cost: Floats) -> Ints | None:
    """Return the exact plan for other costs float64[U,F], same limits; None if none fits."""
    other = Problem(replace(problem.table, cost=cost), problem.limits)
    try:
        choice = Knapsack().answer(other).choice
    except InfeasibleError:
        return None
    return None if choice is None else problem.expand(choice)


def cost_of(problem: Problem, choice: Ints, factor: Floats | None = None) -> float:
    """Return the cost of a plan, with each cost times `factor`, float64[U,F]."""
    each = np.arange(len(choice))
    cost = problem.table.cost[each, choice]
    return float((cost if factor is None else cost * factor[each, choice]).sum())


def paired(difference: Floats) -> tuple[float, float]:
    """Return the mean of paired differences float64[B] and its standard error."""
    count = len(difference)
    error = float(difference.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return float(difference.mean()), error


def _finite(losses: Floats) -> Floats:
    values = np.asarray(losses, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise BitknapError(
            "refine: a plan's measured loss is not a finite number; measure it on another text"
        )
    return values
