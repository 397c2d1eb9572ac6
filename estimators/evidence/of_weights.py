"""Evidence of weights alone, for estimators that need no text."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor

from bitknap.estimators.evidence.evidence import Evidence
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.source import Source
from bitknap.quantization.stacks.reading import read_stored


def of_weights(
    source: Source, include: Collection[str] = (), *, rounding: Rounding = RTN, seed: int = 0
) -> Evidence:
    """Return evidence that holds a source's weights and no statistics of a text.

    Args:
        source: a checkpoint, or anything else that reads matrices.
        include: roles in addition to routed experts: "attention", "shared", "dense".
        rounding: how weights will be rounded; costs are charged for this method.
        seed: random seed, recorded in the provenance of tables.

    Raises:
        ModelError: the source has no units of these roles.
    """
    layout = walk_headers(source.config, source.shapes, include)

    def weights(which: np.ndarray) -> Tensor:
        return read_stored(layout, which, source)

    return Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=weights,
        replay=None,
        provenance={"model": source.fingerprint, "seed": seed},
        rounding=rounding,
    )
