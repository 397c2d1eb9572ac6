"""Small helpers for columns: converted, checked, read-only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.errors import InputError

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]

# Largest change from adding floats in another order, relative to the sum of their magnitudes.
ROUNDING = 1e-12


def frozen(
    name: str, values: Any, dtype: npt.DTypeLike, shape: Sequence[int] | None = None
) -> npt.NDArray[Any]:
    """Return `values` as a read-only array of `dtype`, a copy unless it already is one.

    Raises:
        InputError: the values are not numbers, lose their value in `dtype`, or have the wrong
            shape.
    """
    try:
        given = np.asarray(values)
        with np.errstate(invalid="ignore"):
            array = given.astype(dtype, copy=given.flags.writeable)
    except (TypeError, ValueError):
        raise InputError(f"{name}: not an array of {np.dtype(dtype).name}") from None
    if array.dtype.kind == "i" and given.size and not np.array_equal(array, given):
        raise InputError(
            f"{name}: some values are not whole numbers in the range of {array.dtype.name}"
        )
    if shape is not None and array.shape != tuple(shape):
        raise InputError(f"{name}: shape {array.shape}, expected {tuple(shape)}")
    array.setflags(write=False)
    return array


def numbered(*columns: npt.NDArray[Any]) -> Ints:
    """Number the distinct tuples across `columns` 0, 1, 2, … by first appearance; int32[U]."""
    labels = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, codes = np.unique(column, return_inverse=True)
        # Renumbered after every column, so that the product stays far below 2**63.
        labels = np.unique(labels * len(values) + codes, return_inverse=True)[1]
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[labels]


def slack(summands: Floats) -> float:
    """Return how far a sum may exceed its bound: 0 for whole numbers, else the rounding error."""
    if np.array_equal(summands, np.floor(summands)):
        return 0.0
    return ROUNDING * float(np.abs(summands).sum())
