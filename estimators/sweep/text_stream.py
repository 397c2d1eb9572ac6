"""Runs a text through a model one decoder layer at a time, so that each layer is loaded once.

The model's own forward runs, so that every layer gets the masks and positions it always gets:
the previous layer returns its output from a file, earlier ones return NaN, and the pass ends after
the current layer. If a layer reads more than the previous layer's output, its own output is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.measuring.drawn_loss import rooted
from bitknap.estimators.measuring.kl_replay import Again, Losses, kl_of, losses_of
from bitknap.estimators.measuring.skipped_layers import answering
from bitknap.estimators.measuring.window_portions import portions, until_it_fits
from bitknap.estimators.measuring.windows import Part, Windows, labels_of, logits_of
from bitknap.estimators.sweep.disk_tensors import on_disk, read_back
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.progress import Progress


class _Reached(Exception):
    """Ends a pass at the layer whose output it carries."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Stream:
    """The output of the last layer that ran, for each window, in a file.

    Args:
        batches: the text.
        dtype: dtype of the file; bfloat16 takes half the disk and rounds at every layer.
        path: the file, which may exist from an earlier run; a file without a name when not given.
        shape: shape of a window's part, if the file exists.
    """

    def __init__(
        self,
        batches: Sequence[Windows],
        dtype: torch.dtype = torch.float32,
        *,
        path: Path | None = None,
        shape: Sequence[int] = (),
    ) -> None:
        self.batches, self.dtype, self.shape = batches, dtype, tuple(shape)
        self._path = path
        self._parts: Sequence[Tensor] = ()

    def __getitem__(self, batch: int) -> Tensor:
        """Return the output for a batch, float32 [windows, tokens, ...].

        Raises:
            FileError: the file is missing or damaged.
        """
        if not self._parts and self._path is not None:
            self._parts = self._split(read_back(self._path, self._whole, self.dtype))
        return self._parts[batch].float()

    def write(self, batch: int, hidden: Tensor) -> None:
        """Keep a layer's output for a batch."""
        if not self._parts:
            self.shape = tuple(hidden.shape[1:])
            self._parts = self._split(on_disk(self._whole, self.dtype, path=self._path))
        self._parts[batch].copy_(hidden)

    def some(self, batches: slice) -> Stream:
        """Return the stream of some of the batches, which shares the file."""
        part = Stream(self.batches[batches], self.dtype, shape=self.shape)
        part._parts = self._parts[batches]
        return part

    @property
    def _whole(self) -> tuple[int, ...]:
        return (sum(map(len, self.batches)), *self.shape)

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return list(whole.split([len(part) for part in self.batches]))


class StreamPart(Stream):
    """A part of the windows of another stream, which is read and not written.

    Args:
        whole: the stream of a decoder-only model.
        part: its windows, and their first tokens.
    """

    def __init__(self, whole: Stream, part: Part) -> None:
        self._of, self._length = whole, part.length
        rows, start, batches = np.array(part.rows), 0, []
        self._rows: list[tuple[int, Tensor]] = []
        for number, batch in enumerate(whole.batches):
            here = rows[(rows >= start) & (rows < start + len(batch))] - start
            start += len(batch)
            if len(here):
                batches.append(batch.part(Part(tuple(here.tolist()), part.length)))
                self._rows.append((number, torch.from_numpy(here)))
        super().__init__(batches, whole.dtype)

    def __getitem__(self, batch: int) -> Tensor:
        """Return the output for a batch, float32 [windows, tokens, ...].

        Raises:
            FileError: the file is missing or damaged.
        """
        number, rows = self._rows[batch]
        # A layer sees all tokens of a window but the last.
        return self._of[number][rows, : self._length - 1].contiguous()


