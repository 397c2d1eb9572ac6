"""Losses of plans on texts, of a model in memory or with one decoder layer of it there at a time.

Plans that differ little from the first plan measured start at the first layer in which they differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from bitknap.allocation import ROLES, BitPlan, CostTable
from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.refinement.loop import Measure
from bitknap.api.requests import Calibration
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.of_weights import of_weights
from bitknap.estimators.evidence.variant_kl import Replayed, changing_of
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.judging.by_layer import through
from bitknap.estimators.judging.memory import way_to_measure_plans
from bitknap.estimators.measuring.kl_replay import Losses, Replay
from bitknap.estimators.measuring.language_model import loaded
from bitknap.estimators.measuring.readings import Readings, key_of
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.variant_streams import TOGETHER, VariantStreams
from bitknap.progress import Progress
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.alignment import aligned

# A text that plans are measured on: in a model in memory, or layer by layer.
Sample = Replay | VariantStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A model and the texts that plans are measured on.

    Attributes:
        evidence: how plans are rounded.
        parts: the parts of the text that plans are measured on.
        gate: text that nothing else has read.
        judged: a text of the caller's; None without one.
    """

    evidence: Evidence
    parts: tuple[Sample, ...]
    gate: Sample
    judged: Sample | None = None


def on_text(
    source: Checkpoint,
    windows: Windows,
    asked: Calibration,
    progress: Progress | None = None,
) -> tuple[Evidence, Sample]:
    """Return a model's weights, and what measures plans of it on a text.

    Args:
        source: the model.
        windows: the text.
        asked: the roles that are units, the rounding, where to compute, and the memory to use: a
            model that would take more goes one decoder layer at a time.
        progress: called with (what, done, of).

    Raises:
        InputError: no way is within the limit.
        ModelError: the model cannot be run layer by layer.
    """
    evidence = of_weights(source, asked.include, rounding=asked.method)
    tokens = windows.ids.numel()
    sample: Sample
    if way_to_measure_plans(source, evidence.layout, tokens, asked.memory, {"kl"}) == "whole":
        model = loaded(source.folder, asked.computing)
        layout = walk(model, asked.include)
        sample = Replay(model, layout, windows, cache=False)
    else:
        where = asked.computing
        sample = through(
            source, windows, asked.include, varied=True, where=where, progress=progress
        )
        layout = sample.run.skeleton.layout
    return replace(evidence, layout=layout, device=asked.on_device), sample


def together(sample: Sample) -> int:
    """Return the number of plans that are better measured together than one after another."""
    return 1 if isinstance(sample, Replay) else TOGETHER


def losses_of(evidence: Evidence, sample: Sample, plans: Sequence[BitPlan]) -> list[Losses]:
    """Return the losses of a model on a text when it is stored as each of some plans says.

    Args:
        evidence: how the model is rounded.
        sample: the text.
        plans: plans of the same units, which may be blocks of the evidence's.
    """
    if not plans:
        return []
    changing = changing_of(evidence, plans[0].units)
    sweep = Replayed(sample) if isinstance(sample, Replay) else sample
    variants = [Variant.plan(aligned(plan, changing.layout)) for plan in plans]
    found = dict(sweep.losses(variants, changing))
    return [found[number] for number in range(len(plans))]


def stored(replay: Replay, evidence: Evidence, plan: BitPlan) -> AbstractContextManager[None]:
    """Return the context in which a replayed model is stored as a plan says.

    Args:
        replay: replay of the model that the evidence describes.
        evidence: how it is rounded.
        plan: plan of its units, or of blocks of their rows.
    """
    changing = changing_of(evidence, plan.units)
    return changing(replay.model, Variant.plan(aligned(plan, changing.layout)))


def measures(loop: Loop, table: CostTable, readings: Readings) -> tuple[Measure, ...]:
    """Return functions that measure plans on each part of the text: KL per window, nats per token.

    Args:
        loop: the model and the texts.
        table: the table whose units and formats choices refer to.
        readings: earlier measurements, and where to keep new ones.
    """
    parts: list[Measure] = []
    for number, sample in enumerate(loop.parts):
        about = loop.evidence, table, readings, number
        if isinstance(sample, Replay):
            parts.append(_InMemory(*about, replay=sample))
        else:
            parts.append(_ByLayer(*about, streams=sample))
    return tuple(parts)


@dataclass
class _Part(ABC):
    """Measures plans on one part of the text.

    Attributes:
        evidence: how plans are rounded.
        table: the table whose units and formats choices refer to.
        readings: earlier measurements, and where to keep new ones.
        number: number of the part.
    """

    evidence: Evidence
    table: CostTable
    readings: Readings
    number: int

    def __call__(self, choice: Ints) -> Floats:
        key = key_of([self.number, *choice.tolist()], ())
        known = self.readings.known(key, self._windows())
        if known is None:
            plan = BitPlan.from_choice(self.table.units, self.table.formats, choice)
            known = self._measured(plan, key)
            self.readings.keep(key, known)
        return known

    @abstractmethod
    def _windows(self) -> int:
        """Return the number of windows."""

    @abstractmethod
    def _measured(self, plan: BitPlan, key: str) -> Floats:
        """Return the KL of a plan, whose key is given, on each window."""


@dataclass
class _InMemory(_Part):
    """Measures plans of a model in memory.

    Attributes:
        replay: the text.
        base: the plan that produced the layers in memory.
        name: name of the base in the replay.
    """

    replay: Replay
    base: Ints | None = None
    name: str = "none"

    def _windows(self) -> int:
        return len(self.replay.windows)

    def _measured(self, plan: BitPlan, key: str) -> Floats:
        with stored(self.replay, self.evidence, plan):
            if self.replay.base != self.name:
                # This is the first plan, or another caller has used the replay since.
                self.base, self.name = plan.choice, f"{id(self)} {key}"
                self.replay.rebase(self.name)
            return self.replay.kl_by_window(self._first(plan.choice))

    def _first(self, choice: Ints) -> int | None:
        """Return the first MoE layer in which a plan differs from the base; None for any."""
        units = self.table.units
        other = (choice != self.base) & (units.role == ROLES.index("routed"))
        elsewhere = (choice != self.base) & (units.role != ROLES.index("routed"))
        if elsewhere.any():
            return None
        return int(units.layer[other].min()) if other.any() else int(units.layer.max())


@dataclass
class _ByLayer(_Part):
    """Measures plans of a model of which one layer at a time is in memory.

    Attributes:
        streams: the text.
        based: the same, with the first plan as its base.
    """

    streams: VariantStreams
    based: VariantStreams | None = None

    def _windows(self) -> int:
        return len(self.streams.windows)

    def _measured(self, plan: BitPlan, key: str) -> Floats:
        changing = changing_of(self.evidence, plan.units)
        variant = Variant.plan(aligned(plan, changing.layout))
        if self.based is None:
            self.based = self.streams.rebased(variant, changing)
        return next(losses.kl for _, losses in self.based.losses([variant], changing))
