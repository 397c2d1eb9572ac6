"""Variants of a model, each with some units in other formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.format import Format
from bitknap.estimators.measuring.readings import key_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
    """Units in other formats; all other weights stay as they are.

    Attributes:
        units: the units, int64 [n].
        choice: the number of each one's format, int64 [n].
        formats: the formats; a kept precision changes nothing.
        key: its name in a journal, after the text's.
    """

    units: Longs
    choice: Longs
    formats: tuple[Format, ...]
    key: str

    @classmethod
    def group(cls, run: np.ndarray, format: Format) -> Variant:
        """Return the variant with some units in one format."""
        units = np.asarray(run, dtype=np.int64)
        key = key_of(run, [format])
        return cls(units=units, choice=np.zeros_like(units), formats=(format,), key=key)

    @classmethod
    def plan(cls, plan: BitPlan) -> Variant:
        """Return the variant that a plan over all units describes."""
        return cls(
            units=np.arange(len(plan.units)),
            choice=np.asarray(plan.choice, dtype=np.int64),
            formats=tuple(plan.formats),
            key=f"plan {key_of(plan.choice, plan.formats)}",
        )

    def among(self, kept: np.ndarray) -> Variant:
        """Return the part of the variant that changes units of a set.

        Args:
            kept: whether each unit of the model is in the set, bool [U].
        """
        here = kept[self.units]
        return replace(self, units=self.units[here], choice=self.choice[here])


# Enters a block in which a model's weights are those of a variant.
Changing = Callable[[Any, Variant], AbstractContextManager[None]]


class VariantSweep(Protocol):
    """Measures variants of a model that is not in memory."""

    def kl(self, variants: Sequence[Variant], changing: Changing) -> Iterator[tuple[int, float]]:
        """Yield each variant's number and KL in nats per token, in the order measured."""
        ...
