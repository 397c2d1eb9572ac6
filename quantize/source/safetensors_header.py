"""Read the header of one safetensors file without trusting it.

8 bytes   n, little-endian
n bytes   JSON: name -> dtype, shape, data_offsets; and __metadata__
the rest  the tensors' bytes: no holes, no overlap, nothing left over

A file that breaks one of these rules is refused, by name, before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitknap.errors import FileError

# Names of weight files: transformers' own, and Bitknap's for packed weights. Under its own name
# transformers would load a packed checkpoint silently, with all experts drawn at random.
STEMS = PLAIN, PACKED = "model", "bitknap"

# The bound of the safetensors library.
_MOST_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# Valid on disk, not readable here.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
        dtype: as safetensors spells it, such as "BF16".
        shape: its sizes.
        file: the file that holds it.
        start: first byte in that file.
        stop: one past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, checked against each other and its size.

    Raises:
        FileError: anything at all is wrong with the header; names the file and the tensor.
    """
    return check_header(path, *_read_json(path))


def check_header(
    path: Path, entries: Mapping[str, Any], begin: int, size: int
) -> dict[str, TensorInfo]:
    """Return the tensors of a parsed header, checked against each other and the file's size.

    Args:
        path: the file, named in messages; it need not be here.
        entries: the parsed JSON.
        begin: where the data begins.
        size: size of the file.

    Raises:
        FileError: anything at all is wrong with the header; names the file and the tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = _entry(path, name, entry)
        if not 0 <= start <= stop:
            raise FileError(f"{path}: {name}: data_offsets: [{start}, {stop}] is not a range")
        if begin + stop > size:
            raise FileError(
                f"{path}: truncated: {name} ends at byte {begin + stop}, the file at {size}; "
                "download it again"
            )
        bits = _BITS.get(dtype) or 8 * DTYPES[dtype].itemsize
        if 8 * (stop - start) != math.prod(shape) * bits:
            raise FileError(
                f"{path}: {name}: {stop - start} bytes do not hold {dtype} {list(shape)}"
            )
        tensors[name] = TensorInfo(dtype, shape, path, begin + start, begin + stop)
    _check_tiling(path, tensors, begin, size)
    return tensors


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, where the data begins, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise FileError(f"{path}: header of {length} bytes in a file of {size}; not valid")
            content = file.read(length)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = json.loads(content, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise FileError(f"{path}: header is not a JSON object")
    return entries, 8 + length, size


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return content


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise FileError(f"{path}: {name}: not a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or not (dtype in DTYPES or dtype in _BITS):
        raise FileError(f"{path}: {name}: dtype: {dtype!r} is not known")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise FileError(f"{path}: {name}: {key}: {numbers!r} is not a list of sizes")
    if len(offsets) != 2:
        raise FileError(f"{path}: {name}: data_offsets: {offsets!r} is not a pair")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], begin: int, size: int) -> None:
    at = begin
    for name, info in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
            raise FileError(f"{path}: {name}: {what}, at byte {info.start}")
        at = info.stop
    if at != size:
        raise FileError(f"{path}: {size - at} bytes after the last tensor")
