"""Settings for other tools, read by these tools' own code: every module gets the plan's format."""

from typing import Any

import pytest
from tests.runtimes.environments import ask

import bitknap
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.targets.configs.module_names import Modules
from bitknap.quantization.targets.target import ExportJob

pytestmark = pytest.mark.runtime

_LARGE = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128}
_LARGE["head_dim"] = 128
# Each prints nothing and answers bits and group size of every name, or None.
_GPTQMODEL = """
from gptqmodel.quantization.config import QuantizeConfig
config = QuantizeConfig.from_pretrained(question["folder"])
found = {}
for name in question["names"]:
    rule = config.dynamic_get(name)
    if rule is False:
        found[name] = None
    else:
        rule = rule or {"bits": config.bits, "group_size": config.group_size}
        found[name] = [int(rule["bits"]), rule["group_size"]]
answer(found)
"""
_AUTOROUND = """
import json, re
from auto_round.utils.common import to_standard_regex
with open(question["folder"] + "/auto_round.json") as file:
    config = json.load(file)
found = {}
for name in question["names"]:
    rule = config
    for pattern, setting in config["layer_config"].items():
        if re.search(to_standard_regex(pattern), name):
            rule = setting
    found[name] = None if rule["bits"] == 16 else [rule["bits"], rule["group_size"]]
answer(found)
"""
_LLM_COMPRESSOR = """
import yaml
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
with open(question["folder"] + "/recipe.yaml") as file:
    recipe = yaml.safe_load(file)
(modifier,) = recipe["quantization_stage"]["quantization_modifiers"].values()
config = QuantizationConfig(config_groups=modifier["config_groups"])
found = {}
for name in question["names"]:
    found[name] = None
    for scheme in config.config_groups.values():
        if any(match_name(name, target) for target in scheme.targets):
            found[name] = [scheme.weights.num_bits, scheme.weights.group_size]
            break
answer(found)
"""
# The model itself is quantized: its experts are stacked, and have a quantizer each.
_MODELOPT = """
import torch, yaml
import modelopt.torch.quantization as mtq
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32)
with open(question["folder"] + "/quant_cfg.yaml") as file:
    config = yaml.safe_load(file)
mtq.quantize(model, config, forward_loop=lambda m: m(torch.arange(3, 19)[None]))
found = {}
for name, quantizer in model.named_modules():
    if "weight_quantizer" in name and hasattr(quantizer, "num_bits"):
        sizes = quantizer.block_sizes or {}
        on = [quantizer.num_bits, sizes.get(-1, 0)]
        found[name] = on if quantizer.is_enabled else None
answer(found)
"""
# torchao looks for the rule of every parameter; what it would do is written down, since its
# kernels for 4 bits need a GPU.
_TORCHAO = """
import inspect, json
import torch
from torchao.quantization import quant_api
from transformers import AutoModelForCausalLM, TorchAoConfig
found = {}
names = {}
def record(module, config, *, parameter_name="weight"):
    size = getattr(config, "group_size", None) or 0
    bits = 4 if type(config).__name__.startswith("Int4") else 8
    found[f"{names[module]}.{parameter_name}"] = [bits, size]
    return module
for kind in (quant_api.Int4WeightOnlyConfig, quant_api.Int8WeightOnlyConfig):
    quant_api._QUANTIZE_CONFIG_HANDLER[kind] = record
model = AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32)
names = {module: name for name, module in model.named_modules()}
with open(question["folder"] + "/torchao.json") as file:
    config = TorchAoConfig.from_dict(json.load(file))
quant_api.quantize_(model, config.quant_type, filter_fn=None)
answer({name: found.get(name) for name, _ in model.named_parameters()})
"""
SCRIPTS = {
    "gptqmodel": _GPTQMODEL,
    "autoround": _AUTOROUND,
    "llm-compressor": _LLM_COMPRESSOR,
    "modelopt": _MODELOPT,
    "torchao": _TORCHAO,
}


def exported(name, model, mixed, root):
    """Export a plan drawn at random; return the formats of modules, and names of the others."""
    source, include = Checkpoint.open(model), ("attention",)
    plan = mixed(model, name, include)
    bitknap.export(plan, model, name, root)
    layout = walk_headers(source.config, source.shapes, include)
    job = ExportJob(source=source, layout=layout, plan=plan, out=root)
    return Modules.stacked(job) if name == "torchao" else Modules.of(job)


