"""Download models from the Hugging Face hub file by file, and only the files that are needed.

Pickles are not fetched, and of the weights only those that are read: many repositories hold them
several times, in subfolders or under another name. Code that a configuration names is fetched but
never run: a packed checkpoint of the model names it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from bitknap.disk.atomic import read_json
from bitknap.errors import InputError
from bitknap.quantization.source.companions import reason_to_stay
from bitknap.quantization.source.safetensors_header import TensorInfo, check_header
from bitknap.quantization.source.weight_files import joined, read_index, weights_of

_CONFIG = "config.json"
_CODE = ".py"
_NAMES_CODE = (
    *(_CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    "video_preprocessor_config.json",
)


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

    Without a connection, only the cache is used.

    Raises:
        InputError: there is no such model, or it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    with _fetching(model):
        try:
            sizes = _listed(model)
        except (HTTPError, OSError) as offline:
            try:
                return Path(snapshot_download(model, local_files_only=True))
            except (HTTPError, OSError):
                raise offline from None
        folder = Path(hf_hub_download(model, _CONFIG)).parent
        weights = weights_of(read_json(folder / _CONFIG), sizes.__contains__)
        beside = _beside(sizes)
        for name in (weights, *(n for n in beside if not n.endswith(_CODE))):
            _fetch_one(folder, name, model)
        code = [n for n in beside if n.endswith(_CODE)] if _names_code(folder) else []
        for name in (*code, *_files_of(folder, weights)):
            _fetch_one(folder, name, model)
        return folder


def fetch_headers(model: str) -> Remote | Path:
    """Return the headers of a model, or its folder if its weights are in the cache.

    Raises:
        InputError: there is no such model, or it cannot be downloaded.
        FileError: a header is inconsistent; says which.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    with _fetching(model):
        folder = Path(hf_hub_download(model, _CONFIG)).parent
        cached = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        weights = weights_of(read_json(folder / _CONFIG), cached.__contains__)
        if weights in cached and set(_files_of(folder, weights)) <= set(cached):
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
    code = _names_code(folder)
    beside = [name for name in _beside(sizes) if code or not name.endswith(_CODE)]
    return Remote(folder, joined(files), sum(sizes[name] for name in beside))


def snapshot_of(folder: Path) -> Path:
    """Return the snapshot in a cached repository's folder; return any other folder unchanged.

    Args:
        folder: such as models--ORGANIZATION--NAME, which holds blobs, refs and snapshots.

    Raises:
        InputError: it has several snapshots, and does not say which one is the main branch's.
    """
    snapshots = folder / "snapshots"
    if (folder / _CONFIG).exists() or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    known = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if main.is_file() and (snapshots / main.read_text().strip()) in known:
        return snapshots / main.read_text().strip()
    if len(known) != 1:
        raise InputError(
            f"{folder}: {len(known)} snapshots and no refs/main that names one of them; pass the "
            "folder of a snapshot"
        )
    return known[0]


def cache_of(model: str) -> Path:
    """Return the cache's folder for all files of a model, fetched or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")


@contextmanager
def calling_the_hub(problem: str) -> Iterator[None]:
    """Turn what the hub's library raises into InputError of one line.

    Args:
        problem: what could not be done; the hub's reason follows.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
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
        raise InputError(f"{problem} ({reason})") from None


def _fetching(model: str) -> AbstractContextManager[None]:
    return calling_the_hub(f"{model}: no such folder, and it cannot be downloaded from the hub")


def _listed(model: str) -> dict[str, int]:
    """Return the files of a repository and their bytes."""
    from huggingface_hub import model_info

    files = model_info(model, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


def _beside(sizes: Mapping[str, int]) -> list[str]:
    """Return the files beside configuration and weights that belong to a model."""
    return sorted(n for n, size in sizes.items() if n != _CONFIG and not reason_to_stay(n, size))


def _names_code(folder: Path) -> bool:
    """Return whether a fetched configuration names code of the repository."""
    known = [folder / name for name in _NAMES_CODE]
    return any(path.is_file() and b'"auto_map"' in path.read_bytes() for path in known)


def _files_of(folder: Path, weights: str) -> list[str]:
    """Return the files of weights: those that an index names, or the one file itself."""
    if weights.endswith(".json"):
        return sorted(set(read_index(folder / weights).values()))
    return [weights] if weights else []


def _fetch_one(folder: Path, name: str, model: str) -> None:
    from huggingface_hub import hf_hub_download

    # The cache has one folder per revision.
    if name and Path(hf_hub_download(model, name)) != folder / name:
        raise InputError(f"{model}: changed on the hub while it was downloaded; start again")
