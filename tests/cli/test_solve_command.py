"""`bitknap solve`: pins, profiles, solvers, limits, prices and frontiers."""

import json
from pathlib import Path

import numpy as np
import pytest

from bitknap.allocation import PROFILES, BitPlan, Budget, CostTable, Problem, formats, solve
from bitknap.allocation.tradeoffs.frontier_path import Frontier
from bitknap.cli import main
from bitknap.testing import routed_units

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 36 units that no model is needed for."""
    units = routed_units(2, 6, ("gate", "up", "down"), rows=32, cols=64)
    chosen = formats((1, 2, 3, 4), 32, True)
    scale = np.random.default_rng(0).lognormal(0, 1.5, (36, 1))
    provenance = {"model": "m", "fixed_bytes": 100, "unit": "nats/token"}
    path = tmp_path_factory.mktemp("solve") / "table.safetensors"
    CostTable.from_arrays(
        scale * [1.0, 0.3, 0.08, 0.02], units=units, formats=chosen, provenance=provenance
    ).save(path)
    return path


@pytest.mark.slow
def test_pins_and_profiles_are_kept(made, tmp_path):
    path = tmp_path / "plan.json"
    pins = ("--pin", "layer=0=4", "--pin", "proj=down,layer=1,expert=2=2")
    main(
        [
            "solve",
            str(made.table),
            "--budget",
            "5bpw",
            "--profile",
            "expert",
            *pins[:2],
            "-o",
            str(path),
        ]
    )
    plan = BitPlan.load(path)
    assert {plan.format_of(i).bits for i in range(12)} == {4}
    main(["solve", str(made.table), "--budget", "5bpw", *pins, "-o", str(path), "--overwrite"])
    plan = BitPlan.load(path)
    (unit,) = plan.units.matches("proj=down,layer=1,expert=2").nonzero()[0]
    assert plan.format_of(int(unit)).bits == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "lots"), "examples: 2.5bpw"),
        (("--budget", "0bpw"), "must be above 0"),
        (("--budget", "3bpw", "--pin", "layer=0"), "PATTERN=BITS"),
        (("--budget", "3bpw", "--pin", "layer=0=x"), "PATTERN=BITS"),
        (("--budget", "3bpw", "--pin", "layer=9=4"), "matches no unit"),
        (("--budget", "3bpw", "--pin", "layer=0=5"), "no format has 5 bits"),
        (("--budget", "3bpw", "--pin", "colour=red=4"), "colour"),
        (("--budget", "3bpw", "--profile", "mine"), "gate_eq_up"),
        (("--budget", "3bpw", "--solver", "guess"), "knapsack"),
        ((), "--budget"),
        (("--budget", "3bpw", "--nonsense"), "--nonsense"),
        (("--budget", "3bpw", "--pin", "proj=down=int5"), "format 'int5' is unknown"),
        (("--budget", "3bpw", "--pin", "proj=down=int3-g8-sym"), "no format is int3-g8-sym"),
        (("--budget", "3bpw", "--gap", "2"), "gap: 2.0 is not a share"),
        (("--budget", "3bpw", "--gap", "few"), "few"),
        (("--budget", "3bpw", "--time-limit", "0"), "time_limit: 0.0 must be above 0"),
        (("--budget", "3bpw", "--solver", "greedy", "--gap", "0.1"), "greedy does not take it"),
        (("--budget", "3bpw", "--limit", "missing.json"), "missing.json: cannot be read"),
        (("--budget", "3bpw", "--frontier"), "give one of --budget, --fit and --frontier"),
        (("--frontier", "--price"), "--frontier does not take --price"),
        (("--frontier", "--limit", "x.json"), "--frontier does not take --limit"),
        (("--frontier", "--solver", "ilp"), "--frontier does not take --solver"),
        (("--frontier", "--time-limit", "1"), "--frontier does not take --time-limit"),
        (("--frontier", "--profile", "mine"), "gate_eq_up"),
        (("--frontier", "--pin", "layer=0=5"), "no format has 5 bits"),
    ],
)
def test_bad_words_to_solve(arguments, words, made, tmp_path, refused):
    out = ("-o", tmp_path / "plan.json")
    assert words in refused("solve", made.table, *arguments, *out)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0.5bpw", "1kB", "1%"])
def test_a_budget_below_the_minimum(budget, made, tmp_path, refused, capsys):
    out = ("-o", tmp_path / "plan.json")
    line = refused("solve", made.table, "--budget", budget, *out)
    assert "limit is" in line
    if budget == "0.5bpw":
        table = CostTable.load(made.table)
        assert f"{table.nbytes.min(1).sum() / 1024:.4g} KiB" in line
    rest = ("--budget", budget, *FAST, "-o", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as exit:
        main(["quantize", str(made.model), *rest])
    line = capsys.readouterr().err
    assert exit.value.code == 2
    assert "limit is" in line
    assert "readings are kept in" in line  # for another try, with another budget
    assert line.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.journal"]


# Solvers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knapsack", "ilp", "greedy", "search"])
def test_every_solver_has_a_name(name, table, document, tmp_path):
    options = ("--solver", name, "--profile", "expert", "--budget", "2.4bpw")
    found = document("solve", table, *options, "-o", tmp_path / "plan.json")
    assert found["solver"].startswith(name)
    assert found["bits_per_weight"] <= 2.4
    assert found["bound"] <= found["cost"]
    plan = BitPlan.load(tmp_path / "plan.json")
    assert plan.header["solver"] == found["solver"]
    assert plan.header["profile"] == "expert"


def test_an_early_stop_is_passed_on(table, document, tmp_path):
    options = ("--budget", "2.4bpw", "--gap", "0.5", "--time-limit", "5")
    for name in ("knapsack", "ilp"):
        out = tmp_path / f"{name}.json"
        assert document("solve", table, *options, "--solver", name, "-o", out)["gap"] <= 0.5


def test_a_pin_to_a_format(table, tmp_path):
    path = tmp_path / "plan.json"
    pin = ("--pin", "proj=down=int4-g32-sym")
    main(["solve", str(table), "--budget", "3bpw", *pin, "-o", str(path)])
    plan = BitPlan.load(path)
    down = plan.units.matches("proj=down").nonzero()[0]
    assert {plan.format_of(int(unit)).name for unit in down} == {"int4-g32-sym"}


def test_the_solution_is_printed(table, capsys, tmp_path):
    main(["solve", str(table), "--budget", "3bpw", "-o", str(tmp_path / "plan.json")])
    text = capsys.readouterr().out
    assert all(word in text for word in ("solution", "status", "cost", "bound", "gap"))


# Limits


def limits_file(path, *limits):
    content = {"format": "bitknap.limits", "version": "1.0", "limits": list(limits)}
    path.write_text(json.dumps(content))
    return path


def test_limits_of_several_files_hold(table, document, tmp_path):
    share = limits_file(tmp_path / "a.json", {"kind": "share_at_most", "share": 0.25, "bits": 1})
    rule = {"kind": "count_at_least", "count": 2, "bits": 4, "pattern": "proj=down"}
    count = limits_file(tmp_path / "b.json", rule)
    options = ("--budget", "2.5bpw", "--profile", "free")
    free = document("solve", table, *options, "-o", tmp_path / "free.json")
    both = ("--limit", share, "--limit", count)
    found = document("solve", table, *options, *both, "-o", tmp_path / "plan.json")
    assert found["cost"] >= free["cost"]
    plan = BitPlan.load(tmp_path / "plan.json")
    bits = np.array([plan.format_of(unit).bits for unit in range(36)])
    assert (bits == 1).sum() <= 9
    down = plan.units.matches("proj=down")
    for layer in (0, 1):
        assert (bits[down & (plan.units.layer == layer)] == 4).sum() >= 2


def test_bad_limit_files(table, refused, tmp_path):
    out = ("--budget", "2.5bpw", "-o", tmp_path / "plan.json")
    junk = tmp_path / "junk.json"
    junk.write_text("{")
    assert "not valid JSON" in refused("solve", table, *out, "--limit", junk)
    wrong = limits_file(tmp_path / "w.json", {"kind": "share_at_most", "share": 2, "bits": 1})
    assert "limits[0].share" in refused("solve", table, *out, "--limit", wrong)
    same = limits_file(tmp_path / "s.json", {"kind": "share_at_most", "share": 0.5, "bits": 1})
    line = refused("solve", table, *out, "--limit", same, "--limit", same)
    assert "a name appears twice" in line


# Prices


def test_prices_of_all_profiles(table, document, capsys, tmp_path):
    options = ("--budget", "2.5bpw", "--profile", "expert", "--price")
    found = document("solve", table, *options, "-o", tmp_path / "plan.json")
    rows = {row["profile"]: row for row in found["price"]}
    assert list(rows) == list(PROFILES)
    assert [name for name, row in rows.items() if row["chosen"]] == ["expert"]
    assert rows["expert"]["cost"] == found["cost"]
    assert rows["free"]["ratio"] == 1
    assert rows["layer"]["ratio"] == pytest.approx(rows["layer"]["cost"] / rows["free"]["cost"])
    main(["solve", str(table), *options, "-o", str(tmp_path / "again.json")])
    text = capsys.readouterr().out
    assert "expert *" in text
    assert "over free" in text
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_profile_out_of_reach_says_what_it_would_need(table, document, capsys, tmp_path):
    pin = ("--pin", "layer=0,expert=0=4", "--pin", "layer=1,expert=5,proj=down=2")
    options = ("--budget", "2bpw", *pin, "--price")
    found = document("solve", table, *options, "-o", tmp_path / "plan.json")
    row = {row["profile"]: row for row in found["price"]}["layer"]
    assert (row["status"], row["cost"], row["ratio"]) == ("INFEASIBLE", None, None)
    assert row["reason"].startswith("memory: smallest plan needs")
    main(["solve", str(table), *options, "-o", str(tmp_path / "again.json")])
    assert "infeasible: memory: smallest plan needs" in capsys.readouterr().out


def test_no_price_unless_asked(table, document, tmp_path):
    found = document("solve", table, "--budget", "2.5bpw", "-o", tmp_path / "plan.json")
    assert "price" not in found


# Frontiers


@pytest.mark.slow
def test_a_frontier_and_its_picture(table, document, capsys, tmp_path):
    out, picture = tmp_path / "frontier.json", tmp_path / "frontier.svg"
    found = document("solve", table, "--frontier", "-o", out)
    assert found["picture"] == str(picture)
    assert found["header"]["profile"] == "gate_eq_up"
    assert document("show", out)["points"] == found["points"]
    plan = Frontier.load(out).plan(Budget.bits(2.5))
    tied = CostTable.load(table).tie(PROFILES["gate_eq_up"])
    best = solve(Problem(tied, Budget.bits(2.5)))
    noise = 1e-12 * best.cost
    assert plan.header["bound"] - noise <= best.cost <= plan.header["objective"] + noise
    first = out.read_bytes(), picture.read_bytes()
    assert b"<svg" in first[1]
    main(["solve", str(table), "--frontier", "-o", str(out), "--overwrite"])
    assert (out.read_bytes(), picture.read_bytes()) == first
    capsys.readouterr()
    main(["show", str(out)])
    assert "each optimal at its bytes" in capsys.readouterr().out


def test_a_frontier_overwrites_nothing(table, refused, tmp_path):
    (tmp_path / "frontier.svg").write_text("mine")
    line = refused("solve", table, "--frontier", "-o", tmp_path / "frontier.json")
    assert "frontier.svg exists" in line
    line = refused("solve", table, "--frontier", "-o", tmp_path / "new.svg")
    assert "name the frontier .json" in line


def test_what_is_no_table_or_frontier(table, refused, tmp_path):
    plan = tmp_path / "plan.json"
    main(["solve", str(table), "--budget", "2.5bpw", "-o", str(plan)])
    out = ("-o", tmp_path / "frontier.json")
    assert "not a readable safetensors file" in refused("solve", plan, "--frontier", *out)
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": "bitknap.frontier", "version": "1.0"}')
    assert "formats: missing; make the frontier again" in refused("show", broken)
    assert "'bitknap.frontier' is not 'bitknap.plan'" in refused(
        "quantize", tmp_path, "--plan", broken, "-o", tmp_path / "out"
    )
