"""Exponents of proxies, groups measured together, and plans that check a table."""

import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Budget, CostTable, Format, Problem, Units, formats, profile
from bitknap.benchmarks.profiling.combined import (
    Combined,
    check_plans,
    decode,
    design,
    factors,
    fit_exponents,
    modified,
    plans_for_check,
    readings,
)
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.group_kl.calibrated import group_kl
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.apply import stacks
from bitknap.testing import tiny_model

FORMATS = formats((1, 2, 3, 4), "row", keep="fp32")
GRIDS = 4
LAYERS, EXPERTS, PROJECTIONS = 4, 8, ("gate", "up", "down")


def made_units():
    keys = [(n, e, p) for n in range(LAYERS) for p in PROJECTIONS for e in range(EXPERTS)]
    return Units.build(
        layer=[x[0] for x in keys],
        role=["routed"] * len(keys),
        expert=[x[1] for x in keys],
        projection=[x[2] for x in keys],
        rows=[32] * len(keys),
        cols=[64] * len(keys),
    )


@pytest.fixture(scope="module")
def table():
    units = made_units()
    size = np.random.default_rng(0).lognormal(-7, 0.5, len(units))
    curve = np.array([30.0, 8.0, 2.0, 0.5, 0.0])
    return CostTable.from_arrays(
        size[:, None] * curve, units=units, formats=FORMATS, provenance={"unit": "score"}
    )


@pytest.fixture(scope="module")
def z(table):
    return np.random.default_rng(1).normal(size=(2, len(table.units)))


