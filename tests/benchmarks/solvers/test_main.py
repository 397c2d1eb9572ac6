import json
import subprocess
import sys

import numpy as np
import pytest

from bitknap.allocation import Problem, Status, solve
from bitknap.benchmarks.solvers.__main__ import OURS, quick, run, why_not
from bitknap.benchmarks.solvers.instances import (
    CHANNELS,
    DEEPSEEK_V3,
    KIMI_K2,
    MIXTRAL,
    QWEN3_30B,
    TINY,
    instance,
    model_units,
    random_instance,
)
from bitknap.benchmarks.solvers.peers import BASELINES, scaled
from bitknap.benchmarks.solvers.report import markdown, targets
from bitknap.errors import InputError

ABOUT = {
    "versions": {"python": "3"},
    "cpu": "a processor",
    "cores": 1,
    "threads": 1,
    "relative_gap": 1e-9,
    "solvers": {},
}


@pytest.mark.parametrize(
    ("shape", "units", "billions"),
    [
        (MIXTRAL, 768, 45.1),
        (QWEN3_30B, 18_432, 29.0),
        (DEEPSEEK_V3, 44_544, 653.9),
        (KIMI_K2, 69_120, 1014.7),
    ],
)
def test_models_have_their_published_sizes(shape, units, billions):
    found = model_units(shape)
    assert len(found) == units
    assert found.numel.sum() / 1e9 == pytest.approx(billions, abs=0.05)


def test_channel_groups_are_cut_without_loss():
    whole, cut = model_units(KIMI_K2, 3), model_units(CHANNELS, 46)
    assert cut.numel.sum() == whole.numel.sum()
    assert cut.label(45) == "layer=1 role=routed expert=0 proj=down block=13"


def test_too_many_units_are_refused():
    with pytest.raises(InputError, match="count: 49 of 48 units"):
        model_units(TINY, 49)


def test_instances_are_the_same_every_time_and_in_places_not_convex():
    first, second = instance("tiny").table, instance("tiny").table
    assert np.array_equal(first.cost, second.cost)
    order = np.argsort(first.nbytes[0])
    slopes = np.diff(first.cost[:, order]) / np.diff(first.nbytes[:, order])
    # On a convex curve each step saves less a byte than the one before.
    assert (np.diff(slopes) < 0).any(axis=1).all()


def test_every_further_limit_binds_and_can_be_met():
    given = instance("tiny+5")
    free = solve(Problem(given.table, given.limits[0]))
    each = np.arange(len(free.choice))
    for limit in given.limits[1:]:
        weight = np.broadcast_to(limit.weight, given.table.cost.shape)
        assert weight[each, free.choice].sum() > limit.bound, limit.name
    assert solve(Problem(given.table, given.limits)).cost > free.cost


def test_the_measured_table_is_not_convex_at_two_bits():
    cost = instance("mixtral-measured").table.cost
    above = cost[:, 1] > (cost[:, 0] + cost[:, 2]) / 2
    # As published for these numbers, with squared errors.
    assert round(100 * above.mean()) == 84


def test_random_instances():
    for kind in ("uncorrelated", "weak", "strong"):
        given = random_instance(kind, 30)
        found = solve(Problem(given.table, given.limits))
        assert found.status is Status.OPTIMAL
    with pytest.raises(
        InputError, match="kind 'odd' is unknown; one of uncorrelated, weak, strong"
    ):
        random_instance("odd", 30)
    with pytest.raises(InputError, match="instance 'odd' is unknown; one of tiny, "):
        instance("odd")


def test_scaled_problems_keep_whole_numbers():
    given = instance("tiny")
    flat = scaled(Problem(given.table, given.limits))
    assert np.abs(flat.cost).max() == pytest.approx(1e6)
    assert (flat.weights == np.floor(flat.weights)).all()
    assert np.gcd.reduce(flat.weights.astype(int).ravel()) == 1


def test_the_dynamic_program_refuses_large_tables():
    given = instance("qwen3-30b")
    with pytest.raises(InputError, match=r"dp: .* cells, at most 5e\+08; the table is too large"):
        BASELINES["dp"].run(Problem(given.table, given.limits), 1.0)


def test_what_is_not_tried_says_why():
    assert why_not("dp", instance("tiny+5")) == "6 limits, it takes 1"
    assert why_not("pulp-cbc", instance("tiny")) == ""


@pytest.mark.campaign
def test_a_quick_run_of_everything_and_its_resumption(tmp_path):
    pairs = quick()
    assert {name for name, _ in pairs} == {*OURS, *BASELINES}
    command = [
        sys.executable,
        "-m",
        "bitknap.benchmarks.solvers.__main__",
        "--quick",
        "-o",
        str(tmp_path),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    assert len(rows) == len(done.stdout.splitlines()) == len(pairs)
    best = {row["instance"]: row["objective"] for row in rows if row["solver"] == "knapsack"}
    for row in rows:
        assert row["status"] in ("optimal", "feasible", "skipped"), row
        if row["status"] == "optimal":
            assert row["objective"] == pytest.approx(best[row["instance"]], rel=1e-8), row
        if row["status"] != "skipped":
            assert row["peak_mb"] >= row["over_mb"] >= 0
    partial = tmp_path / "solvers.partial.jsonl"
    whole = partial.read_bytes()
    lines: list[str] = []
    # As if stopped while writing the last line.
    partial.write_bytes(whole[:-20])
    run(tmp_path, pairs, 2.0, lines.append)
    assert len(lines) == 1
    assert len(json.loads((tmp_path / "solvers.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "solvers.svg").read_text().count("<svg") == 1


def row(solver: str, where: str, **more: object) -> dict[str, object]:
    return {
        "solver": solver,
        "instance": where,
        "units": 36_000,
        "formats": 8,
        "limits": 1,
        "time_limit": 100.0,
        "status": "optimal",
        "seconds": 0.1,
        "build_seconds": 0.0,
        "objective": 1.0,
        "gap": 0.0,
        "bytes": 1,
        "peak_mb": 100.0,
        "over_mb": 10.0,
        **more,
    }


def test_targets_are_judged():
    rows = [
        row("knapsack", "36k"),
        row("pulp-cbc", "36k", seconds=105.0, build_seconds=5.0, status="feasible", gap=None),
        row("scipy-highs", "36k", seconds=4.0, objective=1 + 1e-8),
        row("knapsack", "250k", seconds=0.5, peak_mb=501.0),
        row("knapsack", "36k+5", status="no plan", note="found no plan", objective=None),
    ]
    del rows[-1]["objective"]
    found = targets(rows)
    assert [item[1:] for item in found] == [
        ("1.0e-08 over 1 runs", "miss"),
        ("more than 1,000 (pulp-cbc)", "pass"),
        ("40 (scipy-highs)", "miss"),
        ("0.50 s, 501 MB, gap 0.0e+00", "miss"),
        ("", "not measured"),
        ("found no plan", "miss"),
        ("", "not measured"),
    ]
    text = markdown(rows, ABOUT)
    assert (
        "| pulp-cbc | > 100 (ended at 105) | 5 | > 1,000.0 | feasible | – | 1 | 1 | 100 | 10 |"
        in text
    )
    assert "`knapsack` no plan: found no plan." in text
