"""What lies below a folder, so that two moments can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def snapshot(folder: Path, times: Collection[str] = ()) -> dict[str, str]:
    """Return every path below `folder` with its kind and, for files, SHA-256 of the content.

    Args:
        folder: what is looked at.
        times: names of JSON files whose numbers are times; only the keys in them count.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file() and path.name in times:
            found[name] = f"times {_keys(json.loads(path.read_bytes()))}"
        elif path.is_file():
            found[name] = f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            found[name] = "other"
    return found


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return a line for each path that was added, removed or changed."""
    lines = [f"removed: {name}" for name in before if name not in after]
    lines += [f"added: {name}" for name in after if name not in before]
    common = before.keys() & after.keys()
    lines += [f"changed: {name}" for name in sorted(common) if before[name] != after[name]]
    return lines


def _keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _keys(other) for key, other in sorted(value.items())}
    return type(value).__name__
