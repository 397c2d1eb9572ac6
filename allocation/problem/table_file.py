"""The cost table on disk: safetensors, with one JSON text in its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import COLUMNS, Units
from bitknap.disk.column_file import read_columns, write_columns
from bitknap.errors import FileError, InputError

# 1.1 added `frequency`.
KIND, VERSION = "bitknap.table", "1.1"
_OPTIONAL = ("spread", "ties", "frequency")
_DTYPES: dict[str, npt.DTypeLike] = {
    "cost": np.float64,
    "nbytes": np.int64,
    "spread": np.float64,
    "ties": np.int32,
    "frequency": np.float64,
    **{f"units.{name}": dtype for name, dtype in COLUMNS.items()},
}


def least_size(units: int, formats: int) -> int:
    """Return the bytes of a table's costs and sizes, which is nearly all that its file takes."""
    return units * formats * sum(np.dtype(_DTYPES[name]).itemsize for name in ("cost", "nbytes"))


def write_table(fields: Mapping[str, Any], path: Path) -> None:
    """Write the fields of a `CostTable`; equal tables give equal bytes."""
    units: Units = fields["units"]
    header = {
        "format": KIND,
        "version": VERSION,
        "formats": [item.name for item in fields["formats"]],
        "projections": list(units.projections),
        "provenance": dict(fields["provenance"]),
    }
    arrays: dict[str, npt.NDArray[Any]] = {name: fields[name] for name in ("cost", "nbytes")}
    arrays |= {f"units.{name}": column for name, column in units.to_arrays().items()}
    arrays |= {name: fields[name] for name in _OPTIONAL if fields[name] is not None}
    write_columns(path, header, arrays)


def read_table(path: Path) -> dict[str, Any]:
    """Return the fields that `write_table` wrote, not yet checked against each other.

    Raises:
        FileError: one line with the path of the file and of the bad field.
    """
    header, arrays = read_columns(path, "a cost table", KIND, VERSION, _DTYPES, _OPTIONAL)
    try:
        formats = [Format.parse(name) for name in header["formats"]]
        columns = {name: arrays[f"units.{name}"] for name in COLUMNS}
        return {
            "units": Units.from_arrays(columns, header["projections"]),
            "formats": tuple(formats),
            "cost": arrays["cost"],
            "nbytes": arrays["nbytes"],
            "spread": arrays.get("spread"),
            "ties": arrays.get("ties"),
            "frequency": arrays.get("frequency"),
            "provenance": header["provenance"],
        }
    except InputError as error:
        raise FileError(f"{path}: {error}") from None
