"""Every estimator on a tiny model, one of whose experts never sees a token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import ROLES, Format, formats
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree, distortion
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weighed_errors import format_bytes, plainest
from bitknap.estimators.costs.weight_error import WeightError
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.evidence.evidence import FEW_TOKENS
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.group_kl.calibrated import Calibrated, anchors, gains, group_kls
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model
from bitknap.testing.evidence import UNSEEN, lopsided_case, random_windows, weights_alone

FORMATS = formats((1, 2, 3, 4, 6, 8), (8, "row"), (False, True), ("fp16", "compact"), keep="fp32")
BASES = (SecondMoments(), SecondMoments(full=True), WeightError(), Fisher(), DataFree())


@pytest.fixture(scope="module")
def case():
    return lopsided_case(Recorded(full=True, curvature=True))


def families(columns):
    """Return the columns of each family of grids, by width."""
    found: dict[object, list[int]] = {}
    for i, f in enumerate(columns):
        if f.kind == "grid":
            found.setdefault((f.group_size, f.symmetric, f.metadata), []).append(i)
    return found.values()


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_costs_are_sound(base, case):
    table = base.estimate(case.evidence, FORMATS)
    grids = [i for i, f in enumerate(FORMATS) if f.kind == "grid"]
    assert table.units is case.layout.units
    assert np.isfinite(table.cost).all()
    assert (table.cost[:, grids] > 0).all()  # the unseen expert's too
    assert not table.cost[:, [i for i in range(len(FORMATS)) if i not in grids]].any()
    assert np.array_equal(table.nbytes, format_bytes(case.layout.units, FORMATS))
    for columns in families(FORMATS):
        assert (np.diff(table.cost[:, columns], axis=1) <= 0).all()
    assert table.provenance["estimator"] == base.name


@pytest.mark.parametrize("base", BASES[:4], ids=repr)
def test_an_unseen_expert_costs_little_but_something(base, case):
    table = base.estimate(case.evidence, FORMATS[:1])
    unseen = case.layout.units.expert == UNSEEN
    assert table.cost[unseen].max() < np.median(table.cost[~unseen])


def test_coverage_lists_those_that_saw_little(case):
    listed = case.evidence.coverage()
    assert (0, UNSEEN, 0) in listed
    assert (1, UNSEEN, 0) in listed
    counts = {n: layer.count.tolist() for n, layer in case.evidence.layers.items()}
    assert listed == [(n, e, c) for n in (0, 1) for e, c in enumerate(counts[n]) if c < FEW_TOKENS]
    for layer in case.evidence.layers.values():
        assert float(layer.count.sum()) / layer.tokens == pytest.approx(2)
        assert layer.tokens == 6 * 15


@pytest.mark.parametrize("base", [*BASES[:4], Calibrated(base=DataFree())], ids=repr)
def test_tables_know_how_often_experts_are_read(base, case):
    units = case.layout.units
    table = base.estimate(case.evidence, FORMATS[:9:4])
    assert table.frequency.min() == 0  # the unseen expert's
    for layer, evidence in case.evidence.layers.items():
        expected = evidence.count.numpy() / evidence.tokens
        there = units.layer == layer
        assert np.array_equal(table.frequency[there], expected[units.expert[there]])
        each = there & (units.projection == units.projections.index("down"))
        assert table.frequency[each].sum() == pytest.approx(2)  # two experts a token


def test_without_a_text_no_expert_is_known_to_be_read(case):
    assert DataFree().estimate(case.evidence, FORMATS[:2]).frequency is None


def test_shrinking_by_hand(case):
    # Two experts, 16 and 0 of 16 tokens, 16 prior tokens: the mean is 3 for both, and the shares
    # are (16 + 8) / 32 and (0 + 8) / 32.
    layer = case.evidence.layers[0]
    small = type(layer)(
        **{name: getattr(layer, name) for name in type(layer).__dataclass_fields__}
        | {"tokens": 16, "count": torch.tensor([16, 0])}
    )
    assert small.shrunk(torch.tensor([48.0, 0.0])).tolist() == pytest.approx([2.25, 0.75])
    # The shares of all experts add up to the routed tokens per token, as they do unshrunk.
    assert float(small.shrunk(torch.tensor([48.0, 0.0])).sum()) == pytest.approx(48 / 16)


def test_moments_of_down_are_the_squared_output_error(case):
    # With whole moments the cost of `down` is gain × E ‖ΔW (a h)‖², but for the shrinking.
    format = Format(3, 8)
    table = SecondMoments(full=True).estimate(case.evidence, [format])
    units = case.layout.units
    for i in np.flatnonzero(units.projection == units.projections.index("down")):
        layer = case.evidence.layers[int(units.layer[i])]
        weights = case.evidence.weights(np.array([i]))
        delta = (round_trip(weights, format) - weights)[0].double()
        s = layer.shrunk(layer.middle_full)[units.expert[i]]
        expected = layer.gain * torch.trace(delta @ s @ delta.T)
        assert table.cost[i, 0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_calibrated_groups_cost_what_was_measured(case):
    thorough = replace(case.evidence, effort=Effort(thorough=True))
    table = Calibrated().estimate(thorough, FORMATS)
    base = SecondMoments().estimate(thorough, FORMATS)
    chosen = anchors(FORMATS, table.nbytes)
    assert [FORMATS[i].bits for i in chosen] == [1, 2, 3, 4, 8]
    replay = Replay(case.model, case.layout, case.windows, cache=False)
    for run in stacks(case.layout.units):
        sums = base.cost[run].sum(0)
        measured = {}
        for column in chosen:
            choice = np.full(len(case.layout.units), len(FORMATS) - 1)
            choice[run] = column
            plan = table_plan(table, choice)
            with applied(case.model, case.layout, plan):
                measured[column] = replay.kl()
            kl = group_kls(case.evidence, [Variant.group(run, FORMATS[column])])[0]
            assert kl == pytest.approx(measured[column], rel=1e-3, abs=1e-9)
        highest = 0.0
        for column in sorted(chosen, key=lambda c: sums[c]):
            highest = max(highest, measured[column])
            assert table.cost[run, column].sum() == pytest.approx(highest, rel=1e-3, abs=1e-8)
        for columns in families(FORMATS):
            group = table.cost[run][:, columns].sum(0)
            assert (np.diff(group) <= 1e-12).all()
        # Within a group the base ranks.
        ratio = table.cost[run] / np.where(base.cost[run] > 0, base.cost[run], 1)
        np.testing.assert_allclose(ratio, ratio[:1].repeat(len(run), 0), rtol=1e-9)
    assert not table.cost[:, -1].any()
    assert np.isfinite(table.cost).all()
    assert table.provenance["estimator"] == "calibrated(moments)"
    assert table.provenance["measurements"] == len(stacks(case.layout.units)) * len(chosen)


def table_plan(table, choice):
    from bitknap.allocation import BitPlan

    return BitPlan.from_choice(table.units, table.formats, choice)


@pytest.mark.slow
@pytest.mark.parametrize("base", [WeightError(), Fisher(), DataFree()], ids=repr)
def test_calibrated_makes_nats_of_any_base(base, case):
    estimator = Calibrated(base=base)
    assert estimator.name == f"calibrated({base.name})"
    assert "kl" in estimator.needs
    # Groups are read alone at every width; joint readings are divided among them by the base.
    thorough = replace(case.evidence, effort=Effort(thorough=True))
    found = estimator.estimate(thorough, FORMATS)
    ours = Calibrated().estimate(thorough, FORMATS)
    chosen = anchors(FORMATS, found.nbytes)
    for run in stacks(case.layout.units):  # bases disagree within a group, not on its KL
        np.testing.assert_allclose(
            found.cost[run][:, chosen].sum(0), ours.cost[run][:, chosen].sum(0), rtol=0.02
        )


def test_calibrating_leaves_the_model_alone(case):
    before = {n: t.clone() for n, t in case.model.named_parameters()}
    Calibrated().estimate(case.evidence, FORMATS[::9])
    assert all(torch.equal(t, before[n]) for n, t in case.model.named_parameters())
    assert case.evidence.replay.kl() == 0


@pytest.mark.slow
def test_held_out_plans_check_what_was_calibrated(case):
    options = FORMATS[::5]
    table = Calibrated(check=4).estimate(case.evidence, options)
    plain = Calibrated().estimate(case.evidence, options)
    assert np.array_equal(table.cost, plain.cost)
    check = dict(table.provenance["check"])
    least, most = (8 * m.sum() / table.weights for m in (table.nbytes.min(1), table.nbytes.max(1)))
    assert check.pop("bits") == pytest.approx(2.5 if least < 2.5 else (least + most) / 2)
    assert check.pop("plans") == table.provenance["check_measurements"] == 4
    assert set(check) == {"spearman", "slope", "scale", "regret"}
    assert check["regret"] >= 1
    assert 0.2 < check["scale"] < 5
    assert table.provenance["measurements"] == plain.provenance["measurements"]
    again = Calibrated(check=4).estimate(case.evidence, options)
    assert dict(again.provenance) == dict(table.provenance)
    at_five = Calibrated(check=3, check_bits=5.0).estimate(case.evidence, options)
    assert at_five.provenance["check"]["bits"] == 5
    assert case.evidence.replay.kl() == 0  # the weights are back


def test_checks_that_say_nothing_are_refused(case):
    for count in (1, 2):
        with pytest.raises(InputError, match=rf"check: {count} is below 3, .* or 0 for no check"):
            Calibrated(check=count)
    with pytest.raises(InputError, match="check: -1 is not a whole number of at least 0"):
        Calibrated(check=-1)
    with pytest.raises(InputError, match=r"check: only 1 different plans exist at .* 3 are needed"):
        Calibrated(check=3).estimate(case.evidence, FORMATS[:1])


def test_gains_by_hand():
    # KL 2 at a predicted 1 and 20 at 100: half way in logarithms, 10, it is sqrt(2 · 20).
    ends = np.array([1.0, 100.0])
    found = gains(np.array([0.1, 1.0, 10.0, 100.0, 1000.0]), ends, np.array([2.0, 20.0]))
    np.testing.assert_allclose(found, [2, 2, 40**0.5 / 10, 0.2, 0.2])
    # The order of anchors does not matter, and KL never falls while the prediction grows.
    swapped = gains(ends, ends[::-1], np.array([20.0, 2.0]))
    np.testing.assert_allclose(swapped, [2, 0.2])
    falling = gains(ends, ends, np.array([3.0, 1.0]))
    np.testing.assert_allclose(falling, [3, 0.03])
    assert np.isfinite(gains(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.zeros(2))).all()


def test_anchors_are_the_middle_of_each_width(case):
    options = formats((2, 6), (8, 16, 32), True, "fp16")
    sizes = format_bytes(case.layout.units, options)
    assert [options[i].name for i in anchors(options, sizes)] == ["int2-g16-sym", "int6-g16-sym"]
    with pytest.raises(InputError, match="all keep the stored precision"):
        anchors([Format.keep("fp32")], sizes[:, :1])


@pytest.mark.slow
def test_data_free_needs_weights_only(case):
    def never(*args, **kwargs):
        raise AssertionError("no model pass")

    handle = case.model.register_forward_pre_hook(never)
    evidence = weights_alone(case.model)
    assert DataFree().needs == frozenset()
    table = DataFree().estimate(evidence, FORMATS)
    handle.remove()
    assert np.array_equal(table.cost, DataFree().estimate(case.evidence, FORMATS).cost)
    with pytest.raises(InputError, match="live model"):
        Calibrated().estimate(evidence, FORMATS)


def test_distortion_is_that_of_the_table():
    # methods.md#distortion, groups of 32: 0.112 of the variance at 2 bits without polish, 0.353 at
    # 1.
    assert 0.08 < distortion(Format(2, 32), 4096) <= 0.112 * 1.03
    assert distortion(Format(1, 32, symmetric=True), 4096) == pytest.approx(0.353, rel=0.02)
    assert distortion(Format.keep("bf16"), 64) == 0


def test_what_was_not_recorded_is_asked_for(case):
    bare = calibrate(case.model, case.layout, case.windows[:1])
    with pytest.raises(InputError, match="full=True"):
        SecondMoments(full=True).estimate(bare, FORMATS)
    with pytest.raises(InputError, match="curvature=True"):
        Fisher().estimate(bare, FORMATS)


@pytest.mark.slow
def test_other_roles_are_charged_too():
    model = tiny_model("qwen2_moe")
    layout = walk(model, ("attention", "shared"))
    windows = random_windows(2)
    evidence = calibrate(model, layout, windows, Recorded(curvature=True))
    options = [Format(2, 8), Format(5, 0)]
    for estimator in (SecondMoments(), WeightError(), DataFree(), Calibrated()):
        cost = estimator.estimate(evidence, options).cost
        assert np.isfinite(cost).all()
        assert (cost > 0).all(), estimator
    frequency = SecondMoments().estimate(evidence, options).frequency
    assert frequency is not None
    routed = layout.units.role == ROLES.index("routed")
    assert (frequency[~routed] == 1).all()
    assert (frequency[routed] < 1).any()
    with pytest.raises(InputError, match="routed experts only"):
        Fisher().estimate(evidence, FORMATS)


def test_the_same_seed_gives_the_same_evidence(case):
    found = [
        SecondMoments().estimate(calibrate(case.model, case.layout, case.windows), FORMATS[:3])
        for _ in range(2)
    ]
    assert np.array_equal(found[0].cost, found[1].cost)
    assert dict(found[0].provenance) == dict(found[1].provenance)


def test_formats_that_store_alike_cost_alike(case):
    # 16 columns: a group of 32 is the whole row, and compact metadata has nothing to compact.
    assert plainest(Format(3, 32, symmetric=True, metadata="compact"), 16) == Format(
        3, 0, symmetric=True
    )
    assert plainest(Format(3, 8, metadata="compact"), 16) == Format(3, 8, metadata="compact")
    alike = [Format(3, 32, symmetric=True), Format(3, 0, symmetric=True, metadata="compact")]
    weights = case.evidence.weights(stacks(case.layout.units)[0])
    assert torch.equal(*(round_trip(weights, f) for f in alike))
