"""Checkpoints with matrices of any magnitude: written, read, converted and run in every way."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitknap.allocation import BitPlan, Format, formats
from bitknap.errors import FileError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import work_pieces, writer
from bitknap.quantization.packed.config import layout_of
from bitknap.quantization.packed.convert_layout import convert
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.layers import PackedExperts, packed_modules
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks import grouping
from bitknap.testing import tiny_model
from bitknap.testing.comparing import logits

EIGHT = formats(8, (32, "row"), (False, True), ("fp16", "compact"))
# Of each expert's gate, up and down in turn; of up and down the products are 1.
SIZES = (1.0, 1e-7, 1e7, 1.0, 1e12, 1e-12, 1.0, 1e-9, 1e9, 1.0, 1e20, 1e-20)


def scaled(folder, dtype=torch.float32):
    """Save a tiny model whose experts' up and down are scaled, and return its source."""
    tiny_model("mixtral").to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, size in factors(tensors).items():
        tensors[name] = (tensors[name].double() * size).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def factors(tensors):
    """Return what each expert's tensors are multiplied by, gate w1 and up w3 and down w2."""
    place = {"w1": 0, "w3": 1, "w2": 2}
    found = {}
    for name in sorted(tensors):
        parts = name.split(".")
        if "experts" in parts:
            expert = int(parts[parts.index("experts") + 1])
            found[name] = SIZES[(3 * expert + place[parts[-2]]) % len(SIZES)]
    return found


def plan_of(source, options=EIGHT):
    units = walk_headers(source.config, source.shapes).units
    choice = np.arange(len(units)) * 7 // 2 % len(options)
    return BitPlan.from_choice(units, options, choice, model=source.fingerprint)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return scaled(tmp_path_factory.mktemp("scaled") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """A packed model with exponents; read only."""
    out = tmp_path_factory.mktemp("packed") / "out"
    sizes = writer.save(source, plan_of(source), out)
    assert sizes["written"] == sizes["predicted"]
    assert sizes["checkpoint"] == sum(f.stat().st_size for f in out.iterdir())
    return out


def weights_of(model):
    return {n: p for n, p in model.state_dict().items() if "experts" in n}


def distances(one, other):
    """Return how far stacked experts are from each other, relative, expert by expert."""
    return [
        float((a.double() - b.double()).norm() / b.double().norm())
        for name, stack in weights_of(one).items()
        for a, b in zip(stack, weights_of(other)[name], strict=True)
    ]


def test_every_loader_reads_what_was_there(source, packed):
    plain = loading.load(source.folder, dtype=torch.float32)
    exact = loading.load(packed, dtype=torch.float32)
    assert max(distances(exact, plain)) < 0.02
    torch.testing.assert_close(logits(exact), logits(plain), rtol=0.1, atol=0.02)
    for model in (
        loading.load(packed, dtype=torch.float32, packed=True),
        AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits(model), logits(exact), rtol=1e-5, atol=1e-5)


def test_the_operator_of_kernels_runs_them(packed):
    exact, model = loading.load(packed), loading.load(packed, packed=True)
    for module in packed_modules(model):
        if isinstance(module, PackedExperts):
            module.anywhere = True
            module.prepare()
            assert module.kernels is not None
            assert module.kernels.gate is not None
            assert all(kind.scaled for kind in module.kernels.up.kind_list())
            assert not any(kind.scaled for kind in module.kernels.gate.kind_list())
    torch.testing.assert_close(logits(model), logits(exact), rtol=1e-4, atol=1e-4)


def test_the_format_says_so_in_every_layout(packed, tmp_path):
    ours = Checkpoint.open(packed).config["quantization_config"]
    assert (ours["layout"], ours["layout_version"], ours["exponents"]) == ("plain", 2, True)
    convert(packed, "tiles", tmp_path / "tiles")
    ours = Checkpoint.open(tmp_path / "tiles").config["quantization_config"]
    assert (ours["layout"], ours["layout_version"], ours["exponents"]) == ("tiles", 2, True)
    convert(tmp_path / "tiles", "plain", tmp_path / "back")
    for file in packed.iterdir():
        if file.suffix == ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    exact, tiles = loading.load(packed), loading.load(tmp_path / "tiles")
    for name, tensor in weights_of(exact).items():
        assert torch.equal(tensor, weights_of(tiles)[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "tiles").save_pretrained(tmp_path / "saved")
    ours = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (ours["layout"], ours["layout_version"], ours["exponents"]) == ("tiles", 2, True)
    torch.testing.assert_close(logits(loading.load(tmp_path / "saved")), logits(exact))


def test_ordinary_checkpoints_are_what_they_were(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    writer.save(source, plan_of(source), tmp_path / "out")
    ours = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert ours["layout_version"] == 1
    assert "exponents" not in ours


def test_a_layout_of_exponents_is_known_and_no_later_one(tmp_path):
    ours = {"quant_method": "bitknap", "layout": "tiles", "layout_version": 2, "exponents": True}
    assert layout_of({"quantization_config": ours}, tmp_path) == "tiles"
    with pytest.raises(FileError, match=r"layout_version: 3 cannot be read by this library \(2\)"):
        layout_of({"quantization_config": ours | {"layout_version": 3}}, tmp_path)


def test_matrices_cut_into_pieces_are_the_same_bytes(source, packed, tmp_path, monkeypatch):
    for module in (work_pieces, grouping):
        monkeypatch.setattr(module, "PIECE", 4 * 16 * 64)
    writer.save(source, plan_of(source), tmp_path / "out")
    for file in packed.iterdir():
        if file.suffix == ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_weights_of_a_dtype_stay_finite(dtype, tmp_path):
    tiny_model("mixtral").to(dtype).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    largest = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if "experts" in name:
            tensors[name] = (tensor.double() / tensor.double().abs().max() * largest).to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    source = Checkpoint.open(tmp_path / "source")
    plan = plan_of(source, (Format(2, 32), Format(1, 0, symmetric=True), Format(8, 32)))
    writer.save(source, plan, tmp_path / "out")
    for packed in (False, True):
        model = loading.load(tmp_path / "out", packed=packed)
        for layer in model.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                assert stack.dtype == dtype
                assert math.isfinite(stack.detach().double().abs().max())
