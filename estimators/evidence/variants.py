"""Variants of a model, each with some units in other formats, and their measured KL.

A live model measures one variant after another; a model larger than memory measures many in one
sweep over its layers. Both keep every reading in the journal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.estimators.measuring.readings import key_of
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks

if TYPE_CHECKING:
    from bitknap.estimators.evidence.evidence import Evidence


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


def kl_of(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    """Yield each variant's number and KL to the unchanged model, nats per token, as it is known.

    Readings that the evidence's journal has are not measured again; new ones are kept there.

    Raises:
        InputError: the evidence has neither a live model nor a sweep to measure with.
    """
    left = []
    for number, variant in enumerate(variants):
        known = evidence.readings.known(f"{evidence.mark} {variant.key}")
        if known is None:
            left.append(number)
        else:
            yield number, float(known[0])
    for place, value in _measured(evidence, [variants[number] for number in left]):
        evidence.readings.keep(f"{evidence.mark} {variants[left[place]].key}", value)
        yield left[place], value


def _measured(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    changing = partial(_changed, evidence)
    if evidence.sweep is not None:
        yield from evidence.sweep.kl(variants, changing)
        return
    replay = evidence.replay
    for number, variant in enumerate(variants):
        if replay is None:
            raise InputError("measuring KL needs the live model; calibrate it in this process")
        with changing(replay.model, variant):
            yield number, replay.kl(int(evidence.units.layer[variant.units].min()))


@contextlib.contextmanager
def _changed(evidence: Evidence, model: Any, variant: Variant) -> Iterator[None]:
    """Change the model's weights to the variant's while the block runs."""
    chosen = np.full(len(evidence.units), -1, dtype=np.int64)
    chosen[variant.units] = variant.choice
    with contextlib.ExitStack() as blocks:
        for stack in stacks(evidence.units):
            for choice in np.unique(chosen[stack]).tolist():
                if choice < 0 or variant.formats[choice].kind == "keep":
                    continue
                run = stack[chosen[stack] == choice]
                rounded = partial(evidence.round_trip, run, format=variant.formats[choice])
                blocks.enter_context(replaced(model, evidence.layout, run, rounded))
        yield
