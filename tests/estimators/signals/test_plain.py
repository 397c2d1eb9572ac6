"""Plain signals by hand."""

import numpy as np
import pytest
import torch

from bitknap.errors import InputError
from bitknap.estimators.signals.plain import Kurtosis, RandomScore, RowVariance, Uniform
from bitknap.estimators.signals.scored import checked


def test_uniform_and_random(case):
    assert (Uniform().score(case.bare) == 1).all()
    drawn = RandomScore(3).score(case.bare)
    assert np.array_equal(drawn, RandomScore(3).score(case.bare))
    assert not np.array_equal(drawn, RandomScore(4).score(case.bare))
    assert len(set(drawn.tolist())) == len(case.units)


def test_kurtosis_by_hand(evidence_of):
    # ±1 has kurtosis 1; one 3 among eight zeros has mean 1/3 and kurtosis 7.125.
    weights = torch.zeros(3, 3, 3)
    weights[0, 0, 0] = 3
    weights[1] = torch.tensor([1.0, -1, 1]) * torch.tensor([[1.0], [-1], [0]])
    score = Kurtosis().score(evidence_of(weights))
    variance, fourth = 8 / 9, (8 * (1 / 3) ** 4 + (8 / 3) ** 4) / 9
    assert score[0] == pytest.approx(fourth / variance**2)
    assert score[2 * 3] == 3  # zeros count as Gaussian
    sample = torch.randn(1, 300, 300, generator=torch.Generator().manual_seed(0))
    assert Kurtosis().score(evidence_of(sample))[0] == pytest.approx(3, rel=0.05)


# Row variances 1, 4 and 0; the last row is the longest though it does not vary at all.
HAND = torch.tensor([[[1.0, -1, 1, -1], [2, -2, -2, 2], [9, 9, 9, 9]]])


def test_row_variances_by_hand():
    # Variances 1, 4, 0: mean 5/3; population deviation sqrt(26/9); largest 4.
    found = {s: float(RowVariance(s)._of(HAND.double())) for s in ("mean", "spread", "peak")}
    assert found["mean"] == pytest.approx(5 / 3)
    assert found["spread"] == pytest.approx(np.sqrt(26) / 3 / (5 / 3))
    assert found["peak"] == pytest.approx(12 / 5)
    zeros = torch.zeros(1, 3, 4, dtype=torch.float64)
    assert [float(RowVariance(s)._of(zeros)) for s in ("mean", "spread", "peak")] == [0, 0, 1]


def test_the_statistic_is_checked():
    assert RowVariance("peak").name == "row-variance-peak"
    with pytest.raises(
        InputError, match="statistic 'median' is unknown; one of mean, spread, peak"
    ):
        RowVariance("median")  # type: ignore[arg-type]


@pytest.mark.parametrize("statistic", ["mean", "spread", "peak"])
def test_row_variances_are_sound(case, statistic):
    score = checked(RowVariance(statistic), case.bare)
    assert len(set(score.tolist())) > 4
    assert RowVariance(statistic).needs == frozenset()
