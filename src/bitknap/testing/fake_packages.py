"""Fake installed packages, for tests of entry points of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, name: str, points: Mapping[str, Mapping[str, str]], code: str = ""
) -> None:
    """Write a package into a folder, as an installer would.

    Args:
        folder: the folder, which the caller puts on `sys.path`.
        name: name of the distribution; its module has `_` for `-`.
        points: for each group of entry points, their names and values.
        code: source code of the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name.replace('-', '_')}.py").write_text(code, encoding="utf-8")
    about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for group, offered in points.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in offered.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
