"""Measured KL of variants of a model.

A live model measures one variant after another; a model larger than memory measures many in one
sweep over its layers. Both keep every reading in the evidence's journal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variants import Variant
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks


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


def _measured(evidence: Evidence, variants: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    changing = partial(_changed, evidence)
    if evidence.sweep is not None:
        yield from evidence.sweep.kl(variants, changing)
        return
    replay = evidence.replay
    assert replay is not None
    for number, variant in enumerate(variants):
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
