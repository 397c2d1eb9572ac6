"""The protocol `Target`, and how to write your own.

A target is another runtime's format: which widths it stores, which units must share one format
(its profile), and whether the shapes of a model's matrices fit it.

    class EightBitOnly:
        name = "eight-bit-only"
        about = "One scale a row, 8 bits."
        profile = "free"
        bits = (8,)

        def fit(self, units):
            return Fit(target=self, possible=True, bits=(8,), groups=(), reason="")

* `fit` judges all units together, by their rows and columns, before any weight is read.
* A plan for the runtime is made with `--profile` of that name, and with widths from `Fit.bits`.

`ShapeRule` is a target whose rule is divisibility, which covers the runtimes in `TARGETS`
(`quantize/targets/shape_rules.py`); a new one of that kind is one row there.
`fits(units, (EightBitOnly(),))` judges your own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bitknap.allocation.problem.units import Units


class Target(Protocol):
    """Anything that says what a runtime can hold."""

    @property
    def name(self) -> str:
        """The runtime's name on the command line."""
        ...

    @property
    def about(self) -> str:
        """One sentence for lists."""
        ...

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths that the runtime stores."""
        ...

    @property
    def profile(self) -> str:
        """Name in `PROFILES` of the rule that says which units must share a format."""
        ...

    def fit(self, units: Units) -> Fit:
        """Return how a model's shapes fit.

        Args:
            units: all units that a plan covers.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model's shapes fit a target.

    Attributes:
        target: the runtime.
        possible: whether every matrix can be stored.
        bits: widths that every matrix can have.
        groups: its group sizes that divide every row.
        reason: why not, or what is lost; empty if all is well.
    """

    target: Target
    possible: bool
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    reason: str
