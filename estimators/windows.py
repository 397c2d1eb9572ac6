"""How a model reads windows of text: what it is given, and which tokens it has to predict.

A decoder-only model reads every token of a window but the last and predicts the one after it. An
encoder-decoder reads the first half of a window with its encoder and predicts the second half,
token by token, with its decoder. So every layer of either sees as many tokens as are predicted,
and sums over a layer's tokens mean the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitknap.errors import ModelError


def predicted(model: Any, length: int) -> int:
    """Return how many tokens of a window of `length` are predicted; each layer sees as many."""
    return length // 2 if model.config.is_encoder_decoder else length - 1


def labels_of(model: Any, batch: Tensor) -> Tensor:
    """Return the tokens that `model` has to predict, int64 [windows, predicted].

    Args:
        model: a language model, decoder-only or encoder-decoder.
        batch: token ids, int64 [windows, length].
    """
    count = predicted(model, batch.shape[1])
    first = count if model.config.is_encoder_decoder else 1
    return batch[:, first : first + count]


def logits_of(model: Any, batch: Tensor) -> Tensor:
    """Return the logits of each token of `labels_of`, float32 [tokens, vocabulary].

    Args:
        model: a language model, decoder-only or encoder-decoder.
        batch: token ids, int64 [windows, length].

    Raises:
        ModelError: an encoder-decoder does not say which token its decoder starts from.
    """
    if not model.config.is_encoder_decoder:
        given = {"input_ids": batch[:, :-1]}
    else:
        labels = labels_of(model, batch)
        begin = labels.new_full((len(batch), 1), _start(model.config))
        given = {
            "input_ids": batch[:, : labels.shape[1]],
            "decoder_input_ids": torch.cat((begin, labels[:, :-1]), dim=1),
        }
    logits: Tensor = model(**given, use_cache=False).logits
    return logits.float().flatten(0, 1)


def _start(config: Any) -> int:
    """Return the token that a decoder starts from; T5's family starts from padding."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError(
        "config.json: neither decoder_start_token_id nor pad_token_id; set the token that the "
        "decoder starts from"
    )
