"""Variants of a model, each with some units in other formats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.format import Format
from bitknap.estimators.measuring.kl_replay import Losses
from bitknap.estimators.measuring.readings import key_of
from bitknap.estimators.measuring.windows import Part, Windows
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.methods import RTN, round_trip
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stack_pieces
from bitknap.quantization.stacks.quantize_plan import Watched


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
        """Return the part of the variant that changes the units of a set.

        Args:
            kept: whether each unit of the model is in the set, bool [U].
        """
        here = kept[self.units]
        return replace(self, units=self.units[here], choice=self.choice[here])


# The variant that changes nothing.
UNCHANGED = Variant(
    units=np.zeros(0, dtype=np.int64), choice=np.zeros(0, dtype=np.int64), formats=(), key=""
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Changing:
    """How a model's weights become a variant's.

    Attributes:
        layout: the units that variants number; blocks of matrices if variants are of blocks.
        rounding: how they are rounded.
        inputs: statistics of their inputs, for rounding methods that need them.
    """

    layout: Layout
    rounding: Rounding = RTN
    inputs: Watched | None = None

    @contextlib.contextmanager
    def __call__(self, model: Any, variant: Variant) -> Iterator[None]:
        """Change the model's weights to the variant's while the block runs."""
        chosen = np.full(len(self.layout.units), -1, dtype=np.int64)
        chosen[variant.units] = variant.choice
        with contextlib.ExitStack() as blocks:
            for piece in self._pieces:
                for choice in np.unique(chosen[piece]).tolist():
                    if choice < 0 or variant.formats[choice].kind == "keep":
                        continue
                    run = piece[chosen[piece] == choice]
                    rounded = partial(self._rounded, run, variant.formats[choice])
                    blocks.enter_context(replaced(model, self.layout, run, rounded))
            yield

    @cached_property
    def _pieces(self) -> list[np.ndarray]:
        # Rounding takes a few copies of what is rounded at a time.
        return stack_pieces(self.layout.units)

    def _rounded(self, run: np.ndarray, format: Format, weights: Tensor) -> Tensor:
        """Return equally shaped units [n, rows, cols] after a round trip through a format."""
        known = self.inputs(run) if self.inputs and self.rounding.needs_inputs else None
        return round_trip(weights, format, self.rounding, known)


class VariantSweep(Protocol):
    """Measures variants of a model."""

    def losses(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, Losses]]:
        """Yield each variant's number and losses to the unchanged model, in the order measured."""
        ...

    def square_changes(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, float]]:
        """Yield each variant's number and the squared change of its one layer's output."""
        ...


class TextSweep(VariantSweep, Protocol):
    """Measures variants of a model on a text or a part of it."""

    @property
    def text_windows(self) -> Windows:
        """The text with its special tokens."""
        ...

    def on_part(self, part: Part) -> TextSweep:
        """Return what measures on a part of the text."""
        ...
