"""Windows of a batch run together, or fewer at a time where a device's memory runs out.

What does not fit is begun again with half as many windows at a time, down to one. How many fit is
kept with the model, so that later batches do not fail again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bitknap.errors import BitknapWarning, DeviceMemoryError
from bitknap.estimators.measuring.freed_memory import give_back
from bitknap.estimators.measuring.language_model import device_of
from bitknap.estimators.measuring.windows import Windows

T = TypeVar("T")
# Set on a model: the windows that fit at a time if memory ran out, and those that ran last.
_MOST, _LAST = "_bitknap_windows_at_a_time", "_bitknap_windows_of_last_batch"


def portions(model: Any, batch: Windows) -> list[slice]:
    """Return the rows of a batch that run at a time."""
    count = len(batch)
    most = min(count, getattr(model, _MOST, count))
    setattr(model, _LAST, (most, batch.shape[1]))
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def batches_of(model: Any, windows: Windows, tokens: int) -> list[Windows]:
    """Return windows in batches of about `tokens` tokens, or of as many windows as fit."""
    return [batch[rows] for batch in windows.batches(tokens) for rows in portions(model, batch)]


def until_it_fits(
    model: Any, work: Callable[[], T], again: Callable[[], object] | None = None
) -> T:
    """Return what work on `portions` returns; after a lack of memory it begins anew, with less.

    Args:
        model: the model that runs.
        work: what to do.
        again: undoes what was done of it.

    Raises:
        DeviceMemoryError: one window at a time does not fit.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            pass  # here the error is gone, and what its frames held
        _halve(model)
        if again is not None:
            again()


def _halve(model: Any) -> None:
    device = device_of(model)
    count, length = getattr(model, _LAST, (1, 0))
    if count == 1:
        raise DeviceMemoryError(
            f"{device}: out of memory with one window of {length:,} tokens at a time; compute "
            "with `device=cpu`"
        )
    setattr(model, _MOST, count // 2)
    give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    warnings.warn(
        f"{device}: out of memory with {count} windows of {length:,} tokens at a time; going on "
        f"with {count // 2}",
        BitknapWarning,
        stacklevel=2,
    )
