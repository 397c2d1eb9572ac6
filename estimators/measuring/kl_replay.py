"""Measure a changed model against itself unchanged: KL on fixed text, from the first changed layer.

The reference pass keeps each decoder layer's output and the next-token distribution. Measuring a
change in layer l then runs layers l, l + 1, ... only; earlier layers return their stored outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.estimators.measuring.language_model import settle
from bitknap.estimators.measuring.skipped_layers import answering
from bitknap.estimators.measuring.window_portions import batches_of, portions, until_it_fits
from bitknap.estimators.measuring.windows import Windows, labels_of, logits_of, predicted, seen
from bitknap.quantization.models.matrix_views import Layout

BATCH_TOKENS = 2048
# What is done before a text is read once more; None for nothing.
Again = Callable[[], object] | None
# Logarithms worked on at a time; beside the reference's and their exponentials they fit in a cache.
_CACHED = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Means over the tokens of each window, float64 [windows].

    Attributes:
        nll: negative log-likelihood of the text, nats per token.
        kl: KL(reference ‖ model) of the next-token distributions, nats per token.
        top1: share of tokens for which both models predict the same most likely next token.
    """

    nll: np.ndarray
    kl: np.ndarray
    top1: np.ndarray

    @classmethod
    def of(cls, means: Tensor) -> Losses:
        """Return losses from nll, kl and top-1 agreement by window, float64 [3, windows]."""
        nll, kl, top1 = means.numpy()
        return cls(nll=nll, kl=kl, top1=top1)

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean()))


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean over windows, which are nearly independent blocks."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def log_probabilities(model: Any, batch: Tensor | Windows) -> Tensor:
    """Return log-probabilities of the tokens to predict, float32 [tokens, vocabulary]."""
    return torch.log_softmax(logits_of(model, batch), dim=-1)


def kl_of(logits: Tensor, reference_log: Tensor) -> Tensor:
    """Return KL(reference ‖ model) of each token, nats, float32 [tokens].

    Args:
        logits: the model's, float32 [tokens, vocabulary].
        reference_log: log-probabilities of the reference.
    """
    return torch.cat([_divergence(log, known) for log, known in _cached(logits, reference_log)])


def losses_of(logits: Tensor, reference_log: Tensor, labels: Tensor) -> Tensor:
    """Return nll, kl and top-1 agreement by window, float64 [3, windows].

    Args:
        logits: the model's, float32 [tokens, vocabulary].
        reference_log: log-probabilities of the reference.
        labels: the tokens, int64 [windows, predicted], on any device.
    """
    parts, start = [], 0
    for log, known in _cached(logits, reference_log):
        tokens = labels.reshape(-1, 1)[start : (start := start + len(log))].to(log.device)
        nll = -log.gather(1, tokens)[:, 0]
        top1 = (log.argmax(1) == known.argmax(1)).float()
        parts.append(torch.stack([nll, _divergence(log, known), top1]))
    return torch.cat(parts, dim=1).double().view(3, len(labels), -1).mean(2).cpu()


