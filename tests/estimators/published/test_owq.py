"""OWQ by its definition."""

import numpy as np
import pytest

from bitknap.allocation import Format
from bitknap.errors import InputError
from bitknap.estimators.published.owq import Owq
from bitknap.quantization.rounding.methods import round_trip

NARROW = Format(3, 8)


def test_owq_by_its_definition(case):
    unit = case.pick(0, 1, "down")
    layer = case.evidence.layers[0]
    weights = case.evidence.weights(np.array([unit]))
    error = (round_trip(weights, NARROW) - weights)[0].double().square().sum(0) / weights.shape[1]
    columns = 2 * layer.shrunk(layer.middle_square)[1] * error
    worst = columns.sort(descending=True).values
    # 24 columns: one is the worst hundredth, twelve are half.
    one, half = (Owq(NARROW, share).score(case.evidence)[unit] for share in (0.01, 0.5))
    assert one == pytest.approx(float(worst[0]))
    assert half == pytest.approx(float(worst[:12].mean()))
    with pytest.raises(InputError, match="share: 0 is not above 0 and at most 1"):
        Owq(share=0)
