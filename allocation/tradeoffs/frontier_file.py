"""The frontier on disk: JSON, from which the plan of every budget can be recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import storage
from bitknap.allocation.problem.units import COLUMNS, Units
from bitknap.allocation.solvers.lagrangian_path import taken
from bitknap.disk.atomic import check_version, read_json, write_whole
from bitknap.errors import FileError, InputError

if TYPE_CHECKING:
    from bitknap.allocation.tradeoffs.frontier_path import Frontier

KIND, VERSION = "bitknap.frontier", "1.0"
# What people plot: as many points as a screen tells apart.
_POINTS = 200


def write_frontier(frontier: Frontier, path: Path) -> None:
    """Write `frontier`; equal frontiers give equal bytes.

    `points` are for people and plots; `start`, `row_of` and `steps` hold every plan. Bytes of
    the units are written only where the formats do not tell them.
    """
    units, names = frontier.units, [item.name for item in frontier.formats]
    points = [
        {"bits_per_weight": point.bits_per_weight, "bytes": point.nbytes, "cost": point.cost}
        for point in frontier.points(_POINTS)
    ]
    known = np.array_equal(storage(units, frontier.formats), frontier.unit_bytes)
    columns = {name: column.tolist() for name, column in units.to_arrays().items()}
    steps: dict[str, npt.NDArray[Any]] = {"row": frontier.row, "format": frontier.format}
    steps |= {"bytes": frontier.nbytes, "cost": frontier.cost}
    content = {
        "format": KIND,
        "version": VERSION,
        "header": dict(frontier.header),
        "formats": names,
        "points": points,
        "projections": list(units.projections),
        "units": columns,
        "unit_bytes": None if known else frontier.unit_bytes.tolist(),
        "row_of": frontier.row_of.tolist(),
        "start": frontier.start.tolist(),
        "steps": {name: column.tolist() for name, column in steps.items()},
    }
    lines = [f' "{key}": {_text(value)}' for key, value in content.items()]
    write_whole(path, "\n".join(["{", ",\n".join(lines), "}", ""]).encode())


def read_frontier(path: Path) -> Frontier:
    """Read what `write_frontier` wrote.

    Raises:
        FileError: one line with the path of the file and of the bad field.
    """
    from bitknap.allocation.tradeoffs.frontier_path import Frontier

    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path}: not an object")
    check_version(content, KIND, VERSION, path)
    names = [str(name) for name in _field(content, "formats", list, path)]
    projections = [str(name) for name in _field(content, "projections", list, path)]
    steps = _field(content, "steps", dict, path)
    columns = _field(content, "units", dict, path)
    try:
        units = Units.from_arrays(
            {key: _numbers(columns, key, path, "units.") for key in COLUMNS}, projections
        )
        formats = tuple(Format.parse(name) for name in names)
        stored = storage(units, formats)
        given = content.get("unit_bytes")
        if given is None and (stored < 0).any():
            raise FileError(f"{path}: unit_bytes: formats without sizes need them")
        found = Frontier(
            units=units,
            formats=formats,
            unit_bytes=stored if given is None else _numbers(content, "unit_bytes", path),
            row_of=_numbers(content, "row_of", path),
            start=_numbers(content, "start", path),
            row=_numbers(steps, "row", path, "steps."),
            format=_numbers(steps, "format", path, "steps."),
            nbytes=_numbers(steps, "bytes", path, "steps."),
            cost=_numbers(steps, "cost", path, "steps.", np.float64),
            header=_field(content, "header", dict, path),
        )
    except InputError as error:
        raise FileError(f"{path}: {error}") from None
    _check_bytes(found, path)
    return found


def is_frontier(path: Path) -> bool:
    """Return whether a JSON file says that it is a frontier.

    Raises:
        FileError: it is no JSON file.
    """
    content = read_json(path)
    return isinstance(content, dict) and content.get("format") == KIND


def _check_bytes(found: Frontier, path: Path) -> None:
    """Compare the ends of the path with the bytes of their units."""
    unit = np.arange(len(found.units))
    for step in (0, len(found.row)):
        rows = taken(found.start, found.row[:step], found.format[:step])
        size = int(found.unit_bytes[unit, rows[found.row_of]].sum())
        if size != found.nbytes[step]:
            raise FileError(
                f"{path}: steps.bytes[{step}]: {found.nbytes[step]} is not the {size} of the units"
            )


def _numbers(
    content: dict[str, Any],
    key: str,
    path: Path,
    prefix: str = "",
    dtype: npt.DTypeLike = np.int64,
) -> npt.NDArray[Any]:
    values = _field(content, key, list, path, prefix)
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray("ragged")
    # An empty list has no kind of its own.
    if array.size and array.dtype.kind not in ("i" if dtype is np.int64 else "if"):
        wanted = "whole numbers" if dtype is np.int64 else "numbers"
        raise FileError(f"{path}: {prefix}{key}: not a list of {wanted}")
    return array.astype(dtype)


def _field(content: dict[str, Any], key: str, kind: type, path: Path, prefix: str = "") -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        found = type(value).__name__
        raise FileError(f"{path}: {prefix}{key}: {found} found, {kind.__name__} expected")
    return value


def _text(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"frontier header: not plain JSON ({error})") from None
