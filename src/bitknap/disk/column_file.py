"""Columns on disk: safetensors, with one JSON text in the header that describes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.disk.atomic import check_version, write_whole
from bitknap.disk.json_shapes import check_shapes
from bitknap.errors import FileError

# The only metadata key: safetensors does not keep the order of several.
_KEY = "bitknap"
# Entries of a provenance that are read; "each" holds those of the tables that make up a table.
_SAID: dict[str, Any] = {
    "coverage": [[int, int, int]],
    "super_experts": [[int, int, float]],
    "protected": {"units": int, "bits": int},
    "repaired": int,
    "row_blocks": int,
    "rewritten": {"order?": ({}, None), "rotation?": (int, None)},
    "check": (
        {"spearman": (float, None), "slope": (float, None), "scale": (float, None)}
        | {"regret": (float, None), "plans": int, "bits": float},
        None,
    ),
    "proxies": ({"exponents": {}, "dropped?": [str]}, None),
    "samples": {"spearman?": [float]},
    "spearman": [float],
    "measurements": int,
    "serving": {"family": str},
    "tokens": int,
}
_PROVENANCE = {**_SAID, "each": [{f"{key}?": shape for key, shape in _SAID.items()}]}
# Exceptions of safetensors and NumPy for a damaged file, which neither of them documents.
_DAMAGED = (OSError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


def write_columns(
    path: Path, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write arrays and their header, whole or not at all; equal content gives equal bytes."""
    from safetensors.numpy import save

    # safetensors writes the buffer as it lies in memory.
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    write_whole(path, save(flat, metadata={_KEY: text}))


def read_columns(
    path: Path,
    what: str,
    kind: str,
    version: str,
    dtypes: Mapping[str, npt.DTypeLike],
    optional: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the header and the arrays that `write_columns` wrote.

    Args:
        path: the file.
        what: what the file should be, named in messages, such as "a cost table".
        kind: the wanted format, such as "bitknap.table".
        version: what this library writes.
        dtypes: dtypes of every array.
        optional: arrays that may be missing.

    Raises:
        FileError: the file is missing, truncated, corrupt, or of an unknown version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            texts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, *_DAMAGED) as error:
        raise FileError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        header = json.loads(texts[_KEY])
    except (KeyError, ValueError, RecursionError):
        raise FileError(f"{path}: no Bitknap header; not {what}") from None
    if not isinstance(header, dict):
        raise FileError(f"{path}: header: not a JSON object")
    check_version(header, kind, version, path)
    for array in arrays.values():
        array.setflags(write=False)  # so that a frozen value takes it as it is, without a copy
    for name, dtype in dtypes.items():
        if name not in arrays and name not in optional:
            raise FileError(f"{path}: {name}: missing")
        if name in arrays and arrays[name].dtype != dtype:
            wanted = np.dtype(dtype).name
            raise FileError(f"{path}: {name}: dtype {arrays[name].dtype}, expected {wanted}")
    for key in ("formats", "projections"):
        names = header.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FileError(f"{path}: {key}: missing or not a list of names")
    if not isinstance(header.get("provenance"), dict):
        raise FileError(f"{path}: provenance: missing or not a JSON object")
    check_shapes(header["provenance"], _PROVENANCE, f"{path}: provenance")
    return header, arrays
