"""Models that are damaged, of unknown make, or no models: one line from every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitknap.cli import main
from bitknap.testing import tiny_model

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)
ON_A_MODEL = (
    ("inspect",),
    ("estimate", *FAST, "-o", "t.safetensors"),
    ("estimate", *FAST, "--estimator", "data-free", "-o", "t.safetensors"),
    ("quantize", "--budget", "4bpw", *FAST, "-o", "out"),
    ("evaluate", "--tokens", "64", *TEXT),
)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.model, tmp_path / "model")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def on_a_model(model, root, command):
    name, *rest = command
    rest = [
        str(root / a) if before == "-o" else a for before, a in zip(command, rest, strict=False)
    ]
    return (name, model, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_missing_shard(command, copy, tmp_path, refused):
    tiny_model("mixtral", vocab_size=4096).save_pretrained(copy, max_shard_size="300KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    lost = sorted(copy.glob("model-*.safetensors"))[0]
    lost.unlink()
    assert lost.name in refused(*on_a_model(copy, tmp_path, command))


@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_truncated_shard(command, copy, tmp_path, refused):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(*on_a_model(copy, tmp_path, command))


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["experts", "self_attn", "embed_tokens", "gate"])
@pytest.mark.parametrize(
    "command", (ON_A_MODEL[1], *ON_A_MODEL[3:]), ids=lambda c: f"{c[0]}{len(c)}"
)
def test_nan_or_infinite_weight(command, tensor, copy, tmp_path, refused):
    names = []

    def change(tensors):
        names.append(sorted(n for n in tensors if f".{tensor}." in n)[-1])
        tensors[names[0]][-1, -1] = float("inf" if tensor == "gate" else "nan")

    edit(copy, change)
    line = refused(*on_a_model(copy, tmp_path, command))
    assert "NaN or infinite weight" in line
    assert tensor in line


@pytest.mark.parametrize("command", ON_A_MODEL[:4], ids=lambda c: f"{c[0]}{len(c)}")
def test_a_model_without_experts(command, tmp_path, refused, saved):
    model = saved(tmp_path / "llama", "llama")
    line = refused(*on_a_model(model, tmp_path, command))
    assert "no routed experts" in line


@pytest.mark.parametrize("command", ON_A_MODEL[1:], ids=lambda c: f"{c[0]}{len(c)}")
@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_an_unknown_architecture(command, key, copy, tmp_path, refused):
    config = json.loads((copy / "config.json").read_text())
    config[key] = "unheard" if key == "model_type" else ["Unheard"]
    (copy / "config.json").write_text(json.dumps(config))
    if "data-free" in command:  # names and shapes of tensors are enough for it
        main([str(a) for a in on_a_model(copy, tmp_path, command)])
        return
    line = refused(*on_a_model(copy, tmp_path, command))
    assert "unheard" in line.lower()


def test_experts_stored_in_an_unknown_way(tmp_path, refused, saved):
    model = saved(tmp_path / "jetmoe", "jetmoe")
    for command in ON_A_MODEL[:4]:
        line = refused(*on_a_model(model, tmp_path, command))
        assert "do not make experts" in line or "not known" in line


@pytest.mark.slow
def test_experts_that_cannot_be_watched(tmp_path, refused, saved):
    model = saved(tmp_path / "nllb", "nllb_moe")
    line = refused(*on_a_model(model, tmp_path, ON_A_MODEL[1]))
    assert "--estimator data-free" in line
    main([str(a) for a in on_a_model(model, tmp_path, ON_A_MODEL[2])])


@pytest.mark.parametrize("command", ON_A_MODEL, ids=lambda c: f"{c[0]}{len(c)}")
def test_no_model_at_all(command, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(*on_a_model(tmp_path / "empty", tmp_path, command))
    line = refused(*on_a_model("reference:none", tmp_path, command))
    assert "reference:mixtral" in line


def test_an_encoder_decoder_has_no_such_losses(tmp_path, refused, saved):
    model = saved(tmp_path / "switch", "switch_transformers")
    line = refused(*on_a_model(model, tmp_path, ON_A_MODEL[4]))
    assert "encoder-decoder" in line


def test_no_tokenizer(copy, tmp_path, refused):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    for command in (ON_A_MODEL[1], ON_A_MODEL[4]):
        assert "tokenizer" in refused(*on_a_model(copy, tmp_path, command))


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{}"), ("tokenizer.json", "{"), ("tokenizer_config.json", "[1]")],
)
def test_a_damaged_tokenizer(file, content, copy, tmp_path, refused):
    (copy / file).write_text(content)
    line = refused(*on_a_model(copy, tmp_path, ON_A_MODEL[4]))
    assert "no tokenizer that transformers can read" in line


def test_an_expert_too_many(copy, tmp_path, refused):
    def change(tensors):
        for name in [n for n in tensors if ".layers.1." in n and ".experts.3." in n]:
            tensors[name.replace("experts.3.", "experts.4.")] = tensors[name].clone()

    edit(copy, change)
    for command in ON_A_MODEL:
        assert "experts" in refused(*on_a_model(copy, tmp_path, command))


@pytest.mark.slow
def test_another_head(tmp_path, refused, saved):
    model = saved(tmp_path / "model")
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["MixtralModel"]}))
    for command in (ON_A_MODEL[1], *ON_A_MODEL[3:]):
        line = refused(*on_a_model(model, tmp_path, command))
        assert "MixtralModel has no language-model head" in line
    main([str(a) for a in on_a_model(model, tmp_path, ON_A_MODEL[2])])


def rewrite(file, change):
    """Apply `change` to the header of a file of weights."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def first_two(header):
    entries = [e for name, e in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda entry: entry["data_offsets"])[:2]


