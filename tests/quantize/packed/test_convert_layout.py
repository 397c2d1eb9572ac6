"""Both layouts of a packed checkpoint: nothing is lost on the way, and the folder says which."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitknap.allocation import BitPlan, Format, formats
from bitknap.errors import FileError, InputError
from bitknap.kernels.experts_table import dequantize_tiles
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.config import layout_of
from bitknap.quantization.packed.convert_layout import convert, unit_bytes
from bitknap.quantization.packed.outline import streams
from bitknap.quantization.packed.plain_bytes import decode
from bitknap.quantization.packed.tiled_bytes import experts_table
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model

EVERY = formats(range(1, 9), (8, 32, 64, "row"), (False, True), ("fp16", "compact", "compact6"))
KEEP = Format.keep("bf16")


def packed_folder(tmp_path, family="mixtral", shard=None):
    """Save a tiny model packed, in every format, and say that it is plain."""
    source, folder = tmp_path / "source", tmp_path / "packed"
    tiny_model(family).to(torch.bfloat16).save_pretrained(source)
    opened = Checkpoint.open(source)
    units = walk_headers(opened.config, opened.shapes).units
    options = (*EVERY, KEEP)
    choice = np.random.default_rng(0).permutation(np.arange(len(units)) * 7 % len(options))
    choice[0] = len(options) - 1
    plan = BitPlan.from_choice(units, options, choice, model=opened.fingerprint)
    writer.save(opened, plan, folder)
    if shard:
        split(folder, shard)
    convert(folder, "plain", tmp_path / "said")
    shutil.rmtree(folder)
    (tmp_path / "said").rename(folder)
    return folder, plan


def split(folder, shards):
    """Spread the tensors of a folder over some files."""
    tensors = load_file(folder / "bitknap.safetensors")
    (folder / "bitknap.safetensors").unlink()
    files = [f"bitknap-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file(
            {n: t for n, t in tensors.items() if where[n] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index["weight_map"] = where
    (folder / "bitknap.safetensors.index.json").write_text(json.dumps(index, indent=2))


@pytest.mark.parametrize("shards", [None, 3])
def test_a_checkpoint_goes_there_and_back_byte_by_byte(tmp_path, shards, contents):
    folder, plan = packed_folder(tmp_path, shard=shards)
    there = convert(folder, "tiles", tmp_path / "tiles")
    back = convert(tmp_path / "tiles", "plain", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    sizes = unit_bytes(plan, "tiles")
    assert there == {
        "plan": plan.total_bytes,
        "written": int(sizes.sum()),
        "checkpoint": sum(f.stat().st_size for f in (tmp_path / "tiles").iterdir()),
    }
    assert back["plan"] == back["written"] == plan.total_bytes


def test_what_changes_in_a_folder_of_tiles(tmp_path, contents):
    folder, plan = packed_folder(tmp_path, shard=2)
    convert(folder, "tiles", tmp_path / "tiles")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "tiles")
    assert before.headers.keys() == after.headers.keys()
    for name, info in before.headers.items():
        assert after.headers[name].file.name == info.file.name
        if not name.startswith("bitknap."):
            assert torch.equal(before.read(name), after.read(name))
    same = [f for f in contents(folder) if not f.endswith(".safetensors")]
    assert {f for f in same if contents(folder)[f] != contents(tmp_path / "tiles")[f]} == {
        "config.json",
        "bitknap.safetensors.index.json",
    }
    index = json.loads((tmp_path / "tiles" / "bitknap.safetensors.index.json").read_text())
    total = sum(math.prod(t.shape) * t.itemsize for t in map(after.read, after.headers))
    assert index["metadata"]["total_size"] == total
    ours = after.config["quantization_config"]
    assert (ours["layout"], ours["layout_version"]) == ("tiles", 1)
    assert layout_of(after.config, folder) == "tiles"
    assert before.config["quantization_config"]["layout"] == "plain"
    for name, run in streams(plan.units).items():
        rows, cols = int(plan.units.rows[run[0]]), int(plan.units.cols[run[0]])
        options = [plan.format_of(unit) for unit in run]
        table = experts_table(after.read(name), options, rows, cols)
        at = 0
        for unit, format, found in zip(run, options, dequantize_tiles(table), strict=True):
            piece = before.read(name)[at : (at := at + int(plan.nbytes[unit]))]
            if format != KEEP:
                expected = decode(piece, format, rows, cols).dequantize()
                assert torch.equal(found, expected)


def test_a_checkpoint_that_says_nothing_is_plain(tmp_path):
    assert layout_of({"quantization_config": {"quant_method": "bitknap"}}, tmp_path) == "plain"


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (None, "config.json does not say that this is a packed checkpoint"),
        ({"quant_method": "gptq"}, "config.json does not say that this is a packed checkpoint"),
        (
            {"quant_method": "bitknap", "layout": "rows"},
            "config.json: layout 'rows' is unknown; one of plain, tiles",
        ),
        (
            {"quant_method": "bitknap", "layout": "tiles", "layout_version": 2},
            "config.json: layout_version: 2 cannot be read by this library (1)",
        ),
        (
            {"quant_method": "bitknap", "layout": "tiles", "layout_version": "1"},
            "config.json: layout_version: '1' cannot be read by this library (1)",
        ),
    ],
)
def test_a_layout_that_cannot_be_read(tmp_path, ours, message):
    with pytest.raises(FileError) as error:
        layout_of({"quantization_config": ours}, tmp_path)
    assert str(error.value) == f"{tmp_path}: {message}"


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    folder, _ = packed_folder(tmp_path)
    with pytest.raises(InputError, match="layout 'rows' is unknown; one of plain, tiles"):
        convert(folder, "rows", tmp_path / "out")
    with pytest.raises(InputError, match="exists; choose another name"):
        convert(folder, "tiles", tmp_path / "source")
    with pytest.raises(InputError, match="an output may not overlap"):
        convert(folder, "tiles", folder, overwrite=True)
    tensors = load_file(folder / "bitknap.safetensors")
    name = next(n for n in tensors if n.startswith("bitknap."))
    damaged = {
        f"tensor {name} is missing": {n: t for n, t in tensors.items() if n != name},
        f"tensor {name}: U8": tensors | {name: tensors[name][:-1].clone()},
        "tensor bitknap.9.routed.up is not in the plan": tensors
        | {"bitknap.9.routed.up": torch.zeros(1, dtype=torch.uint8)},
    }
    for message, changed in damaged.items():
        save_file(changed, folder / "bitknap.safetensors", metadata={"format": "pt"})
        with pytest.raises(FileError) as error:
            convert(folder, "tiles", tmp_path / "out")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "source"]
