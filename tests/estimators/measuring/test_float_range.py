"""Costs of weights of any magnitude: those of the same function are the same, and none is NaN."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import formats
from bitknap.errors import ModelError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.measuring.float_range import (
    added,
    fits,
    narrowed,
    second_moments,
    squares_product,
    weighed_squares,
)
from bitknap.estimators.named import named
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_gains import gain_of
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import Gptq
from bitknap.testing import tiny_model

OPTIONS = formats((2, 4), 32)
IDS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(3))


def evidence_of(up=1.0, experts=None, **recorded):
    """Calibrate a model whose up projections are multiplied, and down's divided, by a factor."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            for expert in range(len(down)) if experts is None else experts:
                gate_up[expert, down.shape[2] :] *= up
                down[expert] /= up
    return calibrate(model, walk(model), IDS, Recorded(**recorded))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [None, [1]])
@pytest.mark.parametrize("up", [1e-7, 1e-20, 1e20])
@pytest.mark.parametrize("name", ["moments", "fisher"])
def test_the_same_function_costs_the_same(name, up, experts, plain):
    recorded = {"curvature": True} if name == "fisher" else {}
    found = named([name]).estimate(evidence_of(up, experts, **recorded), OPTIONS).cost
    expected = plain[name]
    assert np.isfinite(found).all()
    # An expert of another magnitude is shrunk to its layer in its own, which is near to the same.
    assert found.sum() == pytest.approx(expected.sum(), rel=1e-3 if experts is None else 5e-3)
    assert np.abs(found / expected - 1).max() < (0.02 if experts is None else 0.2)


@pytest.fixture(scope="module")
def plain():
    # Gradients draw labels from the generator that gains draw their noise from.
    seen = {"moments": evidence_of(), "fisher": evidence_of(curvature=True)}
    return {name: named([name]).estimate(seen[name], OPTIONS).cost for name in seen}


@pytest.mark.parametrize("up", [1e-20, 1e20])
def test_whole_moments_and_gptq_too(up):
    costs = []
    for factor in (1.0, up):
        evidence = evidence_of(factor, full=True)
        for table in (
            SecondMoments(full=True).estimate(evidence, OPTIONS),
            SecondMoments(full=True).estimate(replaced(evidence), OPTIONS),
        ):
            assert np.isfinite(table.cost).all()
            costs.append(table.cost.sum())
    assert costs[2:] == pytest.approx(costs[:2], rel=5e-3)


def replaced(evidence):
    return replace(evidence, rounding=Gptq())


@pytest.mark.parametrize("name", ["weight-error", "data-free", "kurtosis", "autoround"])
def test_other_costs_are_numbers(name):
    for up in (1e-20, 1e20):
        evidence = evidence_of(up, [0], curvature=True)
        assert np.isfinite(named([name]).estimate(evidence, OPTIONS).cost).all()


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_gain_that_is_no_number_is_said(kl):
    class Layer:
        layer = 3

    class Sums:
        layer = Layer()

    with pytest.raises(ModelError, match=r"layer 3: the KL is (nan|inf) when noise is added"):
        gain_of(kl, Sums())  # type: ignore[arg-type]


@pytest.mark.parametrize("recorded", [{}, {"curvature": True}])
def test_a_model_whose_output_is_no_number_is_said(recorded):
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.mul_(1e20)
            layer.mlp.experts.down_proj.mul_(1e20)
    with pytest.raises(ModelError, match=r"own output leaves|output is NaN or infinite"):
        calibrate(model, walk(model), IDS, Recorded(**recorded))


def test_ordinary_numbers_stay_in_float32():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert fits(x) and fits(torch.zeros(2, 3)) and fits(x[:0])
    assert narrowed(x.double()).dtype == torch.float32
    assert torch.equal(second_moments(x), x.T @ x)
    assert torch.equal(squares_product(x, x[:, :2]), x.square().T @ x[:, :2].square())
    assert torch.equal(weighed_squares(x, x.abs()), x.square() * x.abs())
    assert added(torch.zeros(2, 4), 1, x[0]).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_others_go_to_float64(size):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    large = x * size
    for found, plain, power in (
        (second_moments(large), x.T @ x, 2),
        (squares_product(large, x), x.square().T @ x.square(), 2),
        (squares_product(large, large), x.square().T @ x.square(), 4),
        (weighed_squares(large, x.abs()), x.square() * x.abs(), 2),
    ):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found / size**power, plain.double(), rtol=1e-4, atol=1e-6)
    one_of_two = torch.stack([x, large])
    assert not fits(one_of_two)
    assert added(torch.zeros(2, 4), 1, large[0].double()).dtype == torch.float64
