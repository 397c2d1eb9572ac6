"""`calibrate` for a model larger than memory: one decoder layer resident at a time.

Two sweeps over the layers. The first records, the second measures gains: for each MoE layer, a
stream that noise in this layer changed is carried along, so that each layer is loaded once for all
streams; the unchanged one runs again only where its outputs were not kept. Gradients take a sweep
in between, from the last layer to the first (`BackwardSweep`). The arithmetic, the noise and the
labels are those of `calibrate`. It provides no live model; `VariantStreams` measures groups and
plans in further sweeps.

While it runs, the disk holds the residual stream of all tokens in float32, once per MoE layer and
twice more, and the embeddings and head; where variants are measured or gradients are recorded, also
once per decoder layer.
Those, whole moments and traces stay on disk as long as the evidence exists. With a journal these
files have names, and every layer that a stream has passed is kept, so that a killed run can
resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS, Again
from bitknap.estimators.measuring.noise_floor import LEAST, ROUNDINGS, floor_of
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.measuring.windows import Windows, part_of
from bitknap.estimators.measuring.windows import seen as seen_by_layers
from bitknap.estimators.sweep.backward_sweep import BackwardSweep
from bitknap.estimators.sweep.expert_recording import LayerSums, check_seen, recording
from bitknap.estimators.sweep.finished_layers import Shelf
from bitknap.estimators.sweep.in_memory import PLAIN, digest_of, layer_evidence, provenance_of
from bitknap.estimators.sweep.layer_gains import GAIN_TOKENS, gain_of, noisy
from bitknap.estimators.sweep.linear_recording import LinearSums, recording_linears
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.text_stream import (
    Stream,
    Streamed,
    StreamPart,
    batch_divergences,
)
from bitknap.estimators.sweep.variant_streams import VariantStreams
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.progress import Progress

# Labels of streams: the first sweep's, the second sweep's unchanged one, and the one that differs
# from it by a few roundings.
_FIRST, _PLAIN, _ROUNDED = "first", "plain", "rounded"


def calibrate_by_layer(
    skeleton: Skeleton,
    windows: Tensor | Windows,
    recorded: Recorded = PLAIN,
    *,
    seed: int = 0,
    readings: Readings | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Run `windows` through a checkpoint layer by layer and record statistics of its experts.

    Args:
        skeleton: the model; its weights are read twice, and again by estimators.
        windows: the text; a tensor int64 [windows, length] has no special tokens.
        recorded: what to record.
        seed: random seed of the labels and of the noise that measures gains.
        readings: journal of finished layers, whose files the evidence reads; none by default.
        progress: called with (what, done, of).

    Returns:
        The evidence that `calibrate` returns, up to rounding; `replay` is None. If
        `recorded.streams` is set, `sweep` measures variants.

    Raises:
        ModelError: the model cannot be run layer by layer, or an MoE layer saw no expert call.
        FileError: a tensor, or a file beside the journal, is missing or damaged.
        BitknapError: the disk has no room for the activations.
    """
    windows = Windows.of(windows)
    text = Stream(windows.batches(BATCH_TOKENS), recorded.spilled)
    about: tuple[object, ...]
    about = (skeleton.source.fingerprint, digest_of(windows.ids), len(skeleton.layout.views), seed)
    about += (skeleton.dtype,)
    shelf = Shelf.of(readings or Readings(), *about, GAIN_TOKENS, *recorded.by_layer)
    work = _Pass(Streamed(skeleton), shelf, {})
    model, layout = skeleton.model, skeleton.layout
    generator = torch.Generator().manual_seed(seed)
    with recording(model, layout, **recorded.of_experts(windows.ids.numel())) as sums:
        with recording_linears(model, layout, full=recorded.full) as linears:
            work.record(text, sums, linears, progress, keep=recorded.keeps_streams)
        check_seen(sums)
        if recorded.differentiates:
            work.backward(text).catch(sums, generator, progress)
    losses, floor = work.losses(text, sums, generator, progress)
    if not recorded.streams:
        work.forget()
    skeleton.drop_rest()
    return Evidence(
        layout=layout,
        layers={n: layer_evidence(x, gain_of(losses[n], x, floor)) for n, x in sums.items()},
        linears={unit: seen.evidence() for unit, seen in linears.items()},
        weights=skeleton.weights,
        replay=None,
        provenance=provenance_of(windows.ids, seed, floor),
        floor=floor,
        traces={number: kept for number, x in sums.items() if (kept := x.trace())},
        sweep=work.sweep(text) if recorded.streams else None,
        experts=skeleton.experts,
        span=seen_by_layers(model, windows.shape[1]),
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Runs streams through a model's layers; a step that is on the shelf is not run again.

    Attributes:
        run: runs the layers.
        shelf: the steps that are done.
        outputs: the text's output of each layer, by place, where it is kept.
    """

    run: Streamed
    shelf: Shelf
    outputs: dict[int, Stream]

    def record(
        self,
        text: Stream,
        sums: Mapping[int, LayerSums],
        linears: Mapping[int, LinearSums],
        progress: Progress | None,
        *,
        keep: bool,
    ) -> None:
        """Run the text through all layers, which the caller records.

        Args:
            text: the text.
            sums: receive the statistics of MoE layers, by number.
            linears: receive those of other projections, by unit.
            progress: called with (what, done, of).
            keep: keep the output of every layer in `outputs`.
        """
        skeleton, stream = self.run.skeleton, text
        for place in range(len(skeleton.layers)):
            if progress:
                progress("calibrate", place, len(skeleton.layers))
            watched: dict[str, LayerSums | LinearSums] = {
                f"layer {number}": sums[number] for number in skeleton.numbers.get(place, ())
            }
            for unit, seen in linears.items():
                if skeleton.holds(place, skeleton.layout.views[unit].tensor):
                    watched[f"linear {unit}"] = seen
            with self._loaded(place, [_FIRST]):
                sums_here = partial(_finished, watched)
                stream, finished = self._advanced(
                    _FIRST, place, stream, sums_here, _clearing(watched), keep=keep
                )
            if keep:
                self.outputs[place] = stream
            for name, watcher in watched.items():
                start = f"{name}/"
                parts = {
                    n.removeprefix(start): x for n, x in finished.items() if n.startswith(start)
                }
                watcher.restore(parts)
        if not keep:
            self._end([_FIRST])

    def backward(self, text: Stream) -> BackwardSweep:
        """Return what differentiates the loss, from the outputs that were kept."""
        return BackwardSweep(run=self.run, shelf=self.shelf, text=text, outputs=self.outputs)

    def forget(self) -> None:
        """Delete the outputs that were kept."""
        for place in self.outputs:
            self.shelf.clear(_step(_FIRST, place))
        self.outputs.clear()

    def sweep(self, text: Stream) -> VariantStreams:
        """Return what measures variants from the outputs that were kept."""
        end = self.outputs[len(self.run.skeleton.layers) - 1]
        return VariantStreams(run=self.run, text=text, end=end, outputs=self.outputs)

    def losses(
        self,
        text: Stream,
        sums: Mapping[int, LayerSums],
        generator: torch.Generator,
        progress: Progress | None,
    ) -> tuple[dict[int, float], float]:
        """Return the KL that noise at each MoE layer's expert output causes, nats per token.

        Beside it, the KL below which readings are noise of arithmetic.
        """
        skeleton, (plain, outputs) = self.run.skeleton, self._to_measure(text)
        changed: dict[str, Stream] = {}
        for place in range(len(skeleton.layers)):
            if progress:
                progress("gains", place, len(skeleton.layers))
            here = {_noise(number): sums[number] for number in skeleton.numbers.get(place, ())}
            first = next(iter(here.values())) if here and _ROUNDED not in changed else None
            known = outputs.get(place)
            steps = [*changed, *here, *([_ROUNDED] if first else []), *([] if known else [_PLAIN])]
            with self._loaded(place, steps):
                for label, other in changed.items():
                    changed[label], _ = self._advanced(label, place, other)
                if first:
                    fresh = torch.Generator().manual_seed(generator.initial_seed())
                    with noisy(skeleton.model, first, fresh, ROUNDINGS):
                        changed[_ROUNDED], _ = self._advanced(
                            _ROUNDED, place, plain, again=_redrawing(fresh)
                        )
                for label, watched in here.items():
                    with noisy(skeleton.model, watched, generator):
                        changed[label], finished = self._advanced(
                            label,
                            place,
                            plain,
                            lambda: {"drawn": generator.get_state()},
                            _redrawing(generator),
                        )
                    generator.set_state(finished["drawn"])
                plain = known or self._advanced(_PLAIN, place, plain)[0]
        found = self._divergences(plain, changed)
        self._end([*changed, _PLAIN])
        floor = floor_of(found.pop(_ROUNDED).numpy()) if changed else LEAST
        return {number: float(found[_noise(number)].mean()) for number in sums}, floor

    def _to_measure(self, text: Stream) -> tuple[Stream, Mapping[int, Stream]]:
        """Return the part of a text that gains are measured on, and what is kept of it."""
        part = part_of(sum(map(len, text.batches)), text.batches[0].shape[1], GAIN_TOKENS)
        if part is None:
            return text, self.outputs
        kept = {place: StreamPart(stream, part) for place, stream in self.outputs.items()}
        return StreamPart(text, part), kept

    def _loaded(
        self, place: int, labels: Collection[str]
    ) -> contextlib.AbstractContextManager[None]:
        """Load the weights of a layer while the block runs, unless all its steps are done."""
        if all(self.shelf.done(_step(label, place)) for label in labels):
            return contextlib.nullcontext()
        return self.run.skeleton.loaded(place)

    def _advanced(
        self,
        label: str,
        place: int,
        start: Stream,
        also: Callable[[], Mapping[str, Tensor]] = dict,
        again: Again = None,
        *,
        keep: bool = False,
    ) -> tuple[Stream, Mapping[str, Tensor]]:
        """Return a layer's output for a stream, and the tensors kept with it.

        Args:
            label: label of the stream.
            place: the layer, which is loaded unless the step is done.
            start: output of the layer before.
            also: returns further tensors to keep, once the layer has run.
            again: called before the layer runs once more, with fewer windows at a time.
            keep: keep the stream that came in, too.
        """
        step, after = _step(label, place), self.run.after
        if self.shelf.done(step):
            finished = self.shelf.get(step)
            path, shape = self.shelf.room(step), finished["shape"].tolist()
            stream = Stream(start.batches, start.dtype, path=path, shape=shape)
            # -1 stands for none: see `after`.
            after[place] = None if int(finished["after"]) < 0 else int(finished["after"])
        else:
            stream = self.run.advance(place, start, self.shelf.room(step), again)
            nones = after[place]
            about = {
                "shape": torch.tensor(stream.shape),
                "after": torch.tensor(-1 if nones is None else nones),
            }
            finished = self.shelf.put(step, about | dict(also()))
        if not keep:
            self.shelf.clear(_step(label, place - 1))
        return stream, finished

    def _divergences(self, plain: Stream, changed: Mapping[str, Stream]) -> dict[str, Tensor]:
        """Return the KL of changed streams after the last layer, float64 [tokens] each."""
        if not changed:
            return {}
        parts = []
        for number in range(len(plain.batches)):
            step = f"kl.{number}"
            if self.shelf.done(step):
                finished = self.shelf.get(step)
            else:
                kl = batch_divergences(self.run, number, plain, list(changed.values()))
                finished = self.shelf.put(step, {"kl": kl})
            parts.append(finished["kl"])
        return dict(zip(changed, torch.cat(parts, dim=1), strict=True))

    def _end(self, labels: Collection[str]) -> None:
        """Delete streams that have passed the last layer and been read."""
        for label in labels:
            self.shelf.clear(_step(label, len(self.run.skeleton.layers) - 1))


def _finished(watched: Mapping[str, LayerSums | LinearSums]) -> dict[str, Tensor]:
    """Return all sums, by owner and name."""
    return {
        f"{owner}/{name}": tensor
        for owner, sums in watched.items()
        for name, tensor in sums.finished().items()
    }


def _clearing(watched: Mapping[str, LayerSums | LinearSums]) -> Callable[[], None]:
    """Return a function that lets sums begin anew."""

    def clear() -> None:
        for sums in watched.values():
            sums.clear()

    return clear


def _redrawing(generator: torch.Generator) -> Callable[[], object]:
    """Return a function that lets a generator draw once more what it draws from now on."""
    return partial(generator.set_state, generator.get_state())


def _noise(number: int) -> str:
    """Return the label of the stream that noise in a layer changed."""
    return f"noise{number}"


def _step(label: str, place: int) -> str:
    return f"{label}.{place}"
