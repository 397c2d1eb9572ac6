"""One calibration pass with live routing: takes model and text, returns evidence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.estimators.measuring.drawn_loss import drawn_labels, loss_of, rooted
from bitknap.estimators.measuring.expert_forward import experts_at
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS, Replay
from bitknap.estimators.measuring.language_model import settle
from bitknap.estimators.measuring.noise_floor import KEY, LEAST, ROUNDINGS, floor_of
from bitknap.estimators.measuring.window_portions import portions, until_it_fits
from bitknap.estimators.measuring.windows import Windows, logits_of, part_of, predicted
from bitknap.estimators.sweep.expert_recording import LayerSums, check_seen, recording
from bitknap.estimators.sweep.layer_gains import GAIN_TOKENS, gain_of, noisy
from bitknap.estimators.sweep.linear_recording import LinearSums, recording_linears
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.progress import Progress
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.source.devices import CPU
from bitknap.quantization.stacks.reading import read_units

# Routing and diagonal moments alone.
PLAIN = Recorded()


def calibrate(
    model: Any,
    layout: Layout,
    windows: Tensor | Windows,
    recorded: Recorded = PLAIN,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Run `windows` through `model` and record statistics of its experts.

    Traces take 4 H bytes per token and MoE layer, gradients the same again (see `LayerTrace`).

    Args:
        model: a language model in evaluation mode, decoder-only or encoder-decoder.
        layout: its units, from `walk`.
        windows: the text; a tensor int64 [windows, length] has no special tokens.
        recorded: what to record beside routing and diagonal moments.
        seed: random seed of the labels and of the noise that measures gains.
        progress: called with (what, done, of).

    Raises:
        ModelError: an MoE layer saw no expert call, or cannot be recorded.
        DeviceMemoryError: one window at a time does not fit into the device's memory.
    """
    windows = Windows.of(windows)
    batches = windows.batches(BATCH_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    settle(model, windows.ids)

    def run() -> tuple[dict[int, LayerSums], dict[int, LinearSums]]:
        drawn = generator.manual_seed(seed) if recorded.differentiates else None
        with (
            recording(model, layout, **recorded.of_experts(windows.ids.numel())) as sums,
            recording_linears(model, layout, full=recorded.full) as linears,
        ):
            _run(model, batches, drawn, progress)
        return sums, linears

    sums, linears = until_it_fits(model, run)
    check_seen(sums)
    replay = Replay(model, layout, windows)
    part = part_of(*windows.shape, GAIN_TOKENS)
    some = replay if part is None else Replay(model, layout, windows.part(part))
    floor = _floor(model, layout, sums, some, generator)
    return Evidence(
        layout=layout,
        layers=_layers(model, layout, sums, some, floor, generator, progress),
        linears={unit: seen.evidence() for unit, seen in linears.items()},
        weights=_weights_of(model, layout),
        replay=replay,
        provenance=provenance_of(windows.ids, seed, floor),
        floor=floor,
        traces={number: kept for number, layer in sums.items() if (kept := layer.trace())},
        experts=partial(experts_at, model),
        span=replay.span,
    )


def _weights_of(model: Any, layout: Layout) -> Callable[[np.ndarray], Tensor]:
    """Return what reads the weights of units, [n, rows, cols], off a live model, to the CPU."""
    tensors = dict(model.named_parameters())
    return lambda which: read_units(layout, which, tensors).detach().cpu()


def digest_of(windows: Tensor) -> str:
    """Return 32 hex digits that name windows, token ids int64 [windows, length]."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:32]


def provenance_of(windows: Tensor, seed: int, floor: float) -> dict[str, Any]:
    """Return the provenance of a pass over windows, token ids int64 [windows, length].

    Args:
        windows: the text.
        seed: random seed of the pass.
        floor: KL below this is noise, nats per token.
    """
    said = {"text": digest_of(windows), "tokens": windows.numel(), "seed": seed}
    return {**said, KEY: floor}


def _run(
    model: Any,
    batches: Sequence[Windows],
    generator: torch.Generator | None,
    progress: Progress | None,
) -> None:
    """Run the text through the model once, which the caller records.

    Args:
        model: the model.
        batches: the text.
        generator: draws labels, whose loss is differentiated; None if no gradients are recorded.
        progress: called with (what, done, of).
    """
    for done, batch in enumerate(batches):
        if progress:
            progress("calibrate", done, len(batches))
        race: Tensor | None = None
        for rows in portions(model, batch):
            if generator is None:
                with torch.no_grad():
                    logits_of(model, batch[rows])
                continue
            with rooted(model) as root, torch.enable_grad():
                logits = logits_of(model, batch[rows])
                if race is None:
                    race = _race(model, batch, logits.shape[1], generator)
                labels = drawn_labels(logits, race[rows].flatten(0, 1))
                # Hooks on the way see the gradients.
                torch.autograd.grad(loss_of(logits, labels), [root])


def _race(model: Any, batch: Windows, words: int, generator: torch.Generator) -> Tensor:
    """Return the variates that draw a batch's labels, float32 [windows, predicted, words].

    They are drawn on the CPU and for the whole batch, so that labels are the same on every device
    and however many windows run at a time.
    """
    count = predicted(model, batch.shape[1], batch.prefix)
    drawn = torch.empty(len(batch) * count, words).exponential_(generator=generator)
    return drawn.view(len(batch), count, words)


def _floor(
    model: Any,
    layout: Layout,
    sums: dict[int, LayerSums],
    replay: Replay,
    generator: torch.Generator,
) -> float:
    """Return the KL below which readings are noise, nats per token."""
    if not layout.layers:
        return LEAST
    number = layout.layers[0].layer
    seed = generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed)
    with noisy(model, sums[number], fresh, ROUNDINGS):
        return floor_of(replay.kl_by_token(number, again=lambda: fresh.manual_seed(seed)))


def _layers(
    model: Any,
    layout: Layout,
    sums: dict[int, LayerSums],
    replay: Replay,
    floor: float,
    generator: torch.Generator,
    progress: Progress | None,
) -> dict[int, LayerEvidence]:
    """Return the evidence of each layer, with its gain."""
    evidence = {}
    for done, layer in enumerate(layout.layers):
        if progress:
            progress("gains", done, len(layout.layers))
        watched = sums[layer.layer]
        again = partial(generator.set_state, generator.get_state())
        with noisy(model, watched, generator):
            gain = gain_of(replay.kl(layer.layer, again=again), watched, floor)
        evidence[layer.layer] = layer_evidence(watched, gain)
    return evidence


def layer_evidence(sums: LayerSums, gain: float) -> LayerEvidence:
    """Return the evidence of one layer from its sums and gain; the sums move to the CPU."""
    sums.move(CPU)
    return LayerEvidence(
        tokens=sums.tokens,
        count=sums.count,
        gate_sum=sums.gate_sum,
        gate_square=sums.gate_square,
        input_square=sums.input_square,
        middle_square=sums.middle_square,
        slopes=sums.slopes,
        input_full=sums.input_full,
        middle_full=sums.middle_full,
        curvature=sums.curvature,
        output_square=float(sums.output_square) / max(1, sums.tokens),
        gain=gain,
        output_max=sums.output_max,
    )
