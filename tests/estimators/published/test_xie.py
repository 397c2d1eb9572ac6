"""Channels: scores by hand, blocks that add up, and the claim about down projections."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Budget, CostTable, Format, Problem, formats, solve
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import distortion
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.published.xie import (
    ChannelScore,
    channel_scores,
    channel_table,
    down_needs_more,
    neuron_scores,
)
from bitknap.estimators.signals.scored import checked
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.stacks.row_blocks import block_units
from bitknap.testing import tiny_model
from bitknap.testing.evidence import random_windows, weights_alone

FORMATS = formats((1, 3), (8, "row"), (False, True), ("fp16", "compact"), keep="fp32")


@pytest.fixture(scope="module")
def case():
    model = tiny_model("mixtral")
    bare = weights_alone(model, seed=0)
    curved = calibrate(model, bare.layout, random_windows(4), Recorded(curvature=True))
    return SimpleNamespace(layout=bare.layout, bare=bare, curved=curved, units=bare.units)


def test_scores_by_hand():
    # Row 0: ±1. Row 1: nine zeros and a 10, mean 1, variance 9, root mean square sqrt(10); with
    # k = 2 its 10 is an outlier, three deviations from the mean.
    weights = torch.tensor([[[1.0, -1] * 5, [10.0] + [0.0] * 9]])
    kv = np.array([1 * 1, 10 / np.sqrt(10) * 9])
    outliers = np.array([0.5, 1.5]) / 11
    for alpha in (0.0, 0.25, 1.0):
        expected = alpha * kv / kv.mean() + (1 - alpha) * outliers / outliers.mean()
        found = channel_scores(weights, alpha, k=2.0)[0].numpy()
        np.testing.assert_allclose(found, expected)
        assert found.mean() == pytest.approx(1)
    # Ten weights cannot hold one more than three deviations away.
    assert channel_scores(weights, 0.0, k=3.0).tolist() == [[1, 1]]


def test_scale_and_order_do_not_matter():
    weights = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1))
    score = channel_scores(weights)
    torch.testing.assert_close(channel_scores(-7 * weights), score)
    torch.testing.assert_close(channel_scores(weights[:, [3, 1, 2, 0, 5, 4]])[:, 3], score[:, 0])
    assert (score > 0).all()


def test_zeros_score_one():
    assert channel_scores(torch.zeros(1, 2, 8)).tolist() == [[1, 1]]


def test_a_bad_channel_stands_out(case):
    weights = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    weights[0, 5, 7] = 12
    assert int(channel_scores(weights).argmax()) == 5
    score = checked(ChannelScore(), case.bare)
    assert (score >= 1).all()
    expected = channel_scores(case.bare.weights(np.array([4])))[0].square().mean().sqrt()
    assert score[4] == pytest.approx(float(expected))


@pytest.mark.parametrize(("alpha", "k"), [(-0.1, 3), (1.1, 3), (0.5, 0)])
def test_constants_are_checked(alpha, k):
    for make in (ChannelScore, lambda a, b: channel_scores(torch.ones(1, 2, 2), a, b)):
        with pytest.raises(InputError, match=r"is not from 0 to 1|must be above 0"):
            make(alpha, k)


@pytest.mark.parametrize("blocks", [1, 3, 24])
def test_blocks_of_a_matrix_cost_what_it_costs_whole(case, blocks):
    for evidence in (case.bare, case.curved):
        whole = channel_table(evidence, FORMATS, blocks=1)
        table = channel_table(evidence, FORMATS, blocks=blocks)
        _, source = block_units(case.units, blocks)
        summed = np.zeros_like(whole.cost)
        np.add.at(summed, source, table.cost)
        np.testing.assert_allclose(summed, whole.cost, rtol=1e-6)
        assert (table.cost[:, :-1] > 0).all()
        assert not table.cost[:, -1].any()
        expected = [f.nbytes(table.units.rows, table.units.cols) for f in FORMATS]
        assert np.array_equal(table.nbytes, np.stack(expected, 1))


def test_with_gradients_costs_are_fishers(case):
    table = channel_table(case.curved, FORMATS, blocks=1)
    np.testing.assert_allclose(table.cost, Fisher().estimate(case.curved, FORMATS).cost, rtol=1e-5)
    assert table.provenance["unit"] == "nats/token"
    blocks = channel_table(case.curved, FORMATS, blocks=4)
    assert blocks.frequency is not None
    assert table.frequency is not None
    assert blocks.frequency.tolist() == table.frequency.repeat(4).tolist()


def test_without_gradients_they_only_rank(case):
    table = channel_table(case.bare, FORMATS, blocks=2)
    assert dict(table.provenance) == {
        "seed": 0,
        "method": "rtn",
        "unit": "score",
        "estimator": "channel",
        "blocks": 2,
    }
    assert table.frequency is None


def test_rows_by_hand(case):
    # One row a unit: score × variance × weights, the same ratio in every format.
    table = channel_table(case.bare, FORMATS[:2], blocks=1000)
    weights = case.bare.weights(np.array([0])).double()
    size = channel_scores(weights)[0] * weights[0].var(1, correction=0)
    ratio = table.cost[:24, 0] / size.numpy()
    np.testing.assert_allclose(ratio, ratio[0])


def test_blocks_can_be_planned(case):
    table = channel_table(case.curved, formats((2, 3, 4), 0, True), blocks=4)
    whole = channel_table(case.curved, formats((2, 3, 4), 0, True), blocks=1)
    found = [solve(Problem(one, [Budget.bits(4.1)])) for one in (table, whole)]
    assert found[0].cost < found[1].cost  # finer units, better plans
    with pytest.raises(InputError, match="blocks: 0 must be at least 1"):
        channel_table(case.bare, FORMATS, blocks=0)


def test_neurons_of_a_layer_cost_what_its_matrices_cost(case):
    grid = Format.parse("int3-g8-asym")
    layer = case.units.layer == 1
    whole = channel_table(case.curved, [grid], blocks=1)
    found = neuron_scores(case.curved, grid)
    assert sorted(found) == [0, 1]
    assert found[1].shape == (4, 24)
    assert found[1].sum() == pytest.approx(whole.cost[layer].sum(), rel=1e-6)
    of_expert = layer & (case.units.expert == 2)
    assert found[1][2].sum() == pytest.approx(whole.cost[of_expert].sum(), rel=1e-6)


def test_neuron_scores_by_hand_without_gradients(case):
    grid = Format.parse("int3-row-sym")
    found = neuron_scores(case.bare, grid)[0][0]
    expected = np.zeros(24)
    for unit, width in ((0, 16), (1, 16), (2, 24)):  # gate, up, down of expert 0
        weights = case.bare.weights(np.array([unit])).double()
        neurons = weights if unit < 2 else weights.transpose(1, 2)
        size = channel_scores(neurons)[0] * neurons[0].var(1, correction=0) * neurons.shape[2]
        expected += size.numpy() * distortion(grid, width)
    np.testing.assert_allclose(found, expected)
    with pytest.raises(InputError, match="format: keep-bf16 rounds nothing; give a grid"):
        neuron_scores(case.bare, Format.keep("bf16"))


def test_the_claim_by_hand(case):
    # Down costs 64 times as much a weight as up, at every width.
    options = formats((2, 3, 4), 0, True)
    units = case.units
    down = units.projection == units.projections.index("down")
    cost = units.numel[:, None] * 4.0 ** -np.arange(3) * np.where(down, 64.0, 1.0)[:, None]
    report = down_needs_more(CostTable.from_arrays(cost, units=units, formats=options), 3.8)
    assert report.layers.tolist() == [0, 1]
    np.testing.assert_allclose(report.ratio, [64, 64])
    assert (report.bits["down"] > report.bits["up"]).all()
    assert (report.holds, report.share) == (True, 1.0)
    assert report.budget == 3.8
    turned = CostTable.from_arrays(
        np.where(down[:, None], cost / 64**2, cost), units=units, formats=options
    )
    against = down_needs_more(turned, 3.8)
    np.testing.assert_allclose(against.ratio, [1 / 64, 1 / 64])
    assert (against.holds, against.share) == (False, 0.0)


def test_the_claim_on_a_model_and_on_blocks(case):
    options = formats((1, 2, 3, 4), 0, True)
    for table in (
        Fisher().estimate(case.curved, options),
        channel_table(case.curved, options, blocks=3),
    ):
        report = down_needs_more(table, 3.5)
        assert report.format in options
        assert (report.ratio > 0).all()
        assert all(len(bits) == 2 for bits in report.bits.values())
        assert (report.bits["down"] >= 1).all()


def test_the_claim_needs_both_projections(case):
    with pytest.raises(InputError, match="projections: no 'up' among unit"):
        down_needs_more(CostTable.from_arrays([[1.0]], [[1]]))
    kept = CostTable.from_arrays(
        np.zeros((len(case.units), 1)), units=case.units, formats=[Format.keep("bf16")]
    )
    with pytest.raises(InputError, match="no grid is allowed for every unit"):
        down_needs_more(kept, 17)
