"""The benchmark of kernels: a toy run through everything, and its arithmetic and verdicts."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bitknap.benchmarks.kernels import __main__ as kernels
from bitknap.benchmarks.kernels.cases import (
    KEPT,
    MIXES,
    MODELS,
    OTHER,
    TOY,
    Case,
    bytes_of,
    cases,
    elsewhere,
    experts_of,
    flops_of,
    routed,
    toy_cases,
)
from bitknap.benchmarks.kernels.peers import INTERPRETED, NAIVE, OURS, TRANSFORMERS
from bitknap.benchmarks.kernels.report import markdown, picture, targets

# A process of its own: whether kernels are compiled is settled when they are imported.
TOY_RUN = """
import sys
import torch
from bitknap.benchmarks.kernels.__main__ import main
from bitknap.benchmarks.kernels.naive import Naive

main(["--toy", "-o", sys.argv[1]])
naive = Naive(3, 64, 96, 32, torch.float32, "cpu")
x, index = torch.randn(5, 64), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]])
weights = torch.rand(5, 2)
gate_up, down = naive.weights("gate_up"), naive.weights("down")
expected = torch.zeros(5, 64)
for t in range(5):
    for e, w in zip(index[t].tolist(), weights[t].tolist()):
        gate, up = (x[t] @ gate_up[e]).chunk(2)
        expected[t] += w * ((torch.nn.functional.silu(gate) * up) @ down[e])
torch.testing.assert_close(naive(x, index, weights), expected, rtol=1e-4, atol=1e-4)
print("naive agrees")
"""


@pytest.mark.campaign
def test_a_toy_run_goes_through_everything(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", TOY_RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "naive agrees" in done.stdout
    document = json.loads((tmp_path / "kernels.json").read_text())
    ways = {row["way"] for row in document["rows"]}
    assert ways == {OURS, INTERPRETED, NAIVE, *(f"transformers {way}" for way in TRANSFORMERS)}
    assert all(row["seconds"] > 0 for row in document["rows"])
    page = (tmp_path / "kernels.md").read_text()
    assert page.partition("\n")[2] == markdown(document)  # below the line that names Bitknap
    assert "A toy run" in page
    assert {verdict for _, _, verdict in targets(document)} == {"not measured"}
    assert (tmp_path / "kernels.svg").read_text().startswith("<?xml")
    cpu = document["cpu"]
    assert all(row["decode equal"] and row["prefill equal"] for row in cpu["layers"])
    assert all(row["equal"] for row in cpu["models"])
    assert all(row["gb_per_second"] > 0 for row in cpu["rates"])


def test_without_a_gpu_nothing_is_made_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        kernels.main(["-o", str(tmp_path)])
    assert exit.value.code == 2
    assert "torch sees no GPU; pass --cpu" in capsys.readouterr().err
    assert "No GPU was available" in markdown({})
    assert {verdict for _, _, verdict in targets({})} == {"not measured"}


def test_cases_cover_what_they_should():
    every, quick = cases(quick=False), cases(quick=True)
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    assert {case.name for case in quick} <= set(names)
    assert {case.layer.name for case in quick} == set(MODELS)
    assert {case.mix for case in every} == set(MIXES)
    assert sum(MIXES["2+3+4+8"]) / len(MIXES["2+3+4+8"]) == 4
    # Weights are made once: those who share them follow each other.
    seen = [case.weights_name for case in every]
    runs = [a for a, b in zip(seen, [None, *seen[:-1]], strict=True) if a != b]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("case", toy_cases(), ids=lambda case: case.mix)
def test_bytes_are_those_of_the_experts_that_are_hit(case):
    experts = experts_of(case, "cpu")
    every = torch.arange(TOY.experts)[None]
    assert experts.gate is not None
    size = sum(t.buffer.nbytes for t in (experts.gate, experts.up, experts.down))
    rows = 2 * case.batch * TOY.hidden * 4
    assert bytes_of(experts, case, every) == size + rows
    assert bytes_of(experts, case, every[:, :1]) < bytes_of(experts, case, every) / 2
    assert flops_of(case) == 2 * 3 * case.batch * TOY.top_k * TOY.hidden * TOY.intermediate
    other = elsewhere(experts)
    assert torch.equal(other.up.buffer, experts.up.buffer)
    assert other.up.buffer.data_ptr() != experts.up.buffer.data_ptr()
    assert (experts.gate.recipes == experts.up.recipes) == (case.mix != OTHER)


def test_routings():
    def counts(routing):
        case = Case(layer=TOY, mix="4", batch=2000, routing=routing, dtype="fp32")
        index = routed(case, "cpu", 0)[1]
        assert all(len(set(row)) == TOY.top_k for row in index.tolist())
        return sorted(index.flatten().bincount(minlength=TOY.experts).tolist())

    assert counts("uniform")[0] > 0.8 * counts("uniform")[-1]
    assert counts("zipf")[0] < 0.5 * counts("zipf")[-1]
    assert counts("one expert") == [0] * (TOY.experts - TOY.top_k) + [2000] * TOY.top_k


def row(mix, batch, microseconds, way=OURS, model=MODELS[0], size=4e8):
    facts = {"model": model, "mix": mix, "group": 128, "batch": batch, "routing": "uniform"}
    took = {"seconds": microseconds / 1e6, "share": size / 4e12 / (microseconds / 1e6)}
    flops = batch * 1e9
    return (
        facts | took | {"dtype": "bf16", "way": way, "bytes": size, "flops": flops, "graph": True}
    )


def test_verdicts():
    rows = [
        row("4", 1, 125),  # 0.8 of the roof
        row("4", 16, 150),  # 0.67
        row("2+3+4+8", 16, 160),
        row("3", 16, 120, size=3e8),
        row("2+3+4", 16, 140, size=3e8),
        row(KEPT, 16, 300, size=16e8),
        row("4", 512, 2000),
        row(KEPT, 512, 1000, way="transformers grouped_mm"),
        row("4", 1, 400, model=MODELS[1]),
        row(OTHER, 16, 200),
    ]
    document = {
        "about": {"device": "a GPU", "date": "2026-01-01", "versions": {}, "cpu": "", "load": 0},
        "ceilings": {"read": 4e12, "copy": 3e12, "matmul": 1e15},
        "rows": rows,
    }
    found = {text.split(":")[0]: verdict for text, _, verdict in targets(document)}
    assert found == {
        "Mixtral, batch 1": "aim",
        "Mixtral, batch 4–32": "pass",
        "Qwen3, DeepSeek, batch 1": "miss",
        "Qwen3, DeepSeek, batch 8–64": "not measured",
        "2 bits, batch 4–64": "not measured",
        "3 bits, batch 4–64": "pass",
        "2, 3, 4 and 8 bits over uniform 4, bytes a second": "pass",
        "2, 3 and 4 bits over uniform 3, bytes a second": "miss",
        "4 bits over our bf16 kernel, batch 1–16": "miss",
        "prefill of 512–4096": "miss",
    }
    page = markdown(document)
    assert "| ours, 4, 128 | 125.0 (80%) |" in page
    assert "Gate and up at different widths, in multiples of the tied mix: 1.25 at 16." in page


@pytest.mark.slow
def test_the_roof_is_drawn(tmp_path):
    document = {
        "about": {"device": "a GPU"},
        "ceilings": {"read": 4e12, "copy": 3e12, "matmul": 1e15},
        "rows": [row("4", 1, 125), row(KEPT, 512, 800)],
    }
    picture(document, tmp_path / "a.svg")
    picture(document, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "a GPU" in (tmp_path / "a.svg").read_text()
