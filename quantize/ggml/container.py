"""The container: named values, then tensors, each at a multiple of 32 bytes.

"GGUF"  version  number of tensors  number of values
values                                name, kind, value
tensors                               name, dimensions (row length first), type, offset
data                                  from the next multiple of 32 on; offsets count from there
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitknap.allocation.codecs.ggml import row_bytes
from bitknap.errors import FileError
from bitknap.quantization.ggml.library import NUMBERS

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_KINDS = "BbHhIif?"  # of struct, by number; then come strings and arrays, and numbers of 8 bytes
_STRING, _ARRAY = 8, 9
_WIDE = {10: "Q", 11: "q", 12: "d"}
_UNSIGNED, _SIGNED, _FLOAT, _BOOL = 4, 5, 6, 7
_PLAIN = {"f32": 4, "bf16": 2}
_NAMES = {number: name for name, number in NUMBERS.items()}

Value = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: its name, such as "blk.0.ffn_down_exps.weight".
        shape: sizes as NumPy has them, the length of a row last.
        type: its type in ggml, such as "f32" or "q4_k".
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        *outer, cols = self.shape
        line = cols * _PLAIN[self.type] if self.type in _PLAIN else row_bytes(self.type, cols)
        return math.prod(outer) * line


@dataclass(frozen=True, slots=True)
class Container:
    """What the head of a file says.

    Attributes:
        path: the file.
        values: the named values.
        entries: its tensors, by name.
        places: where each tensor's data begins in the file.
    """

    path: Path
    values: Mapping[str, Any]
    entries: Mapping[str, Entry]
    places: Mapping[str, int]

    def data(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8, as a view of the file."""
        size, start = self.entries[name].nbytes, self.places[name]
        return np.memmap(self.path, np.uint8, "r", start, (size,)) if size else np.empty(0, "u1")


def padding(size: int) -> bytes:
    """Return the zeros that bring a size to a multiple of 32."""
    return bytes(-size % ALIGNMENT)


def head(values: Mapping[str, Value], entries: Iterable[Entry]) -> bytes:
    """Return the beginning of a file, up to its data; tensors follow in the order of `entries`."""
    tensors = list(entries)
    out = BytesIO()
    out.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(values)))
    for name, value in values.items():
        out.write(_text(name) + _tagged(value))
    offset = 0
    for one in tensors:
        sizes = one.shape[::-1]
        out.write(_text(one.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        out.write(struct.pack("<IQ", NUMBERS[one.type], offset))
        offset += one.nbytes + len(padding(one.nbytes))
    out.write(padding(out.tell()))
    return out.getvalue()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tagged(value: Value) -> bytes:
    """Return a value after the number of its kind."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if not isinstance(value, Sequence):
        kind = _kind_of([value])
        return struct.pack("<I" + _KINDS[kind], kind, value)
    if value and isinstance(value[0], str):
        words = b"".join(_text(str(word)) for word in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + words
    kind = _SIGNED if _kind_of(value) == _UNSIGNED else _kind_of(value)
    return struct.pack(f"<IIQ{len(value)}{_KINDS[kind]}", _ARRAY, kind, len(value), *value)


def _kind_of(numbers: Sequence[Any]) -> int:
    if all(isinstance(one, bool) for one in numbers):
        return _BOOL
    if any(isinstance(one, float) for one in numbers):
        return _FLOAT
    return _SIGNED if min(numbers) < 0 else _UNSIGNED


def read(path: Path) -> Container:
    """Return what the head of a file says; its data is not read.

    Raises:
        FileError: it is no GGUF file, is cut short, or has tensors of types that are not known.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (struct.error, EOFError, UnicodeDecodeError, MemoryError, OverflowError):
        raise FileError(f"{path}: the head of the GGUF file is cut short or damaged") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path, file: BinaryIO) -> Container:
    size = path.stat().st_size
    if file.read(4) != _MAGIC:
        raise FileError(f"{path}: not a GGUF file")
    version, tensors, count = _unpack(file, "<IQQ")
    if version not in (2, 3):
        raise FileError(f"{path}: GGUF of version {version}; versions 2 and 3 can be read")
    values = {_read_text(file, size): _read_value(file, size) for _ in range(count)}
    entries, offsets = {}, {}
    for _ in range(tensors):
        name = _read_text(file, size)
        (rank,) = _unpack(file, "<I")
        shape = _unpack(file, f"<{rank if rank <= 4 else 5}Q")[::-1]
        number, offsets[name] = _unpack(file, "<IQ")
        if number not in _NAMES:
            raise FileError(f"{path}: {name} has type {number}, which is not known here")
        entries[name] = Entry(name, tuple(shape), _NAMES[number])
    step = int(values.get("general.alignment", ALIGNMENT))
    start = -(-file.tell() // step) * step
    places = {name: start + offset for name, offset in offsets.items()}
    for name, one in entries.items():
        if places[name] + one.nbytes > size:
            raise FileError(
                f"{path}: cut short: {name} ends at byte {places[name] + one.nbytes}, the file has "
                f"{size}; fetch or write it again"
            )
    return Container(path, values, entries, places)


def _unpack(file: BinaryIO, kinds: str) -> tuple[Any, ...]:
    return struct.unpack(kinds, file.read(struct.calcsize(kinds)))


def _read_text(file: BinaryIO, most: int) -> str:
    (length,) = _unpack(file, "<Q")
    data = file.read(min(length, most))
    if len(data) != length:
        raise EOFError
    return data.decode()


def _read_value(file: BinaryIO, most: int) -> Any:
    (kind,) = _unpack(file, "<I")
    if kind == _STRING:
        return _read_text(file, most)
    if kind != _ARRAY:
        return _unpack(file, "<" + _code(kind))[0]
    inner, length = _unpack(file, "<IQ")
    if length > most:
        raise EOFError
    if inner == _STRING:
        return [_read_text(file, most) for _ in range(length)]
    return list(_unpack(file, f"<{length}{_code(inner)}"))


def _code(kind: int) -> str:
    if kind < len(_KINDS):
        return _KINDS[kind]
    if kind not in _WIDE:
        raise EOFError
    return _WIDE[kind]
