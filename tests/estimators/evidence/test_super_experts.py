"""Super experts: found by their outputs, held to a width, and let go to see what a limit needs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import Budget, CostTable, Format, Problem, Units, formats, solve
from bitknap.errors import InfeasibleError, InputError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.tables.super_expert_floor import (
    comparable,
    protected,
    units_of,
    unprotected,
)
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model
from bitknap.testing.evidence import random_windows

FORMATS = formats((2, 3, 4, 6), "row", symmetric=True, metadata="fp16")
FOUND = [(1, 3, 55.4)]


@pytest.fixture(scope="module")
def evidence():
    model = tiny_model("mixtral", num_local_experts=8, num_experts=8)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 60
    windows = random_windows(6)
    return calibrate(model, walk(model, ("attention",)), windows)


@pytest.fixture(scope="module")
def table(evidence):
    return SecondMoments().estimate(evidence, FORMATS)


def test_the_scaled_up_expert_is_the_one(evidence):
    ((layer, expert, ratio),) = super_experts(evidence)
    assert (layer, expert) == (1, 3)
    assert ratio > 10
    assert super_experts(evidence, times=2 * ratio) == []


def test_no_narrow_grid_for_a_super_expert(table):
    found = protected(table, FOUND)
    mine = table.units.matches("layer=1,expert=3")
    narrow = np.array([f.bits < 4 for f in FORMATS])
    assert mine.sum() == 3  # gate, up and down
    assert np.array_equal(np.isinf(found.cost), mine[:, None] & narrow)
    allowed = np.isfinite(found.cost)
    assert np.array_equal(found.cost[allowed], table.cost[allowed])
    assert found.provenance["protected"] == {"bits": 4, "units": 3}
    plan = solve(Problem(found, Budget.bits(4.5))).plan
    assert {plan.format_of(int(i)).bits for i in np.flatnonzero(mine)} <= {4, 6}


def test_attention_of_the_same_layer_is_not_an_experts(table):
    assert {table.units.role[i] for i in np.flatnonzero(units_of(table.units, FOUND))} == {0}


@pytest.mark.parametrize(("bits", "left"), [(4, 3), (3, 3), (2, 2), (8, 3)])
def test_without_a_format_so_wide_the_widest_stays(bits, left, table):
    options = FORMATS[:2]  # 2 and 3 bits
    found = protected(
        CostTable.from_arrays(table.cost[:, :2], units=table.units, formats=options), FOUND, bits
    )
    mine = table.units.matches("layer=1,expert=3")
    allowed = {
        f.bits for f, ok in zip(options, np.isfinite(found.cost[mine]).all(0), strict=True) if ok
    }
    assert min(allowed) == left


def test_a_kept_precision_is_wide_enough():
    units = Units.anonymous(2)
    options = (Format(2, 0), Format.keep("bf16"))
    table = CostTable.from_arrays(np.ones((2, 2)), np.ones((2, 2)), units=units, formats=options)
    assert np.isfinite(protected(table, [(0, 0, 20.0)]).cost).any(axis=1).all()


def test_what_is_forbidden_stays_so_and_every_unit_keeps_a_format(table):
    pinned = table.pin("layer=1,expert=3", bits=3)
    found = protected(pinned, FOUND)
    assert np.array_equal(found.cost, pinned.cost)


def test_nothing_to_protect(table):
    assert protected(table, FOUND, 0) is table
    found = protected(table, [])
    assert np.array_equal(found.cost, table.cost)
    assert found.provenance["protected"] == {"bits": 4, "units": 0}
    assert unprotected(found) is found
    for bits in (-1, 2.5):
        with pytest.raises(
            InputError, match=f"protect: {bits} is not a whole number of at least 0"
        ):
            protected(table, FOUND, bits)  # type: ignore[arg-type]


def test_without_protection_a_limit_can_be_met(table):
    large = [*FOUND, *((0, expert, 20.0) for expert in range(8))]
    said = {**table.provenance, "super_experts": [list(one) for one in large]}
    found = protected(replace(table, provenance=said), large)
    least = Budget.bytes(int(found.nbytes.min(1).sum()))
    with pytest.raises(InfeasibleError, match="smallest plan needs"):
        solve(Problem(found, least))
    assert solve(Problem(unprotected(found), least)).plan.total_bytes == least.value


def test_maps_compare_formats_that_all_may_use(table):
    found = comparable(protected(table, FOUND))
    allowed = np.isfinite(found.cost)
    assert np.array_equal(allowed, np.broadcast_to([False, False, True, True], allowed.shape))
    assert comparable(table) is table
