import json
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pytest

from bitknap.allocation import CostTable, Units, formats, profile, solve
from bitknap.allocation.published import (
    chowdhury_bits,
    chowdhury_counts,
    gemq_problem,
    mc_moe,
    mc_moe_cost,
)
from bitknap.errors import InfeasibleError, InputError

TOTALS = (12, 14, 16, 18, 20)


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return json.loads((files("bitknap.benchmarks.solvers") / "mixtral_mc.json").read_text())


def measured(data: Any, **exponents: float) -> Any:
    return mc_moe_cost(
        data["block_output_error"], data["frequency"], data["routing_weight"], **exponents
    )


@pytest.mark.parametrize("total", TOTALS)
def test_mc_moe_gives_the_published_plans(mixtral, total):
    plan = np.array(mixtral["plans"][str(total)])
    assert plan.shape == (32, 8)
    assert np.array_equal(mc_moe(measured(mixtral), total), plan)


def test_squared_errors_give_other_plans(mixtral):
    cost = measured(mixtral, gamma=2)
    agree = {
        total: int((mc_moe(cost, total) == np.array(mixtral["plans"][str(total)])).sum())
        for total in TOTALS
    }
    # Of 256 experts; the code's gamma = 2 was never used, or these would be its plans.
    assert agree == {12: 242, 14: 235, 16: 224, 18: 242, 20: 237}


def test_errors_alone_move_a_quarter_of_the_experts(mixtral):
    # Frequency and routing weight count twice in the published plans, and it shows.
    cost = measured(mixtral, alpha=0, beta=0)
    moved = {
        total: int((mc_moe(cost, total) != np.array(mixtral["plans"][str(total)])).sum())
        for total in TOTALS
    }
    # Of 256 experts.
    assert moved == {12: 63, 14: 70, 16: 71, 18: 75, 20: 66}


def test_mc_moe_is_the_best_of_all_plans():
    generator = np.random.default_rng(0)
    cost = generator.random((6, 4, 3))
    for total in range(7, 13):
        found = mc_moe(cost, total)
        for layer in range(6):
            best = min(
                cost[layer, np.arange(4), np.array(plan) - 1].sum()
                for plan in product((1, 2, 3), repeat=4)
                if sum(plan) <= total and 3 in plan and 2 in plan
            )
            assert cost[layer, np.arange(4), found[layer] - 1].sum() == pytest.approx(best)


def test_mc_moe_with_other_widths_and_no_floors():
    cost = [[[9.0, 1.0], [8.0, 0.0]]]
    assert mc_moe(cost, 6, bits=(2, 4), required=()).tolist() == [[4, 2]]
    assert mc_moe(cost, 8, bits=(2, 4), required=()).tolist() == [[4, 4]]
    assert mc_moe(cost, 8, bits=(2, 4), required=(2,)).tolist() == [[4, 2]]


