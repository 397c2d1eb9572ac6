"""The threshold on two formats."""

import numpy as np
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Format,
    Problem,
    formats,
    solve,
)
from bitknap.allocation.published import Threshold
from bitknap.errors import InfeasibleError, InputError

LOW, MIDDLE, HIGH = formats(bits=(2, 3, 4), group_size=64)


TWO = Threshold(low=Format.made_up(0), high=Format.made_up(1), per="unit")


def test_the_threshold_gives_the_better_format_to_the_most_sensitive(model):
    units = model(1, 1).units
    cost = [[9.0, 5.0, 0.0], [7.0, 3.0, 0.0], [8.0, 6.0, 0.0]]
    table = CostTable.from_arrays(cost, units=units, formats=(LOW, MIDDLE, HIGH))
    step = int(table.nbytes[0, 2] - table.nbytes[0, 0])
    least = int(table.nbytes[:, 0].sum())
    plans = [
        solve(
            Problem(table, Budget.bytes(least + count * step)), Threshold(low=LOW, high=HIGH)
        ).choice.tolist()
        for count in range(4)
    ]
    assert plans == [[0, 0, 0], [2, 0, 0], [2, 0, 2], [2, 2, 2]]


def test_no_threshold_separates_equal_rows():
    table = CostTable.from_arrays(np.tile([1.0, 0.0], (4, 1)), np.tile([1, 2], (4, 1)))
    assert solve(Problem(table, Budget.bytes(7)), TWO).choice.tolist() == [0] * 4
    assert solve(Problem(table, Budget.bytes(8)), TWO).choice.tolist() == [1] * 4


def test_the_threshold_counts_weights_bytes_or_nothing():
    table = CostTable.from_arrays([[8.0, 0.0], [5.0, 0.0]], [[1, 5], [1, 2]])
    problem = Problem(table, Budget.bytes(6))
    assert solve(problem, TWO).choice.tolist() == [1, 0]
    # 8 for 4 bytes, 5 for one.
    low, high = table.formats
    assert solve(problem, Threshold(low=low, high=high, per="byte")).choice.tolist() == [0, 1]
    with pytest.raises(InputError) as error:
        solve(problem, Threshold(low=low, high=high))
    assert str(error.value) == 'threshold: the units have no shapes; use per="byte" or "unit"'


def test_pins_come_before_the_threshold(model):
    table = model(1, 2).pin("expert=0,proj=gate", bits=4).pin("expert=1,proj=up", bits=3)
    found = solve(Problem(table, Budget.bits(3.4)), Threshold(low=LOW, high=HIGH))
    assert found.choice[0] == 2
    assert found.choice[4] == 1
    assert set(np.delete(found.choice, [0, 4]).tolist()) <= {0, 2}


def test_the_threshold_is_not_silent_about_its_floor(model):
    table = model()
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, Budget.bits(3)), Threshold(low=MIDDLE, high=HIGH))
    least = table.nbytes[:, 1].sum()
    assert str(error.value) == (
        f"threshold: the rows at int3-g64-asym need {least:.6g}, limit is {3 / 8 * 36 * 8192:.6g}; "
        "raise the limit or take a smaller format"
    )
    with pytest.raises(InputError, match="threshold: no format int8-g64-asym in the table; there"):
        solve(
            Problem(table, Budget.bits(3)),
            Threshold(low=LOW, high=Format(8, 64)),
        )
