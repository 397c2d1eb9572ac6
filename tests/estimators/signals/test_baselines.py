"""Baselines: each by hand or by its definition, all of them sound on a tiny model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.baselines import (
    AlphaQ,
    AutoRoundScore,
    Exl2Score,
    Frequency,
    HessianTrace,
    Kurtosis,
    McMoe,
    OutlierRatio,
    Owq,
    RandomScore,
    RoutingWeight,
    Uniform,
)
from bitknap.estimators.signals.scored import Scored, checked
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.estimators.signals.weight_signals import hill
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import read_units
from bitknap.testing import tiny_model

UNSEEN = 4
NARROW = Format(3, 8)
ALONE = (Uniform(), RandomScore(), Kurtosis(), OutlierRatio(), AlphaQ(), AlphaQ(tile=4, most=5))
SEEING = (
    Frequency(),
    RoutingWeight(),
    McMoe(),
    HessianTrace(),
    HessianTrace(curvature=True),
    Owq(),
    Exl2Score(),
    Exl2Score(full=True),
    AutoRoundScore(),
)


@pytest.fixture(scope="module")
def case():
    """A model whose last expert never sees a token."""
    model = tiny_model("mixtral", num_local_experts=5, num_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1], router[3], router[UNSEEN] = -router[0], -router[2], 0
    layout = walk(model)
    tensors = dict(model.named_parameters())
    windows = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    bare = Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=lambda which: read_units(layout, which, tensors).detach(),
        replay=None,
        provenance={},
    )
    evidence = calibrate(model, layout, windows, full=True, curvature=True)
    plain = calibrate(model, layout, windows[:1])
    return SimpleNamespace(
        layout=layout, bare=bare, evidence=evidence, plain=plain, units=layout.units
    )


def pick(case, layer, expert, projection):
    units = case.units
    at = units.projections.index(projection)
    here = (units.layer == layer) & (units.expert == expert) & (units.projection == at)
    return int(np.flatnonzero(here)[0])


@pytest.mark.parametrize("signal", [*ALONE, *SEEING], ids=repr)
def test_scores_are_sound(case, signal):
    score = checked(signal, case.evidence)
    assert np.array_equal(score, checked(signal, case.evidence))
    assert (score[case.units.expert == UNSEEN] > 0).all()
    table = Scored(signal).estimate(case.evidence, formats((2, 4), 8))
    assert (table.cost > 0).all()
    assert (np.diff(table.cost, axis=1) < 0).all()
    assert table.provenance["estimator"] == f"scored({signal.name})"


@pytest.mark.parametrize("signal", ALONE, ids=repr)
def test_weights_are_enough_for_some(case, signal):
    assert signal.needs == frozenset()
    assert np.array_equal(signal.score(case.bare), signal.score(case.evidence))


@pytest.mark.parametrize("signal", SEEING, ids=repr)
def test_others_ask_for_a_pass(case, signal):
    assert signal.needs
    with pytest.raises(InputError, match="calibrat"):
        signal.score(case.bare)


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (HessianTrace(curvature=True), "curvature=True"),
        (AutoRoundScore(), "curvature=True"),
        (Exl2Score(full=True), "full=True"),
    ],
    ids=repr,
)
def test_what_was_not_recorded_is_asked_for(case, signal, message):
    with pytest.raises(InputError, match=message):
        signal.score(case.plain)


def test_names_are_distinct():
    names = [signal.name for signal in (*ALONE[:5], *SEEING)]
    assert len(set(names)) == len(names) - 2  # two signals come in two kinds


def test_uniform_and_random(case):
    assert (Uniform().score(case.bare) == 1).all()
    drawn = RandomScore(3).score(case.bare)
    assert np.array_equal(drawn, RandomScore(3).score(case.bare))
    assert not np.array_equal(drawn, RandomScore(4).score(case.bare))
    assert len(set(drawn.tolist())) == len(case.units)


def test_frequency_is_the_shrunk_share_of_tokens(case):
    score = Frequency().score(case.evidence)
    for number, layer in case.evidence.layers.items():
        here = case.units.layer == number
        # 16 pseudo-tokens spread over 5 experts.
        share = (layer.count.numpy() + 16 / 5 * 1) / (layer.tokens + 16)
        np.testing.assert_allclose(score[here], share[case.units.expert[here]], rtol=1e-9)
        assert score[here].min() == score[pick(case, number, UNSEEN, "up")]


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


def test_hessian_trace_by_its_definition(case):
    score = HessianTrace().score(case.evidence)
    layer = case.evidence.layers[1]
    for name, sums in (("gate", layer.input_square), ("down", layer.middle_square)):
        expected = 2 * layer.shrunk(sums)[2].mean()
        assert score[pick(case, 1, 2, name)] == pytest.approx(float(expected))
    curved = HessianTrace(curvature=True).score(case.evidence)
    expected = layer.shrunk(layer.curvature["up"])[3].mean()
    assert curved[pick(case, 1, 3, "up")] == pytest.approx(float(expected))


def test_owq_by_its_definition(case):
    unit = pick(case, 0, 1, "down")
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


def test_autoround_by_its_definition(case):
    unit = pick(case, 0, 2, "gate")
    layer = case.evidence.layers[0]
    weights = case.evidence.weights(np.array([unit]))
    error = (round_trip(weights, NARROW) - weights)[0].double().abs()
    expected = (layer.shrunk(layer.curvature["gate"])[2].sqrt() * error).mean()
    score = AutoRoundScore(NARROW).score(case.evidence)
    assert score[unit] == pytest.approx(float(expected))


def test_exl2_by_its_definition(case):
    unit = pick(case, 1, 0, "down")
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


def test_formats_that_round_nothing_are_refused(case):
    for signal in (Owq, AutoRoundScore, Exl2Score):
        with pytest.raises(InputError, match="keep-bf16 rounds nothing; give a grid"):
            signal(Format.keep("bf16")).score(case.evidence)


def evidence_of(weights):
    """Return evidence of one stack of matrices that were given."""
    count = len(weights)
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=count, num_experts=count)
    layout = walk(model)
    return Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=lambda which: weights[: len(which)],
        replay=None,
        provenance={},
    )


def test_kurtosis_by_hand():
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


def test_outlier_ratio_by_hand():
    # Columns (1, 1), (1, 3), (0, 0): ratios 1, 1.5 and 1.
    weights = torch.tensor([[[1.0, 1, 0], [-1, 3, 0]]])
    assert OutlierRatio().score(evidence_of(weights))[0] == pytest.approx(1.5)


def test_hill_finds_a_power_law():
    # Density ~ x^-a from 1 on: x = u^(-1 / (a - 1)).
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for alpha in (2.0, 3.5):
        assert float(hill(u ** (-1 / (alpha - 1)))) == pytest.approx(alpha, rel=0.01)
    # By hand: the largest of two, 1 + 1 / ln(e).
    assert float(hill(torch.tensor([1.0, np.e]))) == pytest.approx(2)
    assert torch.isnan(hill(torch.tensor([1.0])))
    assert torch.isnan(hill(torch.ones(5)))


def test_alphaq_gives_heavy_tails_more():
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


def test_alphaq_without_a_spectrum_says_nothing():
    assert (AlphaQ().score(evidence_of(torch.zeros(2, 4, 4))) == 1).all()
    for wrong in ({"gamma": np.inf}, {"tail": 1.0}, {"tile": 1}, {"most": 0}):
        with pytest.raises(InputError, match=r"gamma|tail|tile"):
            AlphaQ(**wrong)
