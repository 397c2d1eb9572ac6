"""Limits from files: the same as those of the functions, and every mistake names its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Problem, formats, profile, solve
from bitknap.allocation.limits import (
    bits_per_layer,
    bytes_per_token,
    count_at_least,
    count_at_most,
    custom,
    device_bytes,
    share_at_most,
)
from bitknap.allocation.limits.from_file import read_limits
from bitknap.errors import FileError, InfeasibleError
from bitknap.testing import routed_units

EXPERTS = 8


@pytest.fixture(scope="module")
def table() -> CostTable:
    units = routed_units(2, EXPERTS, ("gate", "up", "down"), rows=64, cols=64)
    random = np.random.default_rng(0)
    cost = random.lognormal(size=(len(units), 1)) * 4.0 ** -np.arange(3)
    return CostTable.from_arrays(
        cost,
        units=units,
        formats=formats(bits=(2, 3, 4), group_size=64),
        frequency=np.full(len(units), 0.25),
        provenance={"fixed_bytes": 1000},
    ).tie(profile("expert"))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes limits and returns the path of the file."""
    np.save(tmp_path / "latency.npy", np.array([[1.0, 1.5, 2.0]]))

    def make(*limits: Any, **top: Any) -> Path:
        content = {"format": "bitknap.limits", "version": "1.0", "limits": list(limits), **top}
        path: Path = tmp_path / "limits.json"
        path.write_text(json.dumps(content))
        return path

    return make


