"""The frontier on disk: JSON, from which the plan of every budget can be recovered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import storage
from bitknap.allocation.problem.units import COLUMNS, Units
from bitknap.disk.atomic import check_version, read_json, write_whole
from bitknap.disk.json_shapes import json_field, json_object
from bitknap.errors import FileError, InputError

KIND, VERSION = "bitknap.frontier", "1.0"
_REMEDY = "make the frontier again"


def write_frontier(
    fields: Mapping[str, Any], points: Sequence[tuple[float | None, int, float]], path: Path
) -> None:
    """Write the fields of a `Frontier`; equal frontiers give equal bytes.

    `start`, `row_of` and `steps` hold every plan. Bytes of the units are written only where they do
    not follow from the formats.

    Args:
        fields: the fields by name.
        points: bits per weight, bytes and cost of some plans, for people and plots.
        path: the file.
    """
    units, formats = fields["units"], fields["formats"]
    names = [item.name for item in formats]
    plotted = [
        {"bits_per_weight": bits, "bytes": nbytes, "cost": cost} for bits, nbytes, cost in points
    ]
    known = np.array_equal(storage(units, formats), fields["unit_bytes"])
    columns = {name: column.tolist() for name, column in units.to_arrays().items()}
    steps: dict[str, npt.NDArray[Any]] = {"row": fields["row"], "format": fields["format"]}
    steps |= {"bytes": fields["nbytes"], "cost": fields["cost"]}
    content = {
        "format": KIND,
        "version": VERSION,
        "header": dict(fields["header"]),
        "formats": names,
        "points": plotted,
        "projections": list(units.projections),
        "units": columns,
        "unit_bytes": None if known else fields["unit_bytes"].tolist(),
        "row_of": fields["row_of"].tolist(),
        "start": fields["start"].tolist(),
        "steps": {name: column.tolist() for name, column in steps.items()},
    }
    lines = [f' "{key}": {_text(value)}' for key, value in content.items()]
    write_whole(path, "\n".join(["{", ",\n".join(lines), "}", ""]).encode())


def read_frontier(path: Path) -> dict[str, Any]:
    """Return the fields that `write_frontier` wrote, not yet checked against each other.

    Raises:
        FileError: one line with the path of the file and of the bad field.
    """
    content = json_object(read_json(path), path, _REMEDY)
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
            raise FileError(
                f"{path}: unit_bytes: missing, but some formats have no size of their own; make "
                "the frontier again"
            )
        return {
            "units": units,
            "formats": formats,
            "unit_bytes": stored if given is None else _numbers(content, "unit_bytes", path),
            "row_of": _numbers(content, "row_of", path),
            "start": _numbers(content, "start", path),
            "row": _numbers(steps, "row", path, "steps."),
            "format": _numbers(steps, "format", path, "steps."),
            "nbytes": _numbers(steps, "bytes", path, "steps."),
            "cost": _numbers(steps, "cost", path, "steps.", np.float64),
            "header": _field(content, "header", dict, path),
        }
    except InputError as error:
        raise FileError(f"{path}: {error}") from None


def is_frontier(path: Path) -> bool:
    """Return whether a JSON file declares itself a frontier.

    Raises:
        FileError: it is not a JSON file.
    """
    content = read_json(path)
    return isinstance(content, dict) and content.get("format") == KIND


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
    # NumPy makes an empty list an array of floats.
    if array.size and array.dtype.kind not in ("i" if dtype is np.int64 else "if"):
        wanted = "whole numbers" if dtype is np.int64 else "numbers"
        raise FileError(f"{path}: {prefix}{key}: must be a list of {wanted}; {_REMEDY}")
    return array.astype(dtype)


def _field(content: dict[str, Any], key: str, kind: type, path: Path, prefix: str = "") -> Any:
    return json_field(content, key, kind, f"{path}: {prefix}", _REMEDY)


def _text(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"frontier header: not plain JSON ({error})") from None
