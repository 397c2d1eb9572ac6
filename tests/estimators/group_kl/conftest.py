"""A table of equally large units, for fits and checks."""

import numpy as np
import pytest

from bitknap.allocation import CostTable, Units, formats

FORMATS = formats((1, 2, 3, 4), "row", keep="fp32")
LAYERS, EXPERTS, PROJECTIONS = 4, 8, ("gate", "up", "down")


def made_units():
    keys = [(n, e, p) for n in range(LAYERS) for p in PROJECTIONS for e in range(EXPERTS)]
    return Units.build(
        layer=[x[0] for x in keys],
        role=["routed"] * len(keys),
        expert=[x[1] for x in keys],
        projection=[x[2] for x in keys],
        rows=[32] * len(keys),
        cols=[64] * len(keys),
    )


@pytest.fixture(scope="module")
def table():
    units = made_units()
    size = np.random.default_rng(0).lognormal(-7, 0.5, len(units))
    curve = np.array([30.0, 8.0, 2.0, 0.5, 0.0])
    return CostTable.from_arrays(
        size[:, None] * curve, units=units, formats=FORMATS, provenance={"unit": "score"}
    )
