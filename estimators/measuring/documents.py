"""The texts that a Python caller may give: a file, strings in memory, or token windows.

`text_of` turns what was given into one frozen value; files are read later, where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.estimators.measuring.windows import Windows


@dataclass(frozen=True, slots=True)
class Documents:
    """Strings, each of which is a separate document.

    Attributes:
        parts: The documents in order; at least one must not be blank.
    """

    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any(part.strip() for part in self.parts):
            raise InputError("the text is empty; pass one of a few thousand words")
        if any("\0" in part for part in self.parts):
            raise InputError("text: a document holds a NUL character; pass plain text")


@dataclass(frozen=True, slots=True, eq=False)
class TokenWindows:
    """Windows of tokens, cut by the caller.

    Attributes:
        ids: Token ids, int64 [windows, length].
    """

    ids: Tensor

    def windows(self, tokens: int, longest: int) -> Windows:
        """Return windows, spread evenly over all of them.

        Args:
            tokens: Maximum number of tokens, rounded down to whole windows.
            longest: The model's context.

        Raises:
            InputError: A window is longer than the context.
        """
        there, length = self.ids.shape
        if length > longest:
            raise InputError(
                f"text: its windows have {length} tokens, the model's context has {longest}; cut "
                "shorter windows"
            )
        wanted = min(there, max(1, tokens // length))
        return Windows(ids=self.ids[torch.arange(wanted) * there // wanted])

    def every(self, length: int) -> Windows:
        """Return all windows, which have the same length."""
        return Windows(ids=self.ids)


Text = str | Documents | TokenWindows
# Types that a caller may give: a path or "builtin", documents, or token windows [windows, length].
TextLike = Text | Path | Sequence[str] | Tensor | np.ndarray | Iterable[Any]


def text_of(given: TextLike) -> Text:
    """Return the caller's text as one value; an iterable is read to its end.

    Args:
        given: A path or "builtin"; a list of strings, each a document; or token windows of one
            length, as an integer array [windows, length] or an iterable of its rows.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(given, str | Documents | TokenWindows):
        return given
    if isinstance(given, Path):
        return str(given)
    if isinstance(given, Tensor | np.ndarray):
        return _windows(torch.as_tensor(given))
    if not isinstance(given, Iterable):
        raise InputError(
            f"text: {type(given).__name__} is not a text; pass a path, 'builtin', a list of "
            "strings or token windows"
        )
    rows = list(given)
    if rows and all(isinstance(row, str) for row in rows):
        return Documents(tuple(rows))
    try:
        ids = torch.stack([torch.as_tensor(row).reshape(-1) for row in rows])
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"text: {len(rows)} items are neither strings nor token windows of one length; pass a "
            "list of strings, or whole numbers [windows, length]"
        ) from None
    return _windows(ids)


def _windows(ids: Tensor) -> TokenWindows:
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    if not whole or ids.ndim != 2 or not ids.numel():
        raise InputError(
            f"text: token windows of {ids.dtype} and shape {list(ids.shape)}; pass whole numbers "
            "[windows, length], at least one"
        )
    if int(ids.min()) < 0:
        raise InputError(f"text: token {int(ids.min())} is below 0; pass token ids")
    return TokenWindows(ids.to("cpu", torch.int64).contiguous())
