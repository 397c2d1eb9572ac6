"""MC-MoE's signals by their definition."""

import numpy as np
import pytest

from bitknap.errors import InputError
from bitknap.estimators.published.mc_moe import Frequency, McMoe, RoutingWeight
from bitknap.testing.evidence import UNSEEN


def test_frequency_is_the_shrunk_share_of_tokens(case):
    score = Frequency().score(case.evidence)
    for number, layer in case.evidence.layers.items():
        here = case.units.layer == number
        # 16 pseudo-tokens spread over 5 experts.
        share = (layer.count.numpy() + 16 / 5 * 1) / (layer.tokens + 16)
        np.testing.assert_allclose(score[here], share[case.units.expert[here]], rtol=1e-9)
        assert score[here].min() == score[case.pick(number, UNSEEN, "up")]


def test_mc_moe_is_the_product(case):
    score = McMoe().score(case.evidence)
    flat = McMoe(alpha=0, beta=0).score(case.evidence)
    assert (flat == 1).all()
    frequency, weight = Frequency().score(case.evidence), RoutingWeight().score(case.evidence)
    for number in case.evidence.layers:
        here = case.units.layer == number
        phi, w = (x[here] / x[here].mean() for x in (frequency, weight))
        np.testing.assert_allclose(score[here], phi * w**1.5)
    with pytest.raises(InputError, match=r"mc-moe: exponents nan and 1.5 must be finite"):
        McMoe(alpha=float("nan"))
