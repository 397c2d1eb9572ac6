import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitknap.allocation import CostTable, Format, Units, formats, profile
from bitknap.allocation.problem.table import widths
from bitknap.errors import FileError, InputError

FORMATS = formats(bits=(2, 3, 4), group_size=32)


def small(**changes: Any) -> CostTable:
    units = Units.build(
        layer=[0, 0, 0, 1, 1, 1],
        role=["routed"] * 6,
        expert=[0] * 6,
        projection=["gate", "up", "down"] * 2,
        rows=[64] * 6,
        cols=[32] * 6,
    )
    cost = np.arange(18.0)[::-1].reshape(6, 3)
    settings: dict[str, Any] = {"cost": cost, "units": units, "formats": FORMATS} | changes
    return CostTable.from_arrays(**settings)


def test_bare_numbers_make_a_table():
    table = CostTable.from_arrays([[3.0, 2.0], [5.0, np.inf]], [[10, 20], [10, 20]])
    assert [item.name for item in table.formats] == ["option-0", "option-1"]
    assert table.cost.dtype == np.float64
    assert table.nbytes.dtype == np.int64
    assert table.weights == 0


def test_bytes_follow_from_shapes_and_formats():
    table = small()
    assert table.nbytes[0].tolist() == [512 + 256, 768 + 256, 1024 + 256]
    assert table.weights == 6 * 64 * 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: small(cost=np.full((6, 3), np.nan)),
            "cost: layer=0 role=routed expert=0 proj=gate int2-g32-asym has nan; use inf to forbid",
        ),
        (lambda: small(cost=np.full((6, 3), -np.inf)), "has -inf; costs are losses of at least 0"),
        (
            lambda: small(cost=np.full((6, 3), -1e-9)),
            "has -1e-09; costs are losses of at least 0; clip",
        ),
        (
            lambda: CostTable.from_arrays([[1.0]], [[0]]),
            "nbytes: layer=0 role=routed expert=0 proj=unit option-0 has 0; bytes must be above 0",
        ),
        (lambda: CostTable.from_arrays([[1.0]], [[-3]]), "has -3; bytes must be above 0"),
        (lambda: small(nbytes=np.full((6, 3), 7)), "has 7; the format stores 768"),
        (lambda: small(nbytes=np.full((6, 3), 7.5)), "nbytes: some values are not whole numbers"),
        (lambda: small(spread=-np.ones((6, 3))), "has -1.0; a spread is a number of at least 0"),
        (lambda: small(cost=np.zeros((5, 3))), "cost: shape (5, 3), expected (6, 3)"),
        (lambda: small(cost=np.zeros(3)), "cost: shape (3,), expected [units, formats]"),
        (lambda: small(formats=[Format(2)] * 3), "must be distinct"),
        (
            lambda: small(frequency=[0, 0.5, np.nan, 1, 1, 1]),
            "frequency: layer=0 role=routed expert=0 proj=down has nan; "
            "a share of tokens is from 0 to 1",
        ),
        (lambda: small(frequency=[0, 0, 0, 0, 0, 1.5]), "proj=down has 1.5; a share of tokens"),
        (lambda: small(frequency=[-0.5] * 6), "proj=gate has -0.5; a share of tokens"),
        (lambda: small(frequency=[0.5]), "frequency: shape (1,), expected (6,)"),
        (lambda: small(provenance={"seed": object()}), "provenance: not plain JSON"),
        (lambda: CostTable.from_arrays([[1.0]]), "nbytes: give them, or units with shapes"),
    ],
)
def test_wrong_numbers_are_named(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


def test_pin_leaves_only_some_formats():
    table = small().pin("layer=0,proj=down", bits=4)
    assert np.isinf(table.cost[2]).tolist() == [True, True, False]
    assert np.isfinite(table.cost[[0, 1, 3, 4, 5]]).all()
    table = small().pin("layer=1", format="int2-g32-asym")
    assert np.isinf(table.cost[3:]).tolist() == [[False, True, True]] * 3


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"bits": 8}, "pin 'layer=0': no format has 8 bits; there are 2, 3, 4"),
        ({"format": "int8-row-sym"}, "no format is int8-row-sym; there are int2-g32-asym, int3"),
        ({}, "pin 'layer=0': give one of bits, format, or at_least and at_most"),
        ({"bits": 2, "format": "int2-g32-asym"}, "pin 'layer=0': give one of bits, format"),
        ({"bits": 2, "at_least": 2}, "pin 'layer=0': give one of bits, format"),
        ({"format": "int2-g32-asym", "at_most": 2}, "give one of bits, format"),
        ({"at_least": 5}, "no format has at least 5 bits; there are 2, 3, 4"),
        ({"at_most": 1.5}, "no format has at most 1.5 bits; there are 2, 3, 4"),
        ({"at_least": 4, "at_most": 3}, "no format has at least 4 and at most 3 bits; there are"),
        ({"at_least": np.nan}, "no format has at least nan bits"),
        ({"format": "int2"}, "format 'int2' is unknown; examples"),
        (
            {"bits": 2},
            "pin 'layer=0': leaves no format for layer=0 role=routed expert=0 proj=down: every one "
            "that has 2 bits is forbidden by an earlier pin or the table; drop one of the two",
        ),
        ({"at_most": 3}, "every one that has at most 3 bits is forbidden by an earlier pin"),
        ({"format": "int3-g32-asym"}, "every one that is int3-g32-asym is forbidden"),
    ],
)
def test_a_pin_that_cannot_hold_says_so(pin, message):
    table = small().pin("layer=0,proj=down", bits=4)
    with pytest.raises(InputError) as error:
        table.pin("layer=0", **pin)
    assert message in str(error.value)


