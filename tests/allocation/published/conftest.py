"""A table that the tests of several published allocators share."""

from collections.abc import Callable

import numpy as np
import pytest

from bitknap.allocation import (
    CostTable,
    Units,
    formats,
)


@pytest.fixture
def model() -> Callable[..., CostTable]:
    """Return what makes a table of layers with experts."""
    return _model


def _model(layers: int = 3, experts: int = 4, seed: int = 0) -> CostTable:
    """Errors that fall with bits, two shapes, an easy and a hard layer."""
    keys = [
        (layer, expert, name)
        for layer in range(layers)
        for expert in range(experts)
        for name in ("gate", "up", "down")
    ]
    units = Units.build(
        layer=[x[0] for x in keys],
        role=["routed"] * len(keys),
        expert=[x[1] for x in keys],
        projection=[x[2] for x in keys],
        rows=[128 if x[2] == "down" else 64 for x in keys],
        cols=[64 if x[2] == "down" else 128 for x in keys],
    )
    generator = np.random.default_rng(seed)
    scale = generator.lognormal(0, 1, (len(keys), 1)) * 4.0 ** (units.layer[:, None])
    cost = scale * 4.0 ** -np.array([2, 3, 4]) * generator.lognormal(0, 0.2, (len(keys), 3))
    return CostTable.from_arrays(cost, units=units, formats=formats(bits=(2, 3, 4), group_size=64))
