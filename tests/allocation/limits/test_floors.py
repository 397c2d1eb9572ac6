"""A floor ("at least") is stored negated, and nowhere shown so."""

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Problem, formats, solve
from bitknap.allocation.limits import bits_per_layer, count_at_least, custom, share_at_most
from bitknap.cli.options.solving import uses
from bitknap.cli.views.tables import limits_table
from bitknap.errors import InfeasibleError
from bitknap.testing import routed_units

BITS = np.array([1, 2, 3])


@pytest.fixture
def table():
    units = routed_units(2, 4, ("down",), rows=64, cols=64)
    cost = np.arange(1, 9)[:, None] * np.array([4.0, 2.0, 1.0])
    return CostTable.from_arrays(cost, units=units, formats=formats(BITS.tolist(), "row", True))


def limited(table):
    return solve(
        Problem(
            table,
            [
                Budget.bits(2.8),
                *count_at_least(table, 2, 3, name="threes"),
                *bits_per_layer(table, at_least=2.0),
                custom(table, "codes", BITS, at_least=9),
                custom(table, "below zero", -BITS, at_most=-8),
                share_at_most(table, 0.5, bits=1),
            ],
        )
    )


def test_used_is_what_a_person_would_write(table):
    found = limited(table)
    bits = BITS[found.choice]
    assert found.used["threes, layer 0"] == (bits[:4] == 3).sum() >= 2
    assert found.used["codes"] == bits.sum() >= 9
    of_layer = 8 * found.plan.nbytes[4:].sum() / (4 * 64 * 64)
    assert found.used["bits per weight, layer 1, at least"] == pytest.approx(of_layer)
    assert found.used["share at 1 bits or fewer"] == (bits == 1).mean()
    # What was asked for below zero is not a floor, and stays as it was asked for.
    assert found.used["below zero"] == -bits.sum() <= -8


def test_plans_keep_bounds_as_they_were_asked_for(table):
    header = limited(table).plan.header
    assert header["limits"]["threes, layer 0"] == 2
    assert header["limits"]["bits per weight, layer 0, at least"] == 2.0
    assert header["limits"]["share at 1 bits or fewer"] == 0.5
    assert header["limits"]["below zero"] == -8
    assert {"threes, layer 1", "codes"} <= set(header["floors"])
    assert not {"memory", "below zero"} & set(header["floors"])


def test_the_command_line_shows_both_rules(table):
    found = limited(table)
    rows = uses(found)["limits"]
    assert rows["codes"]["rule"] == "at least" and rows["codes"]["bound"] == 9
    assert rows["memory"]["rule"] == "at most"
    view = limits_table(rows)
    bounds = dict(zip(view.columns[0].cells, view.columns[2].cells, strict=True))
    assert bounds["threes, layer 0"] == "at least 2"
    assert bounds["below zero"] == "at most -8"
    signs = {cell for cell in map(str, view.columns[1].cells) if cell.startswith("-")}
    assert signs == {f"-{BITS[found.choice].sum()}"}


def test_messages_name_amounts_without_a_sign(table):
    with pytest.raises(InfeasibleError) as caught:
        solve(Problem(table, bits_per_layer(table, at_least=9)))
    assert "the most any plan reaches is 6.5 KiB, the limit asks for 18 KiB" in str(caught.value)
    with pytest.raises(InfeasibleError, match=r"lower codes from 24 to \d") as caught:
        solve(Problem(table, [Budget.bits(2.5), custom(table, "codes", BITS, at_least=24)]))
    assert " -" not in str(caught.value)
