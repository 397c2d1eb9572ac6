"""`bitknap compare` on a tiny model: every strategy, failures apart, resumed, the same twice."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitknap.allocation import BitPlan, formats
from bitknap.api import refining
from bitknap.benchmarks.compare import models
from bitknap.benchmarks.compare import run as running
from bitknap.benchmarks.compare.hand_recipes import down_first, first_layers, offers
from bitknap.benchmarks.compare.strategies import PUBLISHED, names
from bitknap.benchmarks.compare.tasks import Tasks
from bitknap.cli import main
from bitknap.errors import InputError
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import routed_units

pytestmark = pytest.mark.campaign

ROOT = Path(__file__).parent.parent.parent.parent
NUMBERS = ("kl", "kl_se", "perplexity", "top1", "rank", "bytes", "bpw")


@pytest.fixture(scope="module", autouse=True)
def short_gate():
    """The gate judges every uniform recipe; on its usual text it takes half of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "GATE_TOKENS", 512)
        patch.setattr(models, "GATE_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def words(model, tmp_path_factory):
    """What all runs here are asked for; two domains that calibration does not see."""
    folder = tmp_path_factory.mktemp("texts")
    text = (ROOT / "benchmarks" / "reference" / "evaluation.txt").read_text()
    found = ["--text", ROOT / "benchmarks" / "reference" / "calibration.txt"]
    for name, at in {"first": 0, "second": len(text) // 2}.items():
        (folder / f"{name}.txt").write_text(text[at : at + 20_000])
        found += ["--evaluation-text", folder / f"{name}.txt"]
    found += ["--tokens", "256", "--evaluation-tokens", "512", "--refine-tokens", "256"]
    found += ["--formats", "1,2,3,4", "--group-size", "8,row", "--profile", "free"]
    found += ["--refine", "3"]
    return [str(word) for word in ("compare", model, *found)]


@pytest.fixture(scope="module")
def everything(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("all") / "out"
    main([*words, "--budgets", "3,4", "--strategies", "all", "-o", str(out)])
    return out


def test_every_strategy_has_a_row_at_every_budget(everything):
    document = json.loads((everything / "compare.json").read_text())
    rows = document["rows"]
    wanted = names(["all"])
    assert {(row["strategy"], row["budget"]) for row in rows} == {
        (name, budget) for name in wanted for budget in ("3bpw", "4bpw")
    }
    failed = [(row["strategy"], row["reason"]) for row in rows if row["status"] == "failed"]
    assert not failed
    fine = [row for row in rows if row["status"] == "ok"]
    assert len(fine) > 0.8 * len(rows)
    limits = {entry["budget"]: entry["bytes"] for entry in document["budgets"]}
    for row in fine:
        assert all(np.isfinite(row[name]) for name in NUMBERS)
        assert row["bytes"] <= limits[row["budget"]]
        assert row["kl"] == pytest.approx(np.mean(list(row["domain_kl"].values())), rel=1e-9)
        assert set(row["domain_kl"]) == {"first", "second"}
    for row in rows:
        assert row["status"] == "ok" or row["reason"]


def test_exact_solvers_agree_and_ours_is_compared_with_itself_by_nobody(everything):
    rows = json.loads((everything / "compare.json").read_text())["rows"]
    kl = {(row["strategy"], row["budget"]): row["kl"] for row in rows}
    for budget in ("3bpw", "4bpw"):
        assert kl["fisher:ilp", budget] == pytest.approx(kl["fisher:knapsack", budget], rel=0.2)
    ours = [row for row in rows if row["strategy"] == "ours"]
    assert [row["difference"] for row in ours] == [None, None]


def test_files_beside_the_document(everything):
    document = json.loads((everything / "compare.json").read_text())
    assert sorted(path.name for path in everything.iterdir()) == [
        "bitknap_files.json",
        "compare.json",
        "pareto.png",
        "plans",
        "report.html",
        "rows.csv",
        "times.json",
    ]
    with (everything / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    for entry in document["budgets"]:
        plan = BitPlan.load(everything / entry["plan"])
        assert plan.total_bytes <= entry["bytes"]
    assert set(PUBLISHED) <= set(json.loads((everything / "times.json").read_text())["plans"])
    page = (everything / "report.html").read_text()
    assert "evolution" in page


@pytest.fixture
def layered(words):
    """A limit that the model can just be compared in, layer by layer."""
    source = Checkpoint.open(Path(words[1]))
    layout = walk_headers(source.config, source.shapes)
    needs = ("kl", "curvature", "gradients")
    return ["--max-memory", f"{layer_bytes(source, layout, 256 + 256 + 512 + 512, needs)}B"]


def test_a_model_larger_than_memory_is_compared_layer_by_layer(words, layered, tmp_path, document):
    # Read off routers, single units, groups, whole plans, and passes over parts of the text.
    some = ["--budgets", "3,4", "--strategies", "uniform,chowdhury,fuzzy:greedy,evolution,moqa"]
    whole = document(*words, *some, "-o", tmp_path / "whole")
    layers = document(*words, *some, *layered, "-o", tmp_path / "layers")
    assert layers["original"]["perplexity"] == pytest.approx(whole["original"]["perplexity"])
    for one, other in zip(whole["rows"], layers["rows"], strict=True):
        assert (one["strategy"], one["bytes"]) == (other["strategy"], other["bytes"])
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-4)


def test_tasks_need_the_model_in_memory(words, layered, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(Tasks, "check", lambda tasks: None)
    line = refused(*words, *layered, "--tasks", "piqa", "-o", tmp_path / "out")
    assert line == (
        "bitknap: --tasks: need the whole model in memory; raise --max-memory, or leave out --tasks"
    )


def test_two_runs_are_the_same_but_for_times(words, tmp_path):
    some = ["--budgets", "3", "--strategies", "random,evolution,moments:search,gemq"]
    for name in ("one", "two"):
        main([*words, *some, "-o", str(tmp_path / name)])
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file() and path.name != "times.json":
            same = (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
            assert path.read_bytes().replace(b"/one", b"/two") == same, path.name


def test_a_killed_comparison_goes_on(words, tmp_path, background):
    some = ["--budgets", "3,4", "--strategies", "uniform,gemq"]
    one, two = tmp_path / "one", tmp_path / "two"
    journal = tmp_path / ".two.partial" / running.WORK / "journal"
    worker = background([*words, *some, "-o", two], journal, 3)
    worker.kill()
    worker.wait()
    assert journal.exists()
    with pytest.raises(SystemExit):
        main([*words, *some, "--seed", "1", "-o", str(two)])  # a journal of other inputs
    main([*words, *some, "-o", str(one)])
    main([*words, *some, "-o", str(two)])
    for name in ("rows.csv", "pareto.png", "plans/3bpw.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    timed = [json.loads((folder / "times.json").read_text()) for folder in (one, two)]
    assert timed[0]["tables"].keys() == timed[1]["tables"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_strategy_that_fails_is_reported_and_the_others_are_there(
    words, tmp_path, monkeypatch, capsys
):
    from bitknap.benchmarks.compare import strategies

    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(strategies, "_random", broken)
    monkeypatch.setattr("bitknap.estimators.published.mc_moe.rule", broken)
    some = ["--budgets", "3", "--strategies", "random,mc-moe,alphaq,moments:knapsack"]
    with pytest.raises(SystemExit) as exit:
        main([*words, *some, "--json", "-o", str(tmp_path / "out")])
    assert exit.value.code == 1
    rows = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["random"]["status"] == rows["mc-moe"]["status"] == "failed"
    assert rows["random"]["reason"] == "RuntimeError: out of luck"
    assert {rows[name]["status"] for name in ("ours", "alphaq", "moments:knapsack")} == {"ok"}


def test_a_budget_below_a_strategys_reach_is_said_in_its_cell(words, tmp_path, document):
    some = ["--budgets", "1.9,3", "--strategies", "mc-moe,uniform"]
    rows = document(*words, *some, "-o", tmp_path / "out")["rows"]
    cells = {(row["strategy"], row["budget"]): row for row in rows}
    assert cells["mc-moe", "1.9bpw"]["status"] == "unreachable"
    assert "no plan of at most" in cells["mc-moe", "1.9bpw"]["reason"]
    assert cells["mc-moe", "3bpw"]["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--budgets", "2,x"], "--budget 'x': compare takes bits per weight"),
        (["--budgets", "0"], "above 0"),
        (["--strategies", "best"], "fisher:greedy"),
        (["--profile", "half"], "profile 'half' is unknown"),
        (["--refine", "0"], "at least 1"),
        (["--device", "gpu"], "device: 'gpu' is no device; give auto, cpu, cuda or cuda:N"),
        (["--evaluation-tokens", "900000"], "lower --tokens or add text"),
    ],
)
def test_bad_words_are_refused(words, refused, tmp_path, change, reason):
    assert reason in refused(*words, *change, "-o", tmp_path / "sub" / "out")


def test_text_that_calibration_saw_is_refused(words, refused, tmp_path):
    same = [words[words.index("--text") + 1]]
    assert "judge plans on text that no strategy saw" in refused(
        *words[:2], "--text", *same, "--evaluation-text", *same, "--tokens", "4096",
        "--evaluation-tokens", "4096", "-o", tmp_path / "out",
    )  # fmt: skip


def test_a_finished_folder_is_not_written_over(everything, words, refused):
    assert "exists; choose another name" in refused(*words, "-o", everything)


def test_what_a_comparison_wrote_is_replaced_and_nothing_else(words, refused, tmp_path):
    out, some = tmp_path / "out", ["--budgets", "3", "--strategies", "uniform"]
    again = [*words, *some, "-o", str(out), "--overwrite"]
    main(again)
    first = {file.name for file in out.rglob("*")}
    (out / "bitknap_files.json").unlink()  # as of an earlier version
    (out / "thesis.txt").write_text("years of work")
    assert "thesis.txt was not written by Bitknap" in refused(*again)
    (out / "thesis.txt").unlink()
    main(again)
    assert {file.name for file in out.rglob("*")} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for inside in (words[1], f"{words[1]}/out", f"{words[1]}/.."):
        assert "may not overlap" in refused(*words, *some, "-o", inside, "--overwrite")


def test_a_hidden_folder_of_somebody_else_is_no_stopped_run(words, refused, tmp_path):
    for folder in ("out", ".other.partial"):
        (tmp_path / folder / running.WORK).mkdir(parents=True)
        (tmp_path / folder / running.WORK / "thesis.txt").write_text("years of work")
    assert "thesis.txt was not written" in refused(*words, "-o", tmp_path / "out", "--overwrite")
    assert "out exists; choose another name" in refused(*words, "-o", tmp_path / "out")


def test_tasks_without_lm_eval_name_the_extra(words, refused, tmp_path, monkeypatch):
    from bitknap.benchmarks.compare import tasks

    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert "pip install 'bitknap[tasks]'" in refused(
        *words, "--tasks", "piqa", "-o", tmp_path / "out"
    )


def test_tasks_of_ones_own(words, tmp_path, document):
    shutil.copytree(Path(__file__).parent / "task", tmp_path / "task")
    data = tmp_path / "task" / "questions.jsonl"
    config = tmp_path / "task" / "letters.yaml"
    config.write_text(config.read_text().replace("QUESTIONS", str(data)))
    found = document(
        *words, "--budgets", "3", "--strategies", "moments:knapsack", "--tasks", "letters",
        "--task-path", tmp_path / "task", "-o", tmp_path / "out",
    )  # fmt: skip
    for row in (found["original"], *found["rows"]):
        assert 0 <= row["tasks"]["letters"]["acc"] <= 1


def test_names():
    assert names(["quick"])[:4] == ("ours", "ours-unrefined", "ours-rows", "uniform")
    assert len(set(names(["all", "published", "fisher:greedy"]))) == len(names(["all"]))
    with pytest.raises(InputError, match="ESTIMATOR:SOLVER"):
        names(["fisher:magic"])


def test_recipes_give_the_wider_format_to_the_first_in_order():
    units = routed_units(3, 2, ("gate", "up", "down"))
    widths = formats((2, 4), "row", (True,))
    small, large = (int(item.nbytes(16, 16)) for item in widths)
    limit = len(units) * small + 6 * (large - small)
    (first,) = offers(units, widths, first_layers(units), limit, "m")
    assert {int(units.layer[i]) for i in np.flatnonzero(first.plan.choice)} == {0}
    (down,) = offers(units, widths, down_first(units), limit, "m")
    raised = units.projection[np.flatnonzero(down.plan.choice)]
    assert {str(units.projections[p]) for p in raised} == {"down"}
    assert first.plan.total_bytes == down.plan.total_bytes == limit
    assert offers(units, widths, first_layers(units), small, "m") == []
