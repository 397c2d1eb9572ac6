from itertools import product

import numpy as np
import pytest

from bitknap.allocation import CostTable, Units, formats
from bitknap.errors import InputError
from bitknap.report.figure_files import write_picture
from bitknap.report.sensitivity_map import heat, heat_figure, text_of


def table(experts: int = 3, role: str = "routed") -> CostTable:
    """Two layers, gate and down; a cost is 10^(layer - expert) at 2 bits, 100 × less at 4."""
    keys = list(product(range(2), range(experts), ("gate", "down")))
    layer, expert, projection = zip(*keys, strict=True)
    units = Units.build(
        layer=layer,
        role=[role] * len(keys),
        expert=expert,
        projection=projection,
        rows=[64] * len(keys),
        cols=[64] * len(keys),
    )
    cost = 10.0 ** (np.array(layer) - np.array(expert))[:, None] * np.array([1.0, 0.01])
    return CostTable.from_arrays(cost, units=units, formats=formats((2, 4), "row", True))


def test_a_map_shows_the_mean_over_formats_by_layer_and_expert():
    gate, down = heat(table())
    assert (gate.projection, down.projection) == ("gate", "down")
    assert gate.layers.tolist() == [0, 1]
    assert gate.values == pytest.approx(np.array([[-1.0, -2.0, -3.0], [0.0, -1.0, -2.0]]))


def test_formats_that_cost_nothing_or_are_forbidden_do_not_count():
    one = table(experts=1)
    cost = one.cost.copy()
    cost[0] = [np.inf, 0.01]
    cost[1] = 0.0
    gate, down = heat(CostTable.from_arrays(cost, units=one.units, formats=one.formats))
    assert gate.values[0] == pytest.approx([-2.0])
    assert down.layers.tolist() == [1]  # all of layer 0's downs are free


def test_the_text_has_one_mark_an_expert():
    lines = text_of(heat(table())).splitlines()
    assert lines[:3] == ["gate: layers down, experts across", "   0 |*- |", "   1 |@*-|"]
    assert lines[-1] == "scale ' .:-=+*#%@': 10^-3.0 to 10^0.0, mean over formats"
    # With many experts several share a mark: that of the costliest one.
    head, wide = text_of(heat(table(experts=130))).splitlines()[:2]
    assert head == "gate: layers down, experts across, about 2 a mark: the costliest of them"
    assert len(wide) == len("   0 ||") + 64
    assert wide.startswith("   0 |#:")


@pytest.mark.slow
def test_pictures_are_the_same_every_time(tmp_path):
    for suffix in ("png", "svg"):
        paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for path in paths:
            write_picture(heat_figure(heat(table()), "nats/token"), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(InputError, match=r"picture .*x.gif: name it .svg or .png"):
        write_picture(heat_figure(heat(table()), "nats/token"), tmp_path / "x.gif")


def test_a_table_without_experts_has_no_map():
    with pytest.raises(InputError, match="no routed experts"):
        heat(table(role="dense"))


@pytest.mark.slow
def test_panels_of_many_experts_are_below_each_other():
    def shape(experts):
        axes = heat_figure(heat(table(experts)), "nats/token").axes[:2]
        return len({round(one.get_position().x0, 2) for one in axes})

    assert (shape(8), shape(256)) == (2, 1)
