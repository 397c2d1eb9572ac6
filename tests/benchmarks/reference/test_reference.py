"""The bundled models and texts, and the main job on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitknap
from bitknap.api.evaluation import best_uniform_of, summary
from bitknap.api.planning import plan_for
from bitknap.benchmarks import reference
from bitknap.quantization.source.checkpoint import resolve

HERE = Path(reference.__file__).parent
NAMES = ("mixtral", "qwen3moe")


@pytest.mark.parametrize("name", NAMES)
def test_bundle_is_whole_and_small(name):
    folder = resolve(f"reference:{name}")
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    files = {f.name for f in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "initial_routers.safetensors", "CARD.md"} <= files
    record = json.loads((folder / "training.json").read_text())
    assert record["log"][-1]["mean"] < 4.0


def test_texts_are_small_and_do_not_overlap():
    texts = {p: (HERE / f"{p}.txt").read_text("utf-8") for p in ("calibration", "evaluation")}
    assert all(len(t.encode()) <= 600_000 for t in texts.values())
    seen = {line for line in texts["calibration"].splitlines() if len(line) > 60}
    shared = [line for line in texts["evaluation"].splitlines() if line in seen]
    assert len(shared) < 20  # boilerplate of licences and file headers


@pytest.mark.campaign
def test_main_job_beats_the_best_uniform_recipe(tmp_path):
    options = bitknap.formats((1, 2, 3, 4), 64, True, ("fp16", "compact"))
    table = bitknap.estimate(
        "reference:mixtral", formats=options, calibration=bitknap.Calibration(tokens=1024)
    )
    solution = plan_for(table, bitknap.Budget.bits(2.5))
    sizes = bitknap.quantize("reference:mixtral", solution.plan, tmp_path / "out")
    assert sizes["predicted"] == sizes["written"] <= 2.5 * table.weights / 8
    ours = bitknap.evaluate(tmp_path / "out", "reference:mixtral", tokens=2048)
    from bitknap.api.calibration import evaluation_windows

    windows = evaluation_windows(resolve("reference:mixtral"), "builtin", 2048)
    _, recipe, losses = best_uniform_of("reference:mixtral", solution.plan, windows)
    assert recipe.total_bytes >= 0.9 * solution.plan.total_bytes
    assert summary(ours)["kl"] < 0.5 * summary(losses)["kl"]


@pytest.mark.slow
def test_full_moments_are_recorded_when_asked_for():
    options = bitknap.formats((2, 4), "row", True)
    diagonal, full = (
        bitknap.estimate(
            "reference:mixtral",
            bitknap.SecondMoments(full=full),
            options,
            calibration=bitknap.Calibration(tokens=1024),
        )
        for full in (False, True)
    )
    assert (full.cost > 0).all()
    # Rounding errors of one row are nearly uncorrelated, so both see about the same.
    assert 0.5 < full.cost.sum() / diagonal.cost.sum() < 2
