"""Check that parsed JSON from a file has the structure that its reader expects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bitknap.errors import FileError

_LARGE = 1 << 63
# JSON's own words for the types that `json` reads.
_WORDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def json_kind(kind: type) -> str:
    """Return JSON's word for a type, with its article, such as "an object" for dict."""
    return _WORDS[kind]


def json_object(value: Any, where: object, remedy: str) -> dict[str, Any]:
    """Return a parsed JSON value that must be an object.

    Args:
        value: any parsed JSON value.
        where: named in the message, such as the path of the file.
        remedy: what to do, such as "make the plan again".

    Raises:
        FileError: the value is not an object.
    """
    if not isinstance(value, dict):
        raise FileError(f"{where}: must be a JSON object, not {json_kind(type(value))}; {remedy}")
    return value


def json_field(content: Mapping[str, Any], key: str, kind: type, where: str, remedy: str) -> Any:
    """Return a field of a parsed JSON object, which must be there and have the given type.

    Args:
        content: the object.
        key: the field's name.
        kind: dict, list or str.
        where: named in the message before the key, such as "plan.json: " or "plan.json: steps.".
        remedy: what to do, such as "make the plan again".

    Raises:
        FileError: the field is missing or has another type.
    """
    if key not in content:
        raise FileError(f"{where}{key}: missing; {remedy}")
    value = content[key]
    if not isinstance(value, kind):
        actual = json_kind(type(value))
        raise FileError(f"{where}{key}: must be {json_kind(kind)}, not {actual}; {remedy}")
    return value


def check_shapes(values: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> None:
    """Check the values that a reader will use; other keys may hold anything.

    Args:
        values: a parsed JSON object.
        shapes: key to the shape that its value must have if the key is there, as `fits` takes it.
        where: named in messages, such as "table.safetensors: provenance".

    Raises:
        FileError: a value has another shape.
    """
    for key, shape in shapes.items():
        if key in values and not fits(values[key], shape):
            said = repr(values[key])
            said = said if len(said) <= 60 else f"{said[:60]}…"
            raise FileError(
                f"{where}.{key}: {said} is not what Bitknap writes there; make it again"
            )


def fits(value: Any, shape: Any) -> bool:
    """Return whether a parsed JSON value has a shape.

    Args:
        value: any JSON value.
        shape: `int` (of 64 bits), `float` (a finite number), `str`, `bool` or None; a tuple of
            shapes, one of which must fit; a list of one shape, which all entries of a list must
            have, or of several, one an entry; or a mapping of a value's keys to their shapes,
            where a key that ends in "?" may be missing.
    """
    if shape is None or isinstance(shape, type):
        return _is_a(value, shape)
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return False
        wanted = shape * len(value) if len(shape) == 1 else shape
        return len(wanted) == len(value) and all(map(fits, value, wanted))
    return isinstance(value, Mapping) and all(
        fits(value[name], one) if (name := key.removesuffix("?")) in value else key != name
        for key, one in shape.items()
    )


def _is_a(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return _is_number(value)
    # `type`, since a bool is an int.
    if kind is int:
        return type(value) is int and -_LARGE <= value < _LARGE
    return type(value) is kind


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
