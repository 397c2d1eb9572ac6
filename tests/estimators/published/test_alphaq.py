"""Hill's estimate, and spectra that were made to have tails."""

import numpy as np
import pytest
import torch

from bitknap.errors import InputError
from bitknap.estimators.published.alphaq import AlphaQ, hill
from bitknap.estimators.signals.unit_statistics import routed


def test_hill_finds_a_power_law():
    # Density ~ x^-a from 1 on: x = u^(-1 / (a - 1)).
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for alpha in (2.0, 3.5):
        assert float(hill(u ** (-1 / (alpha - 1)))) == pytest.approx(alpha, rel=0.01)
    # By hand: the largest of two, 1 + 1 / ln(e).
    assert float(hill(torch.tensor([1.0, np.e]))) == pytest.approx(2)
    assert torch.isnan(hill(torch.tensor([1.0])))
    assert torch.isnan(hill(torch.ones(5)))


def test_alphaq_gives_heavy_tails_more(evidence_of):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 16, 24, generator=generator)
    spikes = torch.randn(16, 1, generator=generator) @ torch.randn(1, 24, generator=generator)
    weights[2] += 3 * spikes
    evidence = evidence_of(weights)
    signal = AlphaQ(tail=0.3, tile=8)
    score = signal.score(evidence)
    experts = routed(evidence.units)
    assert experts.all()
    of_expert = [score[evidence.units.expert == e][0] for e in range(3)]
    assert int(np.argmax(of_expert)) == 2
    alpha = signal.indices(weights.double()).numpy()
    np.testing.assert_allclose(of_expert, np.median(np.repeat(alpha, 3)) / alpha)
    np.testing.assert_allclose(AlphaQ(3.0, 0.3, 8).score(evidence), score**3)
    # A factor on a matrix changes nothing, and neither does gamma 0.
    np.testing.assert_allclose(AlphaQ(tail=0.3, tile=8).score(evidence_of(5 * weights)), score)
    assert (AlphaQ(0.0).score(evidence) == 1).all()


def test_alphaq_takes_evenly_spaced_tiles():
    # 2 × 3 whole tiles of 8 in 16 × 24; with two of them, the first and the fourth.
    weights = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(2)).double()
    every = [weights[0, i : i + 8, j : j + 8] for i in (0, 8) for j in (0, 8, 16)]
    for most, chosen in ((6, every), (2, [every[0], every[3]])):
        values = torch.cat([torch.linalg.svdvals(tile).square() for tile in chosen])
        assert float(AlphaQ(tile=8, most=most).indices(weights)) == pytest.approx(
            float(hill(values))
        )
    whole = torch.linalg.svdvals(weights[0]).square()
    assert float(AlphaQ().indices(weights)) == pytest.approx(float(hill(whole)))


def test_alphaq_without_a_spectrum_says_nothing(evidence_of):
    assert (AlphaQ().score(evidence_of(torch.zeros(2, 4, 4))) == 1).all()
    for wrong in ({"gamma": np.inf}, {"tail": 1.0}, {"tile": 1}, {"most": 0}):
        with pytest.raises(InputError, match=r"gamma|tail|tile"):
            AlphaQ(**wrong)