def test_floors_and_caps_of_single_units():
    table = small().pin("proj=down", at_least=3)
    assert np.isinf(table.cost[[2, 5]]).tolist() == [[True, False, False]] * 2
    assert np.isfinite(table.cost[[0, 1, 3, 4]]).all()
    table = table.pin("layer=0", at_most=3)
    assert np.isinf(table.cost[2]).tolist() == [True, False, True]
    assert np.isinf(small().pin("layer=0", at_least=3, at_most=3).cost[:3]).tolist() == (
        [[True, False, True]] * 3
    )


def test_kept_precisions_are_wider_than_grids():
    options = (*formats(bits=(2, 8), group_size=32), Format.keep("fp8"), Format.keep("bf16"))
    table = small(cost=np.zeros((6, 4)), formats=options)
    assert widths(options).tolist() == [2, 8, 9, 16]
    pins: Any = (
        ({"at_least": 8}, [False, True, True, True]),
        ({"at_most": 8}, [True, True, False, False]),
        ({"at_most": 16}, [True] * 4),
    )
    for pin, left in pins:
        assert np.isfinite(table.pin("layer=0", **pin).cost[0]).tolist() == left


def test_made_up_formats_have_no_bits():
    table = CostTable.from_arrays([[3.0, 2.0]], [[10, 20]])
    with pytest.raises(InputError, match="bits: option-0 is made up and has none; build the table"):
        table.pin("expert=0", at_least=3)


def test_a_pin_that_matches_nothing_says_so():
    with pytest.raises(InputError, match="pattern 'layer=9' matches no unit; there are layer 0-1"):
        small().pin("layer=9", at_least=2)


def test_ties_combine_to_connected_groups():
    table = small().tie(profile("gate_eq_up"))
    assert table.ties is not None
    assert table.ties.tolist() == [0, 0, 1, 2, 2, 3]
    table = table.tie([7, 1, 2, 3, 4, 7])
    assert table.ties is not None
    assert table.ties.tolist() == [0, 0, 1, 2, 2, 0]
    with pytest.raises(InputError, match=r"ties: shape \(2,\), expected \(6,\)"):
        table.tie([0, 0])


