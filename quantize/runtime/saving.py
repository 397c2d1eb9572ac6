"""`save_pretrained` of a packed model, which writes the packed checkpoint again.

transformers writes tensors and configuration into a temporary folder, as for any model. They then
move to the target folder under the names of a packed checkpoint, together with the files that
cannot be derived from tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import try_lock, write_whole
from bitknap.disk.manifest import MANIFEST, names_in, sign, written_in
from bitknap.errors import FileError, InputError
from bitknap.quantization.packed.config import STUB, packed_config, plain_config, stub
from bitknap.quantization.packed.folder import PLAN, SOURCE
from bitknap.quantization.packed.model_card import CARD, SOURCE_CARD
from bitknap.quantization.source.safetensors_header import PACKED, PLAIN, STEMS

_NEEDED = (PLAN, SOURCE)
_OPTIONAL = (CARD, SOURCE_CARD)
_STAGING = ".saving."


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The files of a packed checkpoint that belong to its streams, as bytes.

    Attributes:
        files: name to content.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def beside(cls, folder: Path, config: Any) -> Companions:
        """Read the files; missing ones are fetched if the weights came from the hub.

        Raises:
            FileError: one is missing.
        """
        contents: dict[str, bytes] = {}
        for name in (*_NEEDED, *_OPTIONAL):
            path = folder / name
            if not path.is_file() and name in _NEEDED:
                _fetch(folder, config, name)
            if path.is_file():
                contents[name] = path.read_bytes()
            elif name in _NEEDED:
                raise FileError(f"{path}: missing; it belongs to the packed weights")
        return cls(files=contents)


def _fetch(folder: Path, config: Any, name: str) -> None:
    """Download one file of a model on the hub to the folder of its weights, in whichever cache."""
    origin = str(getattr(config, "_name_or_path", ""))
    if not origin or Path(origin).is_dir():
        return
    from transformers.utils import cached_file

    # A cache's folder of a snapshot: CACHE/models--ORGANIZATION--NAME/snapshots/COMMIT.
    cached = folder.parent.name == "snapshots"
    cached_file(
        origin,
        name,
        revision=folder.name if cached else getattr(config, "_commit_hash", None),
        cache_dir=folder.parents[2] if cached else None,
        _raise_exceptions_for_missing_entries=False,
    )


def save_pretrained(model: Any, save_directory: str | Path, **kwargs: Any) -> None:
    """Write a packed model as a packed checkpoint; its streams are the bytes that were loaded.

    Args:
        model: loaded by `from_pretrained` from a packed checkpoint.
        save_directory: the folder to write to; files in it that this tool wrote are replaced, and
            its old weight files are deleted.
        kwargs: as for any transformers model, except `state_dict`, `variant`.

    Raises:
        InputError: an option that a packed checkpoint has no place for, or a folder that holds
            the weights or other files of somebody else's model.
    """
    for option in ("state_dict", "variant"):
        if kwargs.get(option):
            raise InputError(
                f"save_pretrained: {option} is not for packed models; save to a folder first"
            )
    out = Path(save_directory)
    if out.exists() and not out.is_dir():
        raise InputError(f"save_pretrained: {out} is a file; name a folder")
    ours = written_in(out) if out.is_dir() else frozenset()
    _check_weights(out, ours)
    out.mkdir(parents=True, exist_ok=True)
    quantizer = model.hf_quantizer
    with _staging(out, ours) as part:
        type(model).save_pretrained(model, part, **kwargs)
        weights = _rename(part)
        quantizer.quantization_config.weights = weights
        _write_config(part, quantizer.quantization_config.to_dict())
        for file, content in quantizer.companions.files.items():
            (part / file).write_bytes(content)
        made = sorted(part.iterdir())
        for file in made:
            _check_replaceable(out, file, ours)
        names = {file.name for file in made}
        sign(out, ours | names | {f"{part.name}/"})
        for file in made:
            file.replace(out / file.name)
        for old in _weights(out):
            if old.name not in names:
                old.unlink()
    sign(out, (ours | names).intersection(names_in(out)))


@contextlib.contextmanager
def _staging(out: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder in `out`, listed there so that a kill leaves nothing unknown.

    Those that killed runs left are deleted. If the block fails, the list is as it was.
    """
    for name in ours:
        if name.startswith(_STAGING):
            _clean_up(out / name)
    listed = out / MANIFEST
    before = listed.read_bytes() if listed.is_file() else None
    part = out / f"{_STAGING}{secrets.token_hex(4)}"
    sign(out, {*ours, f"{part.name}/"})
    part.mkdir()
    handle = os.open(part, os.O_RDONLY)
    try:
        try_lock(handle)
        yield part
    except BaseException:
        if before is None:
            listed.unlink(missing_ok=True)
        else:
            write_whole(listed, before)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def _clean_up(folder: Path) -> None:
    """Delete the temporary folder of another run unless that run still holds its lock."""
    if not folder.is_dir() or folder.is_symlink():
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _weights(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, and their indexes."""
    return sorted(file for stem in STEMS for file in folder.glob(f"{stem}*.safetensors*"))


def _check_weights(out: Path, ours: Collection[str]) -> None:
    """Raise InputError if a folder holds weights that this tool did not write."""
    for file in _weights(out):
        if file.name not in ours:
            raise InputError(
                f"save_pretrained: {file} was not written by Bitknap, and loading would find it "
                "beside the packed weights; move it away or name another folder"
            )


def _check_replaceable(out: Path, file: Path, ours: Collection[str]) -> None:
    """Raise InputError if a file would replace another one that this tool did not write."""
    there = out / file.name
    if file.name in ours or file.name == MANIFEST or not os.path.lexists(there):
        return
    if there.is_symlink() or not there.is_file() or there.read_bytes() != file.read_bytes():
        raise InputError(
            f"save_pretrained: {there} was not written by Bitknap and would be replaced; move it "
            "away or name another folder"
        )


def _rename(folder: Path) -> str:
    """Give weights their names in a packed checkpoint; return the name of the file to load."""
    for file in list(folder.glob(f"{PLAIN}*.safetensors")):
        file.rename(folder / file.name.replace(PLAIN, PACKED, 1))
    index = folder / f"{PLAIN}.safetensors.index.json"
    if not index.is_file():
        return f"{PACKED}.safetensors"
    content = json.loads(index.read_text())
    where = content["weight_map"]
    content["weight_map"] = {name: file.replace(PLAIN, PACKED, 1) for name, file in where.items()}
    index.unlink()
    write_whole(folder / f"{PACKED}.safetensors.index.json", _json(content))
    return f"{PACKED}.safetensors.index.json"


def _write_config(folder: Path, known: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    config = plain_config(json.loads(path.read_text()))
    write_whole(path, _json(packed_config(config, **known)))
    text = stub(config)
    if text is not None:
        write_whole(folder / STUB, text.encode())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
