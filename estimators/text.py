"""Text in, token windows out."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.errors import InputError

BUILTIN = "builtin"
LONGEST_WINDOW = 2048


def read_text(text: str, purpose: str) -> str:
    """Return the text of a file, or the bundled one of this purpose for "builtin".

    Args:
        text: a path or "builtin".
        purpose: "calibration" or "evaluation"; the bundled texts do not overlap.
    """
    if text == BUILTIN:
        source = files("bitknap.benchmarks.reference") / f"{purpose}.txt"
        return source.read_text(encoding="utf-8")
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{text}: cannot be read ({error.strerror}); pass a file or 'builtin'"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{text}: not UTF-8 text") from None


def token_windows(tokenizer: Any, text: str, tokens: int, longest: int) -> Tensor:
    """Cut a text into windows of equal length, spread evenly over it.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole text.
        tokens: how many tokens to take, rounded down to whole windows.
        longest: the model's context.

    Returns:
        int64 [windows, min(longest, 2048)].

    Raises:
        InputError: the text is empty or shorter than asked.
    """
    if not text.strip():
        raise InputError("the text is empty; pass a file with at least a few thousand words")
    ids = np.concatenate(
        [np.asarray(i, np.int64) for i in _encode(tokenizer, text.splitlines(keepends=True))]
    )
    length = min(longest, LONGEST_WINDOW, tokens)
    if length < 2:
        raise InputError(f"tokens: {tokens} is too few; at least 2 are needed")
    wanted, there = tokens // length, len(ids) // length
    if wanted > there:
        raise InputError(
            f"the text has {len(ids)} tokens, {tokens} were asked for; lower --tokens or add text"
        )
    starts = (np.arange(wanted) * there // wanted) * length
    return torch.from_numpy(np.stack([ids[s : s + length] for s in starts]))


def _encode(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    """Encode line by line: a text of megabytes at once is slow, and warned about."""
    encoded: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    return encoded