class Streamed:
    """Runs the layers of a skeleton; the caller loads the layer that is run.

    Attributes:
        skeleton: the model.
        after: number of Nones after the hidden states in each layer's output, by layer; None if a
            layer returns the hidden states alone.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.after: dict[int, int | None] = {}

    @torch.no_grad()
    def advance(
        self, place: int, start: Stream, path: Path | None = None, again: Again = None
    ) -> Stream:
        """Run a layer and return its output.

        Args:
            place: the layer, which must be loaded.
            start: output of the layer before; ignored for the first layer.
            path: file for the output; a file without a name when not given.
            again: called before the layer runs once more, with fewer windows at a time.

        Raises:
            ModelError: the layer cannot be run alone.
            BitknapError: the disk has no room for the output.
            DeviceMemoryError: one window at a time does not fit into the device's memory.
        """
        stream = Stream(start.batches, start.dtype, path=path)

        def run() -> None:
            for number, batch in enumerate(start.batches):
                stream.write(number, self._output(place, start, number, batch))

        until_it_fits(self.skeleton.model, run, again)
        return stream

    def _output(self, place: int, start: Stream, number: int, batch: Windows) -> Tensor:
        """Return a layer's output for a batch, given the output of the layer before."""
        before = self._at(start, number) if place else None
        parts = [
            self._run(place, batch[rows], None if before is None else before[rows])
            for rows in portions(self.skeleton.model, batch)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def backward(
        self,
        place: int,
        start: Stream,
        gradient: Stream,
        path: Path | None = None,
        again: Again = None,
    ) -> Stream:
        """Run a layer again with a graph of its own, and return the gradient at its input.

        Args:
            place: the layer, which must be loaded.
            start: output of the layer before; ignored for the first layer, whose graph starts at
                the embeddings and for which nothing is written.
            gradient: gradient at the layer's output.
            path: file for the gradient; a file without a name when not given.
            again: called before the layer runs once more, with fewer windows at a time.

        Raises:
            DeviceMemoryError: one window at a time does not fit into the device's memory.
        """
        stream = Stream(start.batches, start.dtype, path=path)

        def run() -> None:
            for number, batch in enumerate(start.batches):
                after, parts = self._at(gradient, number), []
                before = self._at(start, number) if place else None
                for rows in portions(self.skeleton.model, batch):
                    here = None if before is None else before[rows]
                    parts.append(self._gradient(place, batch[rows], here, after[rows]))
                if place:
                    stream.write(number, torch.cat(parts))

        until_it_fits(self.skeleton.model, run, again)
        return stream

    @torch.enable_grad()
    def _gradient(self, place: int, batch: Windows, before: Tensor | None, after: Tensor) -> Tensor:
        """Return the gradient at a layer's input; for the first layer, at what was added to it.

        Args:
            place: the layer.
            batch: the windows.
            before: its input; None for the first layer, whose graph starts at the embeddings.
            after: the gradient at its output.
        """
        if before is None:
            with rooted(self.skeleton.model) as root:
                return torch.autograd.grad(self._run(0, batch, None), root, after)[0]
        start = before.detach().requires_grad_()
        # The layer gets a copy, since it may write into its input.
        output = self._run(place, batch, start.clone())
        return torch.autograd.grad(output, start, after)[0]

    def logits(self, hidden: Tensor, windows: Windows) -> Tensor:
        """Return the logits of the tokens to predict, [tokens, vocabulary].

        Args:
            hidden: output of the last layer for these windows, [windows, tokens, ...].
            windows: the windows.
        """
        model = self.skeleton.model

        def run() -> Tensor:
            portions(model, windows)  # for the message: all windows are read at once
            with self._answering(len(self.skeleton.layers), hidden.to(self.skeleton.device)):
                return logits_of(model, windows)

        return until_it_fits(model, run)

    def _at(self, stream: Stream, number: int) -> Tensor:
        """Return a batch of a stream where the model computes."""
        return stream[number].to(self.skeleton.device)

    def _run(self, place: int, batch: Windows, before: Tensor | None) -> Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output)

        handle = self.skeleton.layers[place].register_forward_hook(stop)
        try:
            with self._answering(place, before):
                logits_of(self.skeleton.model, batch)
        except _Reached as reached:
            return self._hidden(place, reached.output)
        finally:
            handle.remove()
        raise self._refused(place, "is not called by the model")

    def _hidden(self, place: int, output: Any) -> Tensor:
        """Return the one tensor in a layer's output."""
        rest = output[1:] if isinstance(output, tuple) else ()
        self.after[place] = len(rest) if isinstance(output, tuple) else None
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or any(x is not None for x in rest):
            raise self._refused(place, "gives more than one tensor")
        if not torch.isfinite(hidden).all():
            raise self._refused(
                place,
                (
                    "gives NaN or infinite numbers, so it needs more than the output of the "
                    "layer before"
                ),
            )
        return hidden

    def _answering(self, place: int, before: Tensor | None) -> AbstractContextManager[None]:
        """Let layers before `place` return without computing, the last of them with `before`."""
        answers: list[Any] = []
        for number in range(place):
            answer = before
            if before is not None and number < place - 1:
                answer = before.new_full((), torch.nan).expand(before.shape)
            after = self.after[number]
            answers.append(answer if after is None else (answer, *[None] * after))
        return answering(list(self.skeleton.layers)[:place], answers)

    def _refused(self, place: int, why: str) -> ModelError:
        kind = type(self.skeleton.layers[place]).__name__
        return ModelError(
            f"decoder layer {place} ({kind}) {why}, so the model cannot be run layer by layer; "
            f"{self.skeleton.otherwise}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passed:
    """A text that has passed all layers of a model.

    Attributes:
        run: the model.
        end: output of its last layer.
    """

    run: Streamed
    end: Stream

    def logits(self, batch: int, row: int) -> Tensor:
        """Return the logits of one window's tokens, float32 [tokens, vocabulary]."""
        here = slice(row, row + 1)
        return self.run.logits(self.end[batch][here], self.end.batches[batch][here])


def passed(
    run: Streamed, text: Stream, kept: Collection[int], progress: Progress | None = None
) -> dict[int, Stream]:
    """Return the output of some layers for a text that passes all of them.

    Args:
        run: runs the layers.
        text: the text, before the first layer.
        kept: the layers whose output is kept.
        progress: called with ("evaluate", done, of).

    Raises:
        ModelError: a layer cannot be run alone.
        FileError: a tensor of the model is missing or damaged.
        BitknapError: the disk has no room for the activations.
    """
    stream, outputs = text, {}
    for place in range(len(run.skeleton.layers)):
        if progress:
            progress("evaluate", place, len(run.skeleton.layers))
        with run.skeleton.loaded(place):
            stream = run.advance(place, stream)
        if place in kept:
            outputs[place] = stream
    return outputs


@torch.no_grad()
def square_distance(one: Stream, other: Stream) -> float:
    """Return the squared Frobenius norm of the difference of two streams of a text."""
    differences = (one[i].double() - other[i].double() for i in range(len(one.batches)))
    return sum(float(difference.square().sum()) for difference in differences)


@torch.no_grad()
def losses_between(reference: Passed, others: Sequence[Passed]) -> list[Losses]:
    """Return the losses of a text that has passed several models, computed a window at a time.

    Args:
        reference: the text in the model that KL and top-1 agreement refer to.
        others: the text in the models that are measured; the reference may be one of them.
    """
    parts = []
    for number, batch in enumerate(reference.end.batches):
        for row in range(len(batch)):
            known = reference.logits(number, row)
            log = torch.log_softmax(known, dim=-1)
            labels = labels_of(reference.run.skeleton.model, batch[row : row + 1])
            for other in others:
                mine = known if other is reference else other.logits(number, row)
                parts.append(losses_of(mine, log, labels))
    by_window = torch.cat(parts, dim=1).view(3, -1, len(others))
    return [Losses.of(by_window[:, :, at]) for at in range(len(others))]


@torch.no_grad()
def batch_divergences(
    run: Streamed, number: int, plain: Stream, changed: Sequence[Stream]
) -> Tensor:
    """Return the KL of each token of one batch, nats, float64 [changed, tokens]."""
    reference, rows = Passed(run=run, end=plain), []
    for row in range(len(plain.batches[number])):
        log = torch.log_softmax(reference.logits(number, row), dim=-1)
        others = (Passed(run=run, end=other).logits(number, row) for other in changed)
        rows.append(torch.stack([kl_of(logits, log).double().cpu() for logits in others]))
    return torch.cat(rows, dim=1)
