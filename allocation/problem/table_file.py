"""The cost table on disk: safetensors, with one JSON text in its header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import COLUMNS, Units
from bitknap.disk.column_file import read_columns, write_columns
from bitknap.errors import FileError, InputError

if TYPE_CHECKING:
    from bitknap.allocation.problem.table import CostTable

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


def write_table(table: CostTable, path: Path) -> None:
    """Write `table`; equal tables give equal bytes."""
    header = {
        "format": KIND,
        "version": VERSION,
        "formats": [item.name for item in table.formats],
        "projections": list(table.units.projections),
        "provenance": dict(table.provenance),
    }
    arrays: dict[str, npt.NDArray[Any]] = {"cost": table.cost, "nbytes": table.nbytes}
    arrays |= {f"units.{name}": column for name, column in table.units.to_arrays().items()}
    arrays |= {name: getattr(table, name) for name in _OPTIONAL if getattr(table, name) is not None}
    write_columns(path, header, arrays)


def read_table(path: Path) -> CostTable:
    """Read what `write_table` wrote.

    Raises:
        FileError: one line with the path of the file and of the bad field.
    """
    from bitknap.allocation.problem.table import CostTable

    header, arrays = read_columns(path, "a cost table", KIND, VERSION, _DTYPES, _OPTIONAL)
    try:
        formats = [Format.parse(name) for name in header["formats"]]
        columns = {name: arrays[f"units.{name}"] for name in COLUMNS}
        return CostTable(
            units=Units.from_arrays(columns, header["projections"]),
            formats=tuple(formats),
            cost=arrays["cost"],
            nbytes=arrays["nbytes"],
            spread=arrays.get("spread"),
            ties=arrays.get("ties"),
            frequency=arrays.get("frequency"),
            provenance=header["provenance"],
        )
    except InputError as error:
        raise FileError(f"{path}: {error}") from None
