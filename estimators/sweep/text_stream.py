"""A text through a model one decoder layer at a time, each layer loaded once for all of it.

The model's own forward runs, so that every layer gets the masks and positions it always gets:
the layer before answers from a file, those before that with NaN, and the pass ends after the layer
in question. A model in which a layer needs more than the one before gave shows itself by NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.measuring.kl_replay import log_probabilities
from bitknap.estimators.measuring.windows import Windows, logits_of
from bitknap.estimators.sweep.disk_tensors import on_disk, read_back
from bitknap.estimators.sweep.weightless_model import Skeleton


class _Reached(Exception):
    """Ends a pass at the layer whose output it carries."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Stream:
    """What the last layer that ran gave for each window, in a file.

    Args:
        batches: the text.
        dtype: what it is kept in; bfloat16 takes half the disk and rounds at every layer.
        path: the file, which may be there from a former run; one without a name when not given.
        shape: shape of a window's part, if the file is there.
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

    @property
    def _whole(self) -> tuple[int, ...]:
        return (sum(map(len, self.batches)), *self.shape)

    def _split(self, whole: Tensor) -> Sequence[Tensor]:
        return list(whole.split([len(part) for part in self.batches]))


class Streamed:
    """Runs the layers of a skeleton, of which the caller has loaded the one that is run.

    Attributes:
        skeleton: the model.
        after: by layer that ran, how many Nones come after its hidden states; None if it gives
            these alone.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.after: dict[int, int | None] = {}

    @torch.no_grad()
    def advance(self, place: int, start: Stream, path: Path | None = None) -> Stream:
        """Return what a layer gives.

        Args:
            place: the layer, which is loaded.
            start: what the layer before gave; anything for the first.
            path: file that keeps what it gives; one without a name when not given.

        Raises:
            ModelError: the layer cannot be run alone.
        """
        stream = Stream(start.batches, start.dtype, path=path)
        for number, batch in enumerate(start.batches):
            stream.write(number, self._run(place, batch, start[number] if place else None))
        return stream

    @torch.no_grad()
    def log_probabilities(self, end: Stream, batch: int, rows: slice) -> Tensor:
        """Return log-probabilities of the tokens to predict, float32 [tokens, vocabulary].

        Args:
            end: what the last layer gave.
            batch: which batch.
            rows: which windows of it.
        """
        with self._answering(len(self.skeleton.layers), end[batch][rows]):
            return log_probabilities(self.skeleton.model, end.batches[batch][rows])

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
                place, "gives no finite numbers: it reads more than the layer before"
            )
        return hidden

    @contextlib.contextmanager
    def _answering(self, place: int, before: Tensor | None) -> Iterator[None]:
        """Let layers before `place` answer at once: the last of them with `before`."""
        skipped = list(self.skeleton.layers)[:place]
        for number, layer in enumerate(skipped):
            answer = before
            if before is not None and number < place - 1:
                answer = before.new_full((), torch.nan).expand(before.shape)
            after = self.after[number]
            whole = answer if after is None else (answer, *[None] * after)
            layer.forward = lambda *args, _answer=whole, **kwargs: _answer
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def _refused(self, place: int, why: str) -> ModelError:
        kind = type(self.skeleton.layers[place]).__name__
        return ModelError(
            f"decoder layer {place} ({kind}) {why}, so the model cannot be calibrated layer by "
            "layer; raise `max_memory`, or use `estimator=DataFree()`"
        )
