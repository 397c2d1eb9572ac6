"""MC-MoE's program: the plans that were published, and the best of all plans."""

import json
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import pytest

from bitknap.allocation.published import (
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
        (lambda: mc_moe_cost([[[-1.0]]], [[1]], [[1]]), "error: some numbers are negative"),
        (
            lambda: mc_moe_cost([[[1.0]]], [[0]], [[1]]),
            "frequency: it is 0 for all experts of layer 0; calibrate",
        ),
        (lambda: mc_moe([[[1.0, 2.0]]], 3), "cost: shape (1, 1, 2), expected [layers, experts, 3]"),
        (lambda: mc_moe([[[1.0, np.inf]]], 3, bits=(1, 2)), "cost: some numbers are not"),
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
