"""What lies below a folder, so that two moments can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below `folder` with its kind and, for files, SHA-256 of the content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
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
