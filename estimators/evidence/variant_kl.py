"""Measured KL of variants of a model, and the change of one layer's output.

A live model measures one variant after another; a model larger than memory measures many in one
sweep over its layers. Both keep every reading in the evidence's journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variants import Changing, Variant, VariantSweep
from bitknap.estimators.measuring.kl_replay import Losses, Replay
from bitknap.estimators.measuring.layer_output import LayerOutput
from bitknap.quantization.stacks.quantize_plan import Watched
from bitknap.quantization.stacks.row_blocks import inputs_of_blocks, layout_for

# Measures variants; yields numbers and values.
_Measure = Callable[[Evidence, Sequence[Variant]], Iterator[tuple[int, float]]]


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
    yield from _read(evidence, variants, "", _measured)


def _read(
    evidence: Evidence, variants: Sequence[Variant], kind: str, measure: _Measure
) -> Iterator[tuple[int, float]]:
    """Yield each variant's number and its measurement, from the journal if it has one."""
    check_measurable(evidence)
    keys = [f"{evidence.mark} {kind}{variant.key}" for variant in variants]
    left = []
    for number, key in enumerate(keys):
        known = evidence.readings.known(key)
        if known is None:
            left.append(number)
        else:
            yield number, float(known[0])
    for place, value in measure(evidence, [variants[number] for number in left]):
        evidence.readings.keep(keys[left[place]], value)
        yield left[place], value


def square_changes(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    """Yield each variant's number and the change that it makes to its layer's output.

    The change is the squared Frobenius norm over the whole text. Readings are kept as in `kl_of`.

    Args:
        evidence: of the model.
        variants: each with units of one layer alone.

    Raises:
        InputError: the evidence has neither a live model nor a sweep to measure with, or the
            model has no single list of decoder layers.
    """
    yield from _read(evidence, variants, "layer ", _square_changes)


def _square_changes(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    sweep: VariantSweep | None = evidence.sweep
    if sweep is None:
        assert evidence.replay is not None
        sweep = Replayed(evidence.replay)
    yield from sweep.square_changes(variants, changing_of(evidence))


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

    def square_changes(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, float]]:
        """Yield each variant's number and the squared change of its one layer's output."""
        output: LayerOutput | None = None
        for number, variant in enumerate(variants):
            layer = _first(variant, changing)
            if output is None or output.number != layer:
                output = LayerOutput(self.replay, changing.layout, layer)
            with changing(self.replay.model, variant):
                yield number, output.square_change()


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
