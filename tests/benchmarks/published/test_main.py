import dataclasses
import json

import numpy as np
import pytest
import torch

from bitknap.allocation import BitPlan, Budget
from bitknap.benchmarks.published.__main__ import compared, ours_on
from bitknap.benchmarks.published.claims import by_budgets, claims, decided
from bitknap.benchmarks.published.report import geometric_mean, markdown, why
from bitknap.benchmarks.published.rules import rules
from bitknap.benchmarks.setting import FORMATS, Judge
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.published.chowdhury import router_norms
from bitknap.estimators.published.rule import Material
from bitknap.estimators.published.xie import xie
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model

# Rows of 16 and 24 weights: a fp16 scale a row takes 0.83 bits of each.
# The fixture plans by every rule.
pytestmark = pytest.mark.slow

BUDGETS = (2.9, 3.6)
RULES = {
    "uniform (best recipe)",
    "random",
    "Chowdhury",
    "Chowdhury, norms alone",
    "Chowdhury, final norm",
    "Chowdhury, final norm alone",
    "Chowdhury, one pass",
    "Chowdhury, longest row",
    "MC-MoE",
    "MxMoE",
    "GEMQ",
    "MoQa",
    "Xie (rows)",
    "FRI-MxMoE",
    "AlphaQ",
    "HAWQ",
    "ExLlamaV2",
    "AutoRound",
    "mlx-lm",
}


def text(seed):
    return torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def case():
    model = tiny_model("mixtral")
    layout = walk(model)
    evidence = calibrate(model, layout, text(0), Recorded(curvature=True, gradients=True))
    final = router_norms(dict(model.named_parameters()), layout)
    generator = np.random.default_rng(0)
    known = Material(
        evidence=evidence,
        final=final,
        initial={layer: norms * generator.random(len(norms)) for layer, norms in final.items()},
        sets=tuple(calibrate(model, layout, text(seed)) for seed in (1, 2)),
    )
    judge = Judge(replay=Replay(model, layout, text(3), cache=False), evidence=evidence)
    return model, judge, known, ours_on(evidence)


@pytest.fixture(scope="module")
def offered(case):
    return list(rules(case[2]))


@pytest.fixture(scope="module")
def rows(case, offered):
    return compared(case[1], offered, case[3], BUDGETS)


def test_every_rule_is_there_at_every_budget(rows):
    assert {row["rule"] for row in rows} == RULES
    assert len(rows) == len(RULES) * len(BUDGETS)


def test_rules_stay_within_the_budget_and_use_it(case, rows):
    ours = case[3]
    for row in rows:
        assert row["bytes"] <= Budget.bits(row["budget"]).limit(ours).bound
        # One step of the smallest group that may change: a matrix, an expert in every layer, a
        # third of a layer, a layer; MoQa's clusters are as they are.
        step = {"free": 0.1, "gate_eq_up": 0.25, "expert": 0.26, "layer_proj": 0.2, "layer": 0.51}
        coarse = 1.5 if row["rule"] == "MoQa" else step[row["ties"]]
        assert row["bpw"] > row["budget"] - coarse, row["rule"]


def test_ours_never_uses_more_bytes(rows):
    assert all(row["ours_bytes"] <= row["bytes"] for row in rows)


def test_rows_are_json_and_pairs_agree(rows):
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["difference"] == pytest.approx(row["kl"] - row["ours_kl"])
        assert row["ratio"] == pytest.approx(row["kl"] / row["ours_kl"])


def test_published_ties_hold(case, offered):
    known, ours = case[2], case[3]
    units = known.evidence.units
    limit = int(Budget.bits(BUDGETS[0]).limit(ours).bound)
    for rule in offered:
        keys = {
            "layer": units.layer,
            "expert": units.layer * 100 + units.expert,
            "layer_proj": units.layer * 100 + units.projection,
        }
        if rule.ties in keys and rule.name != "ExLlamaV2":  # seconds of annealing
            plan = rule.offers(limit)[0].plan
            for key in np.unique(keys[rule.ties]):
                assert len(set(plan.choice[keys[rule.ties] == key].tolist())) == 1, rule.name


def test_a_plan_over_rows_that_agree_loses_what_the_plan_over_matrices_does(case):
    _, judge, known, _ = case
    units = known.evidence.units
    table = xie(known.evidence, FORMATS)
    assert len(table.units) == units.rows.sum()
    whole = np.arange(len(units)) % len(FORMATS)
    plan = BitPlan.from_choice(units, FORMATS, whole)
    by_row = BitPlan.from_choice(table.units, FORMATS, np.repeat(whole, units.rows))
    assert by_row.total_bytes == plan.total_bytes
    assert np.array_equal(judge.of(by_row).kl, judge.of(plan).kl)


def test_uniform_plans_of_two_formats_are_two_to_the_judge(case):
    _, judge, known, _ = case
    units = known.evidence.units
    one, four = (judge.of(BitPlan.uniform(units, FORMATS[i])) for i in (0, 3))
    assert one.kl.mean() > four.kl.mean()


def test_claims_are_judged_with_their_figures(case):
    _, judge, known, ours = case
    found = claims(judge, known, ours, BUDGETS)
    assert len(found) == 5
    assert {claim["verdict"] for claim in found} <= {"confirmed", "refuted", "not decidable"}
    assert json.loads(json.dumps(found)) == found
    without = dataclasses.replace(known, initial=None)
    assert len(claims(judge, without, ours, BUDGETS)) == 4


def test_verdicts():
    assert decided(0.5, 0.2) == "confirmed"
    assert decided(-0.5, 0.2) == "refuted"
    assert decided(0.3, 0.2) == decided(float("nan"), 0.2) == "not decidable"
    assert by_budgets(3, 1) == "confirmed"
    assert by_budgets(0, 1) == "refuted"
    assert by_budgets(0, 0) == "not decidable"


def test_the_report(case, rows):
    _, judge, known, ours = case
    model = {
        "model": "tiny",
        "tokens": 192,
        "judged_on": 192,
        "units": len(ours.units),
        "measurements": 24,
        "rows": rows,
        "claims": claims(judge, known, ours, BUDGETS),
    }
    about = {"cpu": "x86_64", "threads": 1, "versions": {"numpy": "2.4"}}
    found = markdown({"models": {"tiny": model}, "about": about})
    assert all(f"\n| {name} | 2.9 |" in found for name in RULES)
    assert "down projections need more bits than up projections | Xie et al. | tiny" in found
    assert "nan" not in found
    for row in rows:
        if row["difference"] <= 0:
            assert f"- {row['rule']} at {row['budget']} bpw, ratio" in found
    assert found.endswith("x86_64, 1 thread(s); numpy 2.4.\n")


def row(**changed):
    given = {"bytes": 10, "kl": 0.09, "ours_kl": 0.1, "difference": -0.01, "difference_se": 0.001}
    more = {"ratio": 0.9, "predicted": 0.05, "ours_predicted": 0.04, "ours_free_kl": 0.095}
    return {**given, **more, **changed}


def test_reasons():
    assert "two standard errors" in why(row(difference_se=0.01))
    assert "round the model identically" in why(row(difference=0.0))
    assert "is tied (gate = up)" in why(row(ours_free_kl=0.08))
    assert "was not given" in why(row(predicted=None))
    assert "prefer the rule's plan too" in why(row(predicted=0.03))
    assert "misjudge units" in why(row())


def test_the_mean_of_ratios_is_geometric():
    assert geometric_mean([row(ratio=0.5), row(ratio=8.0), row(bytes=None)]) == pytest.approx(2.0)
