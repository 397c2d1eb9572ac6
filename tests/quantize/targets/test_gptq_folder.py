"""Folders in GPTQ's format: names, settings, the order of bits, exact bytes, what is refused."""

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bitknap
from bitknap.allocation import Format
from bitknap.errors import MismatchError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.rounding.methods import method
from bitknap.quantization.source.checkpoint import Checkpoint

TO = "gptq"
ENDS = ("qweight", "qzeros", "scales", "g_idx")


def written(plan, model, out):
    said = bitknap.export(plan, model, TO, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert json.loads((out / "quantize_config.json").read_text()) == config
    return said, load_file(out / "model.safetensors"), config


def format_of(config, module):
    """Return the format of a module, as GPTQModel reads the settings; None if it has none."""
    found = config
    for pattern, value in config["dynamic"].items():
        if re.match(pattern[2:], module):
            found = value if pattern.startswith("+:") else None
            break
    if found is None:
        return None
    return Format(found["bits"], found["group_size"], symmetric=found["sym"], metadata="gptq")


def fields(words, bits):
    """Return the fields of a stream of words, from the lowest bit on."""
    stream = sum((word & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words.tolist()))
    count = 32 * len(words) // bits
    return torch.tensor([stream >> (bits * n) & 2**bits - 1 for n in range(count)])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_matrix_is_stored_as_planned(family, wide, mixed, tmp_path):
    model = wide(family)
    plan = mixed(model, TO, ("attention",))
    said, tensors, config = written(plan, model, tmp_path / "out")
    sizes = [tensor.nbytes for name, tensor in tensors.items() if name.endswith(ENDS)]
    assert said.unit_bytes == plan.total_bytes == sum(sizes)
    assert config["checkpoint_format"] == "gptq_v2"  # some grids are asymmetric
    source = Checkpoint.open(model)
    views = walk_headers(source.config, source.shapes, ("attention",)).views
    for unit, view in enumerate(views):
        module = view.tensor.removesuffix(".weight").replace("block_sparse_moe", "mlp")
        for former, now in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            module = re.sub(rf"\.{former}$", f".{now}", module)
        format = plan.format_of(unit)
        assert format_of(config, module) == format
        weights = source.read(view.tensor).float()[None]
        known: Any = method("rtn").quantize(weights, format)
        codes, zeros, scales, groups = (tensors[f"{module}.{end}"] for end in ENDS)
        assert groups.tolist() == [n // format.group_size for n in range(known.codes.shape[1])]
        assert torch.equal(scales, known.grid.scale.T)
        assert torch.equal(fields(codes[:, 5], format.bits), known.codes[5].long())
        zero = 2 ** (format.bits - 1) if format.symmetric else known.grid.zero[:, -1].long()
        assert (fields(zeros[-1], format.bits) == zero).all()
    routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert not any(format_of(config, name.removesuffix(".weight")) for name in routers)


def test_symmetric_grids_alone_are_in_the_format_that_everything_reads(wide, mixed, tmp_path):
    model = wide("qwen3_moe")
    offered = [Format(bits, 32, symmetric=True, metadata="gptq") for bits in (3, 8)]
    plan = mixed(model, TO, offered=offered)
    said, tensors, config = written(plan, model, tmp_path / "out")
    assert config["checkpoint_format"] == "gptq"
    assert said.checks[1].endswith("bit for bit")
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):  # less 1
            bits = format_of(config, name.removesuffix(".qzeros")).bits
            assert (fields(tensor[0], bits) == 2 ** (bits - 1) - 1).all()


def test_other_files_do_not_hold_these_grids(wide, mixed, tmp_path):
    model = wide("qwen3_moe")
    plan = mixed(model, TO)
    with pytest.raises(MismatchError, match="GPTQ's files alone hold; export the plan to gptq"):
        bitknap.quantize(model, plan, tmp_path / "out")
    with pytest.raises(MismatchError, match="alone hold; export the plan to gptq"):
        bitknap.export(plan, model, "vllm", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stacked_experts_are_refused(wide, mixed, tmp_path):
    model = wide("gpt_oss")
    with pytest.raises(ModelError, match="stacks its experts in one tensor"):
        bitknap.export(mixed(model, TO), model, TO, tmp_path / "out")
    assert not list(tmp_path.iterdir())