def test_every_kind_is_the_function_of_that_name(table, write, tmp_path):
    np.save(tmp_path / "place.npy", np.arange(len(table.units)) % 3)
    np.save(tmp_path / "ones.npy", np.ones(len(table.units)))
    path = write(
        {"kind": "bytes_per_token", "at_most": "1.2GiB"},
        {"kind": "bytes_per_token", "at_most": 4096, "frequency": "ones.npy", "name": "all"},
        {"kind": "device_bytes", "ranks": 8, "at_most": "1 MiB"},
        {"kind": "device_bytes", "ranks": 4, "balance": 1.2, "budget": "3bpw", "name": "even"},
        {"kind": "device_bytes", "ranks": 3, "at_most": 1e9, "device": "place.npy", "name": "own"},
        {"kind": "share_at_most", "share": 0.3, "bits": 2},
        {"kind": "bits_per_layer", "at_least": 2.1, "at_most": 4, "pattern": "proj=gate;up"},
        {"kind": "count_at_least", "count": 1, "bits": 3, "pattern": "proj=down"},
        {"kind": "count_at_most", "count": 20, "bits": 2, "wider": True, "per_layer": False},
        {"kind": "matrix", "name": "latency", "file": "latency.npy", "at_most": 75.0},
    )
    expected = [
        bytes_per_token(table, 1.2 * 2**30 // 1),
        bytes_per_token(table, 4096, np.ones(len(table.units)), name="all"),
        *device_bytes(table, 8, 2**20),
        *device_bytes(table, 4, balance=1.2, budget=Budget.bits(3), name="even"),
        *device_bytes(table, 3, 1e9, device=np.arange(len(table.units)) % 3, name="own"),
        share_at_most(table, 0.3, 2),
        *bits_per_layer(table, 2.1, 4, "proj=gate;up"),
        *count_at_least(table, 1, 3, "proj=down"),
        *count_at_most(table, 20, 2, per_layer=False, wider=True),
        custom(table, "latency", [1.0, 1.5, 2.0], 75.0),
    ]
    found = read_limits(str(path), table)
    assert [x.name for x in found] == [x.name for x in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.bound, one.unit, one.note) == (other.bound, other.unit, other.note)
        assert np.array_equal(one.weight, other.weight)


def test_limits_of_a_file_hold(table, write):
    path = write(
        {"kind": "matrix", "name": "latency", "file": "latency.npy", "at_most": 72},
        {"kind": "count_at_least", "count": 2, "bits": 4},
    )
    found = solve(Problem(table, [Budget.bits(3.5), *read_limits(path, table)]))
    assert np.array([1.0, 1.5, 2.0])[found.choice].sum() <= 72
    down = table.units.matches("proj=down")
    for layer in (0, 1):
        assert (found.choice[down & (table.units.layer == layer)] == 2).sum() >= 2


def test_no_limits_is_none(table, write):
    assert read_limits(write(), table) == ()


SHARE = {"kind": "share_at_most", "share": 0.3, "bits": 2}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, ": must be a JSON object, not a whole number; give its kind and arguments"),
        (
            {},
            ".kind None is unknown; one of bytes_per_token, device_bytes, share_at_most, bits_per",
        ),
        ({"kind": ["x"]}, ".kind ['x'] is unknown; one of"),
        ({"kind": "latency"}, ".kind 'latency' is unknown; one of"),
        (
            {**SHARE, "shares": 1},
            ": key 'shares' is unknown; one of kind, share, bits, pattern, name",
        ),
        ({"kind": "share_at_most", "bits": 2}, ".share: missing"),
        ({**SHARE, "share": 1.5}, ".share: 1.5 is not from 0 to 1"),
        ({**SHARE, "share": "0.3"}, ".share: '0.3' is not a number"),
        ({**SHARE, "share": True}, ".share: True is not a number"),
        ({**SHARE, "share": float("nan")}, ".share: nan is not a finite number"),
        ({**SHARE, "share": [1] * 99}, ", 1, 1, 1, 1, 1, … is not a number"),
        ({**SHARE, "pattern": "layer=9"}, ".pattern: 'layer=9' matches no unit; there are layer"),
        ({**SHARE, "pattern": "bits=9"}, ".pattern: 'bits=9': key 'bits' is unknown; one of layer"),
        ({**SHARE, "pattern": 3}, ".pattern: 3 is not a non-empty string"),
        ({**SHARE, "name": " "}, ".name: ' ' is not a non-empty string"),
        (
            {"kind": "bytes_per_token", "at_most": "12 parsecs"},
            ".at_most: '12 parsecs' is not a size; examples: 12GiB, 800MB, 4096B",
        ),
        ({"kind": "bytes_per_token", "at_most": -5}, ".at_most: -5 is not at least 0"),
        ({"kind": "bytes_per_token", "at_most": 1e999}, ".at_most: inf is not a finite number"),
        ({"kind": "bytes_per_token", "at_most": None}, ".at_most: None is not a number"),
        ({"kind": "device_bytes", "ranks": 2.5, "at_most": 1}, ".ranks: 2.5 is not a whole number"),
        ({"kind": "device_bytes", "ranks": 0, "at_most": 1}, ".ranks: 0 is not a whole number"),
        (
            {"kind": "device_bytes", "ranks": 9, "at_most": 1},
            ".ranks: 9 is more than the 8 experts of layer 0; lower it or give device",
        ),
        (
            {"kind": "device_bytes", "ranks": 2},
            ": device_bytes: give either at_most, or balance and budget",
        ),
        (
            {"kind": "device_bytes", "ranks": 2, "balance": 1.1, "budget": "3 apples"},
            ".budget: budget '3 apples' cannot be read; examples: 2.5bpw",
        ),
        (
            {"kind": "device_bytes", "ranks": 2, "balance": 1.1, "budget": "40%"},
            ": budget 40%: the table has no source_bytes",
        ),
        ({"kind": "bits_per_layer"}, ": bits_per_layer: give at_least, at_most or both"),
        ({"kind": "bits_per_layer", "at_least": 4, "at_most": 3}, ".at_least: 4 is above at_most"),
        ({"kind": "count_at_least", "count": 9, "bits": 3}, ".count: 9 is more than the 8 units"),
        ({"kind": "count_at_least", "count": 1, "bits": 8}, ".bits: no format has 8; there are"),
        ({"kind": "count_at_most", "count": -1, "bits": 2}, ".count: -1 is not a whole number"),
        (
            {"kind": "count_at_most", "count": 1, "bits": 2, "wider": "yes"},
            ".wider: 'yes' is not true or false",
        ),
        ({"kind": "matrix", "name": "x", "at_most": 1}, ".file: missing"),
        (
            {"kind": "matrix", "name": "x", "file": "latency.npy"},
            ": limit x: give either at_most or at_least",
        ),
        ({"kind": "matrix", "name": "x", "file": "none.npy", "at_most": 1}, "none.npy cannot be"),
        (
            {"kind": "matrix", "name": "x", "file": 7, "at_most": 1},
            ".file: 7 is not a non-empty string",
        ),
    ],
)
def test_a_wrong_entry_names_the_field(table, write, entry, message):
    path = write({"kind": "bits_per_layer", "at_least": 2}, entry)
    with pytest.raises(FileError) as error:
        read_limits(path, table)
    assert f"{path}: limits[1]" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2)), "limits[0]: limit x: weight has shape (3, 2), expected (48, 3), [F]"),
        (np.array([1.0, np.nan, 2.0]), "proj=gate int3-g64-asym is nan; expected a number"),
        (np.array(["1", "2", "3"]), "x.npy has dtype <U1, expected numbers"),
        (np.zeros(3, dtype=complex), "x.npy has dtype complex128, expected numbers"),
        (
            np.array([{}, 1, 2], dtype=object),
            "limits[0].file: {file} is not a .npy file of numbers",
        ),
    ],
)
def test_a_wrong_array_names_the_file(table, write, tmp_path, array, message):
    file = tmp_path / "x.npy"
    np.save(file, array, allow_pickle=True)
    path = write({"kind": "matrix", "name": "x", "file": "x.npy", "at_most": 1})
    with pytest.raises(FileError) as error:
        read_limits(path, table)
    assert message.replace("{file}", str(file)) in str(error.value)


