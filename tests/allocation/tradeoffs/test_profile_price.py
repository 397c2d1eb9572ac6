import numpy as np
import pytest

from bitknap.allocation import (
    PROFILES,
    Budget,
    CostTable,
    Limit,
    Solution,
    Status,
    formats,
    profile,
)
from bitknap.allocation.solvers.greedy import Greedy
from bitknap.allocation.tradeoffs.profile_price import Price, price
from bitknap.errors import InputError
from bitknap.testing import routed_units


def table(layers=2, experts=4):
    units = routed_units(layers, experts, ("gate", "up", "down"), rows=32, cols=64)
    chosen = formats((1, 2, 3, 4), 32, True)
    scale = np.random.default_rng(0).lognormal(0, 1.5, (len(units), 1))
    return CostTable.from_arrays(scale * [1.0, 0.3, 0.08, 0.02], units=units, formats=chosen)


def plan_of(one: Price) -> Solution:
    assert one.solution is not None
    return one.solution


def test_coarser_rules_cost_more():
    found = {p.profile.name: p for p in price(table(), Budget.bits(3))}
    assert list(found) == list(PROFILES)
    assert found["free"].ratio == 1
    for finer, coarser in (
        ("free", "gate_eq_up"),
        ("gate_eq_up", "expert"),
        ("expert", "layer"),
        ("free", "layer_proj"),
        ("layer_proj", "layer_gateup_down"),
        ("layer_gateup_down", "layer"),
    ):
        assert found[finer].cost <= found[coarser].cost
    assert found["layer"].cost > 1.2 * found["free"].cost
    for one in found.values():
        assert one.status is Status.OPTIMAL
        assert one.bound == one.cost
        assert one.ratio == pytest.approx(one.cost / found["free"].cost)
        assert plan_of(one).plan.bpw <= 3
        assert one.seconds == plan_of(one).seconds


def test_the_plan_says_which_rule_it_follows():
    (one,) = price(table(), Budget.bits(3), [profile("expert")])
    assert plan_of(one).plan.header["profile"] == "expert"
    assert one.ratio is not None
    assert one.ratio >= 1
    assert (plan_of(one).choice.reshape(-1, 3) == plan_of(one).choice.reshape(-1, 3)[:, :1]).all()


def test_the_tables_own_ties_and_other_limits_hold():
    tied = table().tie(profile("gate_eq_up"))
    narrow = Limit("narrow", np.array([[1.0, 0, 0, 0]]), 0)
    for one in price(tied, [Budget.bits(3), narrow], solver=Greedy()):
        assert plan_of(one).solver == "greedy"
        choice = plan_of(one).choice.reshape(-1, 3)
        assert (choice[:, 0] == choice[:, 1]).all()
        assert (choice > 0).all()


def test_a_rule_that_pins_contradict_is_infeasible():
    pinned = table().pin("proj=gate", bits=2).pin("proj=down", bits=3)
    found = {p.profile.name: p for p in price(pinned, Budget.bits(3.5))}
    assert found["layer_gateup_down"].status is Status.OPTIMAL
    for name in ("expert", "layer"):
        one = found[name]
        assert one.status is Status.INFEASIBLE
        assert (one.cost, one.bound, one.ratio) == (np.inf, np.inf, None)
        assert "every format is forbidden" in one.reason


def test_a_rule_whose_smallest_plan_is_too_large_says_so():
    # One expert at 4 bits drags its whole layer along.
    pinned = table().pin("layer=0,expert=0", bits=4)
    found = {p.profile.name: p for p in price(pinned, Budget.bits(2))}
    assert found["free"].reason == ""
    assert found["layer"].solution is None
    assert found["layer"].reason.startswith("memory: smallest plan needs")


def test_nothing_is_feasible_below_the_least():
    assert {p.status for p in price(table(), Budget.bits(1))} == {Status.INFEASIBLE}


def test_free_plans_without_cost_have_no_ratio():
    zeros = CostTable.from_arrays(np.zeros((2, 2)), np.ones((2, 2), dtype=int))
    assert {p.ratio for p in price(zeros, Budget.bytes(5))} == {None}


def test_limits_of_another_table_are_refused():
    with pytest.raises(InputError, match="limit a: weight has shape"):
        price(table(), Limit("a", np.ones((3, 4)), 1))
