"""Which files are read: those that transformers takes, with the same tensors."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, Format
from bitknap.errors import FileError, InputError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.testing import tiny_model

INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(tensors, path):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def split(folder, shards=SHARDS, index=INDEX, **metadata):
    """Cut a model into two files; return its tensors and the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: shards[at % 2] for at, name in enumerate(names)}
    for shard in shards:
        write({n: tensors[n] for n in names if where[n] == shard}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": metadata, "weight_map": where}))
    return tensors, where


def plain(folder):
    split(folder)


def in_a_folder(folder):
    split(folder, ("parts/b.safetensors", "parts/a.safetensors"))


def odd_names(folder):
    split(folder, ("z z.safetensors", "A.safetensors"))


def named_file(folder):
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config(folder, transformers_weights="mine.safetensors")


def named_index(folder):
    split(folder, index="mine.safetensors.index.json")
    config(folder, transformers_weights="mine.safetensors.index.json")


def named_index_in_a_folder(folder):
    (folder / "parts").mkdir()
    split(folder, ("parts/a.safetensors", "b.safetensors"), "parts/x.safetensors.index.json")
    config(folder, transformers_weights="parts/x.safetensors.index.json")


def named_beside_another(folder):
    tensors = load_file(folder / "model.safetensors")
    write({n: 2 * t for n, t in tensors.items()}, folder / "mine.safetensors")
    config(folder, transformers_weights="mine.safetensors")


def one_file_beside_an_index(folder):
    tensors, _ = split(folder)
    write({n: 2 * t for n, t in tensors.items()}, folder / "model.safetensors")


def twice(folder, *, index_says):
    """Store a tensor in both files, with other numbers in the second."""
    tensors, where = split(folder)
    name = next(n for n in sorted(where) if where[n] == SHARDS[0] and "experts" in n)
    write(load_file(folder / SHARDS[1]) | {name: 3 * tensors[name]}, folder / SHARDS[1])
    where[name] = SHARDS[index_says]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def twice_named_first(folder):
    twice(folder, index_says=0)


def twice_named_last(folder):
    twice(folder, index_says=1)


def named_in_the_other_file(folder):
    _, where = split(folder)
    swapped = {name: SHARDS[shard == SHARDS[0]] for name, shard in where.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": swapped}))


def not_in_the_index(folder):
    _, where = split(folder)
    del where[min(where)]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def more_than_the_model_has(folder):
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name in [n for n in tensors if ".layers.1." in n]:
        more[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    write(tensors | more, folder / "model.safetensors")


def tied_but_stored(folder):
    config(folder, tie_word_embeddings=True)


def without_prefix(folder):
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write(bare, folder / "model.safetensors")


def without_format(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def kept_as_stored(model, out):
    """Write a packed checkpoint whose units all keep the precision that they are stored in."""
    source = Checkpoint.open(resolve(model))
    units = walk_headers(source.config, source.shapes).units
    choice = np.zeros(len(units), dtype=np.int64)
    plan = BitPlan.from_choice(units, (Format.keep("fp32"),), choice, model=source.fingerprint)
    bitknap.quantize(model, plan, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        plain,
        in_a_folder,
        odd_names,
        named_file,
        named_index,
        named_index_in_a_folder,
        named_beside_another,
        one_file_beside_an_index,
        twice_named_first,
        twice_named_last,
        named_in_the_other_file,
        not_in_the_index,
        more_than_the_model_has,
        tied_but_stored,
        without_prefix,
        without_format,
    ],
)
def test_what_transformers_reads_is_read(change, folder, tmp_path):
    change(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept_as_stored(folder, tmp_path / "out")
    ours = bitknap.load(tmp_path / "out", torch.float32).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert not list((tmp_path / "out").glob("m*.safetensors*"))


def test_an_index_without_metadata_is_read(folder):
    before = bitknap.load(folder).state_dict()
    _, where = split(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    after = bitknap.load(folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_repository_in_the_cache_is_its_snapshot(folder, tmp_path):
    root = tmp_path / "models--some--model"
    snapshot = root / "snapshots" / "abc"
    for new in (snapshot, root / "blobs", root / "refs"):
        new.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert resolve(root) == snapshot
    assert Checkpoint.look(root).fingerprint == Checkpoint.open(folder).fingerprint
    shutil.copytree(snapshot, root / "snapshots" / "old", symlinks=True)
    with pytest.raises(InputError, match="2 snapshots and no refs/main that names one of them"):
        resolve(root)
    (root / "refs" / "main").write_text("abc")
    assert resolve(str(root)) == snapshot
    kept_as_stored(root, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_weights_under_another_name_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(FileError, match=r"name model\.fp16\.safetensors in config\.json"):
        Checkpoint.open(folder)


def test_shards_without_their_index_ask_for_it(folder):
    split(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FileError, match=r"though 2 other .* download the missing index"):
        Checkpoint.open(folder)


def test_a_link_to_nothing_instead_of_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"model\.safetensors: a link to .*, which does not exist"):
        Checkpoint.open(folder)


def test_a_link_to_nothing_instead_of_a_configuration(folder, tmp_path):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"config\.json: a link to .*, which does not exist"):
        resolve(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../x.safetensors"])
def test_named_weights_stay_in_their_folder(name, folder):
    config(folder, transformers_weights=name)
    with pytest.raises(FileError, match=r"transformers_weights: .* is not a file in the model's"):
        Checkpoint.open(folder)


def test_named_weights_that_are_missing(folder):
    config(folder, transformers_weights="mine.safetensors")
    with pytest.raises(FileError, match=r"mine\.safetensors: missing; config\.json names it"):
        Checkpoint.open(folder)
