"""Costs of several texts as one table."""

from dataclasses import replace

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Knapsack, Problem, formats, solve
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.tables.several_texts import robust

FORMATS = formats((2, 4, 6, 8), "row", keep="fp32")


@pytest.fixture(scope="module")
def tables(sets):
    return [SecondMoments().estimate(x, FORMATS) for x in sets]


@pytest.mark.parametrize("rule", ["mean", "worst", "mean+sd"])
def test_robust_costs(tables, rule):
    costs = np.stack([table.cost for table in tables])
    mean, sd = costs.mean(axis=0), costs.std(axis=0, ddof=1)
    wanted = {"mean": mean, "worst": costs.max(axis=0), "mean+sd": mean + 2 * sd}[rule]
    found = robust(tables, rule, k=2.0)
    shares = np.mean([np.asarray(t.frequency) for t in tables], axis=0)
    assert found.cost == pytest.approx(wanted)
    assert found.spread == pytest.approx(sd)
    assert found.frequency == pytest.approx(shares)
    assert found.provenance["estimator"] == "robust(moments)"
    assert found.provenance["rule"] == ("mean+2sd" if rule == "mean+sd" else rule)
    assert found.provenance["texts"] == [table.provenance["text"] for table in tables]
    assert "text" not in found.provenance


def test_the_worst_case_plan_is_best_in_the_worst_case_it_models(tables):
    found = robust(tables, "worst")
    plans = [solve(Problem(t, Budget.bits(6)), Knapsack()).choice for t in (found, *tables)]
    each = np.arange(len(found.units))
    worst = [found.cost[each, choice].sum() for choice in plans]
    assert worst[0] == min(worst)


def test_what_one_set_forbids_is_forbidden(tables):
    pinned = [tables[0].pin("layer=0", at_least=4), *tables[1:]]
    found = robust(pinned, "mean+sd")
    assert np.array_equal(np.isinf(found.cost), np.isinf(pinned[0].cost))
    assert np.isfinite(np.asarray(found.spread)).all()


def test_robust_refuses(tables):
    with pytest.raises(InputError, match="1 is below 2; calibrate on two or more texts"):
        robust(tables[:1])
    with pytest.raises(InputError, match="all 2 have the same text"):
        robust([tables[0], tables[0]])
    with pytest.raises(InputError, match="rule 'best' is unknown; one of mean, worst"):
        robust(tables, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"k: -1 is not at least 0"):
        robust(tables, k=-1)
    bare = [CostTable.from_arrays(np.ones((2, 2)), nbytes=np.ones((2, 2)) * n) for n in (1, 2)]
    with pytest.raises(MismatchError, match="table 1: its bytes differ from those of the first"):
        robust(bare)
    for key, value in {"model": "x", "method": "gptq", "unit": "score"}.items():
        other = replace(tables[1], provenance={**tables[1].provenance, key: value})
        with pytest.raises(MismatchError, match=f"table 1: {key} is {value!r}, the first has"):
            robust([tables[0], other])
    other = replace(tables[1], ties=np.zeros(len(tables[1].units)))
    with pytest.raises(MismatchError, match="its ties differ from those"):
        robust([tables[0], other])
    fewer = replace(
        tables[1],
        formats=FORMATS[1:],
        cost=tables[1].cost[:, 1:],
        nbytes=tables[1].nbytes[:, 1:],
        spread=None,
    )
    with pytest.raises(MismatchError, match="its formats differ from those"):
        robust([tables[0], fewer])


def test_what_each_table_says_for_itself_is_kept(tables):
    checks = [{"plans": 3, "spearman": 0.5 + 0.1 * number} for number in range(3)]
    said = [
        {**t.provenance, "measurements": 6, "check": check, "check_measurements": 3}
        for t, check in zip(tables, checks, strict=True)
    ]
    found = robust([replace(t, provenance=p) for t, p in zip(tables, said, strict=True)])
    assert found.provenance["measurements"] == 18
    assert found.provenance["check_measurements"] == 9
    assert found.provenance["kl_floor"] == max(t.provenance["kl_floor"] for t in tables)
    assert found.provenance["each"] == [{"check": check} for check in checks]
    assert found.provenance["method"] == "rtn"
    assert "check" not in found.provenance
    assert "each" not in robust(tables).provenance


def test_an_ensemble_of_estimators_on_one_text_is_allowed(tables):
    other = replace(tables[0], provenance={**tables[0].provenance, "estimator": "other"})
    assert not np.any(robust([tables[0], other]).spread)
