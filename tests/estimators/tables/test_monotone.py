"""More bits never cost more after repair, and nothing else changes."""

import numpy as np
import pytest

from bitknap.allocation import CostTable, Format, formats
from bitknap.estimators.tables.monotone import isotonic, non_increasing
from bitknap.testing import routed_units


def made(cost, options):
    units = routed_units(1, len(cost), ("up",), rows=8, cols=64)
    return CostTable.from_arrays(cost, units=units, formats=options, provenance={"estimator": "x"})


def pooled(row):
    """Return the non-increasing fit by pooling neighbours until none rises."""
    blocks = [[value, 1] for value in row]
    i = 0
    while i + 1 < len(blocks):
        if blocks[i + 1][0] > blocks[i][0]:
            (a, n), (b, m) = blocks[i], blocks[i + 1]
            blocks[i : i + 2] = [[(a * n + b * m) / (n + m), n + m]]
            i = max(0, i - 1)
        else:
            i += 1
    return np.concatenate([[value] * n for value, n in blocks])


def test_the_fit_is_that_of_pooling():
    values = np.random.default_rng(0).normal(size=(200, 8)) * 10.0 ** np.arange(0, -8, -1)
    found = non_increasing(values)
    assert (np.diff(found, axis=1) <= 0).all()
    for row, fit in zip(values, found, strict=True):
        np.testing.assert_allclose(fit, pooled(row), rtol=1e-9, atol=1e-15)


def test_forbidden_formats_are_left_out():
    found = non_increasing(np.array([[1.0, np.inf, 3.0, 1.0], [np.inf, 1.0, 2.0, np.inf]]))
    assert found.tolist() == [[2, np.inf, 2, 1], [np.inf, 1.5, 1.5, np.inf]]
    assert np.isposinf(non_increasing(np.full((1, 3), np.inf))).all()


def test_families_are_repaired_apart_and_repairs_counted():
    options = formats((2, 3, 4), (32, 64), keep="fp32")
    assert [f.name for f in options[::2]] == [
        "int2-g32-asym",
        "int3-g32-asym",
        "int4-g32-asym",
        "keep-fp32",
    ]
    # Between the families costs may rise; within g32 the first unit rises from 3 to 4 bits.
    cost = np.array([[9.0, 10, 2, 6, 4, 1, 0], [9.0, 10, 5, 6, 4, 1, 0]])
    table, repaired = isotonic(made(cost, options))
    assert repaired == 2
    assert table.provenance["repaired"] == 2
    assert table.provenance["estimator"] == "x"
    assert table.cost.tolist() == [[9, 10, 3, 6, 3, 1, 0], [9, 10, 5, 6, 4, 1, 0]]
    again, none = isotonic(table)
    assert none == 0
    assert np.array_equal(again.cost, table.cost)


def test_the_order_of_columns_does_not_matter():
    options = (Format(4, 32), Format(2, 32), Format(3, 32))
    table, repaired = isotonic(made(np.array([[1.0, 2.0, 4.0]]), options))
    assert table.cost.tolist() == [[1, 3, 3]]
    assert repaired == 2


@pytest.mark.parametrize("count", [1, 5])
def test_a_monotone_table_is_left_alone_to_the_bit(count):
    cost = -np.sort(-np.random.default_rng(count).random((count, 6)), axis=1)
    table, repaired = isotonic(made(cost, formats(range(1, 7), 32)))
    assert repaired == 0
    assert np.array_equal(table.cost, cost)
