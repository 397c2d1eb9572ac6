"""Folders for mlx-lm: names, configuration, exact bytes, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, Format
from bitknap.errors import MismatchError, ModelError


def opened(out):
    """Return the tensors, the configuration and the "quantization" block of a folder."""
    config = json.loads((out / "config.json").read_text())
    return load_file(out / "model.safetensors"), config, config["quantization"]


def export(plan, model, out):
    return bitknap.export(plan, model, "mlx", out)


def test_every_module_has_its_format(wide, mixed, tmp_path):
    model = wide("mixtral")
    plan = mixed(model, "mlx", ("attention",))
    said = export(plan, model, tmp_path / "out")
    tensors, config, block = opened(tmp_path / "out")
    assert config["quantization_config"] == block
    assert said.unit_bytes == plan.total_bytes
    assert said.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    packed = 0
    for name, settings in block.items():
        if not isinstance(settings, dict):
            continue
        weight, scales = tensors[f"{name}.weight"], tensors[f"{name}.scales"]
        assert settings["mode"] == "affine"
        assert weight.dtype == torch.uint32
        assert scales.dtype == tensors[f"{name}.biases"].dtype == torch.float16
        cols = scales.shape[-1] * settings["group_size"]
        assert weight.shape[-1] * 32 == cols * settings["bits"]
        packed += weight.nbytes + 2 * scales.nbytes
    assert packed == plan.total_bytes
    assert "model.layers.1.block_sparse_moe.switch_mlp.gate_proj" in block
    assert tensors["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"].shape[0] == 4
    assert "model.layers.0.self_attn.q_proj" in block
    assert not any(".experts." in name for name in tensors)
    assert said.checks[1].startswith(
        "14 of 32 matrices, one of each stack and format, were read back"
    )
    assert said.checks[1].endswith("bit for bit")
    assert BitPlan.load(tmp_path / "out" / "bitknap_plan.json").total_bytes == plan.total_bytes


def test_keys_that_transformers_no_longer_writes(wide, mixed, tmp_path):
    theta = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    model = wide("qwen3_moe", rope_parameters=theta)
    export(mixed(model, "mlx"), model, tmp_path / "out")
    _, config, _ = opened(tmp_path / "out")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}
    assert config["num_experts"] == config["num_local_experts"] == 4


def test_stacked_experts_with_biases_are_taken_apart(wide, mixed, tmp_path):
    model = wide("gpt_oss")
    said = export(mixed(model, "mlx"), model, tmp_path / "out")
    tensors, _, block = opened(tmp_path / "out")
    source = load_file(model / "model.safetensors")
    bias = source["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert torch.equal(tensors["model.layers.1.mlp.experts.gate_proj.bias"], bias[:, ::2])
    assert torch.equal(tensors["model.layers.1.mlp.experts.up_proj.bias"], bias[:, 1::2])
    down = source["model.layers.1.mlp.experts.down_proj_bias"]
    assert torch.equal(tensors["model.layers.1.mlp.experts.down_proj.bias"], down)
    assert "model.layers.1.mlp.experts.down_proj" in block
    assert "truncate: false" in said.warnings[0]


def test_the_same_bytes_again(wide, mixed, tmp_path):
    model = wide("mixtral")
    plan = mixed(model, "mlx")
    export(plan, model, tmp_path / "one")
    export(plan, model, tmp_path / "other")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def shrunk(wide, folder, factor):
    """Write a Mixtral whose experts are multiplied by a number."""
    folder.mkdir()
    tensors = load_file(wide("mixtral") / "model.safetensors")
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((wide("mixtral") / "config.json").read_bytes())
    return tensors


def test_small_weights_are_stored_without_an_exponent(wide, mixed, tmp_path):
    model = tmp_path / "small"
    tensors = shrunk(wide, model, 1 / 256)
    said = export(mixed(model, "mlx", offered=[Format(8, 32)]), model, tmp_path / "out")
    written, _, _ = opened(tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.switch_mlp.gate_proj"
    codes = written[f"{name}.weight"].view(torch.uint8).view(4, 96, 2, 32).float()
    scales, biases = (written[f"{name}.{end}"].float()[..., None] for end in ("scales", "biases"))
    known = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert known.abs().max() < 2**-8
    found = (codes * scales + biases).view(4, 96, 64)[0]
    assert (found - known).norm() < 0.01 * known.norm()
    assert said.checks[1].endswith("of the largest one")


def test_weights_beyond_what_16_bits_hold(wide, mixed, tmp_path):
    model = tmp_path / "small"
    shrunk(wide, model, 2.0**-20)
    with pytest.raises(ModelError, match=r"scales of .* are beyond what its 16 bits hold"):
        export(mixed(model, "mlx"), model, tmp_path / "out")


def test_latent_attention_that_would_be_rounded_twice(wide, mixed, tmp_path):
    latent = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    model = wide("deepseek_v3", **dict.fromkeys(latent, 32))
    with pytest.raises(MismatchError, match=r"kv_b_proj\.weight is taken apart by mlx-lm"):
        export(mixed(model, "mlx", ("attention",)), model, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("jamba", {}, "mlx: model type 'jamba' was never run by mlx-lm here; known are deepseek"),
        ("mixtral", {"head_dim": 16}, "mlx: heads of 16 in 2 are not the hidden size, 64"),
    ],
)
def test_models_that_are_refused(family, changes, why, wide, mixed, tmp_path):
    model = wide(family, **changes)
    with pytest.raises(ModelError, match=why):
        export(mixed(model, "mlx"), model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_exported_once_it_is_repaired(wide, mixed, tmp_path, contents):
    model, broken = wide("mixtral"), tmp_path / "model"
    broken.mkdir()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][-1, -1] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    plan = mixed(model, "mlx")
    with pytest.raises(ModelError, match=r"NaN or infinite.* pieces are kept"):
        export(plan, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    export(plan, broken, tmp_path / "out")
    export(plan, model, tmp_path / "other")
    kept = ("model.safetensors", "config.json")
    out, other = (contents(tmp_path / name) for name in ("out", "other"))
    assert [out[name] for name in kept] == [other[name] for name in kept]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "other", "out"]


def test_a_plan_of_another_model(wide, mixed, tmp_path):
    plan = mixed(wide("mixtral"), "mlx")
    with pytest.raises(MismatchError, match="the plan is for model"):
        export(plan, wide("qwen3_moe"), tmp_path / "out")
