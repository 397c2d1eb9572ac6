"""Checkpoints on disk: exact reading, and one line for every way a file can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitknap.errors import FileError, InputError
from bitknap.quantization.source.checkpoint import Checkpoint, resolve

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def write(folder, tensors, config=None):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "mixtral"}))
    return folder


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    return write(tmp_path, {n: torch.randn(3, 5, generator=generator) for n in ("a", "b")})


def rewrite(folder, change):
    """Apply `change` to the header, and to the data if it returns some."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    data = change(header)
    data = content[8 + size :] if data is None else data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_exact_bits(dtype, tmp_path):
    tensor = torch.randint(0, 2, (3, 4, 5), dtype=torch.uint8).to(dtype)
    source = Checkpoint.open(write(tmp_path, {"x": tensor, "pad": torch.zeros(1)}))
    read = source.read("x")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    assert source.nbytes == tensor.nbytes + 4


def test_reads_empty_and_scalar(tmp_path):
    source = Checkpoint.open(write(tmp_path, {"e": torch.zeros(0, 3), "s": torch.tensor(7.0)}))
    assert source.read("e").shape == (0, 3)
    assert source.read("s") == 7
    assert source.shapes == {"e": ("F32", (0, 3)), "s": ("F32", ())}


def test_a_read_tensor_can_be_written(folder):
    tensor = Checkpoint.open(folder).read("a")
    tensor.zero_()
    assert Checkpoint.open(folder).read("a").any()


def test_unknown_tensor(folder):
    with pytest.raises(InputError, match="no tensor 'z'"):
        Checkpoint.open(folder).read("z")


def test_shards_hold_the_same_model(folder, tmp_path):
    whole = Checkpoint.open(folder)
    (tmp_path / "parts").mkdir()
    parts = shard(tmp_path / "parts", {name: whole.read(name) for name in "ab"})
    source = Checkpoint.open(parts)
    assert all(torch.equal(source.read(name), whole.read(name)) for name in "ab")
    assert source.nbytes == whole.nbytes
    assert source.fingerprint == whole.fingerprint


def test_fingerprint_tells_models_apart(folder, tmp_path):
    source = Checkpoint.open(folder)
    tensors = {name: source.read(name) for name in "ab"}
    first = source.fingerprint
    assert len(first) == 32
    assert Checkpoint.open(folder).fingerprint == first
    assert Checkpoint.open(write(tmp_path, tensors)).fingerprint == first
    tensors["b"][0, 0] += 1
    assert Checkpoint.open(write(tmp_path, tensors)).fingerprint != first
    tensors["b"][0, 0] = source.read("b")[0, 0]
    other = write(tmp_path, tensors, {"model_type": "olmoe"})
    assert Checkpoint.open(other).fingerprint != first


def shard(folder, tensors, **index):
    where = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        where[name] = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / where[name])
    where.update(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return folder


ZEROS = {"a": torch.zeros(2), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/../../x.safetensors", "", ".", "..", 3, []]
)
def test_index_stays_in_its_folder(name, tmp_path):
    with pytest.raises(FileError, match="is not a file name in this folder"):
        Checkpoint.open(shard(tmp_path, ZEROS, b=name))


def test_missing_shard(tmp_path):
    shard(tmp_path, ZEROS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileError, match=r"model-00002-of-00002\.safetensors: missing; .*index"):
        Checkpoint.open(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path):
    with pytest.raises(FileError, match=r"00001-of-00002\.safetensors: c: missing, though"):
        Checkpoint.open(shard(tmp_path, ZEROS, c="model-00001-of-00002.safetensors"))


def test_missing_shard_in_a_folder(tmp_path):
    with pytest.raises(FileError, match=r"sub/x\.safetensors: missing; .*index"):
        Checkpoint.open(shard(tmp_path, ZEROS, b="sub/x.safetensors"))


def test_the_last_of_two_shards_with_one_tensor_counts(tmp_path):
    shard(tmp_path, ZEROS)
    save_file(
        {"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    source = Checkpoint.open(tmp_path)
    assert source.read("a").eq(1).all()
    assert source.nbytes == 16


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_index_without_a_map(index, tmp_path):
    shard(tmp_path, ZEROS)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match="weight_map: missing or empty"):
        Checkpoint.open(tmp_path)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"model\.safetensors: truncated: b ends at byte"):
        Checkpoint.open(folder)


def test_file_that_shrinks_after_opening(folder):
    source = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="b: truncated since it was opened"):
        source.read("b")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\x09" + b"\0" * 7 + b"{}"])
