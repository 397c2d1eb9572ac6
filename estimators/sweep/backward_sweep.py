"""Gradients of the loss, one decoder layer at a time, from the last layer to the first.

The loss is that of labels drawn from the model. Its gradient at the last layer's output is computed
a window at a time. Then each layer runs again on its kept input with a graph for this layer alone;
the gradient at its input goes through a file to the layer before. The labels, and so the gradients
up to rounding, are those of `calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.estimators.measuring.drawn_loss import drawn_labels, loss_of
from bitknap.estimators.sweep.disk_tensors import on_disk
from bitknap.estimators.sweep.expert_recording import LayerSums, catching
from bitknap.estimators.sweep.finished_layers import Shelf
from bitknap.estimators.sweep.text_stream import Stream, Streamed
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSweep:
    """Backpropagates the loss through a model's layers; a step on the shelf is not run again.

    Attributes:
        run: runs the layers.
        shelf: the steps that are done.
        text: the text, before the first layer.
        outputs: the text's output of each layer, by place.
    """

    run: Streamed
    shelf: Shelf
    text: Stream
    outputs: Mapping[int, Stream]

    def catch(
        self,
        sums: Mapping[int, LayerSums],
        generator: torch.Generator,
        progress: Progress | None,
    ) -> None:
        """Catch the gradients of MoE layers, which the caller records.

        Args:
            sums: receive the gradients, by number of the layer.
            generator: draws the labels.
            progress: called with (what, done, of).
        """
        numbers = self.run.skeleton.numbers
        places = range(len(self.outputs) - 1, min(numbers, default=len(self.outputs)) - 1, -1)
        gradient = self._of_loss(generator)
        with catching(sums):
            for done, place in enumerate(places):
                if progress:
                    progress("gradients", done, len(places))
                here = {number: sums[number] for number in numbers.get(place, ())}
                gradient = self._before(place, gradient, here)
        self.shelf.clear(_step(min(places, default=len(self.outputs))))

    def _of_loss(self, generator: torch.Generator) -> Stream:
        """Return the gradient at the last layer's output; the generator advances by the labels."""
        end, step = self.outputs[len(self.outputs) - 1], _step(len(self.outputs))
        if self.shelf.done(step):
            generator.set_state(self.shelf.get(step)["drawn"])
            return Stream(end.batches, end.dtype, path=self.shelf.room(step), shape=end.shape)
        stream = Stream(end.batches, end.dtype, path=self.shelf.room(step))
        for number in range(len(end.batches)):
            stream.write(number, self._of_batch(number, generator))
        self.shelf.put(step, {"drawn": generator.get_state()})
        return stream

    @torch.enable_grad()
    def _of_batch(self, number: int, generator: torch.Generator) -> Tensor:
        """Return the gradient at the last layer's output for one batch."""
        end, race = self.outputs[len(self.outputs) - 1], None
        gradients = []
        for row in range(len(end.batches[number])):
            here = slice(row, row + 1)
            hidden = end[number][here].requires_grad_()
            logits = self.run.logits(hidden, end.batches[number][here])
            if race is None:  # as for the logits of the whole batch, which may not fit in memory
                shape = (len(end.batches[number]), *logits.shape)
                race = on_disk(shape, logits.dtype).exponential_(generator=generator)
            labels = drawn_labels(logits, race[row])
            gradients.append(torch.autograd.grad(loss_of(logits, labels), hidden)[0])
        return torch.cat(gradients)

    def _before(self, place: int, gradient: Stream, here: Mapping[int, LayerSums]) -> Stream:
        """Return the gradient at a layer's input, once those in it are caught.

        Args:
            place: the layer.
            gradient: gradient at its output.
            here: receive the gradients of its experts, by number of the MoE layer.
        """
        start, step = self.outputs[place - 1] if place else self.text, _step(place)
        if self.shelf.done(step):
            path = self.shelf.room(step)
            stream = Stream(start.batches, start.dtype, path=path, shape=gradient.shape)
            caught = self.shelf.get(step)
        else:
            with self.run.skeleton.loaded(place):
                room = self.shelf.room(step)
                stream = self.run.backward(place, start, gradient, room, _clearing(here))
            caught = self.shelf.put(step, _caught(here))
        self.shelf.clear(_step(place + 1))
        for number, layer in here.items():
            start_of = f"{number}/"
            layer.restore_caught(
                {n.removeprefix(start_of): x for n, x in caught.items() if n.startswith(start_of)}
            )
        return stream


def _caught(layers: Mapping[int, LayerSums]) -> dict[str, Tensor]:
    """Return all gradients, by number of the layer and name."""
    return {f"{n}/{name}": x for n, layer in layers.items() for name, x in layer.caught().items()}


def _clearing(layers: Mapping[int, LayerSums]) -> Callable[[], None]:
    """Return a function that lets gradients begin anew."""

    def clear() -> None:
        for layer in layers.values():
            layer.clear_caught()

    return clear


def _step(place: int) -> str:
    """Return the step whose stream is the gradient at a layer's input."""
    return f"gradient.{place}"
