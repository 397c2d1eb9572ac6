"""Record what this tool wrote, and so may replace: a list in every folder, a mark in every file.

    bitknap_files.json   "format" "bitknap.files", "version", and "files": the names, relative to
                         the folder, of all other files that were written into it

A folder without that list is recognised if it is a packed checkpoint or a comparison of an earlier
version. A file is recognised by its "format" key, or by the generator that a page or a picture
names; a GGUF file by the name of its first value.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import write_whole
from bitknap.errors import InputError

MANIFEST = "bitknap_files.json"
KIND, VERSION = "bitknap.files", "1.0"
# The generator that pages name in their head, and pictures in their metadata.
GENERATOR = "Bitknap"
# The comment that reports in Markdown begin with.
REPORT_MARK = f"<!-- generator: {GENERATOR} -->"
_MARKS = (
    REPORT_MARK.encode(),
    f'<meta name="generator" content="{GENERATOR}'.encode(),
    f"<dc:title>{GENERATOR}</dc:title>".encode(),
    b"--ink: #1b1f24; --soft: #57606a",  # pages of versions that named no generator
)
_FORMER_PICTURE = b"<!-- Cost against size: "  # the same for pictures
# The first value of the GGUF files that this tool writes.
GGUF_MARK = "bitknap.plan"
# A page or a picture names its generator before this many bytes.
_HEAD = 1 << 16
# The longest header that the safetensors library allows.
_LONGEST = 100_000_000
# Files in packed checkpoints of versions without the list: Bitknap's own, and those that
# `save_pretrained` writes for configurations and tokenizers.
_PACKED = re.compile(
    r"config\.json|bitknap(-\d{5}-of-\d{5})?\.safetensors|bitknap\.safetensors\.index\.json|"
    r"bitknap_plan\.json|bitknap_source\.json|README\.md|SOURCE_README\.md|modeling_bitknap\.py|"
    r"generation_config\.json|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt|"
    r"chat_template\.(json|jinja)|(pre)?processor_config\.json"
)
_TEMPORARY = re.compile(r"(|.*/)\.([^/]+)\.tmp-[a-z0-9_]{8}", re.DOTALL)
_COMPARED = re.compile(
    r"compare\.json|times\.json|report\.html|rows\.csv|pareto\.png|plans/[\d.e+]+bpw\.json|\.work/.*"
)


def sign(folder: Path, names: Collection[str] | None = None) -> None:
    """Write the list of files into a folder; equal names give equal bytes.

    Args:
        folder: a folder that this tool writes.
        names: files that it wrote or will write there, all files if not given; a name that ends in
            "/" is a folder with everything in it.
    """
    known = set(names_in(folder) if names is None else names) - {MANIFEST}
    content = {"files": sorted(known), "format": KIND, "version": VERSION}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def names_in(folder: Path) -> list[str]:
    """Return the names of all files in a folder and its subfolders, relative to it."""
    return [name for name, _ in _entries(folder) if name == _finished(name)]


def listed(folder: Path) -> frozenset[str] | None:
    """Return the names in a folder's list; None if there is no readable list."""
    path = folder / MANIFEST
    if path.is_symlink():
        return None
    content = _json_of(path)
    if not isinstance(content, dict) or content.get("format") != KIND:
        return None
    names = content.get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return frozenset(names) | {MANIFEST}


