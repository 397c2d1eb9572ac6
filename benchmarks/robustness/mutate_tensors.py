"""Damage a safetensors file: its header as JSON, the numbers in it, or its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitknap.benchmarks.robustness.mutate import Edit, damaged_bytes, damaged_value

# "header" lies about the tensors, "text" about the JSON text that our own files keep in the
# metadata, "length" about the header, "number" sets one number, "shape" keeps file and shape true.
KINDS = ("header", "text", "length", "number", "shape")
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_NUMPY |= {"I16": "<i2", "BOOL": "?", "I8": "i1", "U32": "<u4", "U64": "<u8", "U16": "<u2"}
_NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308, -1e308, 5e-324, 2**62, 99)


def damaged_tensors(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return a safetensors file after the edits; those of bytes come last."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    length: int | None = None
    for kind, seed in edits:
        chance = random.Random(seed)
        if kind == "header":
            header = damaged_value(header, chance)
        elif kind == "text":
            header = _other_text(header, chance)
        elif kind == "number":
            _other_number(header, data, chance)
        elif kind == "shape":
            header, data = _other_shape(header, data, chance)
        elif kind == "length":
            length = chance.choice((0, 1, 7, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, size))
    text = json.dumps(header).encode()
    found = (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)
    return damaged_bytes(found, [edit for edit in edits if edit.kind not in KINDS])


def _other_text(header: Any, chance: random.Random) -> Any:
    """Damage the JSON text in the metadata; of files without one, the metadata."""
    kept = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(kept, dict):
        return damaged_value(header, chance)
    try:
        text = json.dumps(damaged_value(json.loads(kept["bitknap"]), chance))
    except (KeyError, ValueError, TypeError):
        return {**header, "__metadata__": damaged_value(kept, chance)}
    return {**header, "__metadata__": {**kept, "bitknap": text}}


def _tensors(header: Any, data: bytes | bytearray) -> list[tuple[str, str, int, int]]:
    found = []
    for name, entry in header.items() if isinstance(header, dict) else ():
        try:
            start, stop = entry["data_offsets"]
            sized = all(type(n) is int and n > 0 for n in (*entry["shape"], stop, start + 1))
            if name != "__metadata__" and sized and 0 <= start < stop <= len(data):
                found.append((name, _NUMPY[entry["dtype"]], start, stop))
        except (TypeError, KeyError, ValueError):
            continue
    return found


def _other_number(header: Any, data: bytearray, chance: random.Random) -> None:
    tensors = _tensors(header, data)
    if not tensors:
        return
    _, dtype, start, stop = chance.choice(tensors)
    width = np.dtype(dtype).itemsize
    at = start + width * chance.randrange(max(1, (stop - start) // width))
    with np.errstate(all="ignore"):
        value = np.array(chance.choice(_NUMBERS)).astype(dtype)
    data[at : at + width] = value.tobytes()[: max(0, stop - at)]


def _other_shape(header: Any, data: bytearray, chance: random.Random) -> tuple[Any, bytearray]:
    """Give one tensor another shape or dtype that its bytes hold, or other bytes that hold it."""
    tensors = _tensors(header, data)
    if not tensors:
        return header, data
    parts = {name: (bytes(data[start:stop]), kind) for name, kind, start, stop in tensors}
    name = chance.choice(list(parts))
    part, kind = parts[name]
    entry = dict(header[name])
    width = np.dtype(kind).itemsize
    shape = entry["shape"] or [1]
    how = chance.randrange(6)
    if how == 0:
        entry["shape"] = shape[::-1]
    elif how == 1:
        entry["shape"] = [len(part) // width]
    elif how == 2:
        entry["shape"], part = [0, *shape[1:]], b""
    elif how == 3:
        entry["shape"], part = [shape[0] + 1, *shape[1:]], part + part[: len(part) // shape[0]]
    elif how == 4:
        same = [s for s, k in _NUMPY.items() if np.dtype(k).itemsize == width]
        entry["dtype"] = chance.choice(same)
    else:
        entry["shape"], part = [0, (1 << 62) + 1], b""
    parts[name] = part, kind
    return _laid_out({**header, name: entry}, {n: p for n, (p, _) in parts.items()})


def _laid_out(header: Any, parts: dict[str, bytes]) -> tuple[Any, bytearray]:
    found, data = {}, bytearray()
    for name, entry in header.items():
        if name in parts:
            entry = {**entry, "data_offsets": [len(data), len(data) + len(parts[name])]}
            data += parts[name]
        found[name] = entry
    return found, data
