"""Which files hold a model's weights: the ones that transformers reads, in the same way.

    config.json's "transformers_weights"       a file or an index, if it names one
    model.safetensors                          one file
    model.safetensors.index.json               several; the tensors of all of them count

If two files of an index hold the same tensor, the file whose name is sorted last wins, whichever
the index names: transformers lets it overwrite the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bitknap.disk.atomic import read_json
from bitknap.errors import FileError
from bitknap.quantization.source.companions import check_content
from bitknap.quantization.source.safetensors_header import PLAIN, STEMS, TensorInfo, read_header

_FILE, _INDEX = ".safetensors", ".safetensors.index.json"


def weights_of(config: Any, there: Callable[[str], bool]) -> str:
    """Return the name of the file of weights, or of the index of several; "" if there is none.

    Args:
        config: the parsed `config.json`.
        there: function that returns whether the model has a file of a name.

    Raises:
        FileError: the configuration names a file outside the model's folder.
    """
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if isinstance(named, str) and named.endswith((_FILE, _INDEX)):
        if not is_inside(named):
            raise FileError(
                f"config.json: transformers_weights: {named!r} is not a file in the model's folder"
            )
        return named
    names = [stem + ending for stem in STEMS for ending in (_FILE, _INDEX)]
    return next(filter(there, names), "")


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return the tensors of a model, every header checked.

    Raises:
        FileError: a file is missing, truncated or inconsistent; says which.
    """
    name = weights_of(config, lambda name: (folder / name).is_file())
    if not name:
        raise FileError(_nothing(folder))
    path = folder / name
    _check_there(path, "config.json")
    return _read_shards(folder, path) if name.endswith(_INDEX) else read_header(path)


def read_index(index: Path) -> dict[str, str]:
    """Return the file of every tensor, as the index of a checkpoint in several files says.

    Raises:
        FileError: it is no index, or names files outside its folder.
    """
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise FileError(f"{index}: weight_map: missing or empty")
    for file in where.values():
        if not isinstance(file, str) or not is_inside(file):
            raise FileError(f"{index}: weight_map: {file!r} is not a file name in this folder")
    return where


def has_metadata(index: Path) -> bool:
    """Return whether an index has the entry without which transformers does not read it."""
    content = read_json(index)
    return isinstance(content, dict) and isinstance(content.get("metadata"), dict)


def joined(files: Iterable[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the tensors of all files of one checkpoint, given in the order of their names."""
    return {name: info for tensors in files for name, info in tensors.items()}


def is_inside(name: str) -> bool:
    """Return whether a relative name stays in the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    # Names are relative to the model's folder, wherever the index is.
    where = read_index(index)
    shards = sorted(set(where.values()))
    for shard in shards:
        _check_there(folder / shard, index.name)
    headers = joined(read_header(folder / shard) for shard in shards)
    for name, shard in where.items():
        if name not in headers:
            raise FileError(f"{folder / shard}: {name}: missing, though {index.name} says so")
    return headers


def _check_there(path: Path, says: str) -> None:
    check_content(path)
    if not path.is_file():
        raise FileError(f"{path}: missing; {says} names it, download it again")


def _nothing(folder: Path) -> str:
    """Return the error message for a folder without readable weights."""
    for path in sorted(folder.glob(f"*{_FILE}*")):
        check_content(path)
    plain = f"{folder}: neither {PLAIN}{_FILE} nor {PLAIN}{_INDEX}"
    others = sorted(path.name for path in folder.glob(f"*{_FILE}"))
    if len(others) > 1:
        return (
            f"{plain}, though {len(others)} other {_FILE} files; download the missing index, or "
            'name one of them in config.json, "transformers_weights"'
        )
    if others:
        return f'{plain}; name {others[0]} in config.json, "transformers_weights", or rename it'
    return f"{plain}; save the model with safetensors first"
