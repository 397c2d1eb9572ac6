"""Variances of rows, by hand and on a tiny model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.neuron_variance import (
    MaxVar,
    RowVariance,
    max_variance,
    max_variances,
)
from bitknap.estimators.signals.scored import checked
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.apply import read_units
from bitknap.testing import tiny_model


def weights_alone(family, include=()):
    model = tiny_model(family)
    layout = walk(model, include)
    tensors = dict(model.named_parameters())
    evidence = Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=lambda which: read_units(layout, which, tensors).detach(),
        replay=None,
        provenance={},
    )
    return SimpleNamespace(layout=layout, evidence=evidence, units=layout.units)


@pytest.fixture(scope="module")
def case():
    return weights_alone("qwen2_moe", ("shared",))


# Row variances 1, 4 and 0; the last row is the longest though it does not vary at all.
HAND = torch.tensor([[[1.0, -1, 1, -1], [2, -2, -2, 2], [9, 9, 9, 9]]])


def test_max_variance_by_hand():
    assert max_variance(HAND).tolist() == [4]
    assert max_variance(HAND, largest_norm=True).tolist() == [0]
    # Without the constant row both see the same row; the code's variance is unbiased, 16 / 3.
    assert max_variance(HAND[:, :2], largest_norm=True).tolist() == pytest.approx([16 / 3])


def test_an_expert_has_the_max_var_of_its_first_matrix(case):
    score = MaxVar().score(case.evidence)
    own = MaxVar(first_only=False).score(case.evidence)
    experts = routed(case.units)
    gate = case.units.projection == case.units.projections.index("gate")
    for unit in np.flatnonzero(experts):
        same = (case.units.layer == case.units.layer[unit]) & experts & gate
        first = np.flatnonzero(same & (case.units.expert == case.units.expert[unit]))
        assert score[unit] == own[first[0]]
        expected = case.evidence.weights(first)[0].double().var(1, correction=0).max()
        assert score[unit] == pytest.approx(float(expected), rel=1e-6)
    assert np.array_equal(score[~experts], own[~experts])
    assert not np.array_equal(score, own)


def test_by_layer_it_is_the_same_number(case):
    score = MaxVar().score(case.evidence)
    for layer, values in max_variances(case.evidence).items():
        here = routed(case.units) & (case.units.layer == layer)
        np.testing.assert_allclose(values[case.units.expert[here]], score[here])
    unlike = max_variances(case.evidence, largest_norm=True)
    assert any((unlike[n] != v).any() for n, v in max_variances(case.evidence).items())


def test_experts_without_a_gate_start_with_up():
    case = weights_alone("nemotron_h")
    score = MaxVar().score(case.evidence)
    up = case.units.projection == case.units.projections.index("up")
    own = MaxVar(first_only=False).score(case.evidence)
    assert np.array_equal(score[up], own[up])
    assert [len(v) for v in max_variances(case.evidence).values()] == [4]


def test_row_variances_by_hand():
    # Variances 1, 4, 0: mean 5/3; population deviation sqrt(26/9); largest 4.
    found = {s: float(RowVariance(s)._of(HAND.double())) for s in ("mean", "spread", "peak")}
    assert found["mean"] == pytest.approx(5 / 3)
    assert found["spread"] == pytest.approx(np.sqrt(26) / 3 / (5 / 3))
    assert found["peak"] == pytest.approx(12 / 5)
    zeros = torch.zeros(1, 3, 4, dtype=torch.float64)
    assert [float(RowVariance(s)._of(zeros)) for s in ("mean", "spread", "peak")] == [0, 0, 1]


@pytest.mark.parametrize(
    "signal", [MaxVar(), RowVariance(), RowVariance("spread"), RowVariance("peak")]
)
def test_scores_are_sound(case, signal):
    score = checked(signal, case.evidence)
    assert len(set(score.tolist())) > 4
    assert signal.needs == frozenset()


def test_the_statistic_is_checked():
    assert RowVariance("peak").name == "row-variance-peak"
    with pytest.raises(InputError, match="statistic: 'median' is not one of mean, spread, peak"):
        RowVariance("median")  # type: ignore[arg-type]
