"""The plan on disk: JSON that a person can read and `diff` can compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.disk.atomic import check_version, read_json, write_whole
from bitknap.disk.json_shapes import json_field, json_kind, json_object
from bitknap.errors import FileError, InputError
from bitknap.names import unknown

KIND, VERSION = "bitknap.plan", "1.0"
_REMEDY = "make the plan again"
_NUMBERS = ("layer", "expert", "block", "rows", "cols", "bytes")
_TEXTS = ("role", "projection", "format")


def write_plan(fields: Mapping[str, Any], totals: Mapping[str, Any], path: Path) -> None:
    """Write the fields of a `BitPlan`; equal plans give equal bytes, in any order of units."""
    units: Units = fields["units"]
    formats, choice = fields["formats"], fields["choice"]
    head = {
        "format": KIND,
        "version": VERSION,
        "header": dict(fields["header"]),
        "model": fields["model"],
        "totals": dict(totals),
        "formats": [item.name for item in formats],
        "projections": list(units.projections),
    }
    lines = [f" {_text(key)}: {_text(value)}," for key, value in head.items()]
    keys = (units.block, units.projection, units.expert, units.role, units.layer)
    order = np.lexsort(keys)
    names = [_text(name) for name in units.projections]
    columns = (units.layer, units.role, units.expert, units.projection, units.block)
    columns += (units.rows, units.cols, choice, fields["nbytes"])  # type: ignore[assignment]
    rows = [
        f'  {{"layer":{layer},"role":"{ROLES[role]}","expert":{expert},'
        f'"projection":{names[projection]},"block":{block},"rows":{height},"cols":{width},'
        f'"format":"{formats[index].name}","bytes":{size}}}'
        for layer, role, expert, projection, block, height, width, index, size in zip(
            *(column[order].tolist() for column in columns), strict=True
        )
    ]
    text = "\n".join(["{", *lines, ' "units": [', ",\n".join(rows), " ]", "}", ""])
    write_whole(path, text.encode())


def read_plan(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields and totals that `write_plan` wrote, not yet checked against each other.

    Raises:
        FileError: one line with the path of the file and of the bad field.
    """
    content = json_object(read_json(path), path, _REMEDY)
    check_version(content, KIND, VERSION, path)
    header = _field(content, "header", dict, path)
    names = [str(name) for name in _field(content, "formats", list, path)]
    projections = [str(name) for name in _field(content, "projections", list, path)]
    columns = _columns(_field(content, "units", list, path), path)
    columns["role"] = _indices(columns["role"], ROLES, "role", path)
    columns["projection"] = _indices(columns["projection"], projections, "projection", path)
    choice = _indices(columns.pop("format"), names, "format", path)
    try:
        nbytes = np.asarray(columns.pop("bytes"), dtype=np.int64)
        arrays = {name: np.asarray(column, dtype=np.int64) for name, column in columns.items()}
        fields = {
            "units": Units.from_arrays(arrays, projections),
            "formats": tuple(Format.parse(name) for name in names),
            "choice": choice,
            "nbytes": nbytes,
            "model": _field(content, "model", str, path),
            "header": header,
        }
    except (InputError, OverflowError) as error:
        raise FileError(f"{path}: units: {error}") from None
    return fields, _field(content, "totals", dict, path)


def _columns(rows: list[Any], path: Path) -> dict[str, list[Any]]:
    """Turn the rows into columns; numbers must be int and names str."""
    columns: dict[str, list[Any]] = {}
    kinds: dict[str, type] = dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_TEXTS, str)
    for name, kind in kinds.items():
        try:
            columns[name] = [row[name] for row in rows]
            found = set(map(type, columns[name]))
        except (KeyError, TypeError):
            found = {type(None)}
        # `type`, not `isinstance`, since a bool is an int.
        if found - {kind}:
            index = next(i for i, row in enumerate(rows) if type(_get(row, name)) is not kind)
            value = _get(rows[index], name)
            fault = "missing" if value is None else f"{value!r} is not {json_kind(kind)}"
            raise FileError(f"{path}: units[{index}].{name}: {fault}; {_REMEDY}")
    return columns


def _get(row: object, name: str) -> object:
    return row.get(name) if isinstance(row, Mapping) else None


def _indices(values: list[str], names: list[str] | tuple[str, ...], key: str, path: Path) -> Any:
    index = {name: position for position, name in enumerate(names)}
    try:
        return [index[value] for value in values]
    except KeyError:
        unit = next(unit for unit, value in enumerate(values) if value not in index)
        raise unknown(f"{path}: units[{unit}].{key}", values[unit], names, FileError) from None


def _field(content: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    return json_field(content, key, kind, f"{path}: ", _REMEDY)


def _text(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"plan header: not plain JSON ({error})") from None