def written_in(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder that this tool wrote, by its list or their form."""
    known = listed(folder)
    if known is not None:
        return known
    return frozenset(name for name in names_in(folder) if _was_written(folder, name, None))


def check_ours(folder: Path, copied_from: Path | None = None) -> None:
    """Raise InputError unless every file in a folder was written by this tool.

    Args:
        folder: an existing folder; an empty one is fine.
        copied_from: folder of the source model. An earlier version copied files from it, which are
            recognised as copies.
    """
    known = listed(folder)
    for entry, regular in _entries(folder):
        name = _finished(entry)
        former = known is None and _was_written(folder, name, copied_from)
        if not (regular and (former or _is_listed(name, known or ()))):
            raise InputError(
                f"{folder}: {name} was not written by Bitknap, so `overwrite` does not replace "
                "the folder; move it away or choose another name"
            )


def remove(folder: Path) -> None:
    """Delete what this tool wrote into a folder, its list last, then the folder if it is empty.

    A kill in between leaves a folder that is still recognised.

    Raises:
        InputError: something else is in the folder; both stay.
    """
    known = listed(folder) or frozenset()
    strange = ""
    for name, regular in list(_entries(folder)):
        if not (regular and _is_listed(_finished(name), known)):
            strange = strange or name
        elif name != MANIFEST:
            (folder / name).unlink(missing_ok=True)
    for path, _, _ in os.walk(folder, topdown=False):
        if Path(path) != folder and not any(os.scandir(path)):
            Path(path).rmdir()
    if strange:
        raise InputError(f"{folder / strange}: was not written by Bitknap, so it is left there")
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmdir()


def is_ours(path: Path) -> bool:
    """Return whether a file states that this tool wrote it, or is empty and so holds nothing."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if path.stat().st_size == 0:
            return True
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    if head.startswith(b"\x89PNG"):
        return f"Software\0{GENERATOR}".encode() in head
    if head.startswith(b"GGUF"):
        return GGUF_MARK.encode() in head[:64]
    if head.lstrip()[:1] == b"<":
        return any(mark in head for mark in _MARKS) or _FORMER_PICTURE in path.read_bytes()
    if head.lstrip()[:1] == b"{":
        return _ours(_first_line(path)) or _ours(_json_of(path))
    return _ours(_safetensors_header(path))


def _ours(header: Any) -> bool:
    return isinstance(header, dict) and str(header.get("format", "")).startswith("bitknap.")


def _first_line(path: Path) -> Any:
    """Return the parsed first line of a journal."""
    try:
        with path.open("rb") as file:
            return json.loads(file.readline(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return None


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _safetensors_header(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(_LONGEST, path.stat().st_size):
                return None
            return json.loads(json.loads(file.read(size))["__metadata__"]["bitknap"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the name of each non-folder below a folder, and whether it is a regular file."""

    def fail(error: OSError) -> None:
        raise error

    for path, folders, files in os.walk(folder, onerror=fail):
        at = Path(path)
        for name in sorted(files):
            yield _name(at / name, folder), stat.S_ISREG((at / name).lstat().st_mode)
        for name in sorted(folders):
            if (at / name).is_symlink():
                yield _name(at / name, folder), False


def _finished(name: str) -> str:
    """Return the final name of a temporary file of `write_whole`; keep any other name."""
    match = _TEMPORARY.fullmatch(name)
    return name if match is None else f"{match[1]}{match[2]}"


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_listed(name: str, known: Collection[str]) -> bool:
    return name in known or any(n.endswith("/") and name.startswith(n) for n in known)


def _is_packed(folder: Path) -> bool:
    config, plan = _json_of(folder / "config.json"), folder / "bitknap_plan.json"
    ours = config.get("quantization_config") if isinstance(config, dict) else None
    packed = isinstance(ours, dict) and ours.get("quant_method") == "bitknap"
    return packed and plan.is_file() and is_ours(plan)


def _is_compared(folder: Path) -> bool:
    return is_ours(folder / "compare.json") or is_ours(folder / ".work" / "journal")


def _was_written(folder: Path, name: str, copied_from: Path | None) -> bool:
    """Return whether a version that wrote no list would have written this file."""
    if _is_packed(folder):
        if name == MANIFEST or _PACKED.fullmatch(name):
            return True
        source = None if copied_from is None else copied_from / name
        return source is not None and source.is_file() and filecmp.cmp(source, folder / name, False)
    return _is_compared(folder) and _COMPARED.fullmatch(name) is not None
