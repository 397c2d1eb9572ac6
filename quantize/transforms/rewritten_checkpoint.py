"""A plain checkpoint with other numbers in the same tensors, computed as they are read.

Changes to weights that keep the model's function (`permute`, `rotation`) are made here one tensor
at a time, so that the model need not fit in memory. `write` makes a plain transformers folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitknap.disk.atomic import write_whole
from bitknap.disk.outputs import whole_folder
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint, TensorInfo

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewritten:
    """A checkpoint that is changed as it is read, with the same names, shapes and dtypes.

    Plans and packed checkpoints refer to the folder that `write` makes from it.

    Attributes:
        source: the checkpoint to read.
        change: function from a tensor's name and stored value, which it may overwrite, to the new
            value.
        mark: identifies this change; part of the fingerprint.
        config: the content of the new `config.json`.
        copies: new tensors: name to the name of the source's tensor that each is made from.
    """

    source: Checkpoint
    change: Callable[[str, Tensor], Tensor]
    mark: str
    config: Mapping[str, Any]
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The source's folder."""
        return self.source.folder

    @property
    def headers(self) -> dict[str, TensorInfo]:
        """Tensor name to dtype and shape; places are those of the source's tensor."""
        made = {name: self.source.headers[origin] for name, origin in self.copies.items()}
        return {**self.source.headers, **made}

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name to (safetensors dtype, shape): what `headers_only.walk_headers` takes."""
        return {name: (info.dtype, info.shape) for name, info in self.headers.items()}

    @property
    def fingerprint(self) -> str:
        """32 hex digits, different from the source's and from the written copy's."""
        text = f"{self.source.fingerprint} {self.mark}"
        return hashlib.sha256(text.encode()).digest()[:16].hex()

    def read(self, name: str) -> Tensor:
        """Return one tensor, changed, in the dtype that `Checkpoint.read` gives it.

        Raises:
            InputError: there is no tensor of this name.
            FileError: the file has shrunk since it was opened, or torch lacks the dtype.
        """
        stored = self.source.read(self.copies.get(name, name))
        return self.change(name, stored).to(stored.dtype)


def write(checkpoint: Rewritten, out: Path, *, overwrite: bool = False) -> None:
    """Write a plain transformers checkpoint, whole or not at all, in files named like the source's.

    Raises:
        InputError: `out` exists and `overwrite` is false.
        FileError: a file of the source is damaged.
    """
    files: defaultdict[str, list[str]] = defaultdict(list)
    headers = checkpoint.headers
    for name, info in sorted(headers.items(), key=lambda item: item[1][2:]):
        files[info.file.relative_to(checkpoint.folder).as_posix()].append(name)
    with whole_folder(out, overwrite=overwrite, inputs=[checkpoint.folder]) as part:
        checkpoint.source.copy_companions(part)
        # The index that is written here has the usual name.
        config = {k: v for k, v in checkpoint.config.items() if k != "transformers_weights"}
        write_whole(part / "config.json", _json(config))
        for file_name, names in files.items():
            (part / file_name).parent.mkdir(parents=True, exist_ok=True)
            _write_file(checkpoint, {n: headers[n] for n in names}, part / file_name)
        if list(files) != ["model.safetensors"]:
            where = {name: file for file, names in files.items() for name in names}
            total = sum(_size(info) for info in headers.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_whole(part / _INDEX, _json(index))


def _write_file(checkpoint: Rewritten, tensors: Mapping[str, TensorInfo], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [at, at + _size(info)],
        }
        at += _size(info)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            changed = checkpoint.read(name).contiguous().reshape(-1)
            file.write(changed.view(torch.uint8).numpy().data)


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * DTYPES[info.dtype].itemsize


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
