"""Layer gains: the KL per output error of a layer, measured by adding noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.measuring.expert_forward import experts_at
from bitknap.estimators.measuring.noise_floor import LEAST
from bitknap.estimators.sweep.expert_recording import LayerSums

# Noise that measures a layer's gain, relative to its output's size: small enough for KL to be
# quadratic in it, large enough to exceed float32 rounding.
_NOISE = 0.05
# Tokens of the text that gains are measured on: noise changes every token, so that few are enough.
GAIN_TOKENS = 2_048


def noise_scale(sums: LayerSums, relative: float = _NOISE) -> float:
    """Return the standard deviation of the noise at each element of a layer's expert output.

    Args:
        sums: what was recorded of the layer.
        relative: the noise's size, relative to the output's.
    """
    square = float(sums.output_square) / max(1, sums.tokens) / sums.layer.hidden
    return math.sqrt(max(square * relative**2, 1e-30))


@contextlib.contextmanager
def noisy(
    model: Any, sums: LayerSums, generator: torch.Generator, relative: float = _NOISE
) -> Iterator[None]:
    """Add noise to the output of one layer's experts while the block runs.

    Args:
        model: the model.
        sums: what was recorded of the layer.
        generator: draws the noise.
        relative: its size, relative to the output's.
    """
    scale, experts = noise_scale(sums, relative), experts_at(model, sums.layer)

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = experts.summed(output).shape
        noise = torch.randn(shape, generator=generator) * scale  # the same on every device
        return experts.moved(output, noise.to(output.device))

    handle = experts.module.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def gain_of(kl: float, sums: LayerSums, floor: float = LEAST) -> float:
    """Return nats per unit of squared error at a layer's expert output, from the KL of `noisy`.

    Args:
        kl: the KL, nats per token.
        sums: what was recorded of the layer.
        floor: KL below this is noise, and counts as this.

    Raises:
        ModelError: the KL is NaN or infinite.
    """
    if not math.isfinite(kl):
        raise ModelError(
            f"layer {sums.layer.layer}: the KL is {kl} when noise is added to its experts' output: "
            "the model's own output leaves float32 on this text; repair its weights, or use "
            "`estimator=DataFree()`"
        )
    return float(max(kl, floor) / (noise_scale(sums) ** 2 * sums.layer.hidden))
