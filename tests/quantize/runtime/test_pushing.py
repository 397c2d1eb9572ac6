"""Packed models on the hub: what is uploaded, and that it loads again by its id."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from bitknap.disk.manifest import MANIFEST, listed
from bitknap.errors import InputError
from bitknap.quantization.packed.config import STUB
from bitknap.quantization.packed.folder import PLAN, SOURCE
from bitknap.testing.comparing import logits, same_tensors

MODEL = "some/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is the cache's folder of one model: what is uploaded has been fetched."""
    root = tmp_path / "cache" / "models--some--model"
    snapshot = root / "snapshots" / COMMIT
    asked = SimpleNamespace(cache=root.parent, snapshot=snapshot, made=None, commit=None)

    def create_repo(api, repo_id, **how):
        asked.made = (repo_id, api.token, how)
        return SimpleNamespace(repo_id=MODEL)

    def upload_folder(api, *, repo_id, folder_path, allow_patterns, **commit):
        asked.commit = commit
        snapshot.mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, snapshot / name)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
        return repo_id

    # transformers looks for an adapter on the real hub, whatever it is told, and tries five times.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    return asked


def loaded(hub):
    """Load the model that was uploaded, by its id."""
    return AutoModelForCausalLM.from_pretrained(MODEL, cache_dir=hub.cache, local_files_only=True)


def test_a_pushed_model_loads_by_its_id(packed, exact, hub):
    model = AutoModelForCausalLM.from_pretrained(packed)
    pushed = model.push_to_hub("model", private=True, token="t", tags=["mine"], create_pr=False)
    assert pushed == MODEL
    assert hub.made == ("model", "t", {"private": True, "exist_ok": True})
    assert hub.commit["create_pr"] is False and "Bitknap" in hub.commit["commit_message"]
    names = {path.name for path in hub.snapshot.iterdir()}
    assert {PLAN, SOURCE, STUB, "README.md", "bitknap.safetensors"} <= names
    card = (hub.snapshot / "README.md").read_text()
    assert "- mine\n---\n" in card
    assert card.replace("- mine\n", "") == (packed / "README.md").read_text()
    again = loaded(hub)
    assert torch.equal(logits(again), logits(exact))
    # What was loaded from the hub is saved as what was loaded from a folder.
    again.save_pretrained(hub.cache / "saved")
    assert same_tensors(packed, hub.cache / "saved")


def test_saving_and_pushing_uploads_what_was_written_and_nothing_else(packed, hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(out, push_to_hub=True, commit_message="Mine")
    assert hub.made[0] == "out"
    assert hub.commit == {"commit_message": "Mine"}
    uploaded = sorted(path.name for path in hub.snapshot.iterdir())
    assert uploaded == sorted(listed(out) or ()) and "notes.txt" not in uploaded
    assert (out / MANIFEST).is_file()


def test_files_that_transformers_does_not_know_are_fetched_to_the_same_cache(
    packed, exact, hub, monkeypatch
):
    AutoModelForCausalLM.from_pretrained(packed).push_to_hub(MODEL)
    aside = hub.cache / "aside"
    aside.mkdir()
    for name in (PLAN, SOURCE):
        shutil.move(hub.snapshot / name, aside / name)

    def cached_file(origin, name, *, cache_dir, revision, **how):
        assert (origin, cache_dir, revision) == (MODEL, hub.cache, COMMIT)
        shutil.copy(aside / name, hub.snapshot / name)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    assert torch.equal(logits(loaded(hub)), logits(exact))


def test_a_hub_that_refuses_is_one_line(packed, monkeypatch):
    def refuse(*args, **how):
        raise OSError("401: who are you?\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    model = AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(InputError) as refused:
        model.push_to_hub(MODEL)
    expected = "some/model: cannot be uploaded to the hub (401: who are you?)"
    assert str(refused.value) == expected
