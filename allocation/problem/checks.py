"""Checks of single numbers that people give."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np

from bitknap.errors import InputError


def as_float(value: object) -> float | None:
    """Return a real number or a truth value as a float; None for anything else."""
    if not isinstance(value, Real | np.bool_):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def number(what: str, value: object, low: float = 0, high: float = math.inf) -> float:
    """Return `value` as a float.

    Raises:
        InputError: it is not a number, or not from `low` to `high`.
    """
    converted = None if isinstance(value, bool | np.bool_) else as_float(value)
    if converted is None or not low <= converted <= high:
        span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"{what}: {value} is not {'a number' if low == -math.inf else span}")
    return converted


def whole(what: str, value: object, low: int = 0) -> int:
    """Return `value` as an int.

    Raises:
        InputError: it is not a whole number, or is below `low`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < low:
        raise InputError(f"{what}: {value} is not a whole number of at least {low}")
    return int(value)
