"""One pass with live routing over a calibration text: model and text in, evidence out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.allocation.units import ROLES
from bitknap.estimators.evidence import Evidence, LayerEvidence, LinearEvidence, zeros
from bitknap.estimators.recording import LayerSums, check_seen, recording
from bitknap.estimators.replay import BATCH_TOKENS, Replay
from bitknap.progress import Progress
from bitknap.quantize.apply import read_units
from bitknap.quantize.views import ExpertLayer, Layout

# Noise that measures a layer's gain, relative to its output's size: small enough for KL to be
# quadratic in it, large enough to stand above float32 rounding.
_NOISE = 0.05


def calibrate(
    model: Any,
    layout: Layout,
    windows: Tensor,
    *,
    full: bool = False,
    curvature: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Run `windows` through `model` and record what its experts see.

    Args:
        model: a causal language model in evaluation mode.
        layout: its units, from `walk`.
        windows: token ids, int64 [windows, length].
        full: also record whole second-moment matrices.
        curvature: also record squared gradients with labels drawn from the model.
        seed: of the drawn labels and of the noise that measures gains.
        progress: called with (what, done, of).

    Raises:
        ModelError: an MoE layer saw no expert call, or cannot be watched.
    """
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    linears: dict[int, LinearEvidence] = {}
    with (
        recording(model, layout, full=full, curvature=curvature) as sums,
        _linears(model, layout, linears),
    ):
        for done, batch in enumerate(batches):
            if progress:
                progress("calibrate", done, len(batches))
            with torch.enable_grad() if curvature else torch.no_grad():
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
                if curvature:
                    _backward_on_drawn_labels(model, logits, generator)
    check_seen(sums)
    replay = Replay(model, layout, windows)
    tensors = dict(model.named_parameters())

    def weights(which: np.ndarray) -> Tensor:
        return read_units(layout, which, tensors).detach()

    layers = {}
    for done, expert in enumerate(layout.layers):
        if progress:
            progress("gains", done, len(layout.layers))
        gain = _gain(model, expert, sums[expert.layer], replay, generator)
        layers[expert.layer] = _frozen(sums[expert.layer], gain)
    text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:32]
    return Evidence(
        layout=layout,
        layers=layers,
        linears=linears,
        weights=weights,
        replay=replay,
        provenance={"text": text, "tokens": windows.numel(), "seed": seed},
    )


def _backward_on_drawn_labels(model: Any, logits: Tensor, generator: torch.Generator) -> None:
    """Backpropagate the summed loss on labels drawn from the model's own distribution."""
    flat = logits.float().flatten(0, 1)
    with torch.no_grad():
        labels = torch.multinomial(flat.softmax(-1), 1, generator=generator)[:, 0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Only the path matters: one parameter upstream of every expert keeps the graph alive.
    torch.autograd.grad(
        nn.functional.cross_entropy(flat, labels, reduction="sum"),
        parameters[:1],
        allow_unused=True,
    )


def _frozen(sums: LayerSums, gain: float) -> LayerEvidence:
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
    )


def _gain(
    model: Any, layer: ExpertLayer, sums: LayerSums, replay: Replay, generator: torch.Generator
) -> float:
    """Return nats per unit of squared error at the layer's expert output, read with noise."""
    variance = float(sums.output_square) / max(1, sums.tokens) / layer.hidden * _NOISE**2
    scale = max(variance, 1e-30) ** 0.5

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise: Tensor = torch.randn(output.shape, generator=generator) * scale
        noisy: Tensor = output + noise.to(output.dtype)
        return noisy

    handle = model.get_submodule(layer.module).register_forward_hook(add_noise)
    try:
        kl = replay.kl(layer.layer)
    finally:
        handle.remove()
    return float(max(kl, 1e-12) / (scale**2 * layer.hidden))


@contextlib.contextmanager
def _linears(model: nn.Module, layout: Layout, found: dict[int, LinearEvidence]) -> Iterator[None]:
    """Record the input second moments of units that are ordinary linear layers."""
    handles = []
    sums: dict[int, tuple[list[int], Tensor]] = {}
    for unit, view in enumerate(layout.views):
        if ROLES[layout.units.role[unit]] == "routed":
            continue
        module = model.get_submodule(view.tensor.removesuffix(".weight"))
        sums[unit] = ([0], zeros(int(layout.units.cols[unit])))

        def keep(module: nn.Module, args: Any, _unit: int = unit) -> None:
            x = args[0].detach().flatten(0, -2)
            sums[_unit][0][0] += len(x)
            sums[_unit][1].add_(x.double().square().sum(0))

        handles.append(module.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for unit, (tokens, square) in sums.items():
            found[unit] = LinearEvidence(tokens=tokens[0], input_square=square)
