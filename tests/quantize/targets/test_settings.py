"""Settings for tools that round by themselves: every module gets what the plan says."""

import json
import re
from fnmatch import fnmatch

import numpy as np
import pytest

import bitknap
from bitknap.allocation import BitPlan, Format, profile
from bitknap.benchmarks.models.shapes import config as config_of
from bitknap.benchmarks.models.shapes import headers as headers_of
from bitknap.benchmarks.models.shapes import shape_of
from bitknap.errors import MismatchError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.safetensors_header import TensorInfo
from bitknap.quantization.targets import autoround
from bitknap.quantization.targets.catalog import target_of
from bitknap.quantization.targets.configs import quantizers, settings
from bitknap.quantization.targets.configs.module_names import Modules, unit_names
from bitknap.quantization.targets.target import ExportJob

NAMES = ("gptqmodel", "autoround", "llm-compressor", "modelopt", "torchao")
LARGE = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128}
LARGE["head_dim"] = 128


def read(out, name):
    """Return the settings that a target wrote."""
    (file,) = (
        file
        for file in (out / name).iterdir()
        if file.name not in ("bitknap_plan.json", "bitknap_files.json")
    )
    return json.loads(re.sub(r"(-1):", r'"\1":', file.read_text()))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss"])
def model(request, wide):
    return wide(request.param, **LARGE)


@pytest.fixture
def job(model, mixed, tmp_path):
    """Make the job of a target, whose plan is drawn at random."""

    def make(name, include=("attention",)):
        source = Checkpoint.open(model)
        layout = walk_headers(source.config, source.shapes, include)
        return ExportJob(
            source=source,
            layout=layout,
            plan=mixed(model, name, include),
            out=tmp_path / name,
        )

    return make


@pytest.mark.parametrize("name", NAMES)
def test_modules_get_the_plans_formats_and_routers_none(name, job, tmp_path):
    one = job(name)
    said = bitknap.export(one.plan, one.source.folder, name, one.out)
    assert "bitknap_plan.json" in said.files
    assert said.unit_bytes is None
    assert "rounds the weights by itself" in said.warnings[0]
    content = read(tmp_path, name)
    modules = Modules.stacked(one) if name == "torchao" else Modules.of(one)
    matcher = globals()[f"{name.replace('-', '_')}_of"]
    for module in modules.others:
        assert matcher(content, module) is None, module
    for module, format in modules.formats.items():
        assert matcher(content, module) == (format.bits, format.group_size), module


def gptqmodel_of(content, module):
    for pattern, value in content["dynamic"].items():
        if re.match(pattern[2:], module):
            return (value["bits"], value["group_size"]) if pattern.startswith("+:") else None
    return content["bits"], content["group_size"]


def autoround_of(content, module):
    found = (content["bits"], content["group_size"])
    for pattern, value in content["layer_config"].items():
        if re.search(autoround._as_read(pattern), module):
            found = (value["bits"], value.get("group_size"))
    return None if found[0] == 16 else found


def llm_compressor_of(content, module):
    (modifier,) = content["quantization_stage"]["quantization_modifiers"].values()
    for group in modifier["config_groups"].values():
        if any(re.match(target.removeprefix("re:"), module) for target in group["targets"]):
            return group["weights"]["num_bits"], group["weights"]["group_size"]
    return None


def modelopt_of(content, module):
    found = None
    for entry in content["quant_cfg"]:
        if fnmatch(f"{module}.weight_quantizer", entry["quantizer_name"]):
            value = entry.get("cfg")
            found = value and (value["num_bits"], value.get("block_sizes", {}).get("-1", 0))
    return found


def torchao_of(content, name):
    for pattern, value in content["quant_type"]["default"]["_data"]["fqn_to_config"].items():
        if re.fullmatch(pattern.removeprefix("re:"), name):
            size = value["_data"].get("group_size", 0)
            return (4, size) if value["_type"] == "Int4WeightOnlyConfig" else (8, 0)
    return None


def test_names_are_those_of_transformers_5(wide):
    for family, block in (("mixtral", "mlp"), ("granitemoe", "block_sparse_moe")):
        source = Checkpoint.open(wide(family))
        names = unit_names(walk_headers(source.config, source.shapes, ()))
        assert f"model.layers.1.{block}.experts.3.gate_proj" in names


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_match_is_refused(name, job, monkeypatch):
    one = job(name)
    wrong = Format(4, 64, symmetric=True)
    if name == "modelopt":
        monkeypatch.setattr(quantizers, "rules", lambda *_: [("*", wrong)])
    else:
        whole = settings.rules

        def fewer(modules, **how):
            made = whole(modules, **how)
            made.remove(next(one for one in made if one.format is not None))
            return made

        monkeypatch.setattr(settings, "rules", fewer)
    with pytest.raises(MismatchError, match=f"{name}: its rules give .*, the plan says"):
        bitknap.export(one.plan, one.source.folder, name, one.out)
    assert not one.out.exists()


def test_parts_of_one_module_need_one_format(wide, mixed, tmp_path):
    model = wide("granitemoeshared", shared_intermediate_size=64)
    source = Checkpoint.open(model)
    units = walk_headers(source.config, source.shapes, ("shared",)).units
    apart = [units.projections[i] == "gate" for i in units.projection]
    menu = (Format(4, 64, symmetric=True), Format(8, 64, symmetric=True))
    plan = BitPlan.from_choice(units, menu, apart, model=source.fingerprint)
    with pytest.raises(MismatchError, match="solve again with `target=gptqmodel`"):
        bitknap.export(plan, model, "gptqmodel", tmp_path / "out")
    layout = walk_headers(source.config, source.shapes, ("shared",))
    job = ExportJob(source=source, layout=layout, plan=plan, out=tmp_path / "out")
    with pytest.raises(MismatchError, match=r"another part of .*input_linear has int8-g64-sym"):
        Modules.of(job)


@pytest.fixture(scope="module")
def largest(tmp_path_factory):
    """Qwen3-235B by its names and shapes alone, which is all that settings need."""
    shape = shape_of("Qwen3-235B-A22B")
    folder = tmp_path_factory.mktemp("shapes")
    headers = {
        name: TensorInfo(dtype=dtype, shape=tuple(sizes), file=folder, start=0, stop=1)
        for name, (dtype, sizes) in headers_of(shape).items()
    }
    source = Checkpoint(folder=folder, config=config_of(shape), headers=headers)
    return source, walk_headers(source.config, source.shapes, ())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_36_096_units(name, largest, tmp_path):
    source, layout = largest
    target, units = target_of(name), layout.units
    menu = target.menu(units)
    drawn = np.random.default_rng(0).integers(len(menu), size=len(units))
    choice = drawn[profile(target.profile).labels(units)]
    plan = BitPlan.from_choice(units, menu, choice)
    target.check(plan)
    job = ExportJob(source=source, layout=layout, plan=plan, out=tmp_path / "out")
    covered = "188" if name == "torchao" else "36,096"
    assert f"each of {covered} modules gets the plan's format" in target.export(job).checks[0]
