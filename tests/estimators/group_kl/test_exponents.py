"""Exponents of signals and gains of formats: fitted to groups that they made."""

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.group_kl.exponents import fit_exponents

FORMATS = formats((1, 2, 3, 4), "row", keep="fp32")


GRIDS = 4


LAYERS, EXPERTS, PROJECTIONS = 4, 8, ("gate", "up", "down")


@pytest.fixture(scope="module")
def z(table):
    return np.random.default_rng(1).normal(size=(2, len(table.units)))


def halves(table, seed=2, each=6):
    """Return random halves of the units in every grid."""
    generator = np.random.default_rng(seed)
    count = len(table.units)
    return [
        (generator.permutation(count)[: count // 2], f) for f in range(GRIDS) for _ in range(each)
    ]


def measured(table, z, theta, gains, groups, noise=0.0):
    """Return the groups with the KL that exponents and gains would make."""
    truth = table.cost * np.exp(np.asarray(theta, dtype=float) @ z)[:, None] * gains
    error = np.exp(noise * np.random.default_rng(3).normal(size=len(groups)))
    return [(u, f, truth[u, f].sum() * e) for (u, f), e in zip(groups, error, strict=True)]


def test_exponents_and_gains_that_made_the_groups_are_found(table, z):
    theta, gains = [0.6, -0.4], [4.0, 2.0, 1.5, 1.7, 1.0]
    groups = measured(table, z, theta, gains, halves(table))
    found = fit_exponents(table, z, groups, names=("a", "b"), penalty=0.0)
    assert dict(found.exponents) == pytest.approx({"a": 0.6, "b": -0.4}, abs=1e-5)
    assert found.gains == pytest.approx(gains, rel=1e-5)
    report = found.report
    assert (report.groups, report.parameters, report.folds) == (24, 6, 24)
    assert report.error < 1e-4 < report.error_without
    assert (report.dropped, report.fallback) == ((), "")


def test_the_penalty_draws_to_zero(table, z):
    groups = measured(table, z, [0.6, 0.0], np.ones(5), halves(table))
    thetas = [
        abs(fit_exponents(table, z, groups, penalty=p).exponents["signal 0"]) for p in (0, 1, 1e6)
    ]
    assert thetas[0] == pytest.approx(0.6, abs=1e-5)
    assert thetas[0] > thetas[1] > thetas[2]
    assert thetas[2] == pytest.approx(0, abs=1e-4)


def test_a_proxy_that_says_nothing_stays_near_zero(table, z):
    groups = measured(table, z, [0.0, 0.0], [4, 2, 1.5, 1.7, 1], halves(table), noise=0.02)
    found = fit_exponents(table, z, groups)
    assert max(abs(theta) for theta in found.exponents.values()) < 0.1
    assert found.report.error == pytest.approx(found.report.error_without, abs=0.02)


def test_signs_are_kept_where_asked(table, z):
    groups = measured(table, z, [-0.5, 0.5], np.ones(5), halves(table))
    found = fit_exponents(table, z, groups, penalty=0.01, nonnegative=[True, False])
    assert found.exponents["signal 0"] == 0
    assert found.exponents["signal 1"] > 0.2


def test_too_few_groups_fit_gains_alone(table, z):
    groups = measured(table, z, [0.6, 0.6], [4, 2, 1.5, 1.7, 1], halves(table, each=1))
    found = fit_exponents(table, z, groups)
    assert set(found.exponents.values()) == {0.0}
    assert found.report.fallback == (
        "4 groups for 6 exponents and gains; exponents stay 0, only gains were fitted; "
        "measure more groups"
    )
    predicted = [table.cost[u, f].sum() * found.gains[f] for u, f, _ in groups]
    assert predicted == pytest.approx([kl for *_, kl in groups])


def test_constant_signals_are_named(table, z):
    flat = np.vstack([z[0], np.full(len(table.units), 0.0)])
    groups = measured(table, flat, [0.6, 0.0], np.ones(5), halves(table))
    found = fit_exponents(table, flat, groups, names=("told", "flat"))
    assert found.report.dropped == ("flat",)
    assert found.exponents["flat"] == 0


def test_unmeasured_formats_lie_between_their_neighbours(table):
    groups = [g for g in halves(table) if g[1] in (0, 3)]
    none = np.zeros((0, len(table.units)))
    found = fit_exponents(table, none, measured(table, none, [], [4, 9, 9, 1, 1], groups))
    assert found.gains[[0, 3, 4]] == pytest.approx([4, 1, 1])
    assert 4 > found.gains[1] > found.gains[2] > 1


def test_gains_never_turn_the_formats_round(table):
    # Read at 1 bit less than at 2: both take their geometric mean, each having one group.
    every = np.arange(len(table.units))
    none = np.zeros((0, len(table.units)))
    found = fit_exponents(table, none, [(every, 0, 0.02), (every, 1, 0.08)])
    total = table.cost.sum(axis=0) * found.gains
    assert total[:2] == pytest.approx([0.04, 0.04])
    assert found.report.error > 0


def test_a_single_group_has_nothing_to_leave_out(table):
    found = fit_exponents(table, np.zeros((0, len(table.units))), [(np.arange(9), 1, 0.1)])
    assert np.isnan(found.report.error)
    assert len(set(found.gains[:GRIDS].round(9))) == 1


def test_many_groups_are_left_out_in_ten_folds(table, z):
    groups = measured(table, z, [0.3, 0.0], np.ones(5), halves(table, each=15))
    assert fit_exponents(table, z, groups).report.folds == 10


def test_fit_refuses(table, z):
    every = np.arange(3)
    with pytest.raises(InputError, match="groups: the list is empty"):
        fit_exponents(table, z, [])
    with pytest.raises(InputError, match=r"groups\[0\]: its cost in keep-fp32 is 0"):
        fit_exponents(table, z, [(every, 4, 0.1)])
    with pytest.raises(InputError, match=r"groups\[0\]: KL nan is not a finite number"):
        fit_exponents(table, z, [(every, 0, np.nan)])
    with pytest.raises(InputError, match=r"groups\[0\]: a unit is outside 0 to 95"):
        fit_exponents(table, z, [(np.array([96]), 0, 0.1)])
    with pytest.raises(InputError, match=r"signals: shape \(2, 5\), expected \[signals, 96\]"):
        fit_exponents(table, z[:, :5], [(every, 0, 0.1)])
    with pytest.raises(InputError, match=r"names: .* must be 2 different names"):
        fit_exponents(table, z, [(every, 0, 0.1)], names=("a", "a"))