def _cached(logits: Tensor, reference_log: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities of a few tokens, and the reference's, while they are in the cache."""
    count = max(1, _CACHED // logits.shape[1])
    for some, known in zip(logits.split(count), reference_log.split(count), strict=True):
        yield torch.log_softmax(some, dim=-1), known


def _divergence(model_log: Tensor, reference_log: Tensor) -> Tensor:
    """Return the KL of each token from log-probabilities; overwrites `model_log`.

    Logarithms are subtracted before weighting, so that small divergences keep their digits.
    """
    difference = torch.sub(reference_log, model_log, out=model_log)
    divergence: Tensor = torch.linalg.vecdot(reference_log.exp(), difference)
    return divergence


def decoder_layers(model: nn.Module, layout: Layout) -> tuple[nn.ModuleList | None, dict[int, int]]:
    """Return the list of decoder layers and each MoE layer's place in it.

    (None, {}) if the MoE layers are not in one list, and for an encoder-decoder, whose layers do
    not form one chain of outputs.
    """
    places: dict[int, int] = {}
    lists: set[str] = set()
    for expert in layout.layers:
        parts = expert.module.split(".")
        at = next(
            i
            for i in range(1, len(parts))
            if parts[i].isdigit()
            and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList)
        )
        lists.add(".".join(parts[:at]))
        places[expert.layer] = int(parts[at])
    if len(lists) != 1 or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None, {}
    layers = model.get_submodule(lists.pop())
    return (layers, places) if isinstance(layers, nn.ModuleList) else (None, {})


class Replay:
    """A model, fixed windows, and the unchanged model's outputs on them.

    Args:
        model: a language model; its present state is the reference, and the caller changes it
            later.
        layout: its units, used to locate the decoder layers.
        windows: the text; a tensor int64 [windows, length] has no special tokens.
        cache: keep layer outputs, so that later measurements start at the changed layer.

    Attributes:
        windows: token ids, int64 [windows, length].
        base: name of the model whose layer outputs are kept; "" for the reference pass.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Any, layout: Layout, windows: Tensor | Windows, *, cache: bool = True
    ) -> None:
        self._text = Windows.of(windows)
        self.model, self.windows, self.base = model, self._text.ids, ""
        self._layers, self._places = decoder_layers(model, layout) if cache else (None, {})
        settle(model, self.windows)
        self._batches, self._logs, self._outputs = until_it_fits(model, self._reference)

    def _reference(self) -> tuple[list[Windows], list[Tensor], list[list[Any]]]:
        """Return the batches of the text, and log-probabilities and layer outputs of each."""
        batches = batches_of(self.model, self._text, BATCH_TOKENS)
        logs: list[Tensor] = []
        kept: list[list[Any]] = [[] for _ in batches]
        for batch, outputs in zip(batches, kept, strict=True):
            with self._listening(outputs):
                logs.append(log_probabilities(self.model, batch))
        return batches, logs, kept

    @torch.inference_mode()
    def rebase(self, name: str) -> None:
        """Store the layer outputs of the model as it is now; KL still refers to the reference pass.

        For measuring many variants of one changed model: from here on `layer` is the first MoE
        layer that differs from the model as it is at this moment.

        Args:
            name: name of the model as it is now, which `base` returns.
        """
        self.base = name
        if self._layers is None:
            return

        def run() -> list[list[Any]]:
            kept: list[list[Any]] = [[] for _ in self._batches]
            for batch, outputs in zip(self._batches, kept, strict=True):
                with self._listening(outputs):
                    log_probabilities(self.model, batch)
            return kept

        self._outputs = until_it_fits(self.model, run, self._split)

    @property
    def text(self) -> Windows:
        """The windows with their special tokens."""
        return self._text

    @property
    def span(self) -> int:
        """Number of tokens of a window that each layer sees."""
        return seen(self.model, self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Number of predicted tokens in all windows."""
        return len(self.windows) * predicted(self.model, self.windows.shape[1], self._text.prefix)

    @torch.inference_mode()
    def measure(self, layer: int | None = None) -> Losses:
        """Measure the model as it is now.

        Args:
            layer: the first MoE layer that differs from the reference pass; None for any.
        """
        return Losses.of(torch.cat(self._each(losses_of, layer), dim=1))

    @torch.inference_mode()
    def kl(self, layer: int | None = None, *, again: Again = None) -> float:
        """Return the mean KL of the model as it is now, nats per token; cheaper than `measure`.

        Args:
            layer: the first MoE layer that differs from the reference pass; None for any.
            again: called before the text is read once more, with fewer windows at a time.
        """
        return float(self.kl_by_window(layer, again=again).mean())

    @torch.inference_mode()
    def kl_by_window(self, layer: int | None = None, *, again: Again = None) -> np.ndarray:
        """Return the KL of the model as it is now, nats per token, float64 [windows].

        Args:
            layer: the first MoE layer that differs from the reference pass; None for any.
            again: called before the text is read once more, with fewer windows at a time.
        """

        def means(mine: Tensor, log: Tensor, labels: Tensor) -> Tensor:
            return kl_of(mine, log).double().view(len(labels), -1).mean(1)

        return torch.cat(self._each(means, layer, again)).cpu().numpy()

    @torch.inference_mode()
    def kl_by_token(self, layer: int | None = None, *, again: Again = None) -> np.ndarray:
        """Return the KL of the model as it is now at each token, nats, float64 [tokens].

        Args:
            layer: the first MoE layer that differs from the reference pass; None for any.
            again: called before the text is read once more, with fewer windows at a time.
        """
        parts = self._each(lambda mine, log, _: kl_of(mine, log).double(), layer, again)
        return torch.cat(parts).cpu().numpy()

    def _each(
        self,
        measure: Callable[[Tensor, Tensor, Tensor], Tensor],
        layer: int | None,
        again: Again = None,
    ) -> list[Tensor]:
        """Return a measure of each batch, from what `_runs` yields."""

        def begin_anew() -> None:
            self._split()
            if again is not None:
                again()

        def run() -> list[Tensor]:
            return [measure(*parts) for parts in self._runs(layer)]

        return until_it_fits(self.model, run, begin_anew)

    def _split(self) -> None:
        """Cut batches into those of as many windows as fit."""
        every = list(zip(self._batches, self._logs, self._outputs, strict=True))
        self._batches, self._logs, self._outputs = [], [], []
        for batch, log, outputs in every:
            for rows in portions(self.model, batch):
                self._batches.append(batch[rows])
                self._logs.append(_rows_of(log, rows, len(batch)))
                self._outputs.append([_rows_of(kept, rows, len(batch)) for kept in outputs])

    def _runs(self, layer: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (logits now, log-probabilities of the reference, labels) of each batch."""
        first = self._places.get(layer, 0) if layer is not None else 0
        for batch, log, outputs in zip(self._batches, self._logs, self._outputs, strict=True):
            skipped = list(self._layers or ())[:first]
            with answering(skipped, outputs[: len(skipped)]):
                mine = logits_of(self.model, batch)
            yield mine, log, labels_of(self.model, batch)

    @contextlib.contextmanager
    def _listening(self, outputs: list[Any]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)

        handles = [layer.register_forward_hook(keep) for layer in self._layers or ()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _rows_of(output: Any, rows: slice, count: int) -> Any:
    """Return what belongs to some of a batch's windows in an output, whose first axis is theirs."""
    if isinstance(output, tuple):
        return tuple(_rows_of(part, rows, count) for part in output)
    if not isinstance(output, Tensor):
        return output
    each = len(output) // count
    return output[rows.start * each : rows.stop * each]


@torch.inference_mode()
def compare(model: Any, reference: Any, windows: Tensor | Windows) -> Losses:
    """Measure `model` on windows against a reference model."""
    parts = []
    for batch in Windows.of(windows).batches(BATCH_TOKENS):
        parts += until_it_fits(model, partial(_compared, model, reference, batch))
    return Losses.of(torch.cat(parts, dim=1))


def _compared(model: Any, reference: Any, batch: Windows) -> list[Tensor]:
    """Return nll, kl and top-1 agreement by window, float64 [3, windows] of each portion."""
    parts = []
    for rows in portions(model, batch):
        known = logits_of(reference, batch[rows])
        mine = known if model is reference else logits_of(model, batch[rows])
        log = torch.log_softmax(known, dim=-1)
        parts.append(losses_of(mine, log, labels_of(model, batch[rows])))
    return parts
