"""The Hessian trace by its definition."""

import pytest

from bitknap.estimators.published.hawq import HessianTrace


def test_hessian_trace_by_its_definition(case):
    score = HessianTrace().score(case.evidence)
    layer = case.evidence.layers[1]
    for name, sums in (("gate", layer.input_square), ("down", layer.middle_square)):
        expected = 2 * layer.shrunk(sums)[2].mean()
        assert score[case.pick(1, 2, name)] == pytest.approx(float(expected))
    curved = HessianTrace(curvature=True).score(case.evidence)
    expected = layer.shrunk(layer.curvature["up"])[3].mean()
    assert curved[case.pick(1, 3, "up")] == pytest.approx(float(expected))
