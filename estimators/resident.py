"""`calibrate` for a model larger than memory: one decoder layer resident at a time.

Two sweeps over the layers. The first records, the second measures gains: the stream that noise in
one MoE layer changes is carried on beside the unchanged one, so that each layer is loaded once for
all of them. That is the arithmetic of `calibrate`, and the same noise. What it cannot give are
gradients and a live model to measure plans or groups on.

On disk lie, while it runs, a float32 number for each token and number of the residual stream, once
for each MoE layer and once more; embeddings and head; and, as long as the evidence lives, what it
holds of whole moments and traces.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.estimators.calibrate import layer_evidence, provenance_of
from bitknap.estimators.evidence import Evidence, LayerTrace, LinearEvidence
from bitknap.estimators.gains import gain_of, noisy
from bitknap.estimators.recording import LayerSums, check_seen, recording, recording_linears
from bitknap.estimators.replay import BATCH_TOKENS, kl_of
from bitknap.estimators.skeleton import Skeleton
from bitknap.estimators.spill import moved
from bitknap.estimators.streamed import Stream, Streamed
from bitknap.progress import Progress
from bitknap.quantize.source import Checkpoint


def calibrate_by_layer(
    source: Checkpoint,
    windows: Tensor,
    *,
    include: Collection[str] = (),
    full: bool = False,
    traces: bool = False,
    trace_tokens: int | None = None,
    spilled: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Run `windows` through a checkpoint layer by layer and record what its experts see.

    Args:
        source: the checkpoint; its weights are read twice, and again by estimators.
        windows: token ids, int64 [windows, length].
        include: roles that are units beside the routed experts.
        full: also record whole second-moment matrices.
        traces: also keep the experts' inputs and routing, token by token.
        trace_tokens: keep only the first so many tokens; all when not given.
        spilled: what activations are kept in between layers; bfloat16 takes half the disk, and
            its rounding is measured as noise too.
        seed: of the noise that measures gains.
        progress: called with (what, done, of).

    Returns:
        What `calibrate` returns, up to rounding, but for `replay`, which is None.

    Raises:
        InputError: `trace_tokens` is below 1.
        ModelError: the model cannot be run layer by layer, or an MoE layer saw no expert call.
        FileError: a tensor is missing or damaged.
        BitknapError: the disk has no room for the activations.
    """
    if trace_tokens is not None and trace_tokens < 1:
        raise InputError(f"trace_tokens: {trace_tokens} is below 1; leave it out to keep all")
    skeleton = Skeleton(source, include)
    text = Stream(windows.split(max(1, BATCH_TOKENS // windows.shape[1])), spilled)
    linears: dict[int, LinearEvidence] = {}
    kept: dict[int, LayerTrace] = {}
    with (
        recording(
            skeleton.model,
            skeleton.layout,
            full=full,
            trace_tokens=(trace_tokens or windows.numel()) if traces else 0,
        ) as sums,
        recording_linears(skeleton.model, skeleton.layout, linears, full=full),
    ):
        _record(skeleton, text, sums, kept, progress)
    check_seen(sums)
    losses = _losses(skeleton, text, sums, seed, progress)
    skeleton.drop_rest()
    return Evidence(
        layout=skeleton.layout,
        layers={n: layer_evidence(x, gain_of(losses[n], x)) for n, x in sums.items()},
        linears=linears,
        weights=skeleton.weights,
        replay=None,
        provenance=provenance_of(windows, seed),
        traces=kept,
    )


def _record(
    skeleton: Skeleton,
    text: Stream,
    sums: dict[int, LayerSums],
    traces: dict[int, LayerTrace],
    progress: Progress | None,
) -> None:
    """Run the text through all layers, which are watched by the caller."""
    stream, run, there = text.fork(), Streamed(skeleton), skeleton.numbers
    for place in range(len(skeleton.layers)):
        if progress:
            progress("calibrate", place, len(skeleton.layers))
        with skeleton.loaded(place):
            run.advance(place, stream, stream)
        for number in there.get(place, ()):
            _settle(number, sums[number], traces)


def _settle(number: int, sums: LayerSums, traces: dict[int, LayerTrace]) -> None:
    """Move what is large of a finished layer into files."""
    if sums.input_full is not None and sums.middle_full is not None:
        sums.input_full, sums.middle_full = moved(sums.input_full), moved(sums.middle_full)
    trace = sums.trace()
    sums.kept.clear()
    if trace is not None:
        traces[number] = LayerTrace(
            hidden=moved(trace.hidden), index=trace.index, weights=trace.weights, gradient=None
        )


def _losses(
    skeleton: Skeleton,
    text: Stream,
    sums: dict[int, LayerSums],
    seed: int,
    progress: Progress | None,
) -> dict[int, float]:
    """Return the KL, nats a token, that noise at each MoE layer's expert output makes."""
    stream, run, there = text.fork(), Streamed(skeleton), skeleton.numbers
    changed: dict[int, Stream] = {}
    generator = torch.Generator().manual_seed(seed)
    for place in range(len(skeleton.layers)):
        if progress:
            progress("gains", place, len(skeleton.layers))
        with skeleton.loaded(place):
            for other in changed.values():
                run.advance(place, other, other)
            for number in there.get(place, ()):
                changed[number] = text.fork()
                with noisy(skeleton.model, sums[number], generator):
                    run.advance(place, stream, changed[number])
            run.advance(place, stream, stream)
    return _divergences(run, stream, changed)


@torch.no_grad()
def _divergences(run: Streamed, stream: Stream, changed: dict[int, Stream]) -> dict[int, float]:
    """Return the mean KL of changed streams after the last layer, one window at a time."""
    total, tokens = dict.fromkeys(changed, 0.0), 0
    for number, batch in enumerate(stream.batches):
        for row in range(len(batch)):
            here = slice(row, row + 1)
            reference = run.log_probabilities(stream, number, here)
            tokens += len(reference)
            for layer, other in changed.items():
                log = run.log_probabilities(other, number, here)
                total[layer] += float(kl_of(log, reference).double().sum())
    return {layer: kl / tokens for layer, kl in total.items()}
