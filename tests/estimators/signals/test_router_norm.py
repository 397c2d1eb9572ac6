"""Router norms: read, compared, ordered, and made a plan of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.neuron_variance import max_variances
from bitknap.estimators.signals.router_norm import (
    RouterNorm,
    chowdhury_plan,
    norm_changes,
    order,
    router_norms,
)
from bitknap.estimators.signals.scored import Scored, checked
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.apply import read_units
from bitknap.testing import tiny_model


def opened(model, include=()):
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
    return SimpleNamespace(layout=layout, tensors=tensors, evidence=evidence, units=layout.units)


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
        f"layer 0: the source has no tensor {name!r}; "
        "pass the layout that was walked on this source"
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


def test_changes_are_differences_of_norms():
    final, initial = {3: [3.0, 2.0]}, {3: [1.0, 2.5]}
    assert norm_changes(final, initial)[3].tolist() == [2, -0.5]
    assert norm_changes(final)[3].tolist() == [3, 2]
    with pytest.raises(MismatchError, match=r"final of layers \[3\], initial of \[2\]"):
        norm_changes(final, {2: [1.0, 1.0]})
    with pytest.raises(MismatchError, match="layer 3 has 2 final and 3 initial ones"):
        norm_changes(final, {3: [1.0, 1.0, 1.0]})
    with pytest.raises(InputError, match=r"final\[3\]: norms are one finite number from 0"):
        norm_changes({3: [-1.0]})


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


def test_order_by_norm_alone():
    assert order([3.0, 1.0, 2.0]).tolist() == [1, 2, 0]
    assert order([1.0, 1.0, 0.5]).tolist() == [2, 0, 1]  # ties keep their numbers' order


def test_order_by_hand():
    # Ranked 0, 1, 2. Expert 2 varies three times as much as 0: the paper's bound is inclusive,
    # the code's strict.
    assert order([1, 2, 3], [1, 2, 3], 3.0).tolist() == [2, 0, 1]
    assert order([1, 2, 3], [1, 2, 3], 3.0, one_pass=True).tolist() == [0, 1, 2]
    assert order([1, 2, 3], [1, 2, 3.1], 3.0, one_pass=True).tolist() == [2, 0, 1]


def test_one_pass_and_the_fixed_point_differ():
    # From the last rank up: 2 goes before 0, then 1 before 0 but behind 2. From the first rank
    # down: 1 goes before 0, then 2 before 0 but behind 1.
    assert order([1, 2, 3], [1, 4, 3.5], one_pass=True).tolist() == [2, 1, 0]
    assert order([1, 2, 3], [1, 4, 3.5]).tolist() == [1, 2, 0]


def test_neither_leaves_a_pair():
    rng = np.random.default_rng(0)
    unlike = 0
    for _ in range(200):
        norms, spread = rng.random(8), np.exp(2 * rng.standard_normal(8))
        stable, once = order(norms, spread), order(norms, spread, one_pass=True)
        unlike += stable.tolist() != once.tolist()
        for found in (stable, once):
            assert sorted(found.tolist()) == list(range(8))
            assert pairs(found, spread) == 0
            # Doing it again changes nothing.
            rank = np.argsort(found)
            assert order(rank, spread).tolist() == found.tolist()
    assert unlike > 20


def pairs(ranking, spread, zeta=3.0):
    """Count pairs that the rule would still exchange."""
    ranked = spread[ranking]
    wider = ranked[None, :] >= zeta * ranked[:, None]
    return int(np.triu(wider, 1).sum())


def test_experts_without_variance_stay():
    assert order([1, 2, 3], [0, 0, 0]).tolist() == [0, 1, 2]
    assert order([1, 2, 3], [0, 0, 1]).tolist() == [2, 0, 1]


def test_order_checks_its_numbers():
    with pytest.raises(InputError, match="zeta: 1 must be above 1; the paper takes 3"):
        order([1, 2], [1, 2], 1)
    with pytest.raises(InputError, match=r"variances: shape \(3,\), expected \(2,\)"):
        order([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="norms: give one finite number for each expert"):
        order([1, np.nan])
    with pytest.raises(InputError, match="variances: give one finite number from 0"):
        order([1, 2], [1, -2])


def test_the_published_plan(case):
    options = formats((1, 2, 3), 8, True)
    norms = {0: [4, 3, 2, 1], 1: [1, 2, 3, 4]}
    plan = chowdhury_plan(case.layout, options, 2.5, (3, 2), norms=norms, model="m")
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
    plan = chowdhury_plan(case.layout, options, 2.25, (2, 3), norms=norms, variances=wide)
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
        case.layout, formats((1, 2, 3), 8, True), 2.0, (3, 2, 1), norms=norms, variances=wide
    )
    for layer in (0, 1):
        here = np.flatnonzero(case.units.layer == layer).tolist()
        assert sum([plan.format_of(i).bits for i in here]) == 2 * len(here)


def test_plans_check_their_levels_and_units(case):
    norms = {n: [1, 2, 3, 4] for n in (0, 1)}
    with pytest.raises(InputError, match="levels: 4 bits has 0 formats among int2-g8-sym"):
        chowdhury_plan(case.layout, formats((2, 3), 8, True), 3, (4, 2), norms=norms)
    with pytest.raises(InputError, match="levels: 3 bits has 2 formats among"):
        chowdhury_plan(case.layout, formats((2, 3), (8, 16), True), 3, (3, 2), norms=norms)
    model = opened(tiny_model("qwen2_moe"), ("shared",))
    with pytest.raises(InputError, match=r"role=shared .*: the rule gives bits to routed experts"):
        chowdhury_plan(model.layout, formats((2, 3), 8, True), 3, (3, 2), norms=norms)
