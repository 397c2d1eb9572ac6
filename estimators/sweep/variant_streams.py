"""Measures variants of a model layer by layer: each is a stream beside the text's own.

A variant's stream starts at the first layer that it changes, from what the text's own stream was
there, and passes every later layer while that layer is loaded. Several go together, so that a
layer is loaded once for all of them. KL comes from the last layer's output, a window at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.estimators.evidence.variants import Changing, Variant
from bitknap.estimators.measuring.kl_replay import kl_of
from bitknap.estimators.sweep.text_stream import Stream, Streamed

# Variants that pass the layers together: more take more disk, fewer load layers more often. All
# that a kill loses is what these had passed.
TOGETHER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStreams:
    """Measures variants on a text; a `VariantSweep`.

    Attributes:
        run: runs the layers.
        text: the text, before the first layer.
        plain: the unchanged model's output of each layer.
        places: the layer that each unit is in, int64 [U].
    """

    run: Streamed
    text: Stream
    plain: Sequence[Stream]
    places: np.ndarray

    def kl(self, variants: Sequence[Variant], changing: Changing) -> Iterator[tuple[int, float]]:
        """Yield each variant's number and KL in nats per token, in the order measured.

        Raises:
            ModelError: a layer's output is NaN or infinite for a variant.
            FileError: a tensor, or a file beside the journal, is missing or damaged.
            BitknapError: the disk has no room for the streams.
        """
        # Those that start late pass few layers; together with early ones they would wait.
        order = sorted(range(len(variants)), key=lambda i: self._first(variants[i]))
        for start in range(0, len(order), TOGETHER):
            chosen = order[start : start + TOGETHER]
            losses = self._together([variants[i] for i in chosen], changing)
            yield from zip(chosen, losses, strict=True)
        self.run.skeleton.drop_rest()

    def _first(self, variant: Variant) -> int:
        """Return the first layer that a variant changes."""
        return int(self.places[variant.units].min())

    def _together(self, variants: Sequence[Variant], changing: Changing) -> list[float]:
        first = [self._first(variant) for variant in variants]
        streams: dict[int, Stream] = {}
        for place in range(min(first), len(self.plain)):
            with self.run.skeleton.loaded(place):
                for number in np.flatnonzero(np.array(first) <= place).tolist():
                    before = streams.get(number) or self._before(place)
                    here = variants[number].among(self.places == place)
                    model = self.run.skeleton.model
                    with changing(model, here) if len(here.units) else contextlib.nullcontext():
                        streams[number] = self.run.advance(place, before)
        return divergences(self.run, self.plain[-1], [streams[i] for i in range(len(variants))])

    def _before(self, place: int) -> Stream:
        """Return the plain stream that enters a layer."""
        return self.plain[place - 1] if place else self.text


def divergences(run: Streamed, plain: Stream, changed: Sequence[Stream]) -> list[float]:
    """Return the mean KL of changed streams to the plain one, nats per token."""
    total, tokens = torch.zeros(len(changed), dtype=torch.float64), 0
    for number in range(len(plain.batches)):
        sums, seen = batch_divergences(run, number, plain, changed)
        total, tokens = total + sums, tokens + seen
    return [float(mean) for mean in total / tokens]


@torch.no_grad()
def batch_divergences(
    run: Streamed, number: int, plain: Stream, changed: Sequence[Stream]
) -> tuple[Tensor, int]:
    """Return the summed KL of one batch, float64 [changed], and its tokens."""
    total, tokens = torch.zeros(len(changed), dtype=torch.float64), 0
    for row in range(len(plain.batches[number])):
        here = slice(row, row + 1)
        reference = run.log_probabilities(plain, number, here)
        tokens += len(reference)
        for place, other in enumerate(changed):
            log = run.log_probabilities(other, number, here)
            total[place] += kl_of(log, reference).double().sum()
    return total, tokens
