"""The callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# Called with (what, done, of); the command line draws a bar, other callers may pass None.
Progress = Callable[[str, int, int], None]
