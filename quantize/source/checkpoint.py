"""Open a model on disk: where it is, what its headers say, and its tensors' exact bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bitknap.disk.atomic import read_json
from bitknap.errors import FileError, InputError
from bitknap.quantization.ggml import unpacked
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.source import foreign_formats, hub, low_bit_codes
from bitknap.quantization.source.bundled import PREFIX, folder_of
from bitknap.quantization.source.companions import Companions, check_content
from bitknap.quantization.source.low_bit_codes import LowBit
from bitknap.quantization.source.partial_reads import (
    read_ahead,
    read_slabs,
    read_tensor,
    read_view,
)
from bitknap.quantization.source.safetensors_header import DTYPES, PACKED, PLAIN, TensorInfo
from bitknap.quantization.source.weight_files import read_weights, weights_of

__all__ = ["DTYPES", "PACKED", "PLAIN", "REWRITTEN", "Checkpoint", "TensorInfo", "resolve"]

# Key of `config.json` for how a transformed copy was made; see `transformed_model`.
REWRITTEN = "bitknap_rewritten"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# A fingerprint reads this much of each tensor: enough to tell two trainings apart, and cheap.
_SAMPLE = 256
# A checksum reads this much at a time.
_CHUNK = 1 << 24
_PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}


def resolve(model: str | Path) -> Path:
    """Return the folder of a model.

    Args:
        model: a folder with a `config.json`, a GGUF file in 16 or 32 bits, "reference:NAME" for
            a bundled model, or a Hugging Face hub id, which is downloaded unless it is cached.

    Raises:
        InputError: there is no such model.
    """
    folder = _local(model)
    return hub.fetch(str(model)) if folder is None else folder


def places(model: str | Path) -> list[Path]:
    """Return where the files of a model are, or will be once it is fetched from the hub.

    Raises:
        InputError: there is no such model.
    """
    file = Path(model)
    folder = file if file.suffix == ".gguf" and file.is_file() else _local(model)
    return [hub.cache_of(str(model)) if folder is None else folder]


def _local(model: str | Path) -> Path | None:
    """Return the folder of a model on this machine, None for a hub id."""
    if str(model).startswith(PREFIX):
        return folder_of(str(model))
    folder = Path(model)
    with contextlib.suppress(RuntimeError):  # "~name" is a folder's name where nobody is called so
        folder = folder if os.path.lexists(folder) else folder.expanduser()
    if folder.is_dir():
        folder = hub.snapshot_of(folder)
        check_content(folder / "config.json")
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise InputError(
                    f"{folder}: an adapter without its model; merge it into the model, save that, "
                    "and pass its folder"
                )
            raise InputError(f"{folder}: no config.json; pass the folder of a transformers model")
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        return unpacked.folder_of(folder)
    if folder.exists():
        raise InputError(f"{folder} is a file; pass the folder of a transformers model")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such folder, and not a Hugging Face hub id")
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A folder with `config.json` and safetensors, checked header by header.

    Attributes:
        folder: where it is.
        config: the parsed `config.json`.
        headers: tensor name to dtype, shape and place; tensors in fewer than 16 bits appear as
            the "BF16" ones they stand for, in the place of their codes.
        low_bit: how those tensors are really stored, by name.
        elsewhere: bytes of the tokenizer and similar files that were not fetched, as in `look`.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, TensorInfo]
    low_bit: Mapping[str, LowBit] = field(default_factory=dict)
    elsewhere: int = 0

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the configuration and all headers, no weights.

        Raises:
            FileError: a file is missing, truncated or inconsistent; says which.
            ModelError: tensors are quantized in a way that is not read; says which.
        """
        config = _config(folder)
        return cls._of(folder, config, read_weights(folder, config))

    @classmethod
    def look(cls, model: str | Path) -> Checkpoint:
        """Read the configuration and all headers of a model, wherever it is.

        For a model on the hub that is not in the cache nothing else is fetched: its tensors cannot
        be read.

        Raises:
            InputError: there is no such model.
            FileError: a file is missing, truncated or inconsistent; says which.
            ModelError: tensors are quantized in a way that is not read; says which.
        """
        folder = _local(model)
        if folder is not None:
            return cls.open(folder)
        seen = hub.fetch_headers(str(model))
        if isinstance(seen, Path):
            return cls.open(seen)
        known = cls._of(seen.folder, _config(seen.folder), seen.headers)
        return replace(known, elsewhere=seen.beside)

    @classmethod
    def _of(
        cls, folder: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo]
    ) -> Checkpoint:
        headers, low_bit = low_bit_codes.logical(config, stored)
        foreign_formats.check(folder, config, headers, quantized=bool(low_bit))
        return cls(folder=folder, config=config, headers=headers, low_bit=low_bit)

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name to (safetensors dtype, shape): what `headers_only.walk_headers` takes."""
        return {name: (info.dtype, info.shape) for name, info in self.headers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk, without headers."""
        return sum(info.stop - info.start for info in self.stored(self.headers).values())

    def stored(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Return the tensors on disk behind `names`: themselves, or their codes and scales."""
        places: dict[str, TensorInfo] = {}
        for name in names:
            low = self.low_bit.get(name)
            places.update({name: self.headers[name]} if low is None else low.parts)
        return places

    def written_bytes(self, name: str) -> int:
        """Return the bytes of a tensor where it is written: as stored, or decoded to bfloat16."""
        info = self.headers[name]
        return 2 * math.prod(info.shape) if name in self.low_bit else info.stop - info.start

    def precision(self, name: str) -> str:
        """Return the name in `Format.keep` of a tensor's stored precision; "" for others."""
        low = self.low_bit.get(name)
        if low is not None:
            return low.kind if low.keepable else ""
        return _PRECISIONS.get(self.headers[name].dtype, "")

    @property
    def index(self) -> str:
        """Name of the index of weight files, relative to the folder; "" for a single file."""
        name = weights_of(self.config, lambda name: (self.folder / name).is_file())
        return name if name.endswith(".json") else ""

    @property
    def companions(self) -> Companions:
        """The files beside configuration and weights.

        Raises:
            FileError: one that belongs to the model has no content.
        """
        return Companions.of(self.folder, self._weight_names())

    @property
    def folder_bytes(self) -> int:
        """Bytes of the model on disk: weights, configuration and companions."""
        names = (*self._weight_names(), *self.companions.travel, "config.json")
        return sum((self.folder / name).stat().st_size for name in names)

    def _weight_names(self) -> set[str]:
        """Return the files of weights and their index, by names relative to the folder."""
        files = {info.file for info in self.stored(self.headers).values()}
        names = {file.relative_to(self.folder).as_posix() for file in files}
        return names | {self.index} if self.index else names

    def check_companions(self) -> None:
        """Raise FileError if a companion that belongs to the model has no content."""
        Companions.of(self.folder, self._weight_names())

    @property
    def companion_bytes(self) -> int:
        """Bytes of the companions that belong to the model."""
        return sum((self.folder / name).stat().st_size for name in self.companions.travel)

    def copy_companions(self, folder: Path) -> None:
        """Copy the companions that belong to the model; links are followed."""
        for name in self.companions.travel:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)

    def stored_as(self, name: str) -> str:
        """Return a name for the way a tensor is stored, whether or not it can be kept."""
        low = "fp8" if name in self.low_bit else self.headers[name].dtype
        return self.precision(name) or low

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that tell this model from another, even one of the same shapes.

        SHA-256 over the model type, how a transformed copy was made and, sorted by name, each
        tensor's name, dtype, shape and first 256 bytes; it does not depend on how the tensors are
        spread over files.
        """
        digest = hashlib.sha256(str(self.config.get("model_type", "")).encode())
        if REWRITTEN in self.config:
            digest.update(json.dumps(self.config[REWRITTEN], sort_keys=True).encode())
        samples: dict[str, bytes] = {}
        stored = self.stored(self.headers)
        in_place = sorted(stored.items(), key=lambda item: item[1][2:])
        for path, tensors in groupby(in_place, key=lambda item: item[1].file):
            with path.open("rb") as file:
                for name, info in tensors:
                    file.seek(info.start)
                    samples[name] = file.read(min(_SAMPLE, info.stop - info.start))
        for name, info in sorted(stored.items()):
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            digest.update(samples[name])
        return digest.digest()[:16].hex()

    def checksum(self) -> str:
        """Return 32 hex digits of the configuration and every byte of every tensor; reads all."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for name, info in sorted(self.stored(self.headers).items()):
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            with info.file.open("rb") as file:
                file.seek(info.start)
                for start in range(info.start, info.stop, _CHUNK):
                    digest.update(file.read(min(_CHUNK, info.stop - start)))
        return digest.digest()[:16].hex()

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor: in the dtype it is stored in, or bfloat16 if that is less.

        Raises:
            InputError: there is no tensor of this name.
            FileError: the file has shrunk since it was opened, or torch lacks the dtype.
        """
        low = self.low_bit.get(name)
        if low is not None:
            return low_bit_codes.decode(low, _read_both(low))
        info = self.headers.get(name)
        if info is None:
            raise InputError(f"{self.folder}: no tensor {name!r}")
        return read_tensor(name, info)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system read tensors from the disk while something else is computed."""
        read_ahead(self.stored(names).values())

    def read_slabs(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return elements first .. last - 1 of a low-bit tensor's first dimension, bfloat16.

        Raises:
            FileError: the file has shrunk since it was opened.
        """
        low = self.low_bit[name]
        first_row = first if len(low.codes.shape) == 2 else 0
        return low_bit_codes.decode(low, _read_slabs(low, first, last), first_row)

    def read_matrix(self, view: View) -> torch.Tensor:
        """Return one [out, in] matrix as `read` would, without reading the rest of its tensor.

        Raises:
            FileError: the file has shrunk since it was opened, or torch lacks the dtype.
        """
        low = self.low_bit.get(view.tensor)
        if low is None:
            return read_view(self.headers[view.tensor], view)
        shape = self.headers[view.tensor].shape
        if len(shape) == 2 and view == View(tensor=view.tensor, start=view.start, stop=view.stop):
            stop = shape[0] if view.stop is None else min(view.stop, shape[0])
            return self.read_slabs(view.tensor, view.start or 0, stop)
        stored, inside = self._around(low, view)
        return inside.of(low_bit_codes.decode(low, stored))

    def kept(self, view: View) -> torch.Tensor:
        """Return the bytes of one matrix in the precision it is stored in, uint8.

        Raises:
            ModelError: it shares scales with another matrix, so that it cannot be kept alone.
        """
        low = self.low_bit.get(view.tensor)
        if low is not None:
            return low_bit_codes.cut(low, *self._around(low, view))
        return self.read_matrix(view).contiguous().view(torch.uint8).reshape(-1)

    def _around(self, low: LowBit, view: View) -> tuple[low_bit_codes.Stored, View]:
        """Return the expert that holds a matrix, and the matrix's place in it."""
        if view.index is None or view.parts is not None:
            return _read_both(low), view
        return _read_slabs(low, view.index, view.index + 1), replace(view, index=0)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FileError(f"{folder / 'config.json'}: not a JSON object")
    return config


def _read_both(low: LowBit) -> low_bit_codes.Stored:
    return low_bit_codes.Stored(*(read_tensor(name, info) for name, info in low.needed))


def _read_slabs(low: LowBit, first: int, last: int) -> low_bit_codes.Stored:
    """Return elements of the first dimension of codes, with their scales if each has its own."""
    (codes_name, codes), (scales_name, scales) = low.needed
    given = read_slabs(codes_name, codes, first, last)
    if len(codes.shape) > 2 and scales.shape[:1] == codes.shape[:1]:
        return low_bit_codes.Stored(given, read_slabs(scales_name, scales, first, last))
    return low_bit_codes.Stored(given, read_tensor(scales_name, scales))
