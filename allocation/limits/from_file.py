"""Limits from a JSON file: what `bitknap solve --limit FILE` reads. Files are data, never code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation import limits
from bitknap.allocation.problem.budget import Budget, parse_size
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.table import CostTable
from bitknap.disk.atomic import check_version, read_json
from bitknap.disk.json_shapes import json_field, json_object
from bitknap.errors import BitknapError, FileError, InfeasibleError, InputError
from bitknap.names import check_name, unknown

KIND, VERSION = "bitknap.limits", "1.0"
_TOP = ("format", "version", "limits")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """The keys that an entry of one kind may have.

    Attributes:
        make: the function of `bitknap.allocation.limits`.
        needed: required keys, and the functions that read their values.
        allowed: optional keys, and the functions that read their values.
    """

    make: Callable[..., Limit | tuple[Limit, ...]]
    needed: Mapping[str, Callable[[Any, Path], Any]]
    allowed: Mapping[str, Callable[[Any, Path], Any]]


def read_limits(path: str | Path, table: CostTable) -> tuple[Limit, ...]:
    """Read the limits in a file for one table.

    The file is an object with "format" "bitknap.limits", "version" and "limits", a list of
    objects. Each has a "kind": a function of `bitknap.allocation.limits` with its arguments by
    name, or "matrix" with "name", "file" (a `.npy` array as `custom` takes it) and a bound.
    Bytes are numbers or texts such as "1.2GiB"; array files are looked up beside the file.

    Raises:
        FileError: one line with the path of the file and of the bad field.
        InfeasibleError: a budget in the file is smaller than the unquantized parts.
    """
    path = Path(path)
    content = json_object(read_json(path), path, "give its format, version and limits")
    check_version(content, KIND, VERSION, path)
    _refuse_unknown(content, _TOP, str(path))
    entries = json_field(content, "limits", list, f"{path}: ", "list the limits there")
    limits: list[Limit] = []
    taken: dict[str, int] = {}
    for index, entry in enumerate(entries):
        for limit in _read(entry, f"{path}: limits[{index}]", path.parent, table):
            if limit.name in taken:
                raise FileError(
                    f"{path}: limits[{index}].name: {limit.name!r} is that of "
                    f"limits[{taken[limit.name]}] as well; give another"
                )
            taken[limit.name] = index
            limits.append(limit)
    return tuple(limits)


def _read(entry: Any, where: str, folder: Path, table: CostTable) -> tuple[Limit, ...]:
    entry = json_object(entry, where, "give its kind and arguments")
    name = entry.get("kind")
    if not isinstance(name, str) or name not in _KINDS:
        raise unknown(f"{where}.kind", name, _KINDS, FileError)
    kind = _KINDS[name]
    readers = {**kind.needed, **kind.allowed}
    _refuse_unknown(entry, ("kind", *readers), where)
    for key in kind.needed:
        if key not in entry:
            raise FileError(f"{where}.{key}: missing")
    values = {}
    for key, reader in readers.items():
        if key in entry:
            try:
                values[key] = reader(entry[key], folder)
            except InputError as error:
                raise FileError(f"{where}.{key}: {error}") from None
    try:
        made = kind.make(table, **values)
    except (InputError, InfeasibleError) as error:
        raise _located(error, where, tuple(readers)) from None
    return made if isinstance(made, tuple) else (made,)


def _located(error: BitknapError, where: str, keys: tuple[str, ...]) -> BitknapError:
    """Return the error with its place in the file: the key that its message begins with."""
    text = str(error)
    kind = InfeasibleError if isinstance(error, InfeasibleError) else FileError
    key = text.partition(":")[0]
    if key in keys:
        return kind(f"{where}.{text}")
    if "pattern" in keys and text.startswith("pattern "):
        return kind(f"{where}.pattern: {text.removeprefix('pattern ')}")
    return kind(f"{where}: {text}")


def _refuse_unknown(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    # A limit that is silently ignored would give a wrong plan.
    for key in content:
        check_name(f"{where}: key", key, known, FileError)


def _matrix(
    table: CostTable,
    name: str,
    file: npt.NDArray[Any],
    at_most: float | None = None,
    at_least: float | None = None,
) -> Limit:
    return limits.custom(table, name, file, at_most, at_least)


def _number(value: Any, folder: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{_said(value)} is not a number")
    # JSON has no infinity, but Python reads one.
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{value} is not a finite number")
    return value


def _whole(value: Any, folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{_said(value)} is not a whole number")
    return value


def _size(value: Any, folder: Path) -> float:
    return parse_size(value) if isinstance(value, str) else _number(value, folder)


def _budget(value: Any, folder: Path) -> Budget | float:
    return Budget.parse(value) if isinstance(value, str) else _number(value, folder)


def _text(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{_said(value)} is not a non-empty string")
    return value


def _flag(value: Any, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{_said(value)} is not true or false")
    return value


def _array(value: Any, folder: Path) -> npt.NDArray[Any]:
    file = folder / _text(value, folder)
    try:
        with file.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    except Exception:
        # NumPy's reader fails in many ways on a damaged header.
        raise InputError(f"{file} is not a .npy file of numbers") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"{file} has dtype {array.dtype}, expected numbers")
    return array


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


_COUNT: Mapping[str, Callable[[Any, Path], Any]] = {
    "pattern": _text,
    "per_layer": _flag,
    "wider": _flag,
    "name": _text,
}
_KINDS: Mapping[str, _Kind] = {
    "bytes_per_token": _Kind(
        make=limits.bytes_per_token,
        needed={"at_most": _size},
        allowed={"frequency": _array, "name": _text},
    ),
    "device_bytes": _Kind(
        make=limits.device_bytes,
        needed={"ranks": _whole},
        allowed={
            "at_most": _size,
            "balance": _number,
            "budget": _budget,
            "device": _array,
            "name": _text,
        },
    ),
    "share_at_most": _Kind(
        make=limits.share_at_most,
        needed={"share": _number, "bits": _number},
        allowed={"pattern": _text, "name": _text},
    ),
    "bits_per_layer": _Kind(
        make=limits.bits_per_layer,
        needed={},
        allowed={"at_least": _number, "at_most": _number, "pattern": _text, "name": _text},
    ),
    "count_at_least": _Kind(
        make=limits.count_at_least, needed={"count": _whole, "bits": _whole}, allowed=_COUNT
    ),
    "count_at_most": _Kind(
        make=limits.count_at_most, needed={"count": _whole, "bits": _whole}, allowed=_COUNT
    ),
    "matrix": _Kind(
        make=_matrix,
        needed={"name": _text, "file": _array},
        allowed={"at_most": _number, "at_least": _number},
    ),
}
