import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Knapsack, Limit, Problem, Status, solve


def random_table(count: int, *, seed: int = 0) -> CostTable:
    """Errors that fall with bits as they do in models, three sizes of matrices."""
    generator = np.random.default_rng(seed)
    bits = np.array([1, 2, 3, 4, 5, 6, 8, 16])
    scale = generator.lognormal(0, 1.5, (count, 1))
    cost = scale * 4.0**-bits * generator.lognormal(0, 0.3, (count, 8))
    numel = generator.choice([768 * 2048, 1024 * 2048, 1408 * 2048], (count, 1))
    return CostTable.from_arrays(cost, (numel * (4 * bits + 1) // 32).astype(np.int64))


def halfway(table: CostTable, share: float = 0.3) -> int:
    low, high = table.nbytes.min(axis=1).sum(), table.nbytes.max(axis=1).sum()
    return int(low + share * (high - low))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_large_model_is_solved_to_a_proof(share):
    table = random_table(36_096)
    found = solve(Problem(table, Budget.bytes(halfway(table, share))))
    assert found.gap < 1e-6
    assert found.plan.total_bytes <= halfway(table, share)


def test_a_point_above_the_hull_is_chosen_when_right():
    # From 10 to 0, the middle option saves less per byte than the whole step: not on the hull.
    cost, nbytes = [[10.0, 6.0, 0.0]], [[1, 6, 11]]
    found = solve(Problem(CostTable.from_arrays(cost, nbytes), Budget.bytes(10)))
    assert found.choice.tolist() == [1]
    assert found.status is Status.OPTIMAL


def test_a_core_beyond_its_limits_leaves_a_valid_bound():
    generator = np.random.default_rng(0)
    weight = np.sort(generator.integers(10**6, 10**8, (300, 6)), axis=1)
    cost = 1.01e8 - weight + generator.integers(-(10**5), 10**5, weight.shape)
    problem = Problem(CostTable.from_arrays(cost, weight), Budget.bytes(int(weight.mean() * 300)))
    best = solve(problem)
    for solver in (Knapsack(effort=1), Knapsack(effort=5000), Knapsack(states=3)):
        rough = solve(problem, solver)
        assert rough.bound <= best.cost <= rough.cost
        assert rough.gap < 1e-3
    assert solve(problem, Knapsack(effort=1)).status is Status.FEASIBLE


def test_an_early_stop_keeps_its_promise():
    table = random_table(500)
    problem = Problem(table, Budget.bytes(halfway(table)))
    best, rough = solve(problem), solve(problem, Knapsack(gap=0.01))
    assert rough.bound <= best.cost <= rough.cost
    assert rough.gap <= 0.01


def test_identical_units_are_no_trap():
    table = CostTable.from_arrays(
        np.tile([8.0, 2.0, 0.5, 0.0], (5000, 1)), np.tile([2, 3, 4, 8], (5000, 1))
    )
    # 14,999 of 15,000: one unit stays at 2 bits.
    assert solve(Problem(table, Budget.bytes(14_999))).cost == 4999 * 2.0 + 8.0


def test_weights_without_whole_numbers_and_a_tight_bound():
    weight = np.full((10, 2), [0.1, 0.3])
    table = CostTable.from_arrays(np.tile([1.0, 0.0], (10, 1)), np.ones((10, 2), dtype=int))
    # Ten times 0.1 is not 1.0 in floats; nor is the second sum 1.2.
    assert solve(Problem(table, Limit("a", weight, 1.0))).cost == 10
    assert solve(Problem(table, Limit("a", weight, 1.2))).cost == 9


def test_slopes_beyond_floats():
    table = CostTable.from_arrays([[1e300, 0.0], [1.0, 0.0]], np.ones((2, 2), dtype=int))
    limit = Limit("tiny", np.array([[0.0, 1e-300], [0.0, 1.0]]), 1.0)
    assert solve(Problem(table, limit)).choice.tolist()[0] == 1


def test_the_same_problem_has_the_same_answer():
    table = random_table(2000)
    problem = Problem(table, Budget.bytes(halfway(table)))
    assert np.array_equal(solve(problem).choice, solve(problem).choice)


@pytest.mark.slow
def test_two_limits_on_a_model():
    table = random_table(400)
    heat = np.random.default_rng(1).lognormal(0, 1, (400, 1))
    reads = table.nbytes * heat
    free = solve(Problem(table, Budget.bytes(halfway(table))))
    used = reads[np.arange(400), free.choice].sum()
    both = solve(
        Problem(table, [Budget.bytes(halfway(table)), Limit("reads", reads, 0.95 * used)]),
        Knapsack(gap=1e-4, time_limit=5),
    )
    assert both.bound <= both.cost
    assert both.cost > free.cost
    assert both.gap < 1e-2
