"""Which readings are taken, in which order, and what is made of those that are missing."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.costs import sampled_rows
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.group_kl.chosen_readings import MOST_ALONE, Groups, Reading, by_worth
from bitknap.estimators.group_kl.pooled_gains import group_kl
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.readings import Readings
from bitknap.testing.evidence import lopsided_case

OPTIONS = formats((1, 2, 3, 4, 8), (8,), (False,), ("fp16",))


def layers(count, kinds=1):
    """Groups of one unit each, `kinds` in every layer."""
    numbers = range(count * kinds)
    return Groups(
        runs=tuple(np.array([i]) for i in numbers),
        kind=tuple(i % kinds for i in numbers),
        layer=tuple(i // kinds for i in numbers),
    )


def test_joint_readings_first_then_groups_alone_at_narrow_widths():
    wanted = by_worth(layers(4), (1, 2, 3, 4, 8), thorough=False)
    assert wanted[:5] == [Reading((0, 1, 2, 3), width) for width in (1, 0, 2, 3, 4)]
    assert wanted[5:] == [Reading((g,), w) for w in (1, 0, 2) for g in range(4)]
    two = by_worth(layers(2, kinds=2), (4, 8), thorough=False)
    assert two[:4] == [Reading(same, width) for width in (0, 1) for same in ((0, 2), (1, 3))]
    assert two[4:] == [Reading((g,), 0) for g in (0, 2, 1, 3)]  # kinds are read whole


def test_of_many_layers_one_group_of_each_kind_is_read_alone():
    wanted = by_worth(layers(MOST_ALONE + 1, kinds=2), (1, 2, 4), thorough=False)
    assert [len(one.groups) for one in wanted] == [MOST_ALONE + 1] * 6 + [1] * 2
    assert wanted[6:] == [Reading((MOST_ALONE + even,), 1) for even in (0, 1)]


def test_a_projection_of_one_layer_is_read_once_at_every_width():
    assert by_worth(layers(1), (2, 8), thorough=False) == [Reading((0,), 0), Reading((0,), 1)]


def test_thorough_reads_every_group_alone():
    wanted = by_worth(layers(3, kinds=2), (2, 4, 8), thorough=True)
    assert len(wanted) == len(set(wanted)) == 18
    assert {len(one.groups) for one in wanted} == {1}


def test_gains_by_hand():
    # Both widths read jointly: gains 2 and 3. Two of three groups were also read alone: too few to
    # be used, but they say how far groups are from what they share.
    sums = np.array([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    some = {
        Reading((0, 1, 2), 0): 6.0,
        Reading((0, 1, 2), 1): 0.9,
        Reading((0,), 0): 4.0,
        Reading((2,), 0): 2.0,
    }
    found = group_kl(sums, layers(3), some)
    np.testing.assert_allclose(found.kl, np.outer([1, 1, 1], [2, 0.3]))
    assert not found.own.any()
    assert found.error == pytest.approx(np.log(2) / 2**0.5)
    # With the third, each has its own gain, at the other width in proportion to the joint one.
    found = group_kl(sums, layers(3), some | {Reading((1,), 0): 1.0})
    np.testing.assert_allclose(found.kl, np.outer([2, 0.5, 1], [2, 0.3]))
    assert found.own.all()
    assert np.isnan(found.error)


def test_gains_without_joint_readings_by_hand():
    sums = np.array([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    # A group's own gain holds at all widths.
    alone = group_kl(sums, layers(3), {Reading((g,), 0): g + 1.0 for g in range(3)})
    np.testing.assert_allclose(alone.kl, np.outer([1, 2, 3], [1, 0.1]))
    assert alone.own.all()
    # If some are missing, all share the mean of what was read.
    two = group_kl(sums, layers(3), {Reading((0,), 0): 2.0, Reading((1,), 0): 8.0})
    np.testing.assert_allclose(two.kl, 4 * sums)
    assert not two.own.any()
    assert two.error == pytest.approx(np.log(2))
    # One joint reading is the gain of everything, also of other kinds.
    one = group_kl(sums, layers(1, kinds=3), {Reading((0,), 1): 0.5})
    np.testing.assert_allclose(one.kl, 5 * sums)


@pytest.fixture
def case(monkeypatch):
    """A calibrated model, all of whose rows are rounded: only gains have errors."""
    monkeypatch.setattr(sampled_rows, "ROWS", 1 << 20)
    return lopsided_case()


@pytest.mark.slow
def test_the_order_of_readings_sets_what_a_few_measure(case):
    whole = Calibrated().estimate(case.evidence, OPTIONS)
    readings = whole.provenance["readings"]
    assert readings == {"taken": 33, "left": 0}  # 3 × (5 + 2 × 3)
    assert whole.spread is None
    few = Calibrated(measurements=20).estimate(case.evidence, OPTIONS)
    told = few.provenance["readings"]
    assert (told["taken"], told["left"]) == (20, 13)
    assert few.provenance["measurements"] == 20
    np.testing.assert_allclose(np.log(few.cost / whole.cost), 0, atol=1.5)
    one = Calibrated(measurements=1).estimate(case.evidence, OPTIONS)
    assert one.provenance["readings"]["sharing"] == 6
    assert np.isfinite(one.cost).all()
    for none in (0, -2):
        with pytest.raises(InputError, match=rf"measurements: {none} leaves none .* at least 1"):
            Calibrated(measurements=none).estimate(case.evidence, OPTIONS)


def test_time_ends_the_readings(case, monkeypatch, tmp_path):
    clock, real = [0.0], Replay.kl

    def slow(self: Replay, layer: int | None = None) -> float:
        clock[0] += 1
        return real(self, layer)

    monkeypatch.setattr(Replay, "kl", slow)
    monkeypatch.setattr("bitknap.estimators.group_kl.calibrated.time.monotonic", lambda: clock[0])
    journal = Readings.open(tmp_path / "journal", {"model": "this one"})
    limited = replace(case.evidence, effort=Effort(seconds=20), readings=journal)
    table = Calibrated().estimate(limited, OPTIONS)
    told = table.provenance["readings"]
    # 15 readings of all layers together, both layers of two projections, and one of the third.
    assert (told["taken"], told["left"], told["sharing"]) == (20, 13, 2)
    assert told["error"] > 0
    assert table.spread is not None
    sharing = table.spread.max(1) > 0
    np.testing.assert_allclose(table.spread[sharing], table.cost[sharing] * told["error"])
    # The same limit again goes on from there.
    more = Calibrated().estimate(limited, OPTIONS)
    assert more.provenance["readings"]["taken"] > 20
    none = replace(case.evidence, effort=Effort(seconds=0))
    assert Calibrated().estimate(none, OPTIONS).provenance["readings"]["taken"] == 1
