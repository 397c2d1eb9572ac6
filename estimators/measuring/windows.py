"""How a model reads windows of text: its inputs, and the tokens that it has to predict.

A window begins with a prefix, the special tokens that the tokenizer puts before every text, and
continues with text. Only text is predicted; its first token is predicted from the prefix.

A decoder-only model reads every token of a window but the last and predicts the one after it. An
encoder-decoder reads the first half of a window with its encoder and predicts the text of the
second half, token by token, with its decoder, which also begins with the prefix.
Every layer of encoder and decoder sees the same number of tokens, so that sums over a layer's
tokens are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitknap.errors import InputError, ModelError
from bitknap.estimators.measuring.language_model import token_logits

# Windows are not cut to fewer tokens than this.
_SHORTEST = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Token ids, int64 [windows, length], and how many special tokens each window begins with."""

    ids: Tensor
    prefix: int = 0

    @classmethod
    def of(cls, windows: Tensor | Windows) -> Windows:
        """Return windows; a tensor is taken as text without special tokens."""
        return windows if isinstance(windows, Windows) else cls(ids=windows)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of windows, and the length of each."""
        return len(self.ids), self.ids.shape[1]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Windows:
        """Return some of the windows."""
        return Windows(ids=self.ids[rows].contiguous(), prefix=self.prefix)

    def part(self, part: Part) -> Windows:
        """Return a part of the windows."""
        rows = torch.tensor(part.rows, dtype=torch.int64)
        return Windows(ids=self.ids[rows, : part.length].contiguous(), prefix=self.prefix)

    def batches(self, tokens: int) -> list[Windows]:
        """Return the windows in batches of about `tokens` tokens, at least one window each."""
        count = max(1, tokens // self.ids.shape[1])
        return [Windows(ids=part, prefix=self.prefix) for part in self.ids.split(count)]


class Part(NamedTuple):
    """A part of windows: some of them, each cut to its first tokens."""

    rows: tuple[int, ...]
    length: int


def part_of(count: int, length: int, tokens: int) -> Part | None:
    """Return about `tokens` tokens of windows, spread evenly over them; None if they have no more.

    Windows are cut only if whole ones would be fewer than `tokens` / 256: text from many places
    says more than long text.

    Args:
        count: number of windows.
        length: tokens of each.
        tokens: number of tokens to take.
    """
    if count * length <= tokens:
        return None
    cut = min(length, max(_SHORTEST, tokens // count))
    taken = min(count, max(1, tokens // cut))
    return Part(tuple((2 * i + 1) * count // (2 * taken) for i in range(taken)), cut)


def seen(model: Any, length: int) -> int:
    """Return how many tokens of a window of `length` every layer sees."""
    return length // 2 if model.config.is_encoder_decoder else length - 1


def predicted(model: Any, length: int, prefix: int = 0) -> int:
    """Return how many tokens of a window are predicted.

    Args:
        model: a language model, decoder-only or encoder-decoder.
        length: tokens of the window.
        prefix: special tokens that it begins with.

    Raises:
        InputError: no token is predicted.
    """
    count = seen(model, length) - _unscored(model, prefix)
    if count < 1:
        raise InputError(
            f"windows of {length} tokens, {prefix} of them special, leave none to predict; "
            "use more tokens"
        )
    return count


def labels_of(model: Any, batch: Tensor | Windows) -> Tensor:
    """Return the tokens that `model` has to predict, int64 [windows, predicted].

    Args:
        model: a language model, decoder-only or encoder-decoder.
        batch: the windows; a tensor holds text alone.
    """
    windows, length = Windows.of(batch), batch.shape[1]
    count = predicted(model, length, windows.prefix)
    first = seen(model, length) if model.config.is_encoder_decoder else max(1, windows.prefix)
    return windows.ids[:, first : first + count]


def logits_of(model: Any, batch: Tensor | Windows) -> Tensor:
    """Return the logits of each token of `labels_of`, float32 [tokens, vocabulary].

    Args:
        model: a language model, decoder-only or encoder-decoder.
        batch: the windows; a tensor holds text alone.

    Raises:
        ModelError: an encoder-decoder does not say which token its decoder starts from, or the
            model does not predict tokens from text alone.
    """
    windows = Windows.of(batch)
    ids, labels = windows.ids, labels_of(model, windows)
    if not model.config.is_encoder_decoder:
        given = {"input_ids": ids[:, :-1]}
    else:
        start = labels.new_full((len(ids), 1), _start(model.config))
        given = {
            "input_ids": ids[:, : seen(model, ids.shape[1])],
            "decoder_input_ids": torch.cat(
                (start, ids[:, : windows.prefix], labels[:, :-1]), dim=1
            ),
        }
    logits = token_logits(model, given)
    return logits[:, _unscored(model, windows.prefix) :].float().flatten(0, 1)


def _unscored(model: Any, prefix: int) -> int:
    """Return how many tokens that a layer sees are followed by a special token."""
    return prefix if model.config.is_encoder_decoder else max(0, prefix - 1)


def _start(config: Any) -> int:
    """Return the token that a decoder starts from; T5's family starts from padding."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError(
        "config.json: decoder_start_token_id and pad_token_id are both missing; set "
        "decoder_start_token_id"
    )
