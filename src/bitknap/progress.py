"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with (what, done, of); the command line draws a bar, everybody else may pass None.
Progress = Callable[[str, int, int], None]
