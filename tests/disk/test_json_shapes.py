"""Parsed JSON is built as its reader expects, or one line says where it is not."""

import pytest

from bitknap.disk.json_shapes import check_shapes, fits
from bitknap.errors import FileError


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1, int),
        (1, float),
        (0.5, float),
        ("a", str),
        (True, bool),
        (None, (int, None)),
        ([], [int]),
        ([1, 2, 3], [int]),
        ([1, "a"], [int, str]),
        ([[1, 2.5], [3, 4]], [[int, float]]),
        ({"a": 1, "more": []}, {"a": int, "b?": str}),
        ({"a": 1, "b": "x"}, {"a": int, "b?": str}),
        ({"a": 1}, {}),
    ],
)
def test_what_fits(value, shape):
    assert fits(value, shape)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (True, int),
        (True, float),
        (1.0, int),
        (1, bool),
        (1, str),
        (None, int),
        (float("nan"), float),
        (float("inf"), float),
        (10**400, float),
        (10**400, int),
        (1 << 63, int),
        ({}, [int]),
        ("ab", [str]),
        ([1, "a"], [int]),
        ([1], [int, int]),
        ([], {}),
        ({}, {"a": int}),
        ({"a": 1, "b": 2}, {"a": int, "b?": str}),
        ({"a": None}, {"a?": int}),
    ],
)
def test_what_does_not_fit(value, shape):
    assert not fits(value, shape)


def test_only_keys_that_are_read_are_checked():
    check_shapes({"mine": object, "tokens": 3}, {"tokens": int, "other": str}, "file: header")
    with pytest.raises(FileError) as error:
        check_shapes({"tokens": "x" * 1000}, {"tokens": int}, "file: header")
    line = str(error.value)
    assert line.startswith("file: header.tokens: 'xxxx")
    assert line.endswith("is not what Bitknap writes there; make it again")
    assert len(line) < 150
