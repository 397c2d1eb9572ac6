"""Streaming: files of a bounded size, pieces of a bounded size, exact places, the same bytes."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.shards import Entry, lay_out
from bitknap.quantization.packed.work_pieces import sections
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks import grouping
from bitknap.testing import tiny_model

FILES = bitknap.Packing(max_shard_size="40kB")
GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
PARTIAL = ".out.partial"


def test_files_are_no_larger_than_asked_and_listed_in_an_index(case):
    index = json.loads(case.whole["bitknap.safetensors.index.json"])
    names = [name for name in case.whole if name.endswith(".safetensors")]
    assert len(names) > 3
    assert sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"bitknap-00001-of-{len(names):05}.safetensors"
    for name in names:
        held = [tensor for tensor, file in index["weight_map"].items() if file == name]
        assert sum(load_file(case.root / "out" / name)[n].nbytes for n in held) <= 40_000 or (
            len(held) == 1
        )


def test_the_files_are_those_of_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.arange(5, dtype=torch.uint8),
        "c": torch.arange(4).bfloat16(),
    }
    names = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    entries = {n: Entry(names[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    shards = lay_out(entries, "x", 1000)
    shards.create(tmp_path)
    assert shards.are_in(tmp_path)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        for name, tensor in tensors.items():
            file.seek(shards.places[name].start)
            file.write(tensor.view(torch.uint8).numpy().tobytes())
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = (tmp_path / "x.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize(
    "format", (*GRIDS, *formats((1, 3), 8, (False, True), "compact6")), ids=lambda f: f.name
)
def test_sections_are_what_encode_writes(format):
    torch.manual_seed(0)
    quantized = RTN.quantize(torch.randn(1, 24, 40), format)
    stream, (whole, half) = encode(quantized), (sections(format, n, 40) for n in (24, 16))
    assert sum(whole) == len(stream)
    first, rest = encode(quantized.rows(0, 16)), encode(quantized.rows(16, 24))
    parts = zip(first.split(half), rest.split(sections(format, 8, 40)), strict=True)
    assert torch.equal(torch.cat([part for pair in parts for part in pair]), stream)


@pytest.mark.slow
def test_small_pieces_write_the_same_bytes(case, tmp_path, small, contents):
    said = []
    case.save(tmp_path / "out", progress=lambda *args: said.append(args))
    assert contents(tmp_path / "out") == case.whole
    assert len(said) > 100  # matrices of 12 kB in blocks of rows
    assert said == [("quantize", n, len(said)) for n in range(len(said))]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "switch_transformers", "qwen2_moe"])
def test_matrices_are_read_alone_from_every_layout(family, tmp_path, monkeypatch):
    tiny_model(family).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    layout = walk_headers(source.config, source.shapes, ("dense", "shared", "attention"))
    for view in layout.views:
        assert torch.equal(source.read_matrix(view), view.of(source.read(view.tensor)))
        part = view.rows(2, 7)
        assert torch.equal(source.read_matrix(part), part.of(source.read(view.tensor)))


def test_what_watches_inputs_gets_matrices_whole(case, tmp_path, small, contents):
    class Watching:
        name, needs_inputs = "watching", True

        def quantize(self, weights, format, inputs=None, exponents=None):
            assert inputs.moments.shape[1] == weights.shape[2]
            shapes.add(tuple(weights.shape[1:]))
            return RTN.quantize(weights, format)

    def inputs(which):
        size = int(case.plan.units.cols[which[0]])
        moments = torch.eye(size).expand(len(which), size, size)
        return Inputs(moments=moments, tokens=torch.ones(len(which)).long())

    shapes: set[tuple[int, ...]] = set()
    writer.save(
        case.source,
        case.plan,
        tmp_path / "out",
        writer.Rounded(rounding=Watching(), inputs=inputs),
        max_shard_size="40kB",
    )
    assert shapes == {(48, 64), (64, 48)}
    assert contents(tmp_path / "out") == case.whole


def test_short_writes_are_finished(case, tmp_path, monkeypatch, contents):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[:1000], at))
    case.save(tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.parametrize("size", [0, -5, "5 apples", "0B"])
def test_sizes_that_make_no_sense(case, tmp_path, size):
    with pytest.raises(InputError):
        bitknap.quantize(
            case.folder, case.plan, tmp_path / "out", packing=bitknap.Packing(max_shard_size=size)
        )
    assert list(tmp_path.iterdir()) == []


def test_weight_only_costs_are_the_same_in_pieces(case, monkeypatch):
    whole = bitknap.estimate(case.folder, DataFree(), GRIDS[:2])
    monkeypatch.setattr("bitknap.estimators.costs.data_free.stack_pieces", singly)
    assert np.allclose(bitknap.estimate(case.folder, DataFree(), GRIDS[:2]).cost, whole.cost)


def singly(units):
    return grouping.stack_pieces(units, 1)
