"""Matrix products in bfloat16: with weights and in attention, and nothing else."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from bitknap.allocation import formats
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring.language_model import compute_on, loaded
from bitknap.estimators.measuring.products import Products, exact_modules
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import HERE, Computing
from bitknap.testing import FAMILIES, tiny_model
from bitknap.testing.comparing import logits
from bitknap.testing.evidence import random_windows

OPTIONS = formats((2, 4), "row")
ROUNDED = Computing(dtype=torch.bfloat16)
TEXT = random_windows()


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


def grouped(x, stack):
    return functional.grouped_mm(x, stack, offs=torch.tensor([8, 16], dtype=torch.int32))


@pytest.mark.parametrize(
    "product", [functional.linear, torch.matmul, torch.Tensor.mm, functional.bilinear, grouped]
)
def test_factors_are_rounded_and_results_are_not(product, model):
    x, weight = torch.randn(16, 16), torch.nn.Parameter(torch.randn(16, 16))
    factors: tuple[torch.Tensor, ...]
    factors = (x, torch.randn(2, 16, 16)) if product is grouped else (x, weight)
    if product is functional.bilinear:  # a product that nobody listed stays exact
        factors = (x, x, torch.randn(2, 16, 16))
    listed = product is not functional.bilinear
    with torch.no_grad():
        expected = product(*(one.bfloat16() if listed else one for one in factors))
        with Products(model):
            found = product(*factors)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_grouped_products_of_odd_sizes_stay_exact(model):
    """torch refuses them in bfloat16; no real model has experts of such sizes."""
    x, stack = torch.randn(16, 12), torch.randn(2, 12, 16)
    with Products(model):
        found = grouped(x, stack)
    assert torch.equal(found, grouped(x, stack))


def test_float64_stays(model):
    x = torch.randn(4, 4, dtype=torch.float64)
    with Products(model):
        assert torch.equal(functional.linear(x, x), x @ x.T)


def test_products_without_weights_are_exact(model):
    """Such as those that compute positions, and sums of squares."""
    x, places = torch.randn(4, 1), torch.arange(257.0)[None]
    with Products(model):
        assert torch.equal(x @ places, x * places)
        assert torch.equal(x.T @ x, x.square().sum()[None, None])


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "jetmoe")])
def test_families_run(family):
    one = tiny_model(family)
    assert len(exact_modules(one)) == 1 + len(walk(one).layers)  # routers and the head
    exact = logits(one)
    with Products(one):
        rounded = logits(one)
    # Experts that a router chooses otherwise change more than roundings do.
    assert 0 < (rounded - exact).abs().max() < 0.2 * exact.abs().max()


def test_routers_and_the_head_are_exact(model):
    products, x = Products(model), torch.randn(4, model.config.hidden_size)
    router, head = model.model.layers[0].mlp.gate, model.lm_head
    for module in (router, head):
        expected = functional.linear(x, module.weight)
        with torch.no_grad(), products:
            made = module(x)
            assert torch.equal(made[0] if isinstance(made, tuple) else made, expected)
            with pytest.raises(RuntimeError):
                module(x[:, :-1])
            # An error in one leaves no trace.
            assert not torch.equal(functional.linear(x, module.weight), expected)


def test_a_model_computes_so_until_it_is_told_otherwise():
    one, windows = tiny_model("mixtral"), TEXT
    exact = calibrate(one, walk(one), windows)
    compute_on(one, ROUNDED)
    rounded = calibrate(one, walk(one), windows)
    compute_on(one, HERE)
    again = calibrate(one, walk(one), windows)
    first = min(exact.layers)
    assert again.layers[first].gain == exact.layers[first].gain != rounded.layers[first].gain
    for layer in rounded.layers.values():
        assert layer.input_square.dtype == layer.middle_square.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_costs_are_about_the_same_in_both_ways(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    everything = Recorded(full=True, curvature=True, streams=True)
    exact, rounded = (
        calibrate(one, walk(one), TEXT, everything)
        for one in (loaded(tmp_path, where) for where in (HERE, ROUNDED))
    )
    skeleton = Skeleton(Checkpoint.open(tmp_path), where=ROUNDED)
    layered = calibrate_by_layer(skeleton, TEXT, everything)
    for made in (SecondMoments(), Fisher(), Calibrated()):
        ours, others, expected = (made.estimate(x, OPTIONS) for x in (rounded, layered, exact))
        # Which way a product is rounded depends on the last digit of what came before.
        np.testing.assert_allclose(others.cost, ours.cost, rtol=0.03)
        np.testing.assert_allclose(ours.cost.sum(0), expected.cost.sum(0), rtol=0.05)
        assert not np.array_equal(ours.cost, expected.cost)


def test_logits_are_near_those_in_float32(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    one = loaded(tmp_path, ROUNDED)
    exact = logits(one)
    with Products(one):
        rounded = logits(one)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
