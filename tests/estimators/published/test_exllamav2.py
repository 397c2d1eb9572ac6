"""ExLlamaV2's relative error by its definition."""

import numpy as np
import pytest
import torch

from bitknap.allocation import Format
from bitknap.estimators.published.exllamav2 import Exl2Score
from bitknap.quantization.rounding.methods import round_trip

NARROW = Format(3, 8)


def test_exl2_by_its_definition(case):
    unit = case.pick(1, 0, "down")
    layer = case.evidence.layers[1]
    weights = case.evidence.weights(np.array([unit]))
    error = (round_trip(weights, NARROW) - weights)[0].double()
    whole = weights[0].double()
    s = layer.shrunk(layer.middle_full)[0]
    d = torch.diag(layer.shrunk(layer.middle_square)[0])
    for full, moments in ((True, s), (False, d)):
        expected = (torch.trace(error @ moments @ error.T)) / torch.trace(whole @ moments @ whole.T)
        score = Exl2Score(NARROW, full).score(case.evidence)
        assert score[unit] == pytest.approx(float(expected) ** 0.5, rel=1e-5)
    # More bits, less error, for every unit.
    wider = Exl2Score(Format(6, 8)).score(case.evidence)
    assert (wider < Exl2Score(NARROW).score(case.evidence)).all()