def halves(table, seed=2, each=6):
    """Return random halves of the units in every grid."""
    generator = np.random.default_rng(seed)
    count = len(table.units)
    return [
        (generator.permutation(count)[: count // 2], f) for f in range(GRIDS) for _ in range(each)
    ]


def measured(table, z, theta, gains, groups, noise=0.0):
    """Return the groups with the KL that exponents and gains would make."""
    truth = modified(table, z, theta, gains).cost
    error = np.exp(noise * np.random.default_rng(3).normal(size=len(groups)))
    return [(u, f, truth[u, f].sum() * e) for (u, f), e in zip(groups, error, strict=True)]


# Combined


@dataclass(frozen=True)
class Taken:
    """A signal of given scores that counts how often it is asked."""

    name: str
    scores: np.ndarray
    asked: list[str]
    needs: frozenset[str] = frozenset({"moments"})

    def score(self, evidence):
        self.asked.append(self.name)
        return self.scores


@pytest.fixture(scope="module")
def case():
    model = tiny_model("mixtral")
    layout = walk(model)
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(model=model, evidence=calibrate(model, layout, windows))


def taken(case, name="one", scores=None):
    count = len(case.evidence.units)
    scores = np.random.default_rng(0).lognormal(size=count) if scores is None else scores
    return Taken(name, scores, [])


def test_without_exponents_the_base_is_unchanged(case):
    signal = taken(case)
    combined = Combined(base=DataFree(), signals=(signal,))
    found, base = (x.estimate(case.evidence, FORMATS) for x in (combined, DataFree()))
    assert np.array_equal(found.cost, base.cost)
    assert np.array_equal(found.nbytes, base.nbytes)
    assert found.provenance == base.provenance
    assert signal.asked == []
    assert combined.needs == frozenset()
    assert combined.name == "combined(data-free)"


def test_an_exponent_multiplies_costs_within_each_projection(case):
    signal = taken(case)
    combined = Combined(base=DataFree(), signals=(signal,), exponents={"one": 0.5})
    found, base = (x.estimate(case.evidence, FORMATS) for x in (combined, DataFree()))
    units = case.evidence.units
    moved = np.log(found.cost[:, 0] / base.cost[:, 0])
    for projection in range(len(units.projections)):
        here = units.projection == projection
        assert moved[here].mean() == pytest.approx(0, abs=1e-9)
        assert moved[here].std() == pytest.approx(0.5)
        assert np.argsort(moved[here]).tolist() == np.argsort(signal.scores[here]).tolist()
    assert combined.needs == {"moments"}
    assert found.provenance["estimator"] == "combined(data-free * one^0.5)"
    assert found.provenance["exponents"] == {"one": 0.5}
    assert found.provenance["unit"] == base.provenance["unit"]


def test_a_constant_signal_changes_nothing(case):
    signal = taken(case, scores=np.full(len(case.evidence.units), 3.0))
    combined = Combined(base=DataFree(), signals=(signal,), exponents={"one": 2.0})
    found, base = (x.estimate(case.evidence, FORMATS) for x in (combined, DataFree()))
    assert np.array_equal(found.cost, base.cost)


def test_gains_make_nats(case):
    gains = {f: 2.0**f.bits for f in FORMATS if f.kind == "grid"}
    found = Combined(base=DataFree(), gains=gains).estimate(case.evidence, FORMATS)
    base = DataFree().estimate(case.evidence, FORMATS)
    assert found.cost == pytest.approx(base.cost * [2, 4, 8, 16, 1])
    assert found.provenance["unit"] == "nats/token"
    with pytest.raises(InputError, match="gains: none for int8-row-asym; there are int1-row-asym"):
        Combined(base=DataFree(), gains=gains).estimate(case.evidence, formats(8, "row"))


def test_combined_refuses(case):
    one = taken(case)
    with pytest.raises(InputError, match="'two' is no signal given; there are one"):
        Combined(base=DataFree(), signals=(one,), exponents={"two": 1.0})
    with pytest.raises(InputError, match="one has nan; an exponent is a finite number"):
        Combined(base=DataFree(), signals=(one,), exponents={"one": np.nan})
    with pytest.raises(InputError, match="signals: one, one has a name twice"):
        Combined(base=DataFree(), signals=(one, one))
    with pytest.raises(InputError, match="has 0; a gain is a finite number above 0"):
        Combined(base=DataFree(), gains={FORMATS[0]: 0})


def test_modified_moves_spread_and_keeps_what_is_forbidden(table, z):
    pinned = replace(table.pin("layer=0", at_least=2), spread=np.ones(table.cost.shape))
    found = modified(pinned, z[:1], [0.3])
    assert np.array_equal(np.isinf(found.cost), np.isinf(pinned.cost))
    assert np.array(found.spread)[:, 0] == pytest.approx(np.exp(0.3 * z[0]))
    with pytest.raises(InputError, match=r"beyond e\^50; use smaller ones"):
        modified(table, z[:1], [1000.0])


# fit_exponents


def test_exponents_and_gains_that_made_the_groups_are_found(table, z):
    theta, gains = [0.6, -0.4], [4.0, 2.0, 1.5, 1.7, 1.0]
    groups = measured(table, z, theta, gains, halves(table))
    found = fit_exponents(table, z, groups, names=("a", "b"), penalty=0.0)
    assert dict(found.exponents) == pytest.approx({"a": 0.6, "b": -0.4}, abs=1e-5)
    assert found.gains == pytest.approx(gains, rel=1e-5)
    report = found.report
    assert (report.groups, report.parameters, report.folds) == (24, 6, 24)
    assert report.error < 1e-4 < report.error_without
    assert (report.dropped, report.fallback) == ((), "")


def test_the_penalty_draws_to_zero(table, z):
    groups = measured(table, z, [0.6, 0.0], np.ones(5), halves(table))
    thetas = [
        abs(fit_exponents(table, z, groups, penalty=p).exponents["signal 0"]) for p in (0, 1, 1e6)
    ]
    assert thetas[0] == pytest.approx(0.6, abs=1e-5)
    assert thetas[0] > thetas[1] > thetas[2]
    assert thetas[2] == pytest.approx(0, abs=1e-4)


def test_a_proxy_that_says_nothing_stays_near_zero(table, z):
    groups = measured(table, z, [0.0, 0.0], [4, 2, 1.5, 1.7, 1], halves(table), noise=0.02)
    found = fit_exponents(table, z, groups)
    assert max(abs(theta) for theta in found.exponents.values()) < 0.1
    assert found.report.error == pytest.approx(found.report.error_without, abs=0.02)


def test_signs_are_kept_where_asked(table, z):
    groups = measured(table, z, [-0.5, 0.5], np.ones(5), halves(table))
    found = fit_exponents(table, z, groups, penalty=0.01, nonnegative=[True, False])
    assert found.exponents["signal 0"] == 0
    assert found.exponents["signal 1"] > 0.2


def test_too_few_groups_fit_gains_alone(table, z):
    groups = measured(table, z, [0.6, 0.6], [4, 2, 1.5, 1.7, 1], halves(table, each=1))
    found = fit_exponents(table, z, groups)
    assert set(found.exponents.values()) == {0.0}
    assert found.report.fallback == (
        "4 groups for 6 exponents and gains; exponents stay 0, only gains were fitted; "
        "measure more groups"
    )
    predicted = [table.cost[u, f].sum() * found.gains[f] for u, f, _ in groups]
    assert predicted == pytest.approx([kl for *_, kl in groups])


def test_constant_signals_are_named(table, z):
    flat = np.vstack([z[0], np.full(len(table.units), 0.0)])
    groups = measured(table, flat, [0.6, 0.0], np.ones(5), halves(table))
    found = fit_exponents(table, flat, groups, names=("told", "flat"))
    assert found.report.dropped == ("flat",)
    assert found.exponents["flat"] == 0


def test_unmeasured_formats_lie_between_their_neighbours(table):
    groups = [g for g in halves(table) if g[1] in (0, 3)]
    none = np.zeros((0, len(table.units)))
    found = fit_exponents(table, none, measured(table, none, [], [4, 9, 9, 1, 1], groups))
    assert found.gains[[0, 3, 4]] == pytest.approx([4, 1, 1])
    assert 4 > found.gains[1] > found.gains[2] > 1


def test_gains_never_turn_the_formats_round(table):
    # Read at 1 bit less than at 2: both take their geometric mean, each having one group.
    every = np.arange(len(table.units))
    none = np.zeros((0, len(table.units)))
    found = fit_exponents(table, none, [(every, 0, 0.02), (every, 1, 0.08)])
    total = table.cost.sum(axis=0) * found.gains
    assert total[:2] == pytest.approx([0.04, 0.04])
    assert found.report.error > 0


def test_a_single_group_has_nothing_to_leave_out(table):
    found = fit_exponents(table, np.zeros((0, len(table.units))), [(np.arange(9), 1, 0.1)])
    assert np.isnan(found.report.error)
    assert len(set(found.gains[:GRIDS].round(9))) == 1


def test_many_groups_are_left_out_in_ten_folds(table, z):
    groups = measured(table, z, [0.3, 0.0], np.ones(5), halves(table, each=15))
    assert fit_exponents(table, z, groups).report.folds == 10


def test_fit_refuses(table, z):
    every = np.arange(3)
    with pytest.raises(InputError, match="groups: none"):
        fit_exponents(table, z, [])
    with pytest.raises(InputError, match=r"groups\[0\]: costs 0 in keep-fp32"):
        fit_exponents(table, z, [(every, 4, 0.1)])
    with pytest.raises(InputError, match=r"groups\[0\]: KL nan is not a finite number"):
        fit_exponents(table, z, [(every, 0, np.nan)])
    with pytest.raises(InputError, match=r"groups\[0\]: a unit is outside 0 to 95"):
        fit_exponents(table, z, [(np.array([96]), 0, 0.1)])
    with pytest.raises(InputError, match=r"signals: shape \(2, 5\), expected \[signals, 96\]"):
        fit_exponents(table, z[:, :5], [(every, 0, 0.1)])
    with pytest.raises(InputError, match=r"names: .* must be 2 different names"):
        fit_exponents(table, z, [(every, 0, 0.1)], names=("a", "a"))


# several groups at once


def layer_groups(units):
    return [(run, f) for f in range(GRIDS) for run in stacks(units)]


def true_kl(units, groups, predicted, left, seed=4):
    """Return KL with gains made of format, layer and projection, and `left` besides."""
    generator = np.random.default_rng(seed)
    x = factors(units, groups)
    made = np.exp(x @ generator.normal(0.0, 0.4, x.shape[1]))
    return predicted * made * np.exp(left * generator.normal(size=len(groups)))


@pytest.fixture(scope="module")
def many(table):
    groups = layer_groups(table.units)
    predicted = np.array([table.cost[run, f].sum() for run, f in groups])
    predicted *= 0.04 / predicted[:12].sum()
    return SimpleNamespace(units=table.units, groups=groups, predicted=predicted)


@pytest.mark.parametrize("seed", range(4))
def test_a_third_of_the_measurements_recovers_the_gains(many, seed):
    truth = true_kl(many.units, many.groups, many.predicted, left=0.02, seed=seed)
    plan = design(many.groups, len(many.groups) // 3, seed=seed)
    read, x = plan.sets @ truth, factors(many.units, many.groups)
    found = decode(plan, many.predicted, read, features=x, noise=0.01)
    assert len(plan.sets) == 16
    assert found.unread == ()
    assert np.abs(found.kl / truth - 1).max() < 0.1
    assert found.gains == pytest.approx(found.kl / many.predicted)
    # Factors are what so few readings live on: without those of layers and projections, no luck.
    blind = decode(plan, many.predicted, read, noise=0.01)
    assert np.abs(blind.kl / truth - 1).max() > 0.1
    assert blind.left > found.left


def test_what_factors_leave_is_told(many):
    x = factors(many.units, many.groups)
    for left, seen in ((0.0, (0.01, 0.02)), (0.3, (0.2, 0.5))):
        truth = true_kl(many.units, many.groups, many.predicted, left)
        plan = design(many.groups, 24)
        assert decode(plan, many.predicted, plan.sets @ truth, features=x, noise=0.01).left in seen


def test_as_many_measurements_as_groups_read_each_alone(many):
    plan = design(many.groups, len(many.groups))
    assert np.array_equal(plan.sets, np.eye(len(many.groups)))
    truth = true_kl(many.units, many.groups, many.predicted, left=0.2)
    found = decode(plan, many.predicted, truth)
    assert found.kl == pytest.approx(truth, rel=0.02)
    assert found.deviation.max() < 0.031


def test_exact_predictions_are_kept_whatever_their_scale(many):
    plan = design(many.groups, 10)
    found = decode(plan, many.predicted, 3 * plan.sets @ many.predicted)
    assert found.gains == pytest.approx(np.full(len(many.groups), 3.0))


def test_sets_hold_one_format_and_read_every_group(many):
    plan = design(many.groups, 16, seed=5)
    formats_of = np.array([f for _, f in many.groups])
    for index, row in enumerate(plan.sets):
        assert set(formats_of[row]) == {plan.format(index)}
        assert len(plan.units(index)) == row.sum() * EXPERTS
    assert plan.sets.sum(axis=1).tolist() == [6] * 16  # 4 a format, in halves
    assert plan.sets.any(axis=0).all()
    assert np.linalg.matrix_rank(plan.sets.astype(float)) == 16
    assert np.array_equal(design(many.groups, 16, seed=5).sets, plan.sets)
    assert not np.array_equal(design(many.groups, 16, seed=6).sets, plan.sets)


def test_sets_that_would_read_too_much_are_cut_finer(many):
    halves_, finer = (
        design(many.groups, 16, predicted=many.predicted, ceiling=c) for c in (0.05, 0.012)
    )
    dearest = [(plan.sets @ many.predicted).max() for plan in (halves_, finer)]
    assert dearest[1] < dearest[0]
    assert finer.sets.any(axis=0).all()
    found = decode(halves_, many.predicted, 5 * halves_.sets @ many.predicted)
    assert found.above == tuple(range(4))  # the 1-bit sets
    assert halves_.format(3) == 0 != halves_.format(4)


def test_unread_groups_take_their_prior(many):
    plan = design(many.groups, 8)
    some = replace(plan, sets=plan.sets & (np.arange(len(many.groups)) != 7))
    found = decode(some, many.predicted, 2 * some.sets @ many.predicted)
    assert found.unread == (7,)
    assert found.gains[7] == pytest.approx(2)
    assert found.deviation[7] == found.left


def test_design_and_decode_refuse(many):
    with pytest.raises(InputError, match="measurements: 3 is not from 4, one a format, to 48"):
        design(many.groups, 3)
    with pytest.raises(InputError, match="unit 1 is in two groups of format 0"):
        design([(np.array([0, 1]), 0), (np.array([1, 2]), 0)], 1)
    plan = design(many.groups, 8)
    with pytest.raises(InputError, match=r"measured: shape \(7,\), expected \(8,\)"):
        decode(plan, many.predicted, np.ones(7))
    with pytest.raises(InputError, match=r"predicted\[0\]: 0.0 is not a finite number above 0"):
        decode(plan, np.zeros(48), np.ones(8))


def test_readings_change_the_groups_of_a_set_and_put_them_back(case):
    runs, seen = stacks(case.evidence.units), []
    groups = [(run, f) for f in (1, 3) for run in runs]
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    plan = design(groups, len(groups))
    found = readings(plan, case.evidence, FORMATS, lambda *told: seen.append(told))
    evidence = case.evidence
    for kl, (run, f) in zip(found, groups, strict=True):
        alone = group_kl(evidence, run, FORMATS[f])
        assert kl == pytest.approx(alone, rel=1e-6)
    together = readings(design(groups, 4), evidence, FORMATS)
    assert (together > found.reshape(2, -1).min(axis=1).repeat(2)).all()
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
    assert seen[0] == ("measure groups", 0, len(groups))
    with pytest.raises(InputError, match="groups need the live model"):
        readings(plan, replace(evidence, replay=None), FORMATS)


# plans


@pytest.fixture(scope="module")
def problem(table):
    return Problem(table.tie(profile("gate_eq_up")), Budget.bits(2.75))


def test_plans_for_check_fill_the_same_bytes(problem, table):
    plans = plans_for_check(problem, 10, seed=0)
    sizes = [plan.total_bytes for plan in plans]
    assert len({plan.choice.tobytes() for plan in plans}) == 10
    assert max(sizes) <= problem.bounds[0]
    assert max(sizes) / min(sizes) - 1 < 0.02
    cost = [table.cost[np.arange(len(table.units)), plan.choice].sum() for plan in plans]
    assert cost[0] == min(cost)
    assert max(cost[1::2]) < min(cost[2::2])  # near ones before random ones
    assert {plan.header["solver"] for plan in plans[1:]} == {"near the frontier", "random"}
    for plan in plans:
        assert np.array_equal(plan.choice, plan.choice[tied_to(problem)])
    again = plans_for_check(problem, 10, seed=0)
    assert all(np.array_equal(a.choice, b.choice) for a, b in zip(plans, again, strict=True))


def tied_to(problem):
    """Return for each unit the first one of its row."""
    return np.unique(problem.row_of, return_index=True)[1][problem.row_of]


def test_plans_for_check_end_when_there_are_no_more():
    table = CostTable.from_arrays([[4.0, 1.0], [2.0, 1.0]], nbytes=[[1, 2], [1, 2]])
    plans = plans_for_check(Problem(table, Budget.bytes(3)), 5)
    assert 1 <= len(plans) <= 3


def test_a_true_table_passes_its_check(problem, table):
    plans = plans_for_check(problem, 8)
    truth = [table.cost[np.arange(len(table.units)), plan.choice].sum() for plan in plans]
    found = check_plans(table, plans, 2 * np.array(truth) ** 1.5)
    assert found.spearman == pytest.approx(1)
    assert found.slope == pytest.approx(1.5)
    assert found.regret == 1
    assert found.scale == pytest.approx(found.measured.sum() / sum(truth))
    assert found.byte_spread < 0.02


def test_regret_is_what_the_favourite_costs(problem, table):
    plans = plans_for_check(problem, 4)
    found = check_plans(table, plans, [0.06, 0.03, 0.05, 0.04])
    assert found.regret == pytest.approx(2)
    assert found.spearman < 0


def test_alike_predictions_have_no_rank(table):
    plans = [solve_like(table, 1)] * 3
    found = check_plans(table, plans, [0.1, 0.2, 0.3])
    assert np.isnan(found.spearman)
    assert np.isnan(found.slope)


def solve_like(table, column):
    from bitknap.allocation import BitPlan

    return BitPlan.uniform(table.units, table.formats[column])


def test_check_refuses(table):
    plans = [solve_like(table, f) for f in range(3)]
    with pytest.raises(InputError, match="plans: 2 is below 3"):
        check_plans(table, plans[:2], [0.1, 0.2])
    with pytest.raises(InputError, match=r"measured_kl\[1\]: 0.0 is not a finite number above 0"):
        check_plans(table, plans, [0.1, 0, 0.1])
    with pytest.raises(InputError, match=r"plans\[0\]: the table gives it 0"):
        check_plans(table, [solve_like(table, 4), *plans[:2]], [0.1, 0.2, 0.3])
    other = replace(table, formats=(Format.parse("int8-row-sym"), *FORMATS[1:]), nbytes=bytes_of())
    with pytest.raises(MismatchError, match=r"plans\[0\]: the table has no int1-row-asym"):
        check_plans(other, plans, [0.1, 0.2, 0.3])
    bare = CostTable.from_arrays(np.ones((2, 2)), nbytes=np.ones((2, 2)))
    with pytest.raises(MismatchError, match="its 96 units are not the 2 of the table"):
        check_plans(bare, plans, [0.1, 0.2, 0.3])


def bytes_of():
    units = made_units()
    columns = (Format.parse("int8-row-sym"), *FORMATS[1:])
    return np.stack([f.nbytes(units.rows, units.cols) for f in columns], axis=1)


def test_fitting_needs_no_torch():
    code = "import sys, bitknap.benchmarks.profiling.combined; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
