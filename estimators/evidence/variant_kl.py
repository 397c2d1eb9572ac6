"""Measured KL of variants of a model.

A live model measures one variant after another; a model larger than memory measures many in one
sweep over its layers. Both keep every reading in the evidence's journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variants import Changing, Variant
from bitknap.estimators.measuring.kl_replay import Losses, Replay
from bitknap.quantization.stacks.quantize_plan import Watched
from bitknap.quantization.stacks.row_blocks import inputs_of_blocks, layout_for


def check_measurable(evidence: Evidence) -> None:
    """Raise InputError if the evidence has neither a live model nor a sweep to measure with."""
    if evidence.replay is None and evidence.sweep is None:
        raise InputError("measuring KL needs the live model; calibrate it in this process")


def kl_of(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    """Yield each variant's number and KL to the unchanged model, nats per token, as it is known.

    Readings that the evidence's journal has are not measured again; new ones are kept there.

    Raises:
        InputError: the evidence has neither a live model nor a sweep to measure with.
    """
    check_measurable(evidence)
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


def changing_of(evidence: Evidence, units: Units | None = None) -> Changing:
    """Return how the model of evidence becomes a variant.

    Args:
        evidence: what a calibration pass recorded.
        units: the units that variants number, where they are blocks of the evidence's.
    """
    cut = evidence.units if units is None else units
    layout = layout_for(cut, evidence.layout)
    inputs: Watched = evidence.inputs
    if layout is not evidence.layout:
        inputs = inputs_of_blocks(layout.units, evidence.units, evidence.inputs)
    return Changing(layout=layout, rounding=evidence.rounding, inputs=inputs)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Measures variants of a model in memory; a `VariantSweep`.

    Attributes:
        replay: the model on a text.
    """

    replay: Replay

    def losses(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, Losses]]:
        """Yield each variant's number and losses to the unchanged model."""
        for number, variant in enumerate(variants):
            with changing(self.replay.model, variant):
                yield number, self.replay.measure(_first(variant, changing))


def _first(variant: Variant, changing: Changing) -> int:
    """Return the first MoE layer that a variant changes."""
    return int(changing.layout.units.layer[variant.units].min())


def _measured(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    changing = changing_of(evidence)
    if evidence.sweep is not None:
        for number, losses in evidence.sweep.losses(variants, changing):
            yield number, float(losses.kl.mean())
        return
    replay = evidence.replay
    assert replay is not None
    for number, variant in enumerate(variants):
        with changing(replay.model, variant):
            yield number, replay.kl(_first(variant, changing))
