"""Router norms, MaxVar, and the plans of Chowdhury et al."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.published.chowdhury import (
    MaxVar,
    Ranking,
    RouterNorm,
    chowdhury_plan,
    max_variance,
    max_variances,
    router_norms,
)
from bitknap.estimators.signals.scored import Scored, checked
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model
from bitknap.testing.evidence import weights_alone


def opened(model, include=()):
    evidence = weights_alone(model, include)
    return SimpleNamespace(
        layout=evidence.layout,
        tensors=dict(model.named_parameters()),
        evidence=evidence,
        units=evidence.units,
    )


@pytest.fixture(scope="module")
def case():
    return opened(tiny_model("mixtral"))


def test_norms_by_hand(case):
    norms = router_norms(case.tensors, case.layout)
    assert sorted(norms) == [0, 1]
    for layer in case.layout.layers:
        rows = case.tensors[layer.router].detach().double()
        assert rows.shape == (layer.experts, layer.hidden)
        np.testing.assert_allclose(norms[layer.layer], rows.square().sum(1).sqrt().numpy())


def test_a_checkpoint_says_the_same_as_its_live_model(case, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    stored = router_norms(source, walk_headers(source.config, source.shapes))
    live = router_norms(case.tensors, case.layout)
    assert stored.keys() == live.keys()
    for layer, norms in live.items():
        np.testing.assert_allclose(stored[layer], norms, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "longcat_flash"])
def test_every_family_has_one_norm_an_expert(family):
    model = opened(tiny_model(family))
    norms = router_norms(model.tensors, model.layout)
    assert [len(norms[x.layer]) for x in model.layout.layers] == [
        x.experts for x in model.layout.layers
    ]


def test_what_cannot_be_read_is_refused(case):
    name = case.layout.layers[0].router
    with pytest.raises(InputError) as caught:
        router_norms({}, case.layout)
    assert str(caught.value) == (
        f"layer 0: the source has no tensor {name!r}; pass the layout of this source"
    )
    with pytest.raises(MismatchError, match=r"shape \[3, 16\], expected \[4, 16\]"):
        router_norms({name: torch.ones(3, 16)}, case.layout)
    with pytest.raises(MismatchError, match=r"shape \[4, 17\], expected \[4, 16\]"):
        router_norms({name: torch.ones(4, 17)}, case.layout)
    with pytest.raises(InputError, match="NaN or infinite weight"):
        router_norms({name: torch.full((4, 16), torch.nan)}, case.layout)


def test_a_layer_without_a_router_is_named(case):
    from dataclasses import replace

    first = replace(case.layout.layers[0], router=None)
    layout = replace(case.layout, layers=(first,))
    with pytest.raises(InputError, match=r"layer 0 \(.*\): no router was found; use another"):
        router_norms(case.tensors, layout)


def test_small_norms_are_sensitive(case):
    # Layer 0: 1 and 3 twice, mean 2 and deviation 1. Layer 1: all alike.
    signal = RouterNorm(final={0: [1, 3, 1, 3], 1: [2, 2, 2, 2]})
    score = checked(signal, case.evidence)
    units = case.units
    expected = np.exp([1.0, -1, 1, -1])
    first = units.layer == 0
    np.testing.assert_allclose(score[first], expected[units.expert[first]])
    assert (score[~first] == 1).all()
    # With initial norms the difference decides, here the other way round.
    changed = RouterNorm(
        final={0: [1, 3, 1, 3], 1: [2, 2, 2, 2]}, initial={0: [0, 3, 0, 3], 1: [1, 1, 1, 1]}
    )
    np.testing.assert_allclose(changed.score(case.evidence)[first], 1 / score[first])
    assert Scored(signal, -1).estimate(case.evidence, [Format(2, 8)]).cost.min() > 0


def test_what_is_not_routed_scores_one():
    model = opened(tiny_model("qwen2_moe"), ("shared",))
    norms = router_norms(model.tensors, model.layout)
    score = RouterNorm(final=norms).score(model.evidence)
    assert (score[~routed(model.units)] == 1).all()
    assert (score[routed(model.units)] != 1).all()


def test_norms_of_another_model_are_refused(case):
    with pytest.raises(MismatchError, match="layer 1: 0 router norms or variances for 4 experts"):
        RouterNorm(final={0: [1, 2, 3, 4]}).score(case.evidence)
    with pytest.raises(MismatchError, match="layer 0: 2 router norms or variances for 4 experts"):
        RouterNorm(final={0: [1, 2], 1: [1, 2]}).score(case.evidence)


def test_the_published_plan(case):
    options = formats((1, 2, 3), 8, True)
    norms = {0: [4, 3, 2, 1], 1: [1, 2, 3, 4]}
    plan = chowdhury_plan(case.layout, options, 2.5, (3, 2), Ranking(norms=norms), model="m")
    bits = np.array([plan.format_of(i).bits for i in range(len(case.units))])
    units = case.units
    for layer, expected in ((0, [2, 2, 3, 3]), (1, [3, 3, 2, 2])):
        here = units.layer == layer
        assert np.array_equal(bits[here], np.array(expected)[units.expert[here]])
    assert plan.model == "m"
    header = {"solver": "chowdhury", "average": 2.5, "levels": [3, 2], "zeta": None, "displaced": 0}
    assert dict(plan.header) == header


def test_variances_move_an_expert_up(case):
    options = formats((2, 3), 8, True)
    norms = {n: [1, 2, 3, 4] for n in (0, 1)}
    wide = {0: [1, 1, 1, 9], 1: [1, 1, 1, 1]}
    plan = chowdhury_plan(case.layout, options, 2.25, (2, 3), Ranking(norms=norms, variances=wide))
    bits = np.array([plan.format_of(i).bits for i in range(len(case.units))])
    widest = [
        set(case.units.expert[(case.units.layer == n) & (bits == 3)].tolist()) for n in (0, 1)
    ]
    assert widest == [{3}, {0}]
    assert plan.header["displaced"] == 4
    assert plan.header["zeta"] == 3.0


def test_signals_of_a_real_model_make_a_plan(case):
    norms = router_norms(case.tensors, case.layout)
    wide = max_variances(case.evidence)
    plan = chowdhury_plan(
        case.layout,
        formats((1, 2, 3), 8, True),
        2.0,
        (3, 2, 1),
        Ranking(norms=norms, variances=wide),
    )
    for layer in (0, 1):
        here = np.flatnonzero(case.units.layer == layer).tolist()
        assert sum([plan.format_of(i).bits for i in here]) == 2 * len(here)


def test_plans_check_their_levels_and_units(case):
    norms = {n: [1, 2, 3, 4] for n in (0, 1)}
    with pytest.raises(InputError, match="levels: 0 formats among int2-g8-sym"):
        chowdhury_plan(case.layout, formats((2, 3), 8, True), 3, (4, 2), Ranking(norms=norms))
    with pytest.raises(InputError, match=r"levels: 2 formats among .* have 3 bits"):
        chowdhury_plan(case.layout, formats((2, 3), (8, 16), True), 3, (3, 2), Ranking(norms=norms))
    model = opened(tiny_model("qwen2_moe"), ("shared",))
    with pytest.raises(InputError, match=r"role=shared .*: the rule gives bits to routed experts"):
        chowdhury_plan(model.layout, formats((2, 3), 8, True), 3, (3, 2), Ranking(norms=norms))


@pytest.fixture(scope="module")
def shared():
    """A model with shared experts beside the routed ones."""
    return opened(tiny_model("qwen2_moe"), ("shared",))


# Row variances 1, 4 and 0; the last row is the longest though it does not vary at all.
HAND = torch.tensor([[[1.0, -1, 1, -1], [2, -2, -2, 2], [9, 9, 9, 9]]])


def test_max_variance_by_hand():
    assert max_variance(HAND).tolist() == [4]
    assert max_variance(HAND, largest_norm=True).tolist() == [0]
    # Without the constant row both see the same row; the code's variance is unbiased, 16 / 3.
    assert max_variance(HAND[:, :2], largest_norm=True).tolist() == pytest.approx([16 / 3])


def test_an_expert_has_the_max_var_of_its_first_matrix(shared):
    score = MaxVar().score(shared.evidence)
    own = MaxVar(first_only=False).score(shared.evidence)
    experts = routed(shared.units)
    gate = shared.units.projection == shared.units.projections.index("gate")
    for unit in np.flatnonzero(experts):
        same = (shared.units.layer == shared.units.layer[unit]) & experts & gate
        first = np.flatnonzero(same & (shared.units.expert == shared.units.expert[unit]))
        assert score[unit] == own[first[0]]
        expected = shared.evidence.weights(first)[0].double().var(1, correction=0).max()
        assert score[unit] == pytest.approx(float(expected), rel=1e-6)
    assert np.array_equal(score[~experts], own[~experts])
    assert not np.array_equal(score, own)


def test_by_layer_it_is_the_same_number(shared):
    score = MaxVar().score(shared.evidence)
    for layer, values in max_variances(shared.evidence).items():
        here = routed(shared.units) & (shared.units.layer == layer)
        np.testing.assert_allclose(values[shared.units.expert[here]], score[here])
    unlike = max_variances(shared.evidence, largest_norm=True)
    assert any((unlike[n] != v).any() for n, v in max_variances(shared.evidence).items())


def test_experts_without_a_gate_start_with_up():
    case = opened(tiny_model("nemotron_h"))
    score = MaxVar().score(case.evidence)
    up = case.units.projection == case.units.projections.index("up")
    own = MaxVar(first_only=False).score(case.evidence)
    assert np.array_equal(score[up], own[up])
    assert [len(v) for v in max_variances(case.evidence).values()] == [4]


def test_max_var_is_sound(shared):
    score = checked(MaxVar(), shared.evidence)
    assert len(set(score.tolist())) > 4
    assert MaxVar().needs == frozenset()
