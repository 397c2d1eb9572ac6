"""Safetensors output files, laid out completely before any of their tensors is known.

Names, dtypes and shapes determine where everything goes, so that tensors can be written in any
order, in parts, and again after a kill: the same bytes in the same places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bitknap.disk.atomic import write_whole
from bitknap.quantization.source.safetensors_header import DTYPES

MAX_SHARD_SIZE = "5GB"


class Entry(NamedTuple):
    """A tensor to write: dtype as safetensors spells it, shape, and number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Place(NamedTuple):
    """Where a tensor begins: the name of its file, and the byte."""

    file: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The files of one checkpoint.

    Attributes:
        headers: file name to its first bytes, up to the first tensor.
        sizes: file name to its bytes, header included.
        places: tensor name to where it goes.
        index: name and content of the index; None if there is one file.
    """

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    index: tuple[str, bytes] | None

    def create(self, folder: Path) -> None:
        """Write headers and the index; tensors are holes until they are written."""
        for name, header in self.headers.items():
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])
        if self.index is not None:
            write_whole(folder / self.index[0], self.index[1])

    def are_in(self, folder: Path) -> bool:
        """Return whether a folder has the files of `create`, with their headers and sizes."""
        for name, header in self.headers.items():
            file = folder / name
            if file.is_symlink() or not file.is_file() or file.stat().st_size != self.sizes[name]:
                return False
            with file.open("rb") as opened:
                if opened.read(len(header)) != header:
                    return False
        return self.index is None or (folder / self.index[0]).is_file()


def lay_out(tensors: Mapping[str, Entry], stem: str, limit: int) -> Shards:
    """Spread tensors over files as huggingface_hub does, in the order they come.

    Args:
        tensors: by name.
        stem: stem of the files' names: "STEM.safetensors", or "STEM-00001-of-0000N.safetensors".
        limit: maximum bytes of the tensors in a file; a larger tensor has a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=limit,
    )
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for file, names in split.filename_to_tensors.items():
        # Wide dtypes first keeps every tensor aligned to its own width.
        order = sorted(names, key=lambda n: (-DTYPES[tensors[n].dtype].itemsize, n))
        headers[file] = _header({name: tensors[name] for name in order})
        at = len(headers[file])
        for name in order:
            places[name] = Place(file, at)
            at += tensors[name].nbytes
        sizes[file] = at
    index = None
    if split.is_sharded:
        content = {
            "metadata": {**split.metadata, "format": "pt"},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        index = f"{stem}.safetensors.index.json", json.dumps(content, indent=2).encode()
    return Shards(headers=headers, sizes=sizes, places=places, index=index)


def _header(tensors: Mapping[str, Entry]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
