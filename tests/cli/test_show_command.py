"""`bitknap show --diff`: two plans or packed checkpoints side by side."""

import io
import json

import numpy as np
import pytest

from bitknap.allocation import BitPlan, CostTable, formats
from bitknap.cli import main
from bitknap.cli.views.plan_diff_tables import diff_tables
from bitknap.testing import routed_units

FORMATS = formats((2, 3, 4), 32, True)


def units_of(experts=4):
    return routed_units(2, experts, ("gate", "up", "down"), rows=64, cols=32)


def save(path, choice, model="m", **header):
    units = units_of()
    options = FORMATS[: max(choice) + 1]
    BitPlan.from_choice(units, options, choice, model=model, header=header).save(path)
    return path


@pytest.fixture
def pair(tmp_path):
    first = save(tmp_path / "a.json", [0, 1] * 12, objective=0.5, estimator="e")
    second = save(tmp_path / "b.json", [2, 1] + [0, 1] * 11, objective=0.4, estimator="e")
    return first, second


def test_json_says_all_of_it(pair, document):
    found = document("show", pair[0], "--diff", pair[1])
    assert found["kind"] == "plan diff"
    assert found["units"] == {"up": 1, "down": 0, "other": 0, "same": 23}
    assert found["after"]["bytes"] - found["before"]["bytes"] == 512
    assert (found["before"]["objective"], found["after"]["objective"]) == (0.5, 0.4)
    assert found["formats"] == {
        "int2-g32-sym": {"int2-g32-sym": 11, "int4-g32-sym": 1},
        "int3-g32-sym": {"int3-g32-sym": 12},
    }
    (one,) = found["largest"]
    assert (one["before"], one["after"], one["bytes"]) == ("int2-g32-sym", "int4-g32-sym", 512)
    assert (one["layer"], one["expert"]) == (0, 0)
    assert sum(group["nbytes"] for group in found["groups"]) == 512


def test_tables_for_people(pair, capsys):
    main(["show", *map(str, (pair[0], "--diff", pair[1]))])
    text = capsys.readouterr().out
    assert "1 of 24 units differ" in text
    assert "-0.1 (-20.00 %)" in text
    assert "the 1 largest changes" in text
    main(["show", *map(str, (pair[0], "--diff", pair[0]))])
    text = capsys.readouterr().out
    assert "no unit differs" in text
    assert "largest" not in text


def test_costs_of_other_estimators_are_not_subtracted(pair, tmp_path, capsys):
    other = save(tmp_path / "c.json", [0, 1] * 12, objective=7.0, estimator="f")
    main(["show", *map(str, (pair[0], "--diff", other))])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "predicted cost" in x]
    assert line.rstrip("│ ").endswith("–")


def test_many_formats_are_a_list(tmp_path, capsys):
    units, many = units_of(), formats((1, 2, 3, 4, 8), (32, "row"), True)
    rng = np.random.default_rng(0)
    for name in "ab":
        choice = rng.integers(0, len(many), len(units))
        BitPlan.from_choice(units, many, choice).save(tmp_path / f"{name}.json")
    main(["show", str(tmp_path / "a.json"), "--diff", str(tmp_path / "b.json")])
    assert "changes of format" in capsys.readouterr().out


def test_names_of_files_are_no_markup(pair):
    from rich.console import Console

    from bitknap.allocation.plans.plan_diff import plan_diff

    found = plan_diff(*map(BitPlan.load, pair))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(diff_tables(found, "[red]a[/]", "b [/x]")[0])
    text = console.export_text()
    assert "[red]a[/]" in text
    assert "b [/x]" in text


def test_a_packed_checkpoint_is_its_plan(made, document):
    found = document("show", made.out, "--diff", made.plan)
    assert found["units"]["same"] == 24
    assert found["largest"] == []


def test_what_cannot_be_compared(pair, tmp_path, refused):
    first = pair[0]
    other = save(tmp_path / "c.json", [0, 1] * 12, model="another")
    assert "compare plans of the same model" in refused("show", first, "--diff", other)
    junk = tmp_path / "junk.json"
    junk.write_text(json.dumps({"format": "other"}))
    assert "format" in refused("show", first, "--diff", junk)
    assert "cannot be read" in refused("show", first, "--diff", tmp_path / "missing.json")
    assert "no bitknap_plan.json" in refused("show", first, "--diff", tmp_path)
    table = tmp_path / "t.safetensors"
    CostTable.from_arrays([[1.0, 0.5]], [[1, 2]]).save(table)
    said = f"--diff: {table} is not a plan; pass two plans or packed checkpoints"
    assert said in refused("show", first, "--diff", table)
    assert said in refused("show", table, "--diff", first)
    both = ("--diff", pair[1], "--picture", tmp_path / "x.png")
    assert "pass only one" in refused("show", first, *both)
