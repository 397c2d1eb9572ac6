"""The closed loop: never worse by its own measure, within all limits, the same by seed."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Knapsack, Problem, formats, profile, solve
from bitknap.allocation.refinement.loop import Refine
from bitknap.allocation.solvers.solving import within
from bitknap.api.requests import Refinement
from bitknap.errors import BitknapError, InfeasibleError, InputError, MismatchError
from bitknap.testing import random_table, routed_units

BLOCKS = 12


def table(seed=0, layers=3, experts=4):
    return random_table(routed_units(layers, experts), formats((2, 3, 4, 8), 8), seed)


@pytest.fixture
def problem():
    return Problem(table(), [Budget.bits(6.5)])


def hidden(given, parts=2, noise=0.02):
    """Return measures under which the last layer counts five times what the table says."""
    weight = np.where(given.table.units.layer == 2, 5.0, 1.0)
    each = np.arange(len(weight))
    blocks = 1 + noise * np.random.default_rng(9).standard_normal((parts, BLOCKS))

    def part(at):
        def measure(choice):
            return float((weight * given.table.cost[each, choice]).sum()) * blocks[at]

        return measure

    return tuple(part(at) for at in range(parts))


def total(parts, choice):
    return float(np.concatenate([part(choice) for part in parts]).mean())


def test_the_loop_finds_what_the_table_does_not_know(problem):
    parts = hidden(problem)
    found = Refine(parts=parts, evaluations=32).run(problem)
    first = total(parts, solve(problem, Knapsack()).choice)
    each = np.arange(len(problem.table.units))
    weight = np.where(problem.table.units.layer == 2, 5.0, 1.0)[:, None]
    true = CostTable.from_arrays(
        problem.table.cost * weight, units=problem.table.units, formats=problem.table.formats
    )
    best = solve(Problem(true, problem.limits))
    reached = total(parts, found.solution.choice)
    assert reached < first
    least = total(parts, best.choice)
    assert reached - least < 0.25 * (first - least)
    corrected = found.table.cost[each, 0] / problem.table.cost[each, 0]
    layers = problem.table.units.layer
    assert corrected[layers == 2].mean() > 1.5 * corrected[layers != 2].mean()


def test_a_table_that_is_right_is_left_alone(problem):
    each = np.arange(len(problem.table.units))
    rough = 1 + 0.05 * np.random.default_rng(1).standard_normal(BLOCKS)

    def measure(choice):
        return float(problem.table.cost[each, choice].sum()) * rough

    found = Refine(parts=(measure,), evaluations=12).run(problem)
    assert found.solution.choice.tolist() == solve(problem).choice.tolist()
    assert [step.accepted for step in found.steps] == [True] + [False] * (len(found.steps) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["posterior", "tpe", "cmaes"])
def test_plans_keep_to_ties_and_limits_and_repeat_by_seed(driver):
    tied = table().tie(profile("expert"))
    problem = Problem(tied, [Budget.bits(6.5)])
    settings = Refine(parts=hidden(problem), evaluations=10, driver=driver, seed=3)
    one, two = settings.run(problem), settings.run(problem)
    assert within(problem, one.solution.plan)
    assert [s.choice.tolist() for s in one.steps] == [s.choice.tolist() for s in two.steps]
    keys = {step.choice.tobytes() for step in one.steps}
    assert 2 < len(keys) == len(one.steps) <= 10


def test_the_old_name_of_the_posterior_warns_and_works(problem):
    with pytest.warns(
        DeprecationWarning, match="driver='belief' is deprecated.*'posterior'"
    ) as warned:
        settings = Refine(parts=hidden(problem), driver="belief")  # type: ignore[arg-type]
    assert settings == replace(settings, driver="posterior")
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning) as warned:
        assert Refinement(driver="belief") == Refinement()  # type: ignore[arg-type]
    assert warned[0].filename == __file__


def test_as_a_solver_it_gives_the_same_plan(problem):
    settings = Refine(parts=hidden(problem), evaluations=8)
    assert (
        solve(problem, settings).choice.tolist() == settings.run(problem).solution.choice.tolist()
    )


@pytest.mark.slow
def test_a_clearly_worse_plan_is_not_run_to_its_end(problem):
    found = Refine(parts=hidden(problem, parts=4, noise=0.0), evaluations=24).run(problem)
    lengths = {len(step.losses) for step in found.steps}
    assert 4 * BLOCKS in lengths
    assert min(lengths) < 4 * BLOCKS


def test_gains_within_the_error_are_not_accepted(problem):
    draw = np.random.default_rng(0)
    level = float(solve(problem).cost)

    def measure(choice):
        return level * (1 + 0.3 * draw.standard_normal(BLOCKS))

    found = Refine(parts=(measure,), evaluations=12, sure=4.0).run(problem)
    assert sum(step.accepted for step in found.steps) == 1


def test_other_tables_plans_are_measured(problem):
    weight = np.where(problem.table.units.layer == 2, 5.0, 1.0)[:, None]
    other = CostTable.from_arrays(
        problem.table.cost * weight, units=problem.table.units, formats=problem.table.formats
    )
    found = Refine(parts=hidden(problem), evaluations=2, others=(other,)).run(problem)
    assert [step.origin for step in found.steps] == ["table", "other table"]
    assert found.steps[1].accepted


def test_bad_input(problem):
    parts = hidden(problem)
    with pytest.raises(InputError, match="parts: the list is empty"):
        Refine(parts=())
    with pytest.raises(InputError, match="evaluations: 0 is below 1"):
        Refine(parts=parts, evaluations=0)
    with pytest.raises(InputError, match="driver 'x' is unknown; one of"):
        Refine(parts=parts, driver="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sure: -1 is below 0"):
        Refine(parts=parts, sure=-1)
    with pytest.raises(MismatchError, match="other units or formats"):
        Refine(parts=parts, others=(table(layers=2),)).run(problem)
    with pytest.raises(InfeasibleError):
        Refine(parts=parts).run(Problem(table(), [Budget.bits(1)]))
    with pytest.raises(BitknapError, match="not a finite number"):
        Refine(parts=(lambda choice: np.array([np.nan]),)).run(problem)