def known_of(modules):
    """Return what a tool should answer."""
    formats: dict[str, Any] = {one: [f.bits, f.group_size] for one, f in modules.formats.items()}
    return {**dict.fromkeys(modules.others), **formats}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tool_reads_the_plan(name, family, wide, mixed, tmp_path):
    model = wide(family, **_LARGE)
    modules = exported(name, model, mixed, tmp_path / "out")
    known = known_of(modules)
    question = {"folder": str(tmp_path / "out"), "model": str(model), "names": list(known)}
    found = ask("tools", SCRIPTS[name], question)
    if name == "modelopt":
        known = _by_quantizer(known)
        found = {one: value for one, value in found.items() if value or one in known}
    missing = known.keys() - found.keys()
    assert not [one for one in missing if known[one]]
    assert {one: found[one] for one in known if one in found} == {
        one: value for one, value in known.items() if one in found
    }
    assert all(known.get(one) == value for one, value in found.items())


def _by_quantizer(known):
    """Return formats by the names of ModelOpt's quantizers, where experts are stacked."""
    made = {}
    for name, value in known.items():
        if ".experts." not in name:
            made[f"{name}.weight_quantizer"] = value
            continue
        stack, expert, leaf = name.rsplit(".", 2)
        both = leaf if leaf == "down_proj" else "gate_up_proj"
        made[f"{stack}.{both}_weight_quantizers.{expert}"] = value
    return made


# Every module of the file, unpacked by compressed-tensors' own code.
_UNPACKED = """
import json, torch
from safetensors.torch import load_file, save_file
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
tensors = load_file(question["folder"] + "/model.safetensors")
with open(question["folder"] + "/config.json") as file:
    config = QuantizationConfig.model_validate(json.load(file)["quantization_config"])
weights = {}
for name in tensors:
    module, _, end = name.rpartition(".")
    if end != "weight_packed":
        continue
    (scheme,) = [
        one for one in config.config_groups.values()
        if any(match_name(module, target) for target in one.targets)
    ]
    shape = torch.Size(tensors[module + ".weight_shape"].tolist())
    codes = unpack_from_int32(tensors[name], scheme.weights.num_bits, shape)
    scale = tensors[module + ".weight_scale"].float()
    scale = scale.repeat_interleave(scheme.weights.group_size, dim=1)
    weights[module] = codes.float() * scale
save_file(weights, question["out"])
answer(len(weights))
"""
_LOGITS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(question["folder"], dtype=torch.float32)
with torch.no_grad():
    answer(model(torch.tensor([question["tokens"]])).logits[0].tolist())
"""


def test_compressed_tensors_unpacks_the_plans_weights(wide, mixed, tmp_path):
    import torch
    from safetensors.torch import load_file

    from bitknap.allocation import Format
    from bitknap.quantization.rounding.methods import method

    model = wide("mixtral", **_LARGE)
    plan = mixed(model, "compressed-tensors", ("attention",))
    bitknap.export(plan, model, "compressed-tensors", tmp_path / "out")
    question = {"folder": str(tmp_path / "out"), "out": str(tmp_path / "weights.safetensors")}
    assert ask("tools", _UNPACKED, question) == len(plan.units)
    found = load_file(tmp_path / "weights.safetensors")
    source = Checkpoint.open(model)
    layout = walk_headers(source.config, source.shapes, ("attention",))
    for unit, view in enumerate(layout.views):
        weights = source.read(view.tensor).float()[None]
        format: Format = plan.format_of(unit)
        known = method("midtread").quantize(weights, format).dequantize()
        assert torch.equal(found[view.tensor.removesuffix(".weight")], known)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_loads_compressed_tensors(family, wide, mixed, tmp_path):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from bitknap.allocation import Format
    from bitknap.quantization.models.live_model import walk
    from bitknap.quantization.rounding.methods import method
    from bitknap.quantization.stacks.apply import apply

    model = wide(family)
    offered = [Format(4, 32, symmetric=True)]
    plan = mixed(model, "compressed-tensors", ("attention",), offered=offered)
    bitknap.export(plan, model, "compressed-tensors", tmp_path / "out")
    tokens = list(range(3, 43))
    found = ask("tools", _LOGITS, {"folder": str(tmp_path / "out"), "tokens": tokens})
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    apply(live, walk(live, ("attention",)), plan, method("midtread"))
    with torch.no_grad():
        known = live(torch.tensor([tokens])).logits[0].numpy()
    # It decodes to 16 bits, whose rounding is what remains.
    assert np.abs(np.array(found) - known).max() < 0.01 * np.abs(known).max()
