"""Measures variants of a model layer by layer: each is a stream beside the text's own.

A variant's stream starts at the first layer that it changes, from what the text's own stream was
there, and passes every later layer while that layer is loaded. Where variants differ little from
one of them, that one is the base, and they start where they differ from it. Variants that are
alike up to a layer are one stream up to there. Several go together, so that a layer is loaded once
for all of them. Losses come from the last layer's output, a window at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitknap.estimators.evidence.variants import UNCHANGED, Changing, Variant
from bitknap.estimators.measuring.kl_replay import Losses
from bitknap.estimators.measuring.windows import Part, Windows
from bitknap.estimators.sweep.text_stream import (
    Passed,
    Stream,
    Streamed,
    StreamPart,
    losses_between,
    square_distance,
)

# Variants that pass the layers together: more take more disk, fewer load layers more often. All
# that a kill loses is what these had passed.
TOGETHER = 16

# The stream of variants that are the base so far.
_BASE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStreams:
    """Measures variants on a text; a `VariantSweep`.

    Attributes:
        run: runs the layers.
        text: the text, before the first layer.
        end: the unchanged model's output of the last layer.
        outputs: the base's output of each layer at which variants may start, by place.
        base: the variant that `outputs` are of.
    """

    run: Streamed
    text: Stream
    end: Stream
    outputs: Mapping[int, Stream]
    base: Variant = UNCHANGED

    @property
    def text_windows(self) -> Windows:
        """The text with its special tokens."""
        parts = self.text.batches
        return Windows(ids=torch.cat([part.ids for part in parts]), prefix=parts[0].prefix)

    def on_part(self, part: Part) -> VariantStreams:
        """Return what measures on a part of the text, from what is kept of all of it.

        What a decoder layer returns for the first tokens of a window does not depend on later ones.
        """
        outputs = {place: StreamPart(whole, part) for place, whole in self.outputs.items()}
        end = StreamPart(self.end, part)
        return replace(self, text=StreamPart(self.text, part), end=end, outputs=outputs)

    @property
    def reference(self) -> Passed:
        """The text in the unchanged model."""
        return Passed(run=self.run, end=self.end)

    @property
    def windows(self) -> Tensor:
        """Token ids, int64 [windows, length]."""
        return torch.cat([batch.ids for batch in self.text.batches])

    def losses(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, Losses]]:
        """Yield each variant's number and losses to the unchanged model, in the order measured.

        Raises:
            ModelError: a layer's output is NaN or infinite for a variant.
            FileError: a tensor, or a file beside the journal, is missing or damaged.
            BitknapError: the disk has no room for the streams.
        """
        parts = [self._parts(variant, changing) for variant in variants]
        based = self._parts(self.base, changing)
        first = [_differing(one, based) for one in parts]
        # Those that start late pass few layers; together with early ones they would wait.
        order = sorted(range(len(variants)), key=lambda number: first[number])
        for start in range(0, len(order), TOGETHER):
            chosen = order[start : start + TOGETHER]
            begin = self._begin(first[chosen[0]])
            ends = self._together([parts[number] for number in chosen], based, begin, changing)
            yield from zip(chosen, losses_between(self.reference, ends), strict=True)
        self.run.skeleton.drop_rest()

    def rebased(self, base: Variant, changing: Changing) -> VariantStreams:
        """Return the same, for variants that differ little from another base.

        The base's output of every layer is kept; a variant starts at the first layer in which it
        differs.
        """
        outputs: dict[int, Stream] = {}
        stream = self.text
        for place, part in enumerate(self._parts(base, changing)):
            with self.run.skeleton.loaded(place), _changed(self.run, part, changing):
                stream = outputs[place] = self.run.advance(place, stream)
        return replace(self, outputs=outputs, base=base)

    def square_changes(
        self, variants: Sequence[Variant], changing: Changing
    ) -> Iterator[tuple[int, float]]:
        """Yield each variant's number and the squared change of its one layer's output.

        The outputs of the layers and of those before them must be kept.

        Raises:
            ModelError: a layer's output is NaN or infinite for a variant.
            FileError: a tensor, or a file beside the journal, is missing or damaged.
            BitknapError: the disk has no room for a layer's output.
        """
        plain = self._parts(UNCHANGED, changing)
        first = np.array([_differing(self._parts(one, changing), plain) for one in variants])
        for place in np.unique(first).tolist():
            before = self.outputs[place - 1] if place else self.text
            with self.run.skeleton.loaded(place):
                for number in np.flatnonzero(first == place).tolist():
                    with _changed(self.run, variants[number], changing):
                        output = self.run.advance(place, before)
                    yield number, square_distance(output, self.outputs[place])

    def _together(
        self,
        variants: Sequence[Sequence[Variant]],
        base: Sequence[Variant],
        begin: int,
        changing: Changing,
    ) -> list[Passed]:
        """Return the text in each variant.

        Args:
            variants: what each variant changes in each layer.
            base: what the base changes in each layer.
            begin: the layer to start at.
            changing: how a variant is made.
        """
        branches = _Branches(len(variants))
        streams = {_BASE: self.outputs[begin - 1] if begin else self.text}
        for place in range(begin, len(base)):
            before, streams = streams, {}
            parts = [variant[place] for variant in variants]
            with self.run.skeleton.loaded(place):
                for branch, (origin, part) in branches.at(parts, base[place]).items():
                    if branch == _BASE and place in self.outputs:
                        streams[branch] = self.outputs[place]
                        continue
                    with _changed(self.run, part, changing):
                        streams[branch] = self.run.advance(place, before[origin])
        return [Passed(run=self.run, end=streams[branch]) for branch in branches.of]

    def _parts(self, variant: Variant, changing: Changing) -> list[Variant]:
        """Return what a variant changes in each layer."""
        skeleton = self.run.skeleton
        place = np.array([skeleton.place_of(view.tensor) for view in changing.layout.views])
        return [variant.among(place == at) for at in range(len(skeleton.layers))]

    def _begin(self, first: int) -> int:
        """Return the last layer, up to `first`, whose input is kept."""
        return next((place for place in range(first, 0, -1) if place - 1 in self.outputs), 0)


class _Branches:
    """Which stream each variant is at present: those that are alike so far are one.

    Args:
        count: number of variants.

    Attributes:
        of: number of each variant's stream; 0 for those that are the base so far.
    """

    def __init__(self, count: int) -> None:
        self.of = [_BASE] * count
        self._made = 0

    def at(self, parts: Sequence[Variant], base: Variant) -> dict[int, tuple[int, Variant]]:
        """Return the streams after a layer: where each comes from, and what it changes there.

        Args:
            parts: what each variant changes in the layer.
            base: what the base changes there.
        """
        numbers = {(_BASE, _change(base)): _BASE}
        streams: dict[int, tuple[int, Variant]] = {}
        for at, part in enumerate(parts):
            key = self.of[at], _change(part)
            if key not in numbers:
                self._made += 1
                numbers[key] = self._made
            streams[numbers[key]] = self.of[at], part
            self.of[at] = numbers[key]
        return streams


def _differing(parts: Sequence[Variant], base: Sequence[Variant]) -> int:
    """Return the first layer in which a variant differs from the base; the last if in none."""
    pairs = enumerate(zip(parts, base, strict=True))
    differing = (place for place, (part, of_base) in pairs if _change(part) != _change(of_base))
    return next(differing, len(base) - 1)


def _change(part: Variant) -> bytes:
    """Return a key of units and their formats."""
    names = " ".join(part.formats[choice].name for choice in part.choice.tolist())
    return part.units.tobytes() + names.encode()


def _changed(
    run: Streamed, part: Variant, changing: Changing
) -> contextlib.AbstractContextManager[None]:
    return changing(run.skeleton.model, part) if len(part.units) else contextlib.nullcontext()