def test_header_length_that_lies(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=r"header of \d+ bytes in a file of \d+"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nope", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": 3}', "a: not a JSON object"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
    ],
)
def test_header_that_is_not_one(text, message, folder):
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "F17", "a: dtype: 'F17' is not known"),
        ("dtype", ["F32"], "a: dtype: .* is not known"),
        ("dtype", "F16", r"a: 60 bytes do not hold F16 \[3, 5\]"),
        ("shape", [3, 6], r"a: 60 bytes do not hold F32 \[3, 6\]"),
        ("shape", [3, -5], "a: shape: .* is not a list of sizes"),
        ("shape", [3, 5.0], "a: shape: .* is not a list of sizes"),
        ("shape", None, "a: shape: None is not a list of sizes"),
        ("data_offsets", [0], "a: data_offsets: .* is not a pair"),
        ("data_offsets", [60, 0], r"a: data_offsets: \[60, 0\] is not a range"),
        ("data_offsets", [0, 2**70], "truncated: a ends at byte"),
        ("data_offsets", [60, 120], "b: overlaps|a: overlaps|a: leaves a hole|b: leaves a hole"),
        ("data_offsets", [True, 60], "a: data_offsets: .* is not a list of sizes"),
    ],
)
def test_entry_that_lies(field, value, message, folder):
    rewrite(folder, lambda header: header["a"].update({field: value}))
    with pytest.raises(FileError, match=message) as caught:
        Checkpoint.open(folder)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overlap_hole_and_leftover(folder):
    rewrite(folder, lambda header: header["b"].update({"data_offsets": [30, 90]}))
    with pytest.raises(FileError, match="b: overlaps the tensor before it"):
        Checkpoint.open(folder)
    rewrite(folder, lambda h: h["b"].update({"data_offsets": [64, 124]}) or b"\0" * 124)
    with pytest.raises(FileError, match="b: leaves a hole before it"):
        Checkpoint.open(folder)
    rewrite(folder, lambda h: h["b"].update({"data_offsets": [60, 120]}) or b"\0" * 128)
    with pytest.raises(FileError, match="8 bytes after the last tensor"):
        Checkpoint.open(folder)


def test_no_weights_or_config(tmp_path):
    with pytest.raises(FileError, match=r"config\.json: cannot be read"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FileError, match=r"config\.json: not a JSON object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)


def test_resolves_folders(folder, tmp_path):
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    with pytest.raises(InputError, match=r"no such folder, and not a Hugging Face hub id"):
        resolve(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no such folder, and not a Hugging Face hub id"):
        resolve("./some/where/else")
    with pytest.raises(InputError, match=r"a file; pass the folder"):
        resolve(folder / "config.json")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(tmp_path / "bare")


def test_a_name_that_begins_with_a_tilde_is_no_users_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"~nobody-is-called-so: no such folder, and"):
        resolve(Path("~nobody-is-called-so"))
    (tmp_path / "~").mkdir()
    (tmp_path / "~/config.json").write_text("{}")
    assert resolve(Path("~")).samefile(tmp_path / "~")


def test_resolves_bundled_models(tmp_path, monkeypatch):
    (tmp_path / "mixtral").mkdir()
    (tmp_path / "mixtral" / "config.json").write_text("{}")
    monkeypatch.setattr("bitknap.quantization.source.bundled.files", lambda _: tmp_path)
    assert resolve("reference:mixtral") == tmp_path / "mixtral"
    for name in ("gpt5", "", ".."):
        with pytest.raises(InputError, match=r"is unknown; one of reference:mixtral"):
            resolve(f"reference:{name}")
