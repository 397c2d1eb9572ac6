import numpy as np

from bitknap.allocation.solvers.lower_hulls import common_divisor, options, split, steps

INF = np.inf


def test_dominated_and_hull_options():
    cost = np.array([[10.0, 6.0, 0.0, 1.0, INF]])
    weight = np.array([[0.0, 5.0, 10.0, 20.0, 2.0]])
    found = options(cost, weight)
    assert found.option[:, 0].tolist() == [0, 4, 1, 2, 3]
    # Heavier and dearer than the third, the fourth can never be chosen.
    assert found.cost[:, 0].tolist() == [10, INF, 6, 0, INF]
    assert found.hull[:, 0].tolist() == [True, False, False, True, False]


def test_equal_weights_keep_the_cheapest():
    found = options(np.array([[3.0, 2.0, 2.0]]), np.array([[1.0, 1.0, 1.0]]))
    assert np.isfinite(found.cost[:, 0]).sum() == 1
    assert found.option[found.hull[:, 0], 0].tolist() == [1]


def test_steps_fall_in_reward():
    edges = steps(options(np.array([[9.0, 3.0, 1.0]]), np.array([[1.0, 2.0, 4.0]])))
    assert edges.gain.tolist() == [6, 1]
    assert edges.weight.tolist() == [1, 2]


def test_selection_equals_a_full_sort():
    generator = np.random.default_rng(0)
    cost = -np.sort(-generator.integers(0, 50, (5000, 6)).astype(np.float64), axis=1)
    weight = np.cumsum(generator.integers(1, 9, cost.shape), axis=1).astype(np.float64)
    edges = steps(options(cost, weight))
    order = np.argsort(-edges.gain, kind="stable")
    total = np.cumsum(edges.weight[order])
    for room in (0.0, 1.0, total[-1] / 3, total[-1] - 1, total[-1], total[-1] + 5):
        taken, left = split(edges, room, sort=100)
        count = int(np.searchsorted(total, room, side="right"))
        assert edges.weight[taken].sum() == (total[count - 1] if count else 0)
        assert sorted(taken.tolist()) == sorted(order[:count].tolist())
        assert (left[0] == order[count]) if count < len(order) else not len(left)


def test_divisor():
    cost = np.array([[2.0, 1.0], [2.0, 1.0]])
    assert common_divisor(options(cost, np.array([[5.0, 17.0], [1.0, 19.0]]))) == 6
    assert common_divisor(options(cost, np.array([[5.0, 17.5], [1.0, 19.0]]))) == 0
    assert common_divisor(options(cost, np.array([[5.0, 5.0], [1.0, 1.0]]))) == 0
