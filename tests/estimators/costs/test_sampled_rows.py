"""Costs from a sample of rows: how close they come, how well they say so, where they ask more."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.estimators.costs import sampled_rows
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.sampled_rows import Picked, estimated, row_order, told_apart
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.rounding.methods import Gptq, Hqq
from bitknap.testing.evidence import lopsided_case

FORMATS = formats((2, 3, 4), (8, "row"), (False, True), ("fp16",), keep="fp32")


@pytest.fixture(scope="module")
def case():
    return lopsided_case(Recorded(full=True))


def thorough(evidence):
    return replace(evidence, effort=Effort(thorough=True))


@pytest.fixture
def few(monkeypatch):
    """Eight rows of each unit, and never more."""
    monkeypatch.setattr(sampled_rows, "ROWS", 8)
    monkeypatch.setattr(sampled_rows, "_EITHER", np.inf)


def test_small_matrices_are_rounded_whole(case, monkeypatch):
    monkeypatch.setattr(sampled_rows, "ROWS", int(case.evidence.units.rows.max()))
    table = SecondMoments().estimate(case.evidence, FORMATS)
    assert table.spread is None
    assert table.provenance["rows"] == 1
    whole = SecondMoments().estimate(thorough(case.evidence), FORMATS)
    assert np.array_equal(table.cost, whole.cost)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rounding", [None, Hqq(), Gptq()], ids=["rtn", "hqq", "gptq"])
def test_a_sample_estimates_all_rows(full, rounding, case, few):
    evidence = case.evidence if rounding is None else replace(case.evidence, rounding=rounding)
    estimator = SecondMoments(full=full)
    whole, some = (estimator.estimate(e, FORMATS) for e in (thorough(evidence), evidence))
    assert whole.spread is None
    assert some.spread is not None
    assert 0 < some.provenance["rows"] < 0.6
    grids = [i for i, f in enumerate(FORMATS) if f.kind == "grid"]
    assert not some.cost[:, -1].any()
    assert not some.spread[:, -1].any()
    ratio = np.log(some.cost[:, grids] / whole.cost[:, grids])
    assert abs(np.median(ratio)) < 0.1
    off = (some.cost - whole.cost)[:, grids] / some.spread[:, grids]
    assert 0.2 < np.median(np.abs(off)) < 1.2  # 0.67 for a normal error that is known exactly


@pytest.mark.slow
def test_rows_are_drawn_by_unit_and_seed(case, few, monkeypatch):
    units = case.layout.units
    order = row_order(units, 3, 0)
    assert sorted(order) == list(range(units.rows[3]))
    assert np.array_equal(order, row_order(units, 3, 0))
    assert not np.array_equal(order, row_order(units, 3, 1))
    assert not np.array_equal(order, row_order(units, 6, 0))
    # The rows of a unit, and so its costs, do not depend on which units are rounded with it.
    table = SecondMoments().estimate(case.evidence, FORMATS)
    monkeypatch.setattr(sampled_rows, "_PIECE", 1)
    alone = SecondMoments().estimate(case.evidence, FORMATS)
    np.testing.assert_allclose(alone.cost, table.cost, rtol=1e-5)
    assert alone.spread is not None
    assert table.spread is not None
    np.testing.assert_allclose(alone.spread, table.spread, rtol=1e-4)


@pytest.mark.slow
def test_samples_grow_where_formats_cannot_be_told_apart(case, monkeypatch):
    whole = SecondMoments().estimate(thorough(case.evidence), FORMATS)
    shares = []
    for either in (np.inf, 0.05, 0.0):
        monkeypatch.setattr(sampled_rows, "ROWS", 4)
        monkeypatch.setattr(sampled_rows, "_EITHER", either)
        table = SecondMoments().estimate(case.evidence, FORMATS)
        shares.append(table.provenance["rows"])
        assert table.spread is not None
        every = table.spread.max(1) == 0
        np.testing.assert_allclose(table.cost[every], whole.cost[every], rtol=1e-5)
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_the_ratio_estimator_by_hand():
    # Sizes 1 and 3 of 10 in all; in grid 0 costs are a tenth of that, in grid 1 they vary.
    known = np.array([[0.1, 0.1], [0.3, 0.7]])
    found = estimated(known, np.array([1.0, 3.0]), 10.0, 4)
    np.testing.assert_allclose(found.cost, [1.0, 2.0])
    # away = known - size × 0.2 = ±0.1; 10 / 2 × sqrt(½ / 2) = 2.5
    np.testing.assert_allclose(found.spread, [0.0, 2.5 * 0.1 * 2**0.5], atol=1e-12)
    nothing = estimated(np.zeros((2, 1)), np.zeros(2), 0.0, 4)
    assert nothing.cost == 0 and nothing.spread == 0
    every = estimated(known, np.array([1.0, 3.0]), 4.0, 2)
    np.testing.assert_allclose(every.cost, known.sum(0))
    assert not every.spread.any()


def test_only_formats_near_the_hull_have_to_be_told_apart():
    nbytes = np.array([10, 20, 30])
    rng = np.random.default_rng(0)
    size = np.ones(8)

    def told(middle):
        noise = 1 + 0.5 * rng.standard_normal((8, 3))
        return bool(
            told_apart([estimated(np.array([9.0, middle, 1.0]) * noise, size, 64.0, 64)], nbytes)[0]
        )

    assert not told(6.0)  # a little above the line from 9 to 1
    assert told(60.0)  # far above it
    assert told_apart([estimated(np.ones((8, 1)), size, 64.0, 64)], nbytes[:1])[0]


def test_picked_rows():
    stack = torch.arange(24.0).view(2, 3, 4)
    picked = Picked(torch.tensor([1]), torch.tensor([[2, 0]]))
    assert torch.equal(picked.of(stack), stack[1:, [2, 0]])
    assert torch.equal(picked.of(stack[:, :1]), stack[1:, :1])


def test_a_format_on_its_own_needs_no_hull(case, few):
    table = SecondMoments().estimate(case.evidence, [Format(3, 8)])
    assert table.cost.shape[1] == 1
    assert table.spread is not None
