"""Which readings are taken, in which order, and what is made of those that are missing."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.group_kl.chosen_readings import Groups, Reading, by_worth
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


def test_joint_readings_first_then_narrow_ones_then_layers_between():
    wanted = by_worth(layers(4), (1, 2, 3, 4, 8), thorough=False)
    assert wanted[:5] == [Reading((0, 1, 2, 3), width) for width in (1, 0, 2, 3, 4)]
    assert wanted[5:] == [Reading((g,), w) for w in (1, 0, 2) for g in (0, 2, 1, 3)]
    two = by_worth(layers(2, kinds=2), (4, 8), thorough=False)
    assert two[:4] == [Reading(same, width) for width in (0, 1) for same in ((0, 2), (1, 3))]
    assert two[4:] == [Reading((g,), 0) for g in (0, 1, 2, 3)]


def test_a_projection_of_one_layer_is_read_once_at_every_width():
    assert by_worth(layers(1), (2, 8), thorough=False) == [Reading((0,), 0), Reading((0,), 1)]


def test_thorough_reads_every_group_alone():
    wanted = by_worth(layers(3, kinds=2), (2, 4, 8), thorough=True)
    assert len(wanted) == len(set(wanted)) == 18
    assert {len(one.groups) for one in wanted} == {1}


def test_gains_of_missing_readings_by_hand():
    # Both widths read jointly: gains 2 and 3. Layer 0's own gain at width 0 is 4, twice the joint
    # one; layer 2's is 2, the joint one. So layer 1 is in the middle, and at width 1 likewise.
    sums = np.array([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    readings = {
        Reading((0, 1, 2), 0): 6.0,
        Reading((0, 1, 2), 1): 0.9,
        Reading((0,), 0): 4.0,
        Reading((2,), 0): 2.0,
    }
    found = group_kl(sums, layers(3), readings)
    expected = np.outer([2, 2**0.5, 1], [2, 0.3])
    np.testing.assert_allclose(found.kl, expected)
    assert found.read.tolist() == [True, False, True]
    assert found.error == pytest.approx(np.log(2))
    # Without joint readings a group's own gain holds at all widths.
    alone = group_kl(sums, layers(3), {Reading((g,), 0): 3.0 for g in range(3)})
    np.testing.assert_allclose(alone.kl, 3 * sums)
    assert alone.read.all()
    # One joint reading is the gain of everything, also of other kinds.
    one = group_kl(sums, layers(1, kinds=3), {Reading((0,), 1): 0.5})
    np.testing.assert_allclose(one.kl, 5 * sums)
    assert np.isnan(one.error)


@pytest.fixture(scope="module")
def case():
    return lopsided_case()


@pytest.mark.slow
def test_the_order_of_readings_sets_what_a_few_measure(case):
    whole = Calibrated().estimate(case.evidence, OPTIONS)
    readings = whole.provenance["readings"]
    assert readings == {"taken": 33, "left": 0, "error": readings["error"]}  # 3 × (5 + 2 × 3)
    assert whole.spread is None
    few = Calibrated(measurements=20).estimate(case.evidence, OPTIONS)
    told = few.provenance["readings"]
    assert (told["taken"], told["left"]) == (20, 13)
    assert few.provenance["measurements"] == 20
    np.testing.assert_allclose(np.log(few.cost / whole.cost), 0, atol=1.5)
    one = Calibrated(measurements=1).estimate(case.evidence, OPTIONS)
    assert one.provenance["readings"]["interpolated"] == 6
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
    limited = replace(case.evidence, effort=Effort(seconds=19), readings=journal)
    table = Calibrated().estimate(limited, OPTIONS)
    told = table.provenance["readings"]
    assert (told["taken"], told["left"], told["interpolated"]) == (19, 14, 2)
    assert told["error"] > 0
    assert table.spread is not None
    interpolated = table.spread.max(1) > 0
    np.testing.assert_allclose(table.spread[interpolated], table.cost[interpolated] * told["error"])
    # The same limit again goes on from there.
    more = Calibrated().estimate(limited, OPTIONS)
    assert more.provenance["readings"]["taken"] > 19
    none = replace(case.evidence, effort=Effort(seconds=0))
    assert Calibrated().estimate(none, OPTIONS).provenance["readings"]["taken"] == 1
