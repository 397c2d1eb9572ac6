"""The models that come with Bitknap; nothing here needs torch."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitknap.names import check_name

PREFIX = "reference:"
_PACKAGE = "bitknap.benchmarks.reference"


def bundled() -> dict[str, Path]:
    """Return the folder of each bundled model by its name, "reference:" included."""
    root = Path(str(files(_PACKAGE)))
    folders = sorted(path.parent for path in root.glob("*/config.json"))
    return {PREFIX + folder.name: folder for folder in folders}


def folder_of(name: str) -> Path:
    """Return the folder of a bundled model.

    Args:
        name: with "reference:".

    Raises:
        InputError: no bundled model has that name.
    """
    known = bundled()
    check_name("bundled model", name, known)
    return known[name]


def parameters_of(folder: Path) -> int:
    """Return the number of weights in a folder, read from the headers."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def config_of(folder: Path) -> dict[str, Any]:
    """Return a bundled model's `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