def test_mc_moe_scales_no_plan():
    generator = np.random.default_rng(1)
    error, tokens = generator.random((3, 5, 3)), generator.integers(1, 99, (3, 5))
    mass = generator.random((3, 5))
    one = mc_moe(mc_moe_cost(error, tokens, mass), 10)
    assert np.array_equal(one, mc_moe(mc_moe_cost(error, 7 * tokens, 3 * mass), 10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mc_moe_cost([[1.0]], [[1]], [[1]]), "error: shape (1, 1), expected [layers,"),
        (lambda: mc_moe_cost([[[-1.0]]], [[1]], [[1]]), "error: has numbers that are negative"),
        (lambda: mc_moe_cost([[[1.0]]], [[0]], [[1]]), "frequency: layer 0 has none; calibrate"),
        (lambda: mc_moe([[[1.0, 2.0]]], 3), "cost: shape (1, 1, 2), expected [layers, experts, 3]"),
        (lambda: mc_moe([[[1.0, np.inf]]], 3, bits=(1, 2)), "cost: has numbers that are not"),
        (
            lambda: mc_moe([[[1.0, 2.0]]], 3, bits=(1, 2)),
            "bits: [1, 2] must be above 0 and include",
        ),
    ],
)
def test_mc_moe_says_what_is_wrong(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def test_mc_moe_needs_bits_for_its_floors():
    with pytest.raises(InfeasibleError) as error:
        mc_moe(np.ones((1, 8, 3)), 10)
    assert str(error.value) == (
        "mc-moe: 10 bits are too few for 8 experts with one at each of [3, 2]; raise the total"
    )
    assert mc_moe(np.ones((1, 8, 3)), 11).sum() == 11


COUNTS = {
    8: {
        1.5: (0, 4, 4),
        1.75: (2, 2, 4),
        2.0: (2, 4, 2),
        2.125: (3, 3, 2),
        2.25: (4, 2, 2),
        2.375: (5, 1, 2),
        2.5: (6, 0, 2),
        2.75: (7, 0, 1),
    },
    64: {
        1.5: (0, 32, 32),
        1.75: (16, 16, 32),
        1.875: (18, 20, 26),
        2.0: (21, 22, 21),
        2.125: (26, 20, 18),
        2.25: (32, 16, 16),
        2.375: (44, 0, 20),
        2.5: (48, 0, 16),
        2.75: (56, 0, 8),
    },
}


@pytest.mark.parametrize(
    ("experts", "average", "counts"),
    [(experts, *row) for experts, rows in COUNTS.items() for row in rows.items()],
)
def test_chowdhury_counts_as_their_code_does(experts, average, counts):
    assert chowdhury_counts(experts, average, (3, 2, 1)) == counts
    assert sum(n * b for n, b in zip(counts, (3, 2, 1), strict=True)) == average * experts


def test_more_bits_may_mean_more_experts_at_one_bit():
    # The rule's own quirk: 2.375 instead of 2.25 bits raises the 1-bit experts from 16 to 20.
    assert chowdhury_counts(64, 2.25, (3, 2, 1))[2] == 16
    assert chowdhury_counts(64, 2.375, (3, 2, 1))[2] == 20


def test_chowdhury_with_two_levels_and_at_the_ends():
    assert chowdhury_counts(8, 2.5, (3, 2)) == (4, 4)
    assert chowdhury_counts(8, 1.0, (2, 3)) == (0, 8)
    assert chowdhury_counts(8, 9.0, (1, 2, 3)) == (8, 0, 0)
    assert chowdhury_counts(8, 0.5, (1, 2, 3)) == (0, 0, 8)
    # The average that comes out is not the one asked for.
    counts = chowdhury_counts(8, 1.6, (3, 2, 1))
    assert (3 * counts[0] + 2 * counts[1] + counts[2]) / 8 == 1.625


def test_chowdhury_gives_most_bits_to_the_first_of_the_order():
    assert chowdhury_bits([2, 0, 3, 1], 2.5, (3, 2)).tolist() == [3, 2, 3, 2]
    layers = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
    bits = chowdhury_bits(layers, 2.0, (1, 2, 3))
    assert bits.tolist() == [[3, 3, 2, 2, 2, 2, 1, 1], [1, 1, 2, 2, 2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chowdhury_counts(8, 2, (3,)), "levels: [3] must be two or three different"),
        (lambda: chowdhury_counts(8, 2, (3, 3)), "levels: [3, 3] must be two or three different"),
        (lambda: chowdhury_counts(8, 2, (4, 2, 1)), "levels: [4, 2, 1] are not equally spaced"),
        (lambda: chowdhury_counts(0, 2, (2, 1)), "experts: 0 at an average of 2; both must"),
        (lambda: chowdhury_counts(8, float("nan"), (2, 1)), "experts: 8 at an average of nan;"),
        (lambda: chowdhury_bits([0, 0], 2, (2, 1)), "order: a row is not the numbers 0 to 1"),
        (lambda: chowdhury_bits(3, 2, (2, 1)), "order: shape (), expected [experts]"),
    ],
)
def test_chowdhury_says_what_is_wrong(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def experts_table(layers: int, experts: int, seed: int = 0) -> CostTable:
    keys = [(la, e, p) for la in range(layers) for e in range(experts) for p in ("gate", "up")]
    units = Units.build(
        layer=[x[0] for x in keys],
        role=["routed"] * len(keys),
        expert=[x[1] for x in keys],
        projection=[x[2] for x in keys],
        rows=[64] * len(keys),
        cols=[64] * len(keys),
    )
    generator = np.random.default_rng(seed)
    scale = generator.lognormal(0, 1, (len(keys), 1)) * 10.0 ** (units.layer[:, None] % 3)
    # Two bits above the chord of one and three, as min-max grids have it.
    cost = scale * np.array([1.0, 0.85, 0.34]) * generator.lognormal(0, 0.05, (len(keys), 3))
    table = CostTable.from_arrays(cost, units=units, formats=formats(bits=(1, 2, 3)))
    return table.tie(profile("expert"))


def test_gemq_of_one_layer_is_mc_moe_on_the_same_costs():
    table = experts_table(1, 6)
    cost = table.cost.reshape(1, 6, 2, 3).sum(axis=2)
    for total in (9, 11, 14):
        found = solve(gemq_problem(table, total / 6))
        assert (found.choice.reshape(6, 2)[:, 0] + 1).tolist() == mc_moe(cost, total)[0].tolist()


def test_gemq_without_floors_empties_layers_and_with_floors_does_not():
    table = experts_table(6, 4)
    free = solve(gemq_problem(table, 2, floors=False))
    held = solve(gemq_problem(table, 2))
    assert free.cost <= held.cost
    by_layer = held.choice.reshape(6, -1)
    assert all({1, 2} <= set(row.tolist()) for row in by_layer)
    assert not all({1, 2} <= set(row.tolist()) for row in free.choice.reshape(6, -1))
    for found in (free, held):
        assert (found.choice + 1).sum() <= 2 * len(table.units)


def test_gemq_counts_bits_and_not_bytes():
    problem = gemq_problem(experts_table(2, 3), 2.1, floors=False)
    assert problem.limits[0].bound == 25
    assert [limit.name for limit in gemq_problem(experts_table(2, 3), 2).limits] == [
        "bits",
        "layer 0 at 3 bits",
        "layer 0 at 2 bits",
        "layer 1 at 3 bits",
        "layer 1 at 2 bits",
    ]


def test_gemq_says_what_is_wrong():
    bare = CostTable.from_arrays([[1.0, 0.0]], [[1, 2]])
    with pytest.raises(InputError, match="gemq: made-up formats have no bits"):
        gemq_problem(bare, 2)
    with pytest.raises(InputError, match="gemq: an average of 0 bits"):
        gemq_problem(experts_table(1, 2), 0)
    units = experts_table(1, 2).units
    one = CostTable.from_arrays(np.ones((4, 1)), units=units, formats=formats(bits=2))
    with pytest.raises(InputError, match="gemq: floors need two widths"):
        gemq_problem(one, 2)