def test_saving_and_loading_keeps_everything(tmp_path):
    path = tmp_path / "table.safetensors"
    table = small(spread=np.ones((6, 3)), provenance={"estimator": "fisher", "seed": 3})
    table = table.tie(profile("gate_eq_up")).pin("layer=0", bits=3)
    table.save(path)
    again = CostTable.load(path)
    for name in ("cost", "nbytes", "spread", "ties"):
        assert np.array_equal(getattr(again, name), getattr(table, name))
    assert again.formats == table.formats
    assert dict(again.provenance) == dict(table.provenance)
    assert again.units.label(5) == table.units.label(5)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_frequency_is_kept(tmp_path):
    path = tmp_path / "table.safetensors"
    table = small(frequency=[0, 0.5, 1, 1, 1, 1])
    frequency: Any = table.frequency
    assert frequency.dtype == np.float64
    assert not frequency.flags.writeable
    changed = table.tie(profile("expert")).pin("layer=0", at_least=3)
    assert changed.frequency is frequency
    changed.save(path)
    assert np.array_equal(CostTable.load(path).frequency, frequency)  # type: ignore[arg-type]
    rewritten(path, lambda header, ours: header["frequency"].update(dtype="I64"))
    with pytest.raises(FileError, match="frequency: dtype int64, expected float64"):
        CostTable.load(path)


def test_files_from_before_frequency_load(tmp_path):
    path = tmp_path / "table.safetensors"
    small().save(path)
    rewritten(path, lambda header, ours: ours.update(version="1.0"))
    assert CostTable.load(path).frequency is None


def rewritten(path: Path, change: Callable[[Any, Any], object]) -> None:
    """Apply `change` to the safetensors header and to Bitknap's JSON in it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    ours = json.loads(header["__metadata__"]["bitknap"])
    change(header, ours)
    header["__metadata__"]["bitknap"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, ours: ours.update(version="2.0"), "version: 2.0 cannot be read"),
        (
            lambda header, ours: ours.update(format="other"),
            "format: 'other' is not 'bitknap.table'",
        ),
        (lambda header, ours: ours.update(formats="int2"), "formats: missing or not a list"),
        (lambda header, ours: ours.update(formats=["x", "y", "z"]), "format 'x' is unknown"),
        (lambda header, ours: ours.pop("provenance"), "provenance: missing or not a JSON object"),
        (lambda header, ours: ours.update(projections=["gate"]), "projection[1]: 1 is outside"),
        (lambda header, ours: header.update(other=header.pop("cost")), "cost: missing"),
        (
            lambda header, ours: header["cost"].update(dtype="I64"),
            "cost: dtype int64, expected float64",
        ),
        (
            lambda header, ours: ours["provenance"].update(coverage=[[0, 1]]),
            "provenance.coverage: [[0, 1]] is not what Bitknap writes there",
        ),
        (
            lambda header, ours: ours["provenance"].update(check=True),
            "provenance.check: True is not what",
        ),
        (
            lambda header, ours: ours["provenance"].update(each=[{"samples": {"spearman": "x"}}]),
            "provenance.each: ",
        ),
        (
            lambda header, ours: header["spread"].update(
                shape=[0, (1 << 62) + 1], data_offsets=[0, 0]
            ),
            "not a readable safetensors file",
        ),
        (
            lambda header, ours: header["cost"].update(shape=[3, 6]),
            "cost: shape (3, 6), expected (6, 3)",
        ),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path, change, message):
    path = tmp_path / "table.safetensors"
    small(spread=np.ones((6, 3))).save(path)
    rewritten(path, change)
    with pytest.raises(FileError) as error:
        CostTable.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_newer_minor_version_warns(tmp_path):
    path = tmp_path / "table.safetensors"
    small().save(path)
    rewritten(path, lambda header, ours: ours.update(version="1.9"))
    with pytest.warns(UserWarning, match=r"version 1\.9 is newer than 1\.1"):
        CostTable.load(path)


def test_a_truncated_or_missing_file_is_one_line(tmp_path):
    path = tmp_path / "table.safetensors"
    with pytest.raises(FileError, match="not a readable safetensors file"):
        CostTable.load(path)
    small().save(path)
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match="not a readable safetensors file"):
            CostTable.load(path)
