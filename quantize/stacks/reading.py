"""Read the weights of a stack, of a live model or of a checkpoint, and refuse NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bitknap.errors import ModelError
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.source.source import Source


def read_units(layout: Layout, which: np.ndarray, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weights of equally shaped units, float32 [n, rows, cols].

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    weights = torch.stack([layout.views[i].of(tensors[layout.views[i].tensor]) for i in which])
    return _finite(layout, which, weights.float())


def read_stored(
    layout: Layout, which: np.ndarray, source: Source, rows: slice | None = None
) -> Tensor:
    """Return `read_units` of a source, reading one matrix at a time and little else.

    Args:
        layout: walked on the source's shapes.
        which: equally shaped units.
        source: a checkpoint, or anything else that reads matrices.
        rows: which output rows of each unit, by start and stop; all when not given.

    Raises:
        ModelError: a weight is NaN or infinite.
        FileError: a file has shrunk since it was opened.
    """
    units = layout.units
    part = slice(0, int(units.rows[which[0]])) if rows is None else rows
    weights = torch.empty(len(which), part.stop - part.start, int(units.cols[which[0]]))
    for place, unit in enumerate(which):
        view = layout.views[unit]
        weights[place] = source.read_matrix(
            view if rows is None else view.rows(part.start, part.stop)
        )
    return _finite(layout, which, weights)


def _finite(layout: Layout, which: np.ndarray, weights: Tensor) -> Tensor:
    if not all_finite(weights):
        bad = which[int((~torch.isfinite(weights)).flatten(1).any(1).nonzero()[0])]
        raise ModelError(
            f"{layout.views[bad].tensor}: NaN or infinite weight in "
            f"{layout.units.label(int(bad))}; "
            "repair the checkpoint before quantizing it"
        )
    return weights


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one sweep and without a copy."""
    # `aminmax` returns NaN if any value is NaN.
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
