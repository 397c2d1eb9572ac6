"""Give memory that was freed back to the system, so that a process takes what it uses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return freed blocks to the system; does nothing without glibc.

    glibc keeps freed blocks below 32 MiB for later, among them most activations of a batch; after
    several layers it keeps more than a layer uses.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no such library
        return None
