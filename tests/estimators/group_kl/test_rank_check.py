"""Plans that check a table."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Format, Problem, formats, profile
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.group_kl.rank_check import check_plans, plans_for_check

FORMATS = formats((1, 2, 3, 4), "row", keep="fp32")


LAYERS, EXPERTS, PROJECTIONS = 4, 8, ("gate", "up", "down")


@pytest.fixture(scope="module")
def problem(table):
    return Problem(table.tie(profile("gate_eq_up")), Budget.bits(2.75))


def test_plans_for_check_fill_the_same_bytes(problem, table):
    plans = plans_for_check(problem, 10, seed=0)
    sizes = [plan.total_bytes for plan in plans]
    assert len({plan.choice.tobytes() for plan in plans}) == 10
    assert max(sizes) <= problem.bounds[0]
    assert max(sizes) / min(sizes) - 1 < 0.02
    cost = [table.cost[np.arange(len(table.units)), plan.choice].sum() for plan in plans]
    assert cost[0] == min(cost)
    assert max(cost[1::2]) < min(cost[2::2])  # near ones before random ones
    assert {plan.header["solver"] for plan in plans[1:]} == {"near the frontier", "random"}
    for plan in plans:
        assert np.array_equal(plan.choice, plan.choice[tied_to(problem)])
    again = plans_for_check(problem, 10, seed=0)
    assert all(np.array_equal(a.choice, b.choice) for a, b in zip(plans, again, strict=True))


def tied_to(problem):
    """Return for each unit the first one of its row."""
    return np.unique(problem.row_of, return_index=True)[1][problem.row_of]


def test_plans_for_check_end_when_there_are_no_more():
    table = CostTable.from_arrays([[4.0, 1.0], [2.0, 1.0]], nbytes=[[1, 2], [1, 2]])
    plans = plans_for_check(Problem(table, Budget.bytes(3)), 5)
    assert 1 <= len(plans) <= 3


def test_a_true_table_passes_its_check(problem, table):
    plans = plans_for_check(problem, 8)
    truth = [table.cost[np.arange(len(table.units)), plan.choice].sum() for plan in plans]
    found = check_plans(table, plans, 2 * np.array(truth) ** 1.5)
    assert found.spearman == pytest.approx(1)
    assert found.slope == pytest.approx(1.5)
    assert found.regret == 1
    assert found.scale == pytest.approx(found.measured.sum() / sum(truth))
    assert found.byte_spread < 0.02


def test_regret_is_what_the_favourite_costs(problem, table):
    plans = plans_for_check(problem, 4)
    found = check_plans(table, plans, [0.06, 0.03, 0.05, 0.04])
    assert found.regret == pytest.approx(2)
    assert found.spearman < 0


def test_alike_predictions_have_no_rank(table):
    plans = [solve_like(table, 1)] * 3
    found = check_plans(table, plans, [0.1, 0.2, 0.3])
    assert np.isnan(found.spearman)
    assert np.isnan(found.slope)


def solve_like(table, column):
    from bitknap.allocation import BitPlan

    return BitPlan.uniform(table.units, table.formats[column])


def test_check_refuses(table):
    plans = [solve_like(table, f) for f in range(3)]
    with pytest.raises(InputError, match="plans: 2 is below 3"):
        check_plans(table, plans[:2], [0.1, 0.2])
    with pytest.raises(InputError, match=r"measured_kl\[1\]: 0.0 is not a finite number above 0"):
        check_plans(table, plans, [0.1, 0, 0.1])
    with pytest.raises(InputError, match=r"plans\[0\]: the table predicts 0"):
        check_plans(table, [solve_like(table, 4), *plans[:2]], [0.1, 0.2, 0.3])
    other = replace(
        table, formats=(Format.parse("int8-row-sym"), *FORMATS[1:]), nbytes=bytes_of(table.units)
    )
    with pytest.raises(MismatchError, match=r"plans\[0\]: the table has no int1-row-asym"):
        check_plans(other, plans, [0.1, 0.2, 0.3])
    bare = CostTable.from_arrays(np.ones((2, 2)), nbytes=np.ones((2, 2)))
    with pytest.raises(MismatchError, match="its 96 units differ from the 2 of the table"):
        check_plans(bare, plans, [0.1, 0.2, 0.3])


def bytes_of(units):
    columns = (Format.parse("int8-row-sym"), *FORMATS[1:])
    return np.stack([f.nbytes(units.rows, units.cols) for f in columns], axis=1)


def test_fitting_needs_no_torch():
    code = (
        "import sys; from bitknap.estimators.group_kl import exponents, rank_check; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
