"""`bitknap list`: every name that commands take, those of other packages among them."""

import json
import subprocess
import sys

import pytest

from bitknap.allocation import CostTable
from bitknap.cli import main
from bitknap.testing.fake_packages import install

KINDS = ["estimators", "solvers", "methods", "formats", "rules", "profiles", "models", "targets"]
SOLVER = """
from bitknap.allocation import Answer, Status
class Cheapest:
    '''Ignores the budget.'''
    name = "cheapest"
    def __init__(self, seed=0, gap=0.0):
        self.seed, self.gap = seed, gap
    def answer(self, problem):
        return Answer(choice=problem.weights[0].argmin(axis=1), bound=-1.0, status=Status.FEASIBLE)
class Nothing:
    name = "nothing"
"""
ESTIMATORS = """
import numpy as np
from bitknap.estimators.costs.data_free import DataFree
class Score:
    '''Number of rows.'''
    name, needs = "rows", frozenset()
    def score(self, evidence):
        return np.asarray(evidence.units.rows, dtype=float)
class Costs(DataFree):
    '''As data-free.'''
class Needy(Score):
    needs = frozenset({"moment"})
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return what installs a made-up package."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield lambda *arguments: install(folder, *arguments)
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(folder)):
            del sys.modules[module]


def rows(capsys, kind):
    main(["list", kind, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [kind]
    return {row["name"]: row for row in document[kind]}


def test_kinds(capsys):
    main(["list", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["kinds"]] == KINDS
    main(["list"])
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_says_what_it_is_and_where_it_is_from(capsys, kind):
    for name, row in rows(capsys, kind).items():
        assert row["about"] and "\n" not in row["about"], name
        assert row["from"] == "bitknap", name
    main(["list", kind])
    assert kind in capsys.readouterr().out


def test_what_kinds_say_besides(capsys):
    assert rows(capsys, "formats")["int4-g64-sym"]["bytes_per_weight"] == 0.53125
    assert rows(capsys, "formats")["keep-bf16"]["bytes_per_weight"] == 2
    assert rows(capsys, "models")["reference:mixtral"]["parameters"] == 5_912_256
    assert "2410.06270" in rows(capsys, "rules")["mc-moe"]["cites"]
    assert rows(capsys, "targets")["mlx"]["profile"] == "layer_proj"
    assert rows(capsys, "estimators")["kurtosis"]["kind"] == "signal"


def test_the_tables_are_those_of_the_commands(capsys):
    from bitknap.allocation import PROFILES, Format
    from bitknap.allocation.catalog import SOLVERS, solver_of
    from bitknap.estimators.catalog import names
    from bitknap.quantization.rounding.methods import method

    assert tuple(rows(capsys, "profiles")) == tuple(PROFILES)
    assert all(solver_of(name).name.startswith(name) for name in rows(capsys, "solvers"))
    assert [method(name).name for name in rows(capsys, "methods")] == [
        *("rtn", "hqq", "gptq", "midtread", "ggml"),
    ]
    assert {*rows(capsys, "estimators")} == {*names(), "calibrated", "fuzzy"}
    assert all(str(Format.parse(name)) == name for name in rows(capsys, "formats"))
    assert SOLVERS.names()[0] == "knapsack"


@pytest.mark.slow
def test_most_kinds_need_no_torch():
    code = (
        "import sys; from bitknap.api.listing import rows_of\n"
        "for kind in ('solvers', 'methods', 'formats', 'rules', 'profiles', 'models', 'targets'):\n"
        "    rows_of(kind)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list", "solver"], "kind 'solver' is unknown; one of estimators, solvers,"),
        (["solve", "t", "--budget", "3bpw", "-o", "p", "--solver", "gredy"], "mean greedy?"),
        (["solve", "t", "--budget", "3bpw", "-o", "p", "--profile", "fre"], "did you mean free?"),
        (
            ["solve", "t", "--budget", "3bpw", "-o", "p", "--pin", "layer=0=int4-g64-symm"],
            "did you mean int4-g64-sym?",
        ),
        (["estimate", "reference:mixtral", "-o", "t", "--method", "gtpq"], "mean gptq?"),
        (["estimate", "reference:mixtral", "-o", "t", "--estimator", "fischer"], "mean fisher?"),
        (["inspect", "reference:mixtrl"], "did you mean reference:mixtral?"),
        (
            ["compare", "reference:mixtral", "-o", "d", "--strategies", "fisher:gredy"],
            "did you mean fisher:greedy?",
        ),
    ],
)
def test_unknown_names_list_what_there_is_and_the_nearest(refused, arguments, says):
    assert says in refused(*arguments)


def test_a_solver_of_another_package(made, packages, tmp_path, document, refused, capsys):
    points = {"cheapest": "my_solvers:Cheapest", "nothing": "my_solvers:Nothing"}
    packages("my-solvers", {"bitknap.solvers": points}, SOLVER)
    row = rows(capsys, "solvers")["cheapest"]
    assert row == {"name": "cheapest", "about": "Ignores the budget.", "from": "my-solvers 1.0"}
    solve = ("solve", made.table, "--budget", "4bpw")
    facts = document(*solve, "--solver", "cheapest", "--gap", "0.1", "-o", tmp_path / "p.json")
    assert (facts["solver"], facts["status"]) == ("cheapest", "FEASIBLE")
    for option, says in (
        (("--solver", "cheapest", "--time-limit", "1"), "the solver cheapest does not take it"),
        (("--solver", "nothing"), "my_solvers:Nothing of my-solvers 1.0 must have"),
        (
            ("--solver", "cheapst"),
            "cheapest, nothing; did you mean cheapest?",
        ),
    ):
        assert says in refused(*solve, *option, "-o", tmp_path / "q.json")


@pytest.mark.slow
def test_estimators_of_another_package(made, packages, tmp_path, document, refused, capsys):
    points = {name: f"my_estimators:{name.title()}" for name in ("score", "costs", "needy")}
    packages("my-estimators", {"bitknap.estimators": points}, ESTIMATORS)
    listed = rows(capsys, "estimators")
    assert listed["score"]["about"] == "Number of rows."
    assert listed["costs"]["from"] == "my-estimators 1.0"
    few = ("--formats", "2,4", "--group-size", "row")
    for name, said in (("score", "scored(rows)"), ("costs", "data-free")):
        out = tmp_path / f"{name}.safetensors"
        document("estimate", made.model, "--estimator", name, *few, "-o", out)
        assert CostTable.load(out).provenance["estimator"] == said
    for option, says in (
        (("--estimator", "score", "--method", "hqq"), "those of rounding to nearest"),
        (("--estimator", "moments,score"), "name one base, then the signals"),
        (("--estimator", "calibrated,moments,costs"), "name one base, then the signals"),
        (
            ("--estimator", "needy"),
            "of my-estimators 1.0: need 'moment' is unknown; one of",
        ),
    ):
        assert says in refused("estimate", made.model, *option, "-o", tmp_path / "t.safetensors")


def test_names_offered_twice_are_refused(made, packages, tmp_path, document, refused, capsys):
    packages("first", {"bitknap.solvers": {"mine": "first:Cheapest"}}, SOLVER)
    packages("second", {"bitknap.solvers": {"mine": "second:Cheapest", "greedy": "second:X"}})
    for arguments in (
        ("solve", made.table, "--budget", "4bpw", "--solver", "mine", "-o", tmp_path / "p"),
        ("list", "solvers"),
    ):
        said = refused(*arguments)
        assert "by bitknap and second 1.0" in said or "by first 1.0 and second 1.0" in said
    capsys.readouterr()
    document("solve", made.table, "--budget", "4bpw", "-o", tmp_path / "p.json")


def test_a_broken_package_breaks_no_other_name(packages, capsys, made, tmp_path, document):
    packages("broken", {"bitknap.solvers": {"mine": "broken:Mine"}}, "import no_such_module")
    listed = rows(capsys, "solvers")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in listed["mine"]["error"]
    assert listed["mine"]["from"] == "broken 1.0"
    main(["list", "solvers"])
    assert "no_such_module" in "".join(capsys.readouterr().out.split())
    document("solve", made.table, "--budget", "4bpw", "-o", tmp_path / "p.json")
