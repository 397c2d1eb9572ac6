from __future__ import annotations

import pytest

from bitknap.allocation import Format, Units, formats, round_robin, uniform_plans


@pytest.fixture
def units() -> Units:
    experts = [
        (layer, e, p) for layer in range(3) for e in range(5) for p in ("gate", "up", "down")
    ]
    return Units.build(
        layer=[x[0] for x in experts],
        role=["routed"] * len(experts),
        expert=[x[1] for x in experts],
        projection=[x[2] for x in experts],
        rows=[64 if x[2] != "down" else 96 for x in experts],
        cols=[96 if x[2] != "down" else 64 for x in experts],
    )


def test_round_robin_takes_the_bytes_or_just_more(units):
    low, high = Format.parse("int2-g32-sym"), Format.parse("int3-g32-sym")
    step = int((high.nbytes(units.rows, units.cols) - low.nbytes(units.rows, units.cols)).max())
    nbytes = int(2.9 * units.numel.sum() / 8)
    plan = round_robin(units, low, high, nbytes)
    assert nbytes <= plan.total_bytes < nbytes + step


def test_round_robin_spreads_over_layers_and_projections(units):
    low, high = Format.parse("int2-g32-sym"), Format.parse("int3-g32-sym")
    half = int(low.nbytes(units.rows, units.cols).sum() + high.nbytes(units.rows, units.cols).sum())
    plan = round_robin(units, low, high, half // 2)
    for layer in range(3):
        assert 5 <= plan.choice[units.layer == layer].sum() <= 10


def test_every_family_stays_within_two_percent_of_the_budget(units):
    options = formats((1, 2, 3, 4), (32, "row"), (False, True), ("fp16", "compact"))
    nbytes = int(2.6 * units.numel.sum() / 8)
    step = 64 * 96 // 8
    plans = uniform_plans(units, options, nbytes)
    assert plans
    for plan in plans:
        assert plan.total_bytes <= max(1.02 * nbytes, nbytes + step)
        assert len({plan.format_of(i).group_size for i in range(len(units))}) == 1


def test_an_exact_fit_is_offered_as_it_is(units):
    item = Format.parse("int3-row-sym")
    nbytes = int(item.nbytes(units.rows, units.cols).sum())
    plans = uniform_plans(units, formats((2, 3, 4), "row", True), nbytes)
    assert plans[0].total_bytes == nbytes
