"""How a packed checkpoint is recognised, and the names of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bitknap.allocation.problem.units import ROLES, Units
from bitknap.quantization.source.checkpoint import PACKED

PLAN = "bitknap_plan.json"
SOURCE = "bitknap_source.json"
VERSION = "1.0"


def is_packed(folder: Path) -> bool:
    """Return whether `folder` holds a packed checkpoint, even a damaged one."""
    return (folder / PLAN).is_file() or any(folder.glob(f"{PACKED}*.safetensors"))


def roles_of(units: Units) -> tuple[str, ...]:
    """Return the roles beside routed experts that occur, which a walker must include."""
    return tuple(ROLES[r] for r in np.unique(units.role) if ROLES[r] != "routed")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
