import json

import pytest
import torch

from bitknap.allocation import Format
from bitknap.benchmarks.quantize import peers
from bitknap.benchmarks.quantize.__main__ import PARTS, run, toy
from bitknap.benchmarks.quantize.quality import BASE, KINDS
from bitknap.benchmarks.quantize.report import markdown, targets
from bitknap.benchmarks.quantize.speed import OURS, PLAIN, WAYS, matrices
from bitknap.benchmarks.result_files import HEADER

ABOUT = {"versions": {"python": "3"}, "cpu": "a processor", "cores": 1, "threads": 1, "load": 0.5}


@pytest.mark.campaign
def test_a_toy_run_writes_every_part(tmp_path):
    said: list[str] = []
    run(tmp_path / "out", PARTS, toy(), tmp_path, said.append)
    document = json.loads((tmp_path / "out" / "quantize.json").read_text())
    rates = {row["way"]: row for row in document["speed"] if row["format"] == "int4-g64-asym"}
    assert rates.keys() == {way.name for way in WAYS}
    assert rates[OURS]["gb_per_second"] > 0
    assert abs(sum(document["profile"].values())) <= 1 + 1e-9
    losses = {row["way"]: row for row in document["quality"][0]["rows"]}
    assert set(BASE.values()) <= losses.keys()
    assert losses[BASE["gptq"]]["kl"] > 0
    assert losses[BASE["gptq"]]["over_ours"] == 0
    large = document["large"]
    assert set(large["steps"]) == {"estimate", "solve", "quantize"}
    assert all(step["peak_bytes"] > 1 << 24 for step in large["steps"].values())
    assert not (tmp_path / "large").exists()
    assert not list(tmp_path.glob("*.bin"))
    report = (tmp_path / "out" / "quantize.md").read_text()
    assert report.partition("\n")[2] == markdown(document)  # below the line that names Bitknap
    assert "toy int4-g64-asym" in said


def test_parts_not_asked_for_are_kept(tmp_path):
    (tmp_path / "quantize.json").write_text(json.dumps({**HEADER, "large": None, "quality": []}))
    run(tmp_path, ("speed",), toy(), tmp_path, lambda text: None)
    document = json.loads((tmp_path / "quantize.json").read_text())
    assert document.keys() == {*HEADER, "large", "quality", "about", "speed", "profile"}


def rate(way, gb_per_second, format="int4-g64-asym"):
    return {"shape": "a", "format": format, "way": way, "gb_per_second": gb_per_second}


def loss(way, family, kl, ours):
    facts = {"way": way, "family": family, "format": "int4-g64-asym", "kl": kl, "kl_se": 0.01}
    return {**facts, "over_ours": kl - ours, "over_ours_se": 0.001}


def document(**more):
    rows = [
        loss("ours: gptq", "gptq", 0.103, 0.103),
        loss("llm-compressor gptq, act-order", "gptq", 0.2, 0.103),
        loss("llm-compressor gptq, act-order, mse scales", "gptq", 0.09, 0.103),
        loss("ours: hqq", "hqq", 0.11, 0.11),
        loss("hqq package", "hqq", 0.108, 0.11),
    ]
    quality = [{"model": "mixtral", "tokens": 8, "judged_on": 8, "rows": rows}]
    speed = [rate(OURS, 0.06), rate(PLAIN[0], 0.1), rate(PLAIN[1], 0.05)]
    absent = {"shape": "a", "format": "int4-g64-asym", "way": "hqq package"}
    speed.append({**absent, "note": "not installed"})
    steps = {"quantize": {"seconds": 12.0, "peak_bytes": 3 << 29}}
    facts = {"model": "OLMoE", "layers": 4, "estimator": "weight-error", "budget": "3bpw"}
    large = {**facts, "source_bytes": 4 << 30, "written_bytes": 1 << 30, "steps": steps}
    profile = {"mul": 0.25, "div": 0.1}
    parts = {"about": ABOUT, "speed": speed, "quality": quality, "large": large}
    return {**parts, "profile": profile, **more}


def test_targets_compare_with_the_best_peer():
    said = [row[1:] for row in targets(document())]
    assert said == [
        ("0.60 to 0.60 times over 1 comparisons", "pass"),
        ("0.51 to 0.51 of it, 1 formats", "pass"),
        ("1.14 to 1.14 of it, 1 formats; above: mixtral int4-g64-asym", "miss"),
        ("1.02 to 1.02 of it, 1 formats", "pass"),
        ("1.50 GiB for 4.3 GB", "pass"),
    ]
    slow = [rate(OURS, 0.04), rate(PLAIN[0], 0.1)]
    assert targets(document(speed=slow))[0][2] == "miss"
    assert {row[2] for row in targets({})} == {"not measured"}


def test_the_report_has_ratios_and_differences():
    text = markdown(document())
    assert f"| {OURS} | 0.06 (0.6) |" in text
    assert "| hqq package | not installed |" in text
    assert "| ours: gptq | 0.10300 |" in text
    assert "| hqq package | 0.10800 (-0.00200 ± 0.00100) |" in text
    assert "Bitknap's search and packing: mul 25%, div 10%." in text
    assert "| quantize | 12 | 1.50 |" in text


def test_peers_know_only_their_grids():
    real, even, compact, one = map(
        Format.parse,
        ("int4-g64-asym", "int4-row-sym", "int4-g64-asym-compact", "int1-g64-asym"),
    )
    assert [peers.hqq_fits(f) for f in (real, even, compact)] == [True, False, False]
    assert [peers.tensors_fit(f) for f in (real, even, compact, one)] == [True, True, False, False]
    assert peers.installed("")
    assert not peers.installed("no_such_package")


def test_every_kind_of_ours_has_a_name_and_a_base():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {kind.family for kind in KINDS} == BASE.keys()
    assert set(BASE.values()) <= set(names)


@pytest.mark.parametrize("package", peers.PACKAGES)
def test_a_peer_that_is_installed_gives_what_its_name_says(package, tmp_path):
    pytest.importorskip(package)
    given = matrices(1, 64, 128, folder=tmp_path)
    format = Format.parse("int4-g64-asym")
    for way in WAYS:
        if way.needs == package:
            assert isinstance(way.run(given.weights[0], format, given), torch.Tensor)


def test_moments_are_those_of_correlated_inputs(tmp_path):
    found = matrices(1, 8, 64, folder=tmp_path).moments
    assert torch.equal(found, found.T)
    diagonal = found.diagonal()
    apart = found - torch.diag(diagonal)
    assert apart.abs().mean() > 0.1 * diagonal.mean()
