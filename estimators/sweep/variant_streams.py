"""Measures variants of a model layer by layer: each is a stream beside the text's own.

A variant's stream starts at the first layer that it changes, from what the text's own stream was
there, and passes every later layer while that layer is loaded. Variants that are alike up to a
layer are one stream up to there. Several go together, so that a layer is loaded once for all of
them. Losses come from the last layer's output, a window at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Longs
from bitknap.estimators.evidence.variants import Changing, Variant
from bitknap.estimators.measuring.kl_replay import Losses
from bitknap.estimators.sweep.text_stream import Passed, Stream, Streamed, losses_between

# Variants that pass the layers together: more take more disk, fewer load layers more often. All
# that a kill loses is what these had passed.
TOGETHER = 16

# The stream of variants that have changed nothing yet.
_UNCHANGED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStreams:
    """Measures variants on a text; a `VariantSweep`.

    Attributes:
        run: runs the layers.
        text: the text, before the first layer.
        outputs: the unchanged model's output of each layer at which variants may start, and of the
            last.
    """

    run: Streamed
    text: Stream
    outputs: Mapping[int, Stream]

    @property
    def reference(self) -> Passed:
        """The text in the unchanged model."""
        return Passed(run=self.run, end=self.outputs[len(self.run.skeleton.layers) - 1])

    def losses(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, Losses]]:
        """Yield each variant's number and losses to the unchanged model, in the order measured.

        Raises:
            ModelError: a layer's output is NaN or infinite for a variant.
            FileError: a tensor, or a file beside the journal, is missing or damaged.
            BitknapError: the disk has no room for the streams.
        """
        places = places_of(self.run, changing)
        # Those that start late pass few layers; together with early ones they would wait.
        first = [first_of(variant, places) for variant in variants]
        order = sorted(range(len(variants)), key=lambda number: first[number])
        for start in range(0, len(order), TOGETHER):
            chosen = order[start : start + TOGETHER]
            ends = self._together([variants[i] for i in chosen], changing, places)
            yield from zip(chosen, losses_between(self.reference, ends), strict=True)
        self.run.skeleton.drop_rest()

    def _together(
        self, variants: Sequence[Variant], changing: Changing, places: Longs
    ) -> list[Passed]:
        """Return the text in each variant."""
        begin = self._begin(min(first_of(variant, places) for variant in variants))
        branches = _Branches(len(variants))
        streams = {_UNCHANGED: self.outputs[begin - 1] if begin else self.text}
        for place in range(begin, len(self.run.skeleton.layers)):
            parts = [variant.among(places == place) for variant in variants]
            before, streams = streams, {}
            with self.run.skeleton.loaded(place):
                for branch, (origin, part) in branches.at(parts).items():
                    if branch == _UNCHANGED and place in self.outputs:
                        streams[branch] = self.outputs[place]
                        continue
                    with _changed(self.run, part, changing):
                        streams[branch] = self.run.advance(place, before[origin])
        return [Passed(run=self.run, end=streams[branch]) for branch in branches.of]

    def _begin(self, first: int) -> int:
        """Return the last layer, up to `first`, whose input is kept."""
        return next((place for place in range(first, 0, -1) if place - 1 in self.outputs), 0)


class _Branches:
    """Which stream each variant is at present: those that are alike so far are one.

    Args:
        count: number of variants.

    Attributes:
        of: number of each variant's stream; 0 for those that have changed nothing.
    """

    def __init__(self, count: int) -> None:
        self.of = [_UNCHANGED] * count
        self._made = 0

    def at(self, parts: Sequence[Variant]) -> dict[int, tuple[int, Variant]]:
        """Return the streams after a layer: where each comes from, and what it changes there.

        Args:
            parts: what each variant changes in the layer.
        """
        numbers: dict[tuple[int, bytes], int] = {}
        streams: dict[int, tuple[int, Variant]] = {}
        for at, part in enumerate(parts):
            origin = self.of[at]
            key = origin, _change(part)
            if key not in numbers:
                alike = origin == _UNCHANGED and not len(part.units)
                self._made += not alike
                numbers[key] = _UNCHANGED if alike else self._made
                streams[numbers[key]] = origin, part
            self.of[at] = numbers[key]
        return streams


def _change(part: Variant) -> bytes:
    """Return a key of units and their formats."""
    names = " ".join(part.formats[choice].name for choice in part.choice.tolist())
    return part.units.tobytes() + names.encode()


def _changed(
    run: Streamed, part: Variant, changing: Changing
) -> contextlib.AbstractContextManager[None]:
    return changing(run.skeleton.model, part) if len(part.units) else contextlib.nullcontext()


def places_of(run: Streamed, changing: Changing) -> Longs:
    """Return the decoder layer that each unit is in, int64 [U]."""
    return np.array([run.skeleton.place_of(view.tensor) for view in changing.layout.views])


def first_of(variant: Variant, places: Longs) -> int:
    """Return the first layer that a variant changes; the last one if it changes nothing."""
    return int(places[variant.units].min(initial=int(places.max())))
