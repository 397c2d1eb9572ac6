"""`bitknap study` in process: from a table to a page and a plan."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from bitknap.allocation import BitPlan, Budget, CostTable, formats
from bitknap.allocation.search.best_trials import records
from bitknap.allocation.search.study import create, load, run
from bitknap.allocation.search.study_design import Design
from bitknap.cli import main
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.report.study_page import page
from bitknap.testing import routed_units

WIDTHS = formats((2, 3, 4, 8), "row")
DESIGN = Design(budget=Budget.bits(4.5))
ROOT = Path(__file__).parents[3]
TEXT = ("--text", str(ROOT / "LICENSE"))  # short: quick to tokenize


def loss(plan):
    bits = np.array([item.bits for item in plan.formats])[plan.choice]
    return float((4.0**-bits * (1 + 4 * plan.units.layer)).sum())


@pytest.fixture
def table(tmp_path):
    units = routed_units(2, 3)
    decay = np.array([4.0**-item.bits for item in WIDTHS])
    cost = np.random.default_rng(0).lognormal(size=(len(units), 1)) * decay
    path = tmp_path / "table.safetensors"
    CostTable.from_arrays(cost, units=units, formats=WIDTHS, spread=cost / 5).save(path)
    return path


@pytest.fixture
def journal(tmp_path):
    return f"journal:{tmp_path}/s.log"


@pytest.mark.parametrize("command", ["create", "run", "show", "best"])
def test_help_has_an_example(command, capsys):
    main(["study", command, "--help"])
    text = capsys.readouterr().out
    assert f"Example: bitknap study {command}" in text
    assert "--json" in text
    main(["study", "--help"])
    assert command in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_larger_than_memory_is_measured_layer_by_layer(made, tmp_path, document, refused):
    source = Checkpoint.open(made.model)
    layout = walk_headers(source.config, source.shapes)
    least = layer_bytes(source, layout, 512, {"kl"})
    found = []
    for number, limit in enumerate([(), ("--max-memory", f"{least}B")]):
        study = ("s", "--storage", f"journal:{tmp_path}/{number}.log")
        main(["study", "create", *study, "--table", str(made.table), "--budget", "4bpw"])
        go = ["study", "run", *study, "--model", str(made.model)]
        go += ["--trials", "3", "--tokens", "512"]
        found.append(document(*go, *limit)["trials"])
        found.append([record.loss for record in records(load(*study[::2]))])
    whole, losses, layers, of_layers = found
    assert whole == layers == {"complete": 3}
    # The first plan is the table's own; the others are asked for before any is measured.
    assert of_layers[0] == pytest.approx(losses[0], rel=1e-4)
    line = refused(*go, "--max-memory", "1kB")
    assert "measuring takes about" in line and "raise --max-memory" in line


@pytest.mark.slow
def test_the_whole_way_on_a_real_model(tmp_path, capsys, refused, document):
    table, url = tmp_path / "t.safetensors", f"journal:{tmp_path}/s.log"
    source = Checkpoint.open(resolve("reference:mixtral"))
    units = walk_headers(source.config, source.shapes, ()).units
    cost = np.broadcast_to([4.0**-2, 4.0**-4], (len(units), 2)) * (1 + units.layer[:, None])
    made = CostTable.from_arrays(
        cost,
        units=units,
        formats=formats((2, 4), 64),
        provenance={"model": source.fingerprint},
    )
    made.save(table)
    main(["study", "create", "s", "--storage", url, "--table", str(table), "--budget", "3bpw"])
    capsys.readouterr()
    measuring = ("study", "run", "s", "--storage", url, "--model", "reference:mixtral", *TEXT)
    main([*measuring, "--trials", "2", "--tokens", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trial 0: loss 0.")
    assert ", predicted " in lines[0]
    told = document(*measuring, "--trials", "1")  # of as many tokens
    assert told["trials"] == {"complete": 3}
    assert told["measured"]["what"] == "KL, nats/token"
    assert told["measured"]["tokens"] == 64
    assert "tokens was 64, now 128" in refused(*measuring, "--tokens", "128")
    plan = tmp_path / "plan.json"
    best = document("study", "best", "s", "--storage", url, "-o", plan)["best"]
    assert best == told["best"]
    header = BitPlan.load(plan).header
    assert (header["study"], header["trial"]) == ("s", best["number"])
    assert header["measured"] == {"loss": best["loss"], **told["measured"]}
    assert best["loss"] > 0
    held_out = ROOT / "benchmarks" / "reference" / "evaluation.txt"
    assert refused(*measuring[:-2], "--text", held_out) == (
        f"bitknap: --text {held_out}: the evaluation text; a study must not see it"
    )
    assert "'gpu' is no device" in refused(*measuring, "--device", "gpu")
    other = ("study", "run", "s", "--storage", url, "--model", "reference:qwen3moe")
    assert "reference:qwen3moe: not the model that the table of study 's' was made on" in refused(
        *other
    )


@pytest.mark.slow
@pytest.mark.parametrize("trials", [0, 1, 2, 15])
def test_a_page_of_any_number_of_trials(table, journal, tmp_path, capsys, document, trials):
    made = create("<s> & co", journal, table, DESIGN)
    if trials:
        run(made, loss, trials)
    out = tmp_path / "page.html"
    shown = document("study", "show", "<s> & co", "--storage", journal, "-o", out)
    assert shown["trials"] == ({"complete": trials} if trials else {"waiting": 1})
    text = out.read_text()
    assert "<title>Study &lt;s&gt; &amp; co</title>" in text
    assert "<s> & co" not in text
    assert "bitknap study create &#x27;&lt;s&gt; &amp; co&#x27; --storage journal:" in text
    # Nothing is loaded from elsewhere; the library is there once.
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert text.count("plotly.js v") == (1 if trials else 0)
    heads = re.findall("<h2>(.*?)</h2>", text)
    assert ("History" in heads) == (trials > 0)
    assert ("Parameters one by one" in heads) == (trials > 1)
    assert heads[-1] == "Repeat it"
    main(["study", "show", "<s> & co", "--storage", journal])
    assert "4.5bpw" in capsys.readouterr().out


@pytest.mark.slow
def test_a_front(table, journal, tmp_path, capsys, refused, document):
    made = ("study", "create", "s", "--storage", journal, "--table", table, "--knobs", "tilts")
    told = document(*made, "--budgets", "4.5bpw-8bpw", "--seed", "3")
    assert told["about"]["sampler"] == "nsga2"
    run(load("s", journal), loss, 10)
    told = document("study", "best", "s", "--storage", journal)
    sizes = [row["nbytes"] for row in told["front"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 1
    out = tmp_path / "plan.json"
    best = ("study", "best", "s", "--storage", journal, "-o", out)
    assert refused(*best) == (
        "bitknap: the study has plans of several sizes; choose one with --budget, such as 3bpw"
    )
    row = document(*best, "--budget", "5bpw")["best"]
    assert BitPlan.load(out).total_bytes == row["nbytes"] <= 5 / 8 * 16 * 16 * 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page(load("s", journal))
    assert "<h2>Size against loss</h2>" in text
    assert "--budgets 4.5-8.0bpw" in text
    main(["study", "show", "s", "--storage", journal])
    assert "front of size and loss" in capsys.readouterr().out


def test_default_knobs_are_what_there_is(table, journal, tmp_path, document):
    table.with_name("other.safetensors").write_bytes(table.read_bytes())
    made = ("study", "create", "s", "--storage", journal, "--table", table, "--budget", "4.5bpw")
    told = document(*made, "--feature", tmp_path / "other.safetensors")
    knobs = told["about"]["knobs"]
    assert knobs["tilts"] == ["layer", "proj"]
    assert knobs["risk"]
    assert knobs["exponents"] == ["other"]
    assert not knobs["floor"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give either a budget or a range of budgets"),
        (("--budgets", "wide"), "--budgets 'wide': write LOW-HIGH in bits per weight: 2bpw-4bpw"),
        (
            ("--budget", "5bpw", "--knobs", "x"),
            "--knobs 'x' is unknown; one of tilts, risk, formats, floor, cap, exponents",
        ),
        (
            ("--budget", "5bpw", "--knobs", "exponents"),
            "--knobs exponents: give at least one --feature TABLE",
        ),
        (
            ("--budget", "5bpw", "--storage", "x.db"),
            "storage x.db: Could not parse SQLAlchemy URL from given URL string; write one like "
            "sqlite:///study.db, journal:study.log, postgresql://user@host/name",
        ),
    ],
)
def test_bad_words_are_one_line(table, journal, tmp_path, refused, more, message):
    made = ("study", "create", "s", "--storage", journal, "--table", table, *more)
    assert refused(*made) == f"bitknap: {message}"
    assert list(tmp_path.iterdir()) == [table]


def test_nothing_is_overwritten(table, journal, tmp_path, refused):
    made = create("s", journal, table, DESIGN)
    run(made, loss, 1)
    out = tmp_path / "there"
    out.write_text("mine")
    for command in ("show", "best"):
        line = refused("study", command, "s", "--storage", journal, "-o", out)
        assert line == f"bitknap: {out} exists; choose another name or pass --overwrite"
    assert out.read_text() == "mine"
