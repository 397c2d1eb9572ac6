"""GGUF files as sources: the model that they were written from, tokenizer and all."""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer

from bitknap import DataFree, estimate
from bitknap.allocation import Format
from bitknap.errors import FileError, ModelError
from bitknap.quantization.ggml import container, unpacked
from bitknap.quantization.ggml.tokenizer_json import CUTS
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint, places, resolve

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("family", "changes", "include"),
    [
        ("mixtral", {}, ()),
        pytest.param("qwen3_moe", {}, (), marks=slow),
        pytest.param("qwen2_moe", {}, (), marks=slow),
        pytest.param("olmoe", {}, (), marks=slow),
        pytest.param("qwen2", {}, ("dense",), marks=slow),
        pytest.param("qwen3", {}, ("dense",), marks=slow),
        pytest.param(
            "llama", {"tie_word_embeddings": True, "attention_bias": True}, ("dense",), marks=slow
        ),
    ],
)
def test_the_model_that_was_written_is_read(tmp_path, llama, family, changes, include):
    model = llama.model(tmp_path / "model", family, **changes)
    file = llama.write(tmp_path / "model", tmp_path / "a.gguf", include=include)
    again = load(resolve(file.path), torch.float32)
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    ids = torch.tensor([llama.prompts()[1]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("cut", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_tokenizer_is_the_same(tmp_path, llama, cut):
    folder = tmp_path / "model"
    llama.model(folder, "mixtral")
    if cut != "gpt-2":
        known = json.loads((folder / "tokenizer.json").read_text())
        pattern = {"type": "Split", "pattern": {"Regex": CUTS[cut]}, "behavior": "Isolated"}
        bytewise = {**known["pre_tokenizer"], "use_regex": False}
        steps = [{**pattern, "invert": False}, bytewise]
        known["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        (folder / "tokenizer.json").write_text(json.dumps(known))
    path = llama.write(folder, tmp_path / "a.gguf").path
    assert container.read(path).values["tokenizer.ggml.pre"] == cut
    ours, theirs = (AutoTokenizer.from_pretrained(at) for at in (resolve(path), folder))
    text = "It's 12345 o'clock,\n\n  WE'LL see: naïve <|end|> Zürich — done."
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.eos_token_id == theirs.eos_token_id


def test_16_bits_stay_16_bits(tmp_path, llama):
    llama.model(tmp_path / "model", "mixtral").to(torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    file = llama.write(tmp_path / "model", tmp_path / "a.gguf", (Format.keep("bf16"),))
    source = Checkpoint.open(resolve(file.path))
    assert source.config["dtype"] == "bfloat16"
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert torch.equal(source.read(name), file.source.read(name))


@pytest.mark.slow
def test_commands_take_the_file(tmp_path, llama, document):
    llama.model(tmp_path / "model", "mixtral")
    path = llama.write(tmp_path / "model", tmp_path / "a.gguf").path
    assert places(path) == [path]
    table = estimate(path, DataFree(), [Format(3, 32), Format(4, 32)])
    assert len(table.units) == 2 * 4 * 3
    words = ("--target", "gguf", "--budget", "5bpw", "--estimator", "moments", "--tokens", "64")
    said = document("quantize", path, *words, "--formats", "4,8", "-o", tmp_path / "b.gguf")
    assert said["bytes_on_disk"] == said["bytes_predicted"]
    assert (tmp_path / "b.gguf").stat().st_size < path.stat().st_size


def test_it_is_unpacked_once_and_again_when_it_changes(tmp_path, llama):
    llama.model(tmp_path / "model", "mixtral")
    path = llama.write(tmp_path / "model", tmp_path / "a.gguf").path
    first = unpacked.folder_of(path)
    time = (first / "model.safetensors").stat().st_mtime_ns
    assert unpacked.folder_of(path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == time
    os.utime(path, ns=(1, 1))
    assert unpacked.folder_of(path) != first


def test_an_output_is_not_the_input(tmp_path, llama, refused):
    llama.model(tmp_path / "model", "mixtral")
    path = llama.write(tmp_path / "model", tmp_path / "a.gguf").path
    words = ("quantize", path, "--target", "gguf", "--budget", "5bpw", "--overwrite", "-o", path)
    assert "may not overlap" in refused(*words)


def test_files_that_are_no_source_are_refused(tmp_path, llama, refused):
    llama.model(tmp_path / "model", "mixtral")
    path = llama.write(tmp_path / "model", tmp_path / "a.gguf").path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="cut short"):
        resolve(path)
    assert "cut short" in refused("inspect", path)
    path.unlink()
    quantized = llama.write(tmp_path / "model", tmp_path / "b.gguf", (Format.ggml("q8_0"),)).path
    with pytest.raises(ModelError, match=r"is quantized already \(q8_0\)"):
        resolve(quantized)
    llama.model(tmp_path / "other", "deepseek_v2")
    other = llama.write(tmp_path / "other", tmp_path / "c.gguf").path
    with pytest.raises(ModelError, match="architecture deepseek2 is read from GGUF for llama, "):
        resolve(other)


def test_scaled_rotary_embeddings_are_refused(tmp_path, llama):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama.model(tmp_path / "model", "llama", rope_parameters=rope)
    path = llama.write(tmp_path / "model", tmp_path / "a.gguf", include=("dense",)).path
    with pytest.raises(ModelError, match="rotary embedding"):
        resolve(path)
