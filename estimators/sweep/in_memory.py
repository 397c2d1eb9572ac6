"""One calibration pass with live routing: takes model and text, returns evidence."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS, Replay
from bitknap.estimators.measuring.language_model import settle
from bitknap.estimators.measuring.windows import Windows, logits_of
from bitknap.estimators.sweep.expert_recording import LayerSums, caught_alone, check_seen, recording
from bitknap.estimators.sweep.layer_gains import gain_of, noisy
from bitknap.estimators.sweep.linear_recording import recording_linears
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.progress import Progress
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.stacks.reading import read_units

# Routing and diagonal moments alone.
PLAIN = Recorded()


def calibrate(
    model: Any,
    layout: Layout,
    windows: Tensor | Windows,
    recorded: Recorded = PLAIN,
    *,
    by_layer: bool = False,
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
        by_layer: catch the gradients of one layer per backward pass, so that only that layer and
            later ones hold a graph; needs one more pass per MoE layer, and the result is the same
            up to rounding.
        seed: random seed of the labels and of the noise that measures gains.
        progress: called with (what, done, of).

    Raises:
        ModelError: an MoE layer saw no expert call, or cannot be recorded.
    """
    windows = Windows.of(windows)
    batches = windows.batches(BATCH_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    settle(model, windows.ids)
    with recording(
        model,
        layout,
        full=recorded.full,
        curvature=recorded.curvature,
        trace_tokens=recorded.traced(windows.ids.numel()),
        gradients=recorded.gradients,
    ) as sums:
        drawn = generator if recorded.curvature or recorded.gradients else None
        # If all parameters are frozen, a forward pass builds no graph.
        alone = by_layer or not any(p.requires_grad for p in model.parameters())
        with recording_linears(model, layout, full=recorded.full) as linears:
            labels = _run(model, batches, drawn, backward=not alone, progress=progress)
        if labels and alone:
            _backward_by_layer(model, batches, labels, sums, progress)
    check_seen(sums)
    replay = Replay(model, layout, windows)
    return Evidence(
        layout=layout,
        layers=_layers(model, layout, sums, replay, generator, progress),
        linears={unit: seen.evidence() for unit, seen in linears.items()},
        weights=_weights_of(model, layout),
        replay=replay,
        provenance=provenance_of(windows.ids, seed),
        traces={number: kept for number, layer in sums.items() if (kept := layer.trace())},
    )


def _weights_of(model: Any, layout: Layout) -> Callable[[np.ndarray], Tensor]:
    """Return what reads the weights of units, [n, rows, cols], off a live model."""
    tensors = dict(model.named_parameters())
    return lambda which: read_units(layout, which, tensors).detach()


def digest_of(windows: Tensor) -> str:
    """Return 32 hex digits that name windows, token ids int64 [windows, length]."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:32]


def provenance_of(windows: Tensor, seed: int) -> dict[str, Any]:
    """Return the provenance of a pass over windows, token ids int64 [windows, length]."""
    return {"text": digest_of(windows), "tokens": windows.numel(), "seed": seed}


def _run(
    model: Any,
    batches: Sequence[Windows],
    generator: torch.Generator | None,
    *,
    backward: bool,
    progress: Progress | None,
) -> list[Tensor]:
    """Run the text through the model once; return the drawn labels, none without a generator.

    Args:
        model: the model, which the caller records.
        batches: the text.
        generator: draws labels; needed for gradients.
        backward: backpropagate in the same pass.
        progress: called with (what, done, of).
    """
    labels = []
    backward = backward and generator is not None
    for done, batch in enumerate(batches):
        if progress:
            progress("calibrate", done, len(batches))
        with torch.enable_grad() if backward else torch.no_grad():
            logits = logits_of(model, batch)
            if generator is not None:
                labels.append(_drawn_labels(logits, generator))
            if backward:
                # One parameter upstream of every expert is enough to keep the graph.
                first = next(p for p in model.parameters() if p.requires_grad)
                _backward(logits, labels[-1], first)
    return labels


@torch.no_grad()
def _drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels from the model's own distribution, int64 [tokens].

    Raises:
        ModelError: the model's output is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            "calibration: the model's output is NaN or infinite on this text; repair its weights, "
            "or use `estimator=DataFree()`"
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _backward(logits: Tensor, labels: Tensor, root: Tensor) -> None:
    """Backpropagate the summed loss to `root`; hooks on the way see the gradients."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.autograd.grad(loss, [root], allow_unused=True)


def _backward_by_layer(
    model: Any,
    batches: Sequence[Windows],
    labels: Sequence[Tensor],
    sums: dict[int, LayerSums],
    progress: Progress | None,
) -> None:
    """Catch the gradients layer by layer, each with a graph that starts at the layer's input."""
    with _no_parameter_gradients(model), torch.enable_grad():
        for done, number in enumerate(sums):
            if progress:
                progress("gradients", done, len(sums))
            with caught_alone(sums, number) as layer:
                for batch, drawn in zip(batches, labels, strict=True):
                    logits = logits_of(model, batch)
                    if layer.root is not None:
                        _backward(logits, drawn, layer.root)


@contextlib.contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters while the block runs, so that they start no graph."""
    started = [p for p in model.parameters() if p.requires_grad]
    for parameter in started:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in started:
            parameter.requires_grad_(True)


def _layers(
    model: Any,
    layout: Layout,
    sums: dict[int, LayerSums],
    replay: Replay,
    generator: torch.Generator,
    progress: Progress | None,
) -> dict[int, LayerEvidence]:
    """Return the evidence of each layer, with its gain."""
    evidence = {}
    for done, layer in enumerate(layout.layers):
        if progress:
            progress("gains", done, len(layout.layers))
        watched = sums[layer.layer]
        with noisy(model, watched, generator):
            gain = gain_of(replay.kl(layer.layer), watched)
        evidence[layer.layer] = layer_evidence(watched, gain)
    return evidence


def layer_evidence(sums: LayerSums, gain: float) -> LayerEvidence:
    """Return the evidence of one layer from its sums and gain."""
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
