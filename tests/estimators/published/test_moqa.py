"""Several calibration sets: significances, fuzzy clusters, MoQa's plan."""

from dataclasses import replace

import numpy as np
import pytest
from skfuzzy.cluster import cmeans

from bitknap.allocation import formats
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.published.moqa import (
    expert_significance,
    fuzzy_clusters,
    joint_significance,
    moqa_plan,
)
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model
from bitknap.testing.evidence import random_windows

FORMATS = formats((2, 4, 6, 8), "row", keep="fp32")


# significance


def test_significance_is_a_share_and_never_zero(sets):
    for layer, share in expert_significance(sets[0]).items():
        assert share.sum() == pytest.approx(1)
        assert sets[0].layers[layer].count[7] == 0
        assert share[7] > 0
        assert share.argmin() == 7


def test_significance_by_hand(sets):
    evidence = sets[0]
    layer, units = evidence.layers[1], evidence.units
    total = []
    for expert in range(8):
        where = units.matches(f"layer=1,expert={expert},proj=down")
        (unit,) = np.flatnonzero(where)
        down = evidence.weights(np.array([unit]))[0].double()
        middle = layer.shrunk(layer.middle_square)[expert]
        total.append(sum(float(middle[k].sqrt() * down[:, k].norm()) for k in range(len(middle))))
    wanted = np.array(total) / sum(total)
    assert expert_significance(evidence)[1] == pytest.approx(wanted)


def test_joint_significance_is_over_the_sets(sets):
    each = [expert_significance(x)[0] for x in sets]
    joint = joint_significance(sets)[0]
    assert joint.mean == pytest.approx(np.mean(each, axis=0))
    assert joint.worst == pytest.approx(np.max(each, axis=0))
    assert joint.sd == pytest.approx(np.std(each, axis=0, ddof=1))
    assert joint.mean.sum() == pytest.approx(1)


def test_one_set_is_not_several(sets):
    with pytest.raises(InputError, match=r"sets: 1 is below 2; calibrate on two or more texts"):
        joint_significance(sets[:1])
    with pytest.raises(InputError, match="all 2 have the same text"):
        joint_significance([sets[0], sets[0]])


def test_sets_of_two_models_do_not_join(sets):
    model = tiny_model("mixtral")
    other = calibrate(model, walk(model), random_windows(4, seed=1))
    with pytest.raises(MismatchError, match="its 24 units differ from the 48 of the first"):
        joint_significance([sets[0], other])


def test_weights_alone_have_no_significance(sets):
    with pytest.raises(InputError, match="no layer of experts was seen"):
        expert_significance(replace(sets[0], layers={}))


# clusters


def test_clear_clusters_are_found_widest_first():
    values = np.repeat([0.1, 1.0, 2.0, 4.0], 5) + 0.01 * np.arange(20) % 0.03
    found = fuzzy_clusters(values)
    assert found.bits.tolist() == [2] * 5 + [4] * 5 + [6] * 5 + [8] * 5
    assert (np.diff(found.centres) < 0).all()
    assert found.centres == pytest.approx([4, 2, 1, 0.1], abs=0.05)
    assert found.membership.sum(axis=0) == pytest.approx(np.ones(20))
    assert not found.lowered.any()


def test_near_a_boundary_the_lower_precision_comes_first():
    values = np.array([0.0, 0.1, 0.9, 1.0, 0.51])
    sharp, soft = (fuzzy_clusters(values, (8, 2), margin=margin) for margin in (0, 0.1))
    assert sharp.bits.tolist() == [2, 2, 8, 8, 8]
    assert soft.bits.tolist() == [2, 2, 8, 8, 2]
    assert soft.lowered.tolist() == [False] * 4 + [True]
    assert (soft.bits <= sharp.bits).all()


