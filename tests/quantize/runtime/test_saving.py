"""`save_pretrained` of a packed model: the packed checkpoint again, or a plain one."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from bitknap.disk.manifest import check_ours, listed, names_in
from bitknap.errors import InputError
from bitknap.quantization.packed.config import STUB
from bitknap.quantization.packed.convert_layout import convert
from bitknap.quantization.packed.folder import PLAN, SOURCE
from bitknap.quantization.runtime import loading, saving
from bitknap.quantization.runtime.saving import Companions
from bitknap.testing.comparing import change_quantization_config, logits, same_tensors


def test_saving_writes_what_was_loaded(packed, tmp_path, contents):
    one, two = tmp_path / "one", tmp_path / "two"
    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(one)
    assert same_tensors(packed, one)
    for name in (PLAN, SOURCE, STUB):
        assert (one / name).read_bytes() == (packed / name).read_bytes()
    assert not list(one.glob("model*.safetensors*"))
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(two)
    assert contents(one) == contents(two)
    # Over itself, and over what is there.
    model = AutoModelForCausalLM.from_pretrained(two)
    (two / "notes.txt").write_text("mine")
    model.save_pretrained(two)
    assert contents(two) == contents(one) | {"notes.txt": b"mine"}


def test_in_shards(packed, exact, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("bitknap-*.safetensors"))) > 2
    assert same_tensors(packed, tmp_path / "shards")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits(exact)
    )
    assert torch.equal(logits(loading.load(tmp_path / "shards")), logits(exact))
    # Fewer files than before: none is left over.
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards").save_pretrained(tmp_path / "shards")
    assert [f.name for f in (tmp_path / "shards").glob("*.safetensors*")] == ["bitknap.safetensors"]


def test_saving_a_dequantized_model_is_plain(packed, exact, tmp_path):
    exact.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights", "auto_map"} & set(config)
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert torch.equal(logits(loading.load(tmp_path / "plain")), logits(exact))


def test_dequantizing_later(packed, exact, tmp_path):
    found = AutoModelForCausalLM.from_pretrained(packed).dequantize()
    assert type(found.model.layers[0].mlp.experts) is type(exact.model.layers[0].mlp.experts)
    ours, theirs = found.state_dict(), exact.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_file()


@pytest.mark.parametrize("option", [{"variant": "x"}, {"state_dict": {1: 2}}])
def test_what_saving_has_no_place_for(option, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(
        InputError, match=f"save_pretrained: {next(iter(option))} is not for packed"
    ):
        model.save_pretrained(tmp_path / "out", **option)


@pytest.mark.slow
def test_streams_in_tiles(packed, exact, tmp_path):
    folder = tmp_path / "tiles"
    convert(packed, "tiles", folder)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(found), logits(exact))
    assert torch.equal(logits(loading.load(folder)), logits(exact))
    found.save_pretrained(tmp_path / "again")
    assert same_tensors(folder, tmp_path / "again")
    assert torch.equal(logits(loading.load(tmp_path / "again")), logits(exact))
    convert(tmp_path / "again", "plain", tmp_path / "back")
    assert same_tensors(packed, tmp_path / "back")


def test_a_newer_minor_version_is_read_with_a_warning_and_kept(packed, exact, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    change_quantization_config(folder, version="1.7", novelty=3)
    with pytest.warns(UserWarning, match=r"1\.7 is newer"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(exact))
    model.save_pretrained(tmp_path / "again")
    said = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert said[0]["quantization_config"] == said[1]["quantization_config"]
    assert said[1]["quantization_config"]["novelty"] == 3


def test_the_plan_is_fetched_from_where_the_weights_came_from(packed, tmp_path, monkeypatch):
    snapshot, fetched = tmp_path / "snapshot", []
    shutil.copytree(packed, snapshot, ignore=shutil.ignore_patterns("*_plan.json", "*_source.json"))

    def cached_file(model, name, **options):
        fetched.append((model, name))
        shutil.copy(packed / name, snapshot / name)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    config = AutoConfig.from_pretrained(packed)
    config._name_or_path = "someone/model"
    files = Companions.beside(snapshot, config).files
    assert fetched == [("someone/model", PLAN), ("someone/model", SOURCE)]
    assert files[PLAN] == (packed / PLAN).read_bytes()


@pytest.fixture(scope="module")
def kept_packed(packed):
    return AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "README.md", "config.json"]
)
def test_files_of_another_model_are_never_replaced(kept_packed, tmp_path, name):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(InputError, match="was not written by Bitknap") as raised:
        kept_packed.save_pretrained(tmp_path)
    assert name in str(raised.value)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "years of work"}


def test_files_of_ones_own_stay_beside_what_is_saved_again(kept_packed, tmp_path):
    (tmp_path / "notes.txt").write_text("years of work")
    kept_packed.save_pretrained(tmp_path, max_shard_size="20KB")
    kept_packed.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "years of work"
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["bitknap.safetensors"]
    (tmp_path / "bitknap_files.json").unlink()  # as of an earlier version
    kept_packed.save_pretrained(tmp_path)


def test_a_killed_run_leaves_nothing_unknown(kept_packed, tmp_path, contents):
    out = tmp_path / "out"
    kept_packed.save_pretrained(out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    for moment in ("save_pretrained", "replace"):
        kill_while_saving(kept_packed, out, moment)
        left = {name.partition("/")[0] for name in names_in(out)} - before.keys()
        assert left
        assert {f"{name}/" for name in left} <= (listed(out) or set())
        with pytest.raises(InputError, match=r"notes\.txt was not written by Bitknap"):
            check_ours(out)
        kept_packed.save_pretrained(out)
        assert contents(out) == before


def kill_while_saving(model, out, moment):
    """Save in a child process that is killed when the first file is to move, or before that."""
    child = os.fork()
    if child == 0:
        owner = type(model) if moment == "save_pretrained" else Path
        plain = getattr(owner, moment)

        def killed(one, *args, **kwargs):
            if moment == "save_pretrained":
                Path(args[0], "model.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            if one.parent.name.startswith(".saving.") and args[0].parent == out:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(one, *args, **kwargs)

        setattr(owner, moment, killed)
        saving.save_pretrained(model, out)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
