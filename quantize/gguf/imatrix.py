"""Importance matrices: the mean squares of every matrix's inputs, as llama.cpp's tools keep them.

A file has, for each tensor of a GGUF model, the sum of x² by column (for experts, one row each) and
how many tokens were summed. Files before 2025 are a plain list, and can be read too.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from bitknap.allocation.problem.units import Units
from bitknap.disk.manifest import GGUF_MARK
from bitknap.errors import FileError, MismatchError
from bitknap.quantization.ggml import container
from bitknap.quantization.ggml.container import Entry, Value
from bitknap.quantization.gguf import names

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What the inputs of a tensor's matrices were like.

    Attributes:
        squares: mean of x² by column, float32 [n, cols]; n is 1, or the number of experts.
        tokens: number of tokens that each matrix saw, float32 [n].
    """

    squares: np.ndarray
    tokens: np.ndarray


def content_of(known: Mapping[str, np.ndarray], text: str, plan: str = "") -> bytes:
    """Return the bytes of a file with importances.

    They are stored as of one token each, so that the quotient that llama-quantize takes is exactly
    what was given, and its blocks are exactly ours.

    Args:
        known: tensor name to importances, float32 [n, cols].
        text: name of the text that they were measured on.
        plan: digest of the plan beside it.
    """
    values: dict[str, Value] = {
        GGUF_MARK: plan,
        "general.type": "imatrix",
        "imatrix.datasets": [text],
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": 1,
    }
    entries, data = [], []
    for name, squares in sorted(known.items()):
        matrix = np.ascontiguousarray(squares, np.float32)
        entries += [
            Entry(name + _SUMS, matrix.shape, "f32"),
            Entry(name + _COUNTS, (len(matrix), 1), "f32"),
        ]
        data += [matrix, np.ones(len(matrix), np.float32)]
    out = BytesIO()
    out.write(container.head(values, entries))
    for part in data:
        out.write(part.tobytes() + container.padding(part.nbytes))
    return out.getvalue()


def read(path: Path) -> dict[str, Importance]:
    """Return the importances of a file, by the names of tensors.

    Raises:
        FileError: it is no such file, or is cut short.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    known = _read_gguf(path) if start == b"GGUF" else _read_plain(path)
    if not known:
        raise FileError(f"{path}: holds no importances; make it with llama-imatrix")
    for name, one in known.items():
        if not (np.isfinite(one.squares).all() and (one.squares >= 0).all()):
            raise FileError(f"{path}: {name}: an importance is negative, NaN or infinite")
    return known


def _read_gguf(path: Path) -> dict[str, Importance]:
    held = container.read(path)
    if held.values.get("general.type") != "imatrix":
        raise FileError(f"{path}: a GGUF file, but no importance matrix")
    known = {}
    for full in held.entries:
        if not full.endswith(_SUMS):
            continue
        name = full.removesuffix(_SUMS)
        if name + _COUNTS not in held.entries:
            raise FileError(f"{path}: {name} has sums but no counts; make the file again")
        *_, cols = held.entries[full].shape
        sums = held.data(full).view(np.float32).reshape(-1, cols)
        counts = held.data(name + _COUNTS).view(np.float32).reshape(-1, 1)
        if len(counts) not in (1, len(sums)):
            raise FileError(f"{path}: {name} has {len(sums)} sums and {len(counts)} counts")
        tokens = np.broadcast_to(counts, (len(sums), 1))
        known[name] = Importance(sums / np.maximum(tokens, 1), tokens[:, 0].copy())
    return known


def _read_plain(path: Path) -> dict[str, Importance]:
    """Return the importances of a list: count, then name, calls, values of each tensor."""
    known = {}
    try:
        data = path.read_bytes()
        (count,) = struct.unpack_from("<i", data)
        at = 4
        for _ in range(count):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            at += 4 + length
            calls, size = struct.unpack_from("<ii", data, at)
            values = np.frombuffer(data, "<f4", size, at + 8)
            at += 8 + 4 * size
            known[name] = Importance(
                (values / max(1, calls))[None], np.full(1, calls, dtype=np.float32)
            )
    except (struct.error, ValueError, UnicodeDecodeError):
        raise FileError(
            f"{path}: no importance matrix of llama.cpp, or cut short; make it again"
        ) from None
    return known


def of_units(known: Mapping[str, Importance], units: Units, path: Path) -> list[np.ndarray]:
    """Return the importances of each unit's columns, float32 [cols] each.

    Args:
        known: importances by tensor.
        units: units of a model.
        path: the file, for messages.

    Raises:
        MismatchError: a unit has none, or of another width: the file is of another model.
    """
    found: list[np.ndarray] = []
    for place in range(len(units)):
        unit = units.row(place)
        name = f"{names.of_unit(unit)}.weight"
        one = known.get(name)
        if one is None:
            raise MismatchError(f"{path}: has no importances of {name}; make it with this model")
        row = _row(one, unit.expert, unit.cols)
        if row is None:
            raise MismatchError(
                f"{path}: {name} has importances of shape {list(one.squares.shape)}, "
                f"{units.label(place)} has {unit.cols} inputs; make it with this model"
            )
        found.append(row)
    return found


def _row(one: Importance, expert: int, cols: int) -> np.ndarray | None:
    """Return a matrix's row; lists have the rows of all experts as one."""
    rows: np.ndarray = (
        one.squares.reshape(-1, cols) if one.squares.size % cols == 0 else one.squares
    )
    wanted = max(expert, 0)
    if rows.shape[1] != cols or wanted >= len(rows):
        return None
    row: np.ndarray = rows[wanted]
    return row


def types_text(types: Sequence[tuple[str, str]]) -> str:
    """Return the file for `llama-quantize --tensor-type-file`: one pattern and its type a line.

    Patterns are anchored and escaped, so that each is found in the one name that it is made from.

    Args:
        types: tensor names and their types.
    """
    lines = (f"^{name.replace('.', chr(92) + '.')}$={type}" for name, type in types)
    return "\n".join(lines) + "\n"
