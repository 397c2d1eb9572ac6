"""Text in, token windows out.

A file is one document and is encoded whole, so that no cut changes its tokens. Windows
are cut from the tokens of the text, and each begins with the special tokens that the tokenizer puts
before a text, such as BOS; those that it puts after a text, such as EOS, are left out. The
bundled texts are read in the same way: excerpts of four domains, one after the other, whole lines
with their indentation and their blank lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.estimators.measuring.documents import Documents, Text, TokenWindows
from bitknap.estimators.measuring.windows import Windows
from bitknap.quantization.source.transformers_calls import calling_transformers

BUILTIN = "builtin"
LONGEST_WINDOW = 2048
# Increase this when the same file gives different windows, so that old measurements are not used.
ENCODING = 2
# Characters of a text that show which special tokens the tokenizer puts around it.
_PROBE = 64


def read_text(text: str, purpose: str) -> str:
    """Return the text of a file, or for "builtin" the bundled text for this purpose.

    Line ends become newlines; a byte order mark is left out.

    Args:
        text: a path or "builtin".
        purpose: "calibration" or "evaluation"; the bundled texts do not overlap.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
    """
    if text == BUILTIN:
        source = files("bitknap.benchmarks.reference") / f"{purpose}.txt"
        return source.read_text(encoding="utf-8")
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{text}: cannot be read ({error.strerror}); pass a file or 'builtin'"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{text}: not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start:,}); "
            "convert it to UTF-8"
        ) from None
    if "\0" in content:
        raise InputError(
            f"{text}: not text (a NUL character at {content.index(chr(0)):,}); pass UTF-8 text"
        )
    if not content.strip():
        raise InputError(f"{text}: the text is empty; pass a file with a few thousand words")
    return content


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A document as tokens.

    Attributes:
        ids: token ids of its text, int64 [n].
        prefix: special tokens that the tokenizer puts before a text, int64 [p].
    """

    ids: np.ndarray
    prefix: np.ndarray

    def windows(self, tokens: int, longest: int) -> Windows:
        """Return windows of equal length, spread evenly over the text.

        Args:
            tokens: number of tokens to take, including prefixes, rounded down to whole windows.
            longest: the model's context.

        Raises:
            InputError: the text is too short, or no token would be predicted.
        """
        length, least = min(longest, LONGEST_WINDOW, tokens), max(2, len(self.prefix) + 1)
        if length < least:
            what = "tokens" if tokens == length else "the model's context"
            raise InputError(f"{what}: {length} is too few; at least {least} are needed")
        wanted, there = tokens // length, self.count(length)
        if wanted > there:
            raise InputError(
                f"the text has {len(self.ids)} tokens, {self._of(tokens, wanted)} were asked for; "
                "lower `tokens` or add text"
            )
        return self._cut(np.arange(wanted) * there // wanted, length)

    def every(self, length: int) -> Windows:
        """Return all windows of a length."""
        return self._cut(np.arange(self.count(length)), length)

    def count(self, length: int) -> int:
        """Return how many windows of a length the text has."""
        return len(self.ids) // (length - len(self.prefix))

    def _of(self, tokens: int, windows: int) -> str:
        """Say how many tokens were asked for, and how many of them are special."""
        special = windows * len(self.prefix)
        return f"{tokens} ({special} of them special)" if special else str(tokens)

    def _cut(self, places: np.ndarray, length: int) -> Windows:
        size = length - len(self.prefix)
        text = self.ids[places[:, None] * size + np.arange(size)]
        begin = np.broadcast_to(self.prefix, (len(places), len(self.prefix)))
        ids = torch.from_numpy(np.concatenate((begin, text), axis=1))
        return Windows(ids=ids, prefix=len(self.prefix))


def document_of(text: Text, purpose: str) -> Documents | TokenWindows:
    """Return a text as documents or token windows; a file is read, and is one document.

    Args:
        text: From `text_of`.
        purpose: "calibration" or "evaluation", which of the bundled texts "builtin" names.

    Raises:
        InputError: The file cannot be read, or holds no UTF-8 text.
    """
    return Documents((read_text(text, purpose),)) if isinstance(text, str) else text


def encode(tokenizer: Any, text: str | Documents, vocabulary: int | None = None) -> Encoded:
    """Return documents as tokens: those of each whole document, and how each window is to begin.

    Args:
        tokenizer: a transformers tokenizer.
        text: the document or documents; blank ones are left out.
        vocabulary: rows of the model's embedding; not checked when not given.

    Raises:
        InputError: the text is empty, or the tokenizer does not fit it or the model.
    """
    documents = text if isinstance(text, Documents) else Documents((text,))
    parts = [part for part in documents.parts if part.strip()]
    prefix, suffix = _around(tokenizer, parts[0])
    every = [_ids(tokenizer, part) for part in parts]
    ids = np.concatenate([whole[len(prefix) : len(whole) - suffix] for whole in every])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not len(ids) or (unknown is not None and (ids == unknown).all()):
        raise InputError(
            "the tokenizer knows no part of the text; pass text in the model's "
            "language, or put the model's own tokenizer in its folder"
        )
    most = int(max(ids.max(), prefix.max(initial=0)))
    if vocabulary is not None and most >= vocabulary:
        raise InputError(
            f"the tokenizer has {len(tokenizer):,} tokens and gives token {most}, but the model's "
            f"embedding has {vocabulary:,} rows; put the model's own tokenizer in its folder"
        )
    return Encoded(ids=ids, prefix=prefix)


def token_windows(tokenizer: Any, text: str, tokens: int, longest: int) -> Tensor:
    """Cut a document into windows of equal length, spread evenly over it.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole text.
        tokens: number of tokens to take, rounded down to whole windows.
        longest: the model's context.

    Returns:
        int64 [windows, min(longest, 2048)]; each begins as the tokenizer begins a text.

    Raises:
        InputError: the text is empty or shorter than asked.
    """
    return encode(tokenizer, text).windows(tokens, longest).ids


def _around(tokenizer: Any, text: str) -> tuple[np.ndarray, int]:
    """Return the special tokens put before a text, int64 [p], and how many are put after it."""
    probe = text.strip()[:_PROBE]
    plain = _ids(tokenizer, probe, special=False)
    if not len(plain):
        probe, plain = text, _ids(tokenizer, text, special=False)
    whole = _ids(tokenizer, probe)
    spare = len(whole) - len(plain)
    before = next(
        (at for at in range(spare + 1) if np.array_equal(whole[at : at + len(plain)], plain)), None
    )
    if before is None:
        raise InputError(
            "the tokenizer puts special tokens inside a text, not only around it; use a "
            "tokenizer of transformers"
        )
    return whole[:before], spare - before


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> np.ndarray:
    """Return the ids of a text, int64 [n]."""
    # `verbose` would warn that the text is longer than the model's context; it is cut afterwards.
    what = "the tokenizer cannot encode the text"
    with calling_transformers(what, "put the model's own tokenizer in its folder", InputError):
        encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    ids: Sequence[int] = encoded["input_ids"]
    return np.asarray(ids, dtype=np.int64)
