"""Launch choices: sensible for the models' shapes, overridden by what was measured."""

import json
from dataclasses import asdict
from importlib import resources

import pytest
import torch

from bitknap.errors import InputError
from bitknap.kernels import launch as module
from bitknap.kernels.launch import (
    Case,
    Device,
    Launch,
    Tile,
    check,
    choose,
    file_name,
    heuristic,
    write_table,
)
from bitknap.kernels.tune import changes, main, starts

H200, MI300X = Device("NVIDIA H200", 132), Device("AMD", 304, 0)
MODELS = {
    "mixtral": {"topk": 2, "experts": 8, "hidden": 4096, "intermediate": 14336},
    "qwen3": {"topk": 8, "experts": 128, "hidden": 2048, "intermediate": 768},
    "deepseek": {"topk": 6, "experts": 64, "hidden": 2048, "intermediate": 1408},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", [H200, MI300X])
def test_paths_follow_tokens(model, device):
    paths = [
        heuristic(Case(tokens=tokens, **MODELS[model]), device).path
        for tokens in (1, 8, 16, 17, 256, 1 << 15)
    ]
    assert paths == ["decode"] * 3 + ["grouped"] * 2 + ["dense"]


@pytest.mark.parametrize("model", MODELS)
def test_a_few_tokens_fit_one_tile_and_fill_the_device(model):
    for tokens in range(1, 17):
        case = Case(tokens=tokens, **MODELS[model])
        chosen = heuristic(case, H200)
        check(chosen, case)
        assert heuristic(case, MI300X).tokens == 16
        experts = min(case.tokens * case.topk, case.experts)
        programs = experts * chosen.down.split * -(-case.hidden // chosen.down.rows)
        runs = chosen.down.split
        assert programs >= H200.processors or (runs + 1) * 512 > case.intermediate or runs == 8


def test_a_launch_is_read_back():
    chosen = heuristic(Case(tokens=1, **MODELS["qwen3"]), H200)
    assert Launch.parse(chosen.text()) == chosen


def test_what_was_measured_comes_first(monkeypatch, tmp_path):
    case = Case(tokens=3, **MODELS["qwen3"])
    mine = Launch(path="decode", tokens=16, gate_up=Tile(rows=32, warps=8), down=Tile(split=2))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / file_name("NVIDIA H200")).write_text(
        write_table("NVIDIA H200", [(case, mine)], "never")
    )
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    module._table.cache_clear()
    try:
        assert choose(case, H200) == mine
        # Three and four tokens share a launch, five have none.
        assert choose(Case(tokens=4, **MODELS["qwen3"]), H200) == mine
        assert choose(Case(tokens=5, **MODELS["qwen3"]), H200) != mine
        assert choose(case, Device("another", 132)) == heuristic(case, H200)
    finally:
        module._table.cache_clear()


def test_a_table_says_what_it_was_measured_with():
    case = Case(tokens=8, **MODELS["qwen3"])
    text = write_table("GPU", [(case, heuristic(case, H200))], "2026-01-01, triton 3.9")
    known = json.loads(text)
    assert known["measured"] == "2026-01-01, triton 3.9"
    assert known["launches"][0]["case"] == "E128 k8 H2048 I768 T8"
    assert known["launches"][0]["launch"] == asdict(heuristic(case, H200))
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def test_the_decode_path_takes_only_a_few_tokens():
    case = Case(tokens=20, **MODELS["qwen3"])
    few = heuristic(Case(tokens=16, **MODELS["qwen3"]), H200)
    with pytest.raises(
        InputError, match="launch: 20 tokens are more than the 16 that the decode path takes; "
    ):
        check(few, case)


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_candidates_of_the_tuner_can_all_be_launched(tokens):
    case = Case(tokens=tokens, **MODELS["qwen3"])
    begun = starts(case, H200)
    assert begun[0] == heuristic(case, H200)
    assert len(set(begun)) == len(begun)
    for launch in begun:
        for tried in (changes(launch, "gate_up"), changes(launch, "down")):
            assert len(set(tried)) == len(tried) > 0 or launch.path == "dense"
            assert all(one.gate_up == launch.gate_up or one.down == launch.down for one in tried)
            for one in tried:
                check(one, case)


def test_nothing_is_tuned_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as exit:
        main(["--experts", "8", "--topk", "2", "--hidden", "64", "--intermediate", "64"])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said == "tune: no GPU is available, and launches are measured on one\n"
