"""The reference training still runs, and what it saves is what the package bundles."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from bitknap.benchmarks import reference
from bitknap.benchmarks.reference.bundle import FILES, excerpts
from bitknap.benchmarks.reference.muon import orthogonalise
from bitknap.benchmarks.reference.recipe import DOMAINS
from bitknap.benchmarks.reference.train import batch_at, rate_at, train, windows
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime.loading import load

HERE = Path(reference.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_a_short_training_saves_a_model(name, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = (HERE / "calibration.txt").read_text("utf-8")
    for place, domain in enumerate(DOMAINS):
        part = text[place * 60_000 : (place + 1) * 60_000]
        (corpus / f"{domain}.train.txt").write_text(part)
        (corpus / f"{domain}.valid.txt").write_text(part[:4_000])
    threads = torch.get_num_threads()
    try:
        train(
            argparse.Namespace(
                model=name,
                corpus=corpus,
                out=tmp_path / "out",
                tokens=1024,
                batch=512,
                every=1,
                threads=1,
                seed=0,
                compile=False,
            )
        )
    finally:
        torch.set_num_threads(threads)
    assert {f.name for f in (tmp_path / "out").iterdir()} >= set(FILES)
    assert len(walk(load(tmp_path / "out")).units) in (96, 384)


def test_rate_warms_up_stays_and_decays():
    rates = [rate_at(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[500] == 1.0
    assert 0 < rates[999] < 0.01


def test_a_batch_is_a_function_of_the_step():
    data = windows(torch.arange(256 * 40 + 1).numpy())
    assert torch.equal(batch_at(data, 13, 4, seed=0), batch_at(data, 13, 4, seed=0))
    epoch = torch.cat([batch_at(data, step, 4, seed=0) for step in range(10)])
    assert len(torch.unique(epoch[:, 0])) == 40


@pytest.mark.parametrize("shape", [(3, 24, 40), (40, 24)])
def test_orthogonalised_singular_values_are_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_excerpts_are_whole_lines_spread_over_the_text():
    lines = [f"line {i:06d}\n" for i in range(10_000)]
    taken = excerpts("".join(lines), 28_000).split("\n")
    known = {line.strip() for line in lines}
    assert all(line in known for line in taken if line)
    assert int(next(t for t in reversed(taken) if t).split()[1]) > 7_000
