"""Patterns that select units: "layer=0-3,proj=down,expert=1;4,role=routed"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools
from bitknap.errors import InputError
from bitknap.names import check_name, unknown

_ALIASES = {"projection": "proj"}


def matching(
    pattern: str,
    numbers: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, tuple[npt.NDArray[Any], Sequence[str]]],
) -> Bools:
    """Return which entries match all comma-separated `key=value` parts, bool[U].

    Args:
        pattern: numbers take integers and ranges (`0-3`), names take globs (`*_proj`);
            `;` or `|` separates alternatives.
        numbers: integer columns by key.
        names: index columns by key, each with its vocabulary.

    Raises:
        InputError: an unknown key, a malformed value, or nothing is selected.
    """
    selected: Bools | None = None
    seen: set[str] = set()
    for part in pattern.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        key = _ALIASES.get(key, key)
        known = [*numbers, *names]
        if not equals:
            raise InputError(
                f"pattern {pattern!r}: {part.strip()!r} is not KEY=VALUE; keys: {', '.join(known)}"
            )
        check_name(f"pattern {pattern!r}: key", key, known)
        if key in seen:
            raise InputError(f"pattern {pattern!r}: {key} is given twice; join values with ';'")
        seen.add(key)
        choices = [text.strip() for text in re.split(r"[;|]", value)]
        if key in numbers:
            accepted = _accepted_numbers(pattern, key, choices, numbers[key])
        else:
            accepted = _accepted_names(pattern, key, choices, *names[key])
        selected = accepted if selected is None else selected & accepted
    if selected is None or not selected.any():
        raise InputError(f"pattern {pattern!r} matches no unit; there are {_known(numbers, names)}")
    return selected


def _accepted_numbers(
    pattern: str, key: str, choices: Sequence[str], column: npt.NDArray[Any]
) -> Bools:
    accepted = np.zeros(len(column), dtype=np.bool_)
    for choice in choices:
        if choice == "*":
            return np.ones(len(column), dtype=np.bool_)
        match = re.fullmatch(r"(-?\d{1,9})(?:-(\d{1,9}))?", choice)
        if not match:
            raise InputError(f"pattern {pattern!r}: {key}={choice} is not N or N-M; join with ';'")
        low = int(match[1])
        accepted |= (column >= low) & (column <= int(match[2] or low))
    return accepted


def _accepted_names(
    pattern: str, key: str, choices: Sequence[str], column: npt.NDArray[Any], names: Sequence[str]
) -> Bools:
    wanted = np.array([any(fnmatchcase(name, choice) for choice in choices) for name in names])
    if not wanted.any():
        raise unknown(f"pattern {pattern!r}: {key}", ";".join(choices), names)
    accepted: Bools = wanted[column]
    return accepted


def _known(
    numbers: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, tuple[npt.NDArray[Any], Sequence[str]]],
) -> str:
    texts = [f"{key} {column.min()}-{column.max()}" for key, column in numbers.items()]
    for key, (column, vocabulary) in names.items():
        present = np.unique(column)
        texts.append(f"{key} {'/'.join(vocabulary[index] for index in present)}")
    return ", ".join(texts)
