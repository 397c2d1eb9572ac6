"""Models on the Hugging Face hub: file by file, and no file that is not needed.

No code, no pickle, and of weights only those that are read: many repositories hold them several
times, in subfolders or under another name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bitknap.errors import InputError
from bitknap.quantize.headers import STEMS, TensorInfo, check_header, joined, read_index

_CONFIG = "config.json"
# What stands beside weights: configuration, tokenizer, template, card.
_BESIDE = (".json", ".txt", ".model", ".jinja", "README.md")


class Remote(NamedTuple):
    """A model of which only configuration and headers were fetched.

    Attributes:
        folder: where `config.json` is.
        headers: tensor name to dtype, shape and place; the files are not there.
        beside: bytes of the files beside weights and configuration.
    """

    folder: Path
    headers: dict[str, TensorInfo]
    beside: int


def fetch(model: str) -> Path:
    """Return the cached folder of a model, after downloading what is missing in it.

    Without a connection the cache alone will do.

    Raises:
        InputError: there is no such model, or it cannot be had.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    with _one_line(model):
        try:
            sizes = _listed(model)
        except (HTTPError, OSError) as offline:
            try:
                return Path(snapshot_download(model, local_files_only=True))
            except (HTTPError, OSError):
                raise offline from None
        folder = Path(hf_hub_download(model, _CONFIG)).parent
        for name in sorted(n for n in sizes if n.endswith(_BESIDE)):
            _check_one(folder, Path(hf_hub_download(model, name)), model)
        for name in _weights(folder, sizes):
            _check_one(folder, Path(hf_hub_download(model, name)), model)
        return folder


def fetch_headers(model: str) -> Remote | Path:
    """Return what the headers of a model say, or its folder if its weights are in the cache.

    Raises:
        InputError: there is no such model, or it cannot be had.
        FileError: a header is inconsistent; says which.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    with _one_line(model):
        folder = Path(hf_hub_download(model, _CONFIG)).parent
        here = _weights(folder, [file.name for file in folder.iterdir()])
        if here and all((folder / name).is_file() for name in here):
            return folder
        sizes = _listed(model)
        known = get_safetensors_metadata(model).files_metadata
    files = []
    for name, file in sorted(known.items()):
        entries = {
            tensor: {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": list(info.data_offsets),
            }
            for tensor, info in file.tensors.items()
        }
        end = max((info.data_offsets[1] for info in file.tensors.values()), default=0)
        files.append(check_header(folder / name, entries, 0, end))
    beside = sum(size for n, size in sizes.items() if n.endswith(_BESIDE) and n != _CONFIG)
    return Remote(folder, joined(files), beside)


@contextmanager
def _one_line(model: str) -> Iterator[None]:
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    expected = (
        *(HFValidationError, HTTPError, OSError),
        *(NotASafetensorsRepoError, SafetensorsParsingError),
    )
    try:
        yield
    except expected as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(
            f"{model}: no such folder, and the hub cannot give it ({reason})"
        ) from None


def _listed(model: str) -> dict[str, int]:
    """Return the files at the top of a repository and their bytes."""
    from huggingface_hub import model_info

    files = model_info(model, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}


def _weights(folder: Path, names: dict[str, int] | list[str]) -> list[str]:
    """Return the files of weights, in the order `Checkpoint.open` looks for them."""
    for stem in STEMS:
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
        index = folder / f"{stem}.safetensors.index.json"
        if index.name in names:
            return sorted(set(read_index(index).values()))
    return []


def _check_one(folder: Path, file: Path, model: str) -> None:
    # The cache has a folder a revision.
    if file.parent != folder:
        raise InputError(f"{model}: changed on the hub while it was downloaded; start again")
