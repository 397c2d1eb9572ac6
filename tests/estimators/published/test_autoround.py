"""AutoRound's score by its definition."""

import numpy as np
import pytest

from bitknap.allocation import Format
from bitknap.estimators.published.autoround import AutoRoundScore
from bitknap.quantization.rounding.methods import round_trip

NARROW = Format(3, 8)


def test_autoround_by_its_definition(case):
    unit = case.pick(0, 2, "gate")
    layer = case.evidence.layers[0]
    weights = case.evidence.weights(np.array([unit]))
    error = (round_trip(weights, NARROW) - weights)[0].double().abs()
    expected = (layer.shrunk(layer.curvature["gate"])[2].sqrt() * error).mean()
    score = AutoRoundScore(NARROW).score(case.evidence)
    assert score[unit] == pytest.approx(float(expected))