def test_order_and_scale_of_values_do_not_matter():
    values = np.random.default_rng(0).lognormal(size=40)
    order = np.random.default_rng(1).permutation(40)
    found = fuzzy_clusters(values).bits
    assert fuzzy_clusters(values[order]).bits.tolist() == found[order].tolist()
    assert fuzzy_clusters(1e-6 * values).bits.tolist() == found.tolist()
    ranked = found[np.argsort(values)]
    assert (np.diff(ranked) >= 0).all()


def test_clusters_are_those_of_scikit_fuzzy():
    values = np.random.default_rng(3).lognormal(size=60)
    found = fuzzy_clusters(values, m=2.0)
    start = found.membership
    centres, membership, *_ = cmeans(values[None], 4, 2.0, error=1e-9, maxiter=10, init=start)
    assert centres[:, 0] == pytest.approx(found.centres, rel=1e-4)
    assert membership == pytest.approx(start, abs=1e-4)


def test_clustering_leaves_the_global_generator_alone():
    before = repr(np.random.get_state())  # noqa: NPY002
    fuzzy_clusters([0.0, 0.1, 0.9, 1.0], (8, 2), seed=5)
    assert repr(np.random.get_state()) == before  # noqa: NPY002


def test_a_small_fuzzifier_makes_memberships_sharp():
    values = np.random.default_rng(0).lognormal(size=30)
    sharp, soft = (fuzzy_clusters(values, m=m).membership.max(axis=0).mean() for m in (1.2, 3.0))
    assert sharp > 0.95 > soft


def test_clusters_refuse():
    with pytest.raises(InputError, match="2 different values cannot form 4 clusters"):
        fuzzy_clusters([1.0, 1.0, 2.0])
    with pytest.raises(InputError, match=r"m: 1\.0 must be above 1"):
        fuzzy_clusters([1.0, 2.0], (8, 2), m=1.0)
    with pytest.raises(
        InputError, match=r"precisions: \(8, 8\) must be at least two different widths"
    ):
        fuzzy_clusters([1.0, 2.0], (8, 8))
    with pytest.raises(InputError, match="margin: 2 is not from 0 to 1"):
        fuzzy_clusters([1.0, 2.0], (8, 2), margin=2)
    with pytest.raises(InputError, match="all finite"):
        fuzzy_clusters([1.0, np.nan], (8, 2))


# plan


def test_the_plan_gives_whole_experts_the_width_of_their_cluster(sets):
    plan = moqa_plan(sets, FORMATS)
    joint = joint_significance(sets)
    value = np.concatenate([8 * joint[layer].mean for layer in (0, 1)])
    wanted = fuzzy_clusters(value).bits.reshape(2, 8)
    bits = np.array([f.bits for f in FORMATS])[plan.choice]
    units = plan.units
    assert np.array_equal(bits, wanted[units.layer, units.expert])
    assert {2, 8} <= set(bits.tolist())
    assert plan.header["solver"] == "moqa"
    assert len(plan.header["texts"]) == 3


def test_the_plan_refuses(sets):
    with pytest.raises(InputError, match="0 of 6 bits; the rule needs exactly one"):
        moqa_plan(sets, formats((2, 4, 8), "row"))
    with pytest.raises(InputError, match="2 of 8 bits"):
        moqa_plan(sets, formats((2, 4, 6, 8), ("row", 8)))
    with pytest.raises(InputError, match="is below 2"):
        moqa_plan(sets[:1], FORMATS)
    with pytest.raises(InputError, match="rule 'best' is unknown; one of mean, worst"):
        moqa_plan(sets, FORMATS, rule="best")  # type: ignore[arg-type]


def test_units_beside_the_experts_are_kept():
    model = tiny_model("mixtral")
    layout = walk(model, include=("attention",))
    sets = [calibrate(model, layout, random_windows(4, seed=seed)) for seed in range(2)]
    plan = moqa_plan(sets, FORMATS, precisions=(8, 4, 2))
    other = np.flatnonzero(plan.units.role != 0)
    assert len(other) > 0
    assert {plan.formats[plan.choice[i]].kind for i in other} == {"keep"}
