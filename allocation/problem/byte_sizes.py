"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import math
import re

from bitknap.errors import InputError

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BY_NAME = {name.lower(): size for name, size in _UNITS.items()}
# A number, a unit, and whether the bytes of the units alone are meant.
SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z%]+)(\s+units)?")


def parse_size(text: str) -> int:
    """Return the bytes of a text such as "12GiB" or "800MB".

    Raises:
        InputError: the text is not a size.
    """
    match = SIZE.fullmatch(text.strip().lower())
    if not match or match[2] not in BY_NAME or match[3]:
        raise InputError(f"{text!r} is not a size; examples: 12GiB, 800MB, 4096B")
    return in_bytes(match)


def in_bytes(match: re.Match[str]) -> int:
    """Return the bytes of a match of `SIZE` whose unit is in `BY_NAME`."""
    # int keeps whole bytes exact beyond 2**53.
    size = int(match[1]) if match[1].isdecimal() else float(match[1])
    return math.floor(size * BY_NAME[match[2]])


def human(count: float) -> str:
    """Return bytes as people read them: "9.40 GiB", "312 B"."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= _UNITS[name]:
            return f"{count / _UNITS[name]:.4g} {name}"
    return f"{count:.4g} B"
