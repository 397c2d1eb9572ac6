"""Made-up installed packages, for tests of what other packages add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, name: str, points: Mapping[str, Mapping[str, str]], code: str = ""
) -> None:
    """Write a package into a folder, as an installer would.

    Args:
        folder: to be put on `sys.path`.
        name: of the distribution; its module has `_` for `-`.
        points: by group of entry points, names and what they stand for.
        code: the module's text.
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
