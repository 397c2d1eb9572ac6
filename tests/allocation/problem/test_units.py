from typing import Any

import numpy as np
import pytest

from bitknap.allocation import Units
from bitknap.allocation.problem.units import Unit
from bitknap.errors import InputError


def two_layers() -> Units:
    """2 layers, each: 3 routed experts of gate, up, down, and the output projection."""
    names = ["gate", "up", "down"] * 3 + ["o"]
    return Units.build(
        layer=np.repeat([0, 1], 10),
        role=(["routed"] * 9 + ["attention"]) * 2,
        expert=[0, 0, 0, 1, 1, 1, 2, 2, 2, -1] * 2,
        projection=names * 2,
        rows=[64] * 20,
        cols=[32] * 20,
    )


def test_columns_are_compact_and_read_only():
    units = two_layers()
    assert len(units) == 20
    assert units.projections == ("gate", "up", "down", "o")
    assert units.numel.tolist() == [2048] * 20
    assert [units.layer.dtype, units.role.dtype] == [np.int32, np.int8]
    with pytest.raises(ValueError, match="read-only"):
        units.layer[0] = 7


def test_labels_name_what_a_unit_is():
    units = two_layers()
    assert units.label(14) == "layer=1 role=routed expert=1 proj=up"
    assert units.label(9) == "layer=0 role=attention proj=o"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layer=0", 10),
        ("layer=0-1,proj=down", 6),
        ("expert=0;2,proj=gate|up", 8),
        ("role=att*", 2),
        ("projection=*", 20),
        ("expert=-1", 2),
        (" layer = 1 , expert=* , block=0", 10),
    ],
)
def test_patterns_select(pattern, count):
    assert two_layers().matches(pattern).sum() == count


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "pattern '': '' is not KEY=VALUE; keys: layer, expert, block, proj, role"),
        ("bits=3", "key 'bits' is unknown; one of layer, expert, block, proj, role"),
        ("layer=a", "layer=a is not N or N-M; join with ';'"),
        ("layer=1,layer=2", "layer is given twice; join values with ';'"),
        ("proj=middle", "proj 'middle' is unknown; one of gate, up, down, o"),
        ("layer=7", "matches no unit; there are layer 0-1, expert -1-2, block 0-0, proj"),
        ("role=shared", "matches no unit"),
    ],
)
def test_a_pattern_that_cannot_be_meant_says_so(pattern, message):
    with pytest.raises(InputError) as error:
        two_layers().matches(pattern)
    assert message in str(error.value)


def test_a_unit_appears_once():
    columns: dict[str, Any] = {
        "layer": [0, 0],
        "role": ["routed"] * 2,
        "expert": [3, 3],
        "rows": [1, 1],
    }
    with pytest.raises(InputError, match="layer=0 role=routed expert=3 proj=up appears twice"):
        Units.build(**columns, projection=["up", "up"], cols=[1, 1])
    assert len(Units.build(**columns, projection=["up", "up"], cols=[1, 1], block=[0, 1])) == 2


def test_columns_have_one_length_and_known_values():
    with pytest.raises(InputError, match=r"rows: shape \(1,\), expected \(2,\)"):
        Units.build(
            layer=[0, 1],
            role=["routed"] * 2,
            expert=[0, 0],
            projection=["up"] * 2,
            rows=[8],
            cols=[8, 8],
        )
    with pytest.raises(InputError, match="role 'router' is unknown; one of routed, shared, dense"):
        Units.build(layer=[0], role=["router"], expert=[0], projection=["up"], rows=[8], cols=[8])
    with pytest.raises(InputError, match=r"rows\[0\]: -8 is outside 0 to inf"):
        Units.build(layer=[0], role=["routed"], expert=[0], projection=["up"], rows=[-8], cols=[8])
    with pytest.raises(InputError, match="expected one entry per unit, at least one"):
        Units.anonymous(0)


def test_arrays_round_trip():
    units = two_layers()
    again = Units.from_arrays(units.to_arrays(), units.projections)
    assert [again.label(i) for i in range(20)] == [units.label(i) for i in range(20)]
    with pytest.raises(InputError, match="column role is missing"):
        Units.from_arrays({"layer": units.layer}, units.projections)


def test_a_row_is_a_value():
    unit = two_layers().row(14)
    assert unit == (1, "routed", 1, "up", 0, 64, 32)
    assert unit == Unit(
        layer=1, role="routed", expert=1, projection="up", block=0, rows=64, cols=32
    )
    assert unit.numel == 2048
    assert [type(value) for value in unit] == [int, str, int, str, int, int, int]
    assert two_layers().row(-1).role == "attention"
    with pytest.raises(IndexError):
        two_layers().row(20)


def test_anonymous_units_have_no_shapes():
    units = Units.anonymous(4)
    assert len(units) == 4
    assert not units.has_shapes


@pytest.mark.parametrize("name", ["layer", "expert", "block"])
def test_numbers_that_no_model_has_are_refused(name):
    columns = {key: np.array([0, 1]) for key in ("layer", "expert", "block")}
    columns |= {key: np.array([0, 0]) for key in ("role", "projection", "rows", "cols")}
    columns[name][1] = 134_217_730
    with pytest.raises(InputError, match=rf"{name}\[1\]: 134217730 is outside -?[01] to 65536"):
        Units(**columns, projections=("gate",))
