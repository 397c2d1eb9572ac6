"""How much work a cost table may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of what estimators could round and measure they do.

    Attributes:
        thorough: round all rows of every matrix, and measure every group by itself, on all tokens.
        seconds: time after which no further reading of groups begins; None sets no limit.
    """

    thorough: bool = False
    seconds: float | None = None