def test_a_damaged_array_is_one_line(table, write, tmp_path):
    file = tmp_path / "latency.npy"
    path = write({"kind": "matrix", "name": "x", "file": "latency.npy", "at_most": 1})
    content = file.read_bytes()
    for damaged in (b"", content[:9], content[:40], content[:-1], b"PK\3\4" + content):
        file.write_bytes(damaged)
        with pytest.raises(
            FileError, match=r"limits\[0\]\.file: .* is not a \.npy file of numbers"
        ):
            read_limits(path, table)
    file.write_bytes(content.replace(b"(1, 3)", b"(1, 3 "))
    with pytest.raises(FileError, match=r"is not a \.npy file of numbers"):
        read_limits(path, table)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"format": "bitknap.plan"}, "limits.json: format: 'bitknap.plan' is not 'bitknap.limits'"),
        ({"version": "2.0"}, "limits.json: version: 2.0 cannot be read by this library (1.0)"),
        ({"limits": {}}, "limits.json: limits: must be a list, not an object; list"),
        ({"limit": []}, "limits.json: key 'limit' is unknown; one of format, version, limits"),
    ],
)
def test_a_wrong_file_says_so(table, write, top, message):
    with pytest.raises(FileError) as error:
        read_limits(write(**top), table)
    assert message in str(error.value)


def test_a_file_that_is_no_object_or_no_json(table, tmp_path):
    path = tmp_path / "limits.json"
    with pytest.raises(FileError, match=r"limits\.json: cannot be read"):
        read_limits(path, table)
    path.write_text("[]")
    with pytest.raises(FileError, match=r"limits\.json: must be a JSON object"):
        read_limits(path, table)
    path.write_text("{")
    with pytest.raises(FileError, match=r"limits\.json: not valid JSON"):
        read_limits(path, table)


def test_the_same_limit_twice_is_named(table, write):
    path = write(SHARE, {"kind": "bits_per_layer", "at_least": 2}, SHARE)
    with pytest.raises(FileError) as error:
        read_limits(path, table)
    assert str(error.value) == (
        f"{path}: limits[2].name: 'share at 2 bits or fewer' is that of limits[0] as well; "
        "give another"
    )


def test_a_budget_below_what_is_not_quantized(table, write):
    path = write({"kind": "device_bytes", "ranks": 2, "balance": 1, "budget": "999B"})
    with pytest.raises(InfeasibleError, match=r"limits\[0\]: memory: the parts that are not"):
        read_limits(path, table)


def test_a_table_without_frequency(table, write):
    bare = CostTable.from_arrays(table.cost, units=table.units, formats=table.formats)
    path = write({"kind": "bytes_per_token", "at_most": 1})
    with pytest.raises(FileError) as error:
        read_limits(path, bare)
    assert str(error.value) == (
        f"{path}: limits[0]: bytes_per_token: the table has no frequency; "
        "estimate it from a text, or give it"
    )
