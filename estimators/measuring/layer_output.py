"""One decoder layer alone: its calls in the unchanged model, and the change of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import InputError
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS, Replay, decoder_layers
from bitknap.estimators.measuring.language_model import computing
from bitknap.estimators.measuring.window_portions import batches_of, until_it_fits
from bitknap.estimators.measuring.windows import logits_of
from bitknap.quantization.models.matrix_views import Layout


class LayerOutput:
    """A decoder layer with the inputs and outputs of its calls; 8 T H bytes of float32.

    Args:
        replay: the model, unchanged now, and the text.
        layout: its units, used to locate the decoder layer.
        number: number of its MoE layer.

    Raises:
        InputError: the model has no single list of decoder layers.
    """

    @torch.inference_mode()
    def __init__(self, replay: Replay, layout: Layout, number: int) -> None:
        layers, places = decoder_layers(replay.model, layout)
        if layers is None:
            raise InputError("the model has no single list of decoder layers; measure kl instead")
        self.number, self._module = number, layers[places[number]]
        self._model = replay.model
        self._calls: list[tuple[Any, Any, Tensor]] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._calls.append((args, kwargs, _tensor(output)))

        handle = self._module.register_forward_hook(keep, with_kwargs=True)
        try:
            until_it_fits(replay.model, lambda: self._run(replay), self._calls.clear)
        finally:
            handle.remove()

    def _run(self, replay: Replay) -> None:
        for batch in batches_of(replay.model, replay.text, BATCH_TOKENS):
            logits_of(replay.model, batch)

    @torch.inference_mode()
    def square_change(self) -> float:
        """Return the squared Frobenius norm of the present change of its output over the text."""
        square = 0.0
        for args, kwargs, reference in self._calls:
            with computing(self._model):
                output = _tensor(self._module(*args, **kwargs))
            square += float((output.double() - reference.double()).square().sum())
        return square


def window_norms(change: Tensor, window: Tensor) -> Tensor:
    """Return the Frobenius norm of a change [n, H] within each window, float64 [windows].

    Args:
        change: one row per token.
        window: the window of each token, int64 [n].
    """
    square = change.double().square().sum(1)
    return torch.bincount(window, square).sqrt()


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
