"""Open a model on disk: where it is, what its headers say, and its tensors' exact bytes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bitknap.errors import FileError, InputError
from bitknap.files import read_json
from bitknap.quantize.headers import DTYPES, TensorInfo, read_header

__all__ = ["DTYPES", "Checkpoint", "TensorInfo", "resolve"]

_BUNDLED = "bitknap.benchmarks.reference"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What a checkpoint needs: weights, configuration, tokenizer. No code, no pickle.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# How weights are called: transformers' own name, and ours for packed ones. Under its own name
# transformers would load a packed checkpoint without a word and make up all experts at random.
PLAIN, PACKED = "model", "bitknap"
# A fingerprint reads this much of each tensor: enough to tell two trainings apart, and cheap.
_SAMPLE = 256


def resolve(model: str | Path) -> Path:
    """Return the folder of a model.

    Args:
        model: a folder with a `config.json`, "reference:NAME" for a bundled model, or a Hugging
            Face hub id, which is downloaded unless it is cached.

    Raises:
        InputError: there is no such model.
    """
    if str(model).startswith("reference:"):
        return _bundled(str(model).removeprefix("reference:"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; pass the folder of a transformers model")
        return folder
    if folder.exists():
        raise InputError(f"{folder}: a file; pass the folder of a transformers model")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such folder, and not a Hugging Face hub id")
    return _download(model)


def _bundled(name: str) -> Path:
    root = Path(str(files(_BUNDLED)))
    names = sorted(path.parent.name for path in root.glob("*/config.json"))
    if name not in names:
        bundled = ", ".join(f"reference:{one}" for one in names) or "none in this installation"
        raise InputError(f"reference:{name}: no such bundled model; there are: {bundled}")
    return root / name


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        # Subfolders hold the same weights again, in other formats.
        folder = snapshot_download(model, allow_patterns=list(_WANTED), ignore_patterns=["*/*"])
        return Path(folder)
    except (HFValidationError, HTTPError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(
            f"{model}: no such folder, and the hub cannot give it ({reason})"
        ) from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A folder with `config.json` and safetensors, checked header by header.

    Attributes:
        folder: where it is.
        config: the parsed `config.json`.
        headers: tensor name to dtype, shape and place.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the configuration and all headers, no weights.

        Raises:
            FileError: a file is missing, truncated or inconsistent; says which.
        """
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise FileError(f"{folder / 'config.json'}: not a JSON object")
        for stem in (PLAIN, PACKED):
            single = folder / f"{stem}.safetensors"
            if single.is_file():
                return cls(folder=folder, config=config, headers=read_header(single))
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                return cls(folder=folder, config=config, headers=_read_shards(index))
        raise FileError(
            f"{folder}: neither {PLAIN}.safetensors nor {PLAIN}.safetensors.index.json; "
            "save the model with safetensors first"
        )

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name to (safetensors dtype, shape): what `names.walk_headers` takes."""
        return {name: (info.dtype, info.shape) for name, info in self.headers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.stop - info.start for info in self.headers.values())

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that tell this model from another, even one of the same shapes.

        SHA-256 over the model type and, sorted by name, each tensor's name, dtype, shape and
        first 256 bytes; it does not depend on how the tensors are spread over files.
        """
        digest = hashlib.sha256(str(self.config.get("model_type", "")).encode())
        samples: dict[str, bytes] = {}
        in_place = sorted(self.headers.items(), key=lambda item: item[1][2:])
        for path, tensors in groupby(in_place, key=lambda item: item[1].file):
            with path.open("rb") as file:
                for name, info in tensors:
                    file.seek(info.start)
                    samples[name] = file.read(min(_SAMPLE, info.stop - info.start))
        for name, info in sorted(self.headers.items()):
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            digest.update(samples[name])
        return digest.digest()[:16].hex()

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor, in the dtype it is stored in.

        Raises:
            InputError: there is no tensor of this name.
            FileError: the file has shrunk since it was opened, or torch lacks the dtype.
        """
        info = self.headers.get(name)
        if info is None:
            raise InputError(f"{self.folder}: no tensor {name!r}")
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise FileError(f"{info.file}: {name}: torch cannot hold dtype {info.dtype}")
        if not math.prod(info.shape):
            return torch.empty(info.shape, dtype=dtype)
        buffer = bytearray(info.stop - info.start)
        with info.file.open("rb") as file:
            file.seek(info.start)
            if file.readinto(buffer) != len(buffer):
                raise FileError(f"{info.file}: {name}: truncated since it was opened")
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(info.shape)


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise FileError(f"{index}: weight_map: missing or empty")
    headers: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(where.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise FileError(f"{index}: weight_map: {shard!r} is not a file name in this folder")
        path = index.parent / shard
        if not path.is_file():
            raise FileError(f"{path}: missing; {index.name} names it, download it again")
        for name, info in read_header(path).items():
            if name in headers:
                raise FileError(f"{path}: {name}: also in {headers[name].file.name}")
            headers[name] = info
    for name, shard in where.items():
        if name not in headers or headers[name].file.name != shard:
            raise FileError(f"{index.parent / shard}: {name}: missing, though {index.name} says so")
    return headers
