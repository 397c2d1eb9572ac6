"""Readings of KL below what arithmetic alone makes of it are not believed."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring.noise_floor import LEAST, floor_of
from bitknap.testing.evidence import lopsided_case


@pytest.fixture(scope="module")
def case():
    return lopsided_case()


def test_floor_by_hand():
    # Mean -1, deviation 1 of four values: 1 + 2 × 1 / 2.
    assert floor_of(np.array([-2.0, -2.0, 0.0, 0.0])) == 2
    assert floor_of(np.zeros(3)) == floor_of(np.array([np.nan, 1])) == LEAST


def test_the_floor_is_far_below_what_rounding_costs(case):
    floor = case.evidence.floor
    assert floor == case.evidence.provenance["kl_floor"]
    # Half of what the logarithms of these few tokens leave of float32, and a thousandth of a gain.
    assert LEAST < floor < 1e-6


def test_readings_below_the_floor_are_not_believed(case):
    grids = formats((2, 4), "row")
    table = Measured().estimate(case.evidence, grids)
    units = case.layout.units
    cut = float(np.median(table.cost[units.layer == 0, 1]))
    found = Measured().estimate(replace(case.evidence, floor=cut), grids)
    assert found.provenance["filled"] > table.provenance["filled"]
    assert (found.cost > 0).all()
    believed = table.cost > cut
    assert np.array_equal(found.cost[believed], table.cost[believed])


def test_groups_below_the_floor_count_as_the_floor(case):
    grids = formats((2, 8), "row")
    table = Calibrated().estimate(case.evidence, grids)
    assert "noise" not in table.provenance["readings"]
    found = Calibrated().estimate(replace(case.evidence, floor=1.0), grids)
    assert found.provenance["readings"]["noise"] == found.provenance["readings"]["taken"]
    # Groups are read by themselves in 2 bits; in 8 their joint reading says about the same.
    units = case.layout.units
    for layer, projection in np.unique([units.layer, units.projection], axis=1).T:
        group = (units.layer == layer) & (units.projection == projection)
        assert found.cost[group].sum(0) == pytest.approx([1, 1], rel=0.1)
