"""Folders in compressed-tensors' format: names, groups, exact bytes, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import bitknap
from bitknap.allocation import BitPlan, Format
from bitknap.errors import MismatchError, ModelError

TO = "compressed-tensors"


def written(plan, model, out):
    said = bitknap.export(plan, model, TO, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return said, load_file(out / "model.safetensors"), config


def format_of(config, module):
    """Return bits and group size of a module, as compressed-tensors reads the groups."""
    if any(re.match(one.removeprefix("re:"), module) for one in config["ignore"]):
        return None
    for group in config["config_groups"].values():
        if any(re.match(target.removeprefix("re:"), module) for target in group["targets"]):
            return group["weights"]["num_bits"], group["weights"]["group_size"]
    return None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_module_has_its_format(family, wide, mixed, tmp_path):
    model = wide(family)
    plan = mixed(model, TO, ("attention",))
    said, tensors, config = written(plan, model, tmp_path / "out")
    assert said.unit_bytes == plan.total_bytes
    packed = 0
    for name, weight in tensors.items():
        module, _, end = name.rpartition(".")
        if end != "weight_packed":
            continue
        rows, cols = tensors[f"{module}.weight_shape"].tolist()
        scale = tensors[f"{module}.weight_scale"]
        bits, size = format_of(config, module)
        assert weight.dtype == torch.int32
        assert scale.dtype == torch.float16
        assert weight.shape == (rows, cols * bits // 32)
        assert scale.shape == (rows, cols // size)
        present = module.replace("block_sparse_moe", "mlp")
        for former, now in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            present = present.removesuffix(f".{former}") + f".{now}" * present.endswith(former)
        assert format_of(config, present) == (bits, size)
        packed += weight.nbytes + scale.nbytes
    assert packed == plan.total_bytes
    routers = [name for name in tensors if name.endswith("gate.weight")]
    assert len(routers) == 2
    assert not any(format_of(config, name.removesuffix(".weight")) for name in routers)
    assert "transformers would read them all in the first one" in said.warnings[0]
    assert said.checks[1].endswith("bit for bit")


def test_codes_are_a_stream_from_the_lowest_bit(wide, tmp_path):
    model = wide("qwen3_moe")
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint

    source = Checkpoint.open(model)
    units = walk_headers(source.config, source.shapes, ()).units
    uniform = BitPlan.uniform(units, Format(3, 32, symmetric=True), source.fingerprint)
    plan = BitPlan.from_choice(
        units,
        uniform.formats,
        uniform.choice,
        model=source.fingerprint,
        header={"method": "midtread"},
    )
    said, tensors, _ = written(plan, model, tmp_path / "out")
    assert said.warnings == ()
    module = "model.layers.0.mlp.experts.1.up_proj"
    words = tensors[f"{module}.weight_packed"][5].tolist()
    stream = sum((word & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    codes = torch.tensor([stream >> (3 * n) & 7 for n in range(64)]).float()
    scale = tensors[f"{module}.weight_scale"][5].float().repeat_interleave(32)
    source_row = source.read(f"{module}.weight")[5].float()
    assert ((codes - 4) * scale - source_row).norm() < 0.25 * source_row.norm()


def test_a_plan_of_other_costs_is_refused(wide, mixed, tmp_path):
    model = wide("qwen3_moe")
    plan = mixed(model, TO)
    plain = BitPlan.from_choice(plan.units, plan.formats, plan.choice, model=plan.model)
    with pytest.raises(MismatchError, match="rounds by midtread, the plan's costs are of rounding"):
        bitknap.export(plain, model, TO, tmp_path / "out")
    bitknap.export(bitknap.coarsen(plain, TO), model, TO, tmp_path / "out")


def test_packed_checkpoints_have_no_such_grids(wide, mixed, tmp_path):
    model = wide("qwen3_moe")
    with pytest.raises(MismatchError, match="export the plan to compressed-tensors"):
        bitknap.quantize(model, mixed(model, TO), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stacked_experts_are_refused(wide, mixed, tmp_path):
    model = wide("gpt_oss")
    with pytest.raises(ModelError, match="stacks its experts in one tensor"):
        bitknap.export(mixed(model, TO), model, TO, tmp_path / "out")
    assert not list(tmp_path.iterdir())