def overlapping(header):
    one, two = first_two(header)
    size = two["data_offsets"][1] - two["data_offsets"][0]
    two["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + size]


def of_another_dtype(header):
    header["model.norm.weight"]["dtype"] = "F16"


def of_no_dtype(header):
    header["model.norm.weight"]["dtype"] = "F9"


def of_whole_numbers(header):
    name = next(n for n in header if ".experts." in n)
    header[name]["dtype"] = "I32"


ON_HEADERS = (ON_A_MODEL[0], *ON_A_MODEL[2:4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overlapping, "overlaps the tensor before it"),
        (of_another_dtype, "model.norm.weight: 64 bytes do not hold F16 [16]"),
        (of_no_dtype, "model.norm.weight: dtype: 'F9' is not known"),
        (of_whole_numbers, "stored as I32 (quantized, method unknown)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("command", ON_HEADERS, ids=lambda c: f"{c[0]}{len(c)}")
def test_headers_that_lie(command, damage, message, copy, tmp_path, refused):
    rewrite(copy / "model.safetensors", damage)
    assert message in refused(*on_a_model(copy, tmp_path, command))


@pytest.mark.parametrize("command", ON_HEADERS, ids=lambda c: f"{c[0]}{len(c)}")
def test_a_header_length_that_lies(command, copy, tmp_path, refused):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    line = refused(*on_a_model(copy, tmp_path, command))
    expected = f"{file}: header of {1 << 40} bytes in a file of {len(content)}; not valid"
    assert line == f"bitknap: {expected}"


def in_two_files(folder):
    """Split the weights over two files with an index; return both files and the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = names[::2], names[1::2]
    files = [folder / f"model-{n}-of-2.safetensors" for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({n: tensors[n] for n in part}, file, metadata={"format": "pt"})
    where = {n: file.name for file, part in zip(files, parts, strict=True) for n in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return files, index, where


def test_a_tensor_in_two_shards_counts_once(made, copy, document):
    (one, two), _, where = in_two_files(copy)
    name = next(n for n, file in where.items() if file == one.name)
    tensors = load_file(two)
    save_file(tensors | {name: load_file(one)[name]}, two, metadata={"format": "pt"})
    assert document("inspect", copy) == document("inspect", made.model)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/hostname", "..", []])
def test_an_index_that_points_outside(outside, copy, tmp_path, refused):
    _, index, where = in_two_files(copy)
    index.write_text(json.dumps({"weight_map": where | {"lm_head.weight": outside}}))
    for command in ON_HEADERS:
        line = refused(*on_a_model(copy, tmp_path, command))
        expected = f"{index}: weight_map: {outside!r} is not a file name in this folder"
        assert line == f"bitknap: {expected}"


def test_a_scale_that_is_missing(copy, tmp_path, refused):
    def change(tensors):
        name = next(n for n in tensors if ".experts." in n)
        tensors["model.layers.0.mlp.experts.up_proj_blocks"] = torch.zeros(
            4, 2, 3, 16, dtype=torch.uint8
        )
        del tensors[name]

    edit(copy, change)
    for command in ON_HEADERS:
        line = refused(*on_a_model(copy, tmp_path, command))
        assert "up_proj_blocks: no model.layers.0.mlp.experts.up_proj_scales" in line
