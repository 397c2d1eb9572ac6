"""GEMQ's program over all layers."""

import numpy as np
import pytest

from bitknap.allocation import CostTable, formats, profile, solve
from bitknap.allocation.published import (
    gemq_problem,
    mc_moe,
)
from bitknap.errors import InputError
from bitknap.testing import routed_units


def experts_table(layers: int, experts: int, seed: int = 0) -> CostTable:
    units = routed_units(layers, experts, ("gate", "up"), rows=64, cols=64)
    generator = np.random.default_rng(seed)
    scale = generator.lognormal(0, 1, (len(units), 1)) * 10.0 ** (units.layer[:, None] % 3)
    # Two bits above the chord of one and three, as min-max grids have it.
    cost = scale * np.array([1.0, 0.85, 0.34]) * generator.lognormal(0, 0.05, (len(units), 3))
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
