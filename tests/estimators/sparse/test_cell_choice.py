"""Anchors: where they lie, and when growing stops."""

import numpy as np
import pytest

from bitknap.allocation import Format, formats
from bitknap.errors import InputError
from bitknap.estimators.sparse.cell_choice import (
    AtRandom,
    ByDepth,
    CellSpace,
    Growth,
    LeastSure,
    grow,
)
from bitknap.estimators.sparse.cell_features import Antecedents
from bitknap.estimators.sparse.predictors import LogLinear
from bitknap.testing import routed_units

LAYERS, EXPERTS = 12, 12
FORMATS = formats((2, 3, 4), 64)
ORIGIN = {"model": "m", "method": "rtn", "text": "t", "tokens": 1, "seed": 0}


@pytest.fixture(scope="module")
def units():
    return routed_units(LAYERS, EXPERTS, ("gate", "up", "down"), rows=8, cols=64)


@pytest.fixture(scope="module")
def truth(units):
    generator = np.random.default_rng(0)
    layer = np.cumsum(generator.normal(0, 0.5, LAYERS))[units.layer]
    noise = generator.normal(0, 0.1, (len(units), 1))
    return np.exp(layer[:, None] - 1.2 * np.arange(3) + noise)


@pytest.fixture(scope="module")
def antecedents(units):
    bits = np.broadcast_to(-np.arange(3.0), (len(units), 3))
    return Antecedents(names=("bits",), values=bits[:, :, None])


def free_cells(units):
    return np.ones((len(units), len(FORMATS)), dtype=np.bool_)


@pytest.mark.parametrize("anchors", [ByDepth(), AtRandom(), LeastSure()], ids=repr)
def test_picks_are_free_distinct_and_repeatable(anchors, units):
    free = free_cells(units)
    free[:, 1] = False
    spread = np.random.default_rng(1).uniform(size=free.shape)
    for given in (None, spread):
        cells = anchors.pick(units, free, given, 50, 3)
        assert len(set(cells.tolist())) == len(cells) == 50
        assert free.ravel()[cells].all()
        assert cells.tolist() == anchors.pick(units, free, given, 50, 3).tolist()
        assert cells.tolist() != anchors.pick(units, free, given, 50, 4).tolist() or (
            isinstance(anchors, LeastSure) and given is not None
        )


def test_depth_takes_whole_experts_and_middle_layers_most(units):
    anchors = ByDepth()
    # A fourth, a half and a sixth of 48 experts each: 12, 24 and 8, of 9 cells each.
    cells = anchors.pick(units, free_cells(units), None, (12 + 24 + 8) * 9, 0)
    unit, times = np.unique(cells // 3, return_counts=True)
    assert (times == 3).all()
    expert = units.layer[unit] * EXPERTS + units.expert[unit]
    assert (np.unique(expert, return_counts=True)[1] == 3).all()
    thirds = np.bincount(np.unique(expert) // EXPERTS // 4, minlength=3)
    assert thirds == pytest.approx([12, 24, 8], abs=2)
    # Its beginning has the same proportions.
    half = anchors.pick(units, free_cells(units), None, 22 * 9, 0)
    assert half.tolist() == cells[: 22 * 9].tolist()
    first = np.bincount(np.unique(units.layer[half // 3] * 12 + units.expert[half // 3]) // 48)
    assert first == pytest.approx([6, 12, 4], abs=3)


def test_the_least_sure_cells_come_first_one_a_unit(units):
    spread = np.zeros((len(units), 3))
    spread[5], spread[9, 2], spread[7, 1] = (1.0, 3.0, 2.0), 4.0, 5.0
    free = free_cells(units)
    free[7] = False
    cells = LeastSure().pick(units, free, spread, 2, 0)
    assert cells.tolist() == [9 * 3 + 2, 5 * 3 + 1]


def space(units, antecedents, formats=FORMATS):
    return CellSpace(units=units, formats=formats, antecedents=antecedents, provenance=ORIGIN)


def read_off(truth):
    """Return what measures cells by reading a table."""
    return lambda units, columns: enumerate(truth[units, columns].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("anchors", [AtRandom(), ByDepth(), LeastSure()], ids=repr)
def test_growing_stops_when_the_ranking_is_as_good_as_it_gets(anchors, units, truth, antecedents):
    calls: list[tuple[int, int]] = []

    def measure(units, columns):
        calls.extend(zip(units.tolist(), columns.tolist(), strict=True))
        return enumerate(truth[units, columns].tolist())

    def grown(seed):
        growth = Growth(start=60, step=60, stop=900, anchors=anchors, seed=seed)
        return grow(measure, space(units, antecedents), LogLinear(), growth)

    found = grown(0)
    assert found.saturated
    assert found.measurements == len(calls) == len(set(calls)) < 900
    assert found.measurements == 90 + 60 * len(found.spearman)
    assert found.spearman[-1] > 0.97
    assert found.spearman[-1] - found.spearman[-3] < 0.005
    assert len(found.held_out) == 90
    assert all(truth[u, c] == v for u, c, v in zip(*columns(found.samples), strict=True))
    again = grown(0)
    assert again.spearman == found.spearman
    assert again.samples.loss.tolist() == found.samples.loss.tolist()


def columns(samples):
    return samples.unit, samples.column, samples.loss


def test_growing_keeps_within_the_budget(units, truth, antecedents):
    growth = Growth(start=20, step=15, stop=47)
    found = grow(read_off(truth), space(units, antecedents), LogLinear(), growth)
    assert not found.saturated
    assert found.measurements == 47  # 10 to judge by, 20, 15, and the 2 that are left
    assert len(found.spearman) == 3


def test_kept_precisions_are_not_measured(units, truth, antecedents):
    kept = space(units, antecedents, (*FORMATS[:2], Format.keep("bf16")))
    growth = Growth(start=20, step=20, stop=60)
    found = grow(read_off(truth), kept, LogLinear(), growth)
    assert found.samples.column.max() == 1


def test_a_budget_without_a_start_is_refused(units, truth, antecedents):
    with pytest.raises(InputError) as error:
        grow(
            read_off(truth),
            space(units, antecedents),
            LogLinear(),
            Growth(start=20, step=10, stop=25),
        )
    assert str(error.value) == (
        "stop: 25 measurements are fewer than 10 held out and 20 to start with; "
        "raise stop or lower start"
    )
    with pytest.raises(InputError, match="are not three numbers above 0"):
        ByDepth(shares=(0.0, 0.5, 0.5))
