"""Whole files: llama.cpp computes what transformers does with the weights that they hold."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitknap.allocation import Format
from bitknap.errors import ModelError
from bitknap.quantization.ggml import container, library
from bitknap.quantization.gguf.architectures import ARCHITECTURES
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.ggml import Blocks
from bitknap.quantization.stacks.apply import apply
from bitknap.quantization.stacks.grouping import stacks
from bitknap.quantization.stacks.quantize_plan import quantize_plan
from bitknap.quantization.stacks.reading import read_stored

MENU = tuple(map(Format.ggml, ("q8_0", "q5_1", "iq4_nl", "q4_0")))
slow = pytest.mark.slow
LONG = {"max_position_embeddings": 2560}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
PLAIN_YARN = {key: value for key, value in YARN.items() if "mscale" not in key}
FAMILIES = (
    pytest.param("mixtral", {}, ()),
    pytest.param("qwen3_moe", {}, (), marks=slow),
    pytest.param("qwen2_moe", {}, (), marks=slow),
    pytest.param("olmoe", {}, (), marks=slow),
    pytest.param("deepseek_v2", {}, (), marks=slow),
    pytest.param("deepseek_v2", {}, ("attention", "shared", "dense"), marks=slow),
    pytest.param("deepseek_v2", {"q_lora_rank": None, "num_hidden_layers": 27}, (), marks=slow),
    pytest.param("deepseek_v3", {"n_group": 2}, (), marks=slow),
    pytest.param("deepseek_v3", {"rope_parameters": YARN, **LONG}, (), marks=slow),
    pytest.param("qwen3_moe", {"rope_parameters": PLAIN_YARN, **LONG}, (), marks=slow),
    pytest.param("qwen2_moe", {"tie_word_embeddings": True}, (), marks=slow),
    pytest.param("gpt_oss", {}, (), marks=slow),
    pytest.param("qwen2", {}, ("dense",), marks=slow),
    pytest.param("qwen3", {"tie_word_embeddings": True}, ("attention", "dense"), marks=slow),
    pytest.param("llama", {"tie_word_embeddings": True}, ("dense",), marks=slow),
    pytest.param(
        "llama",
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        ("dense",),
        marks=slow,
    ),
)


@pytest.mark.parametrize(("family", "changes", "include"), FAMILIES)
def test_a_float32_file_has_the_logits_of_transformers(tmp_path, llama, family, changes, include):
    model = llama.model(tmp_path / "model", family, **changes)
    file = llama.write(tmp_path / "model", tmp_path / "a.gguf", include=include)
    prompts = llama.prompts()
    found = llama.log_probabilities(file.path, prompts)
    assert np.isfinite(found).all(axis=1).sum() >= 2
    np.testing.assert_allclose(
        found[np.isfinite(found)], llama.expected(model, prompts)[np.isfinite(found)], atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "include"),
    [("mixtral", ("attention",)), pytest.param("qwen2_moe", ("attention", "shared"), marks=slow)],
)
def test_a_quantized_file_has_the_logits_of_its_weights(tmp_path, llama, family, include):
    """llama.cpp also rounds activations, so its logits are only near those of decoded weights."""
    folder = tmp_path / "model"
    model = llama.model(folder, family)
    file = llama.write(folder, tmp_path / "a.gguf", MENU, include)
    assert file.made.unit_bytes == file.plan.total_bytes
    prompts = llama.prompts()
    plain = llama.expected(model, prompts)
    apply(model, walk(model, include), file.plan, file.rounded.rounding, file.rounded.inputs)
    ours, theirs = llama.expected(model, prompts), llama.log_probabilities(file.path, prompts)
    known = np.isfinite(theirs).all(axis=1)

    def divergence(rows):
        return float((np.exp(ours) * (ours - rows)).sum(1)[known].mean())

    assert known.any()
    assert divergence(theirs) < 0.02
    assert divergence(theirs) < 0.3 * divergence(plain)


def test_blocks_are_exactly_the_plans_rounding(tmp_path, llama):
    folder = tmp_path / "model"
    llama.model(folder, "mixtral")
    file = llama.write(folder, tmp_path / "a.gguf", MENU)
    held = container.read(file.path)
    layout = walk_headers(file.source.config, file.source.shapes)
    rounded = quantize_plan(
        file.plan,
        lambda which: read_stored(layout, which, file.source),
        file.rounded.rounding,
        file.rounded.inputs,
    )
    for which, blocks in rounded:
        assert isinstance(blocks, Blocks)
        unit = layout.units.row(int(which[0]))
        name = f"blk.{unit.layer}.ffn_{unit.projection}_exps.weight"
        data = held.data(name).reshape(4, unit.rows, -1)
        ours = blocks.blocks.numpy().reshape(len(which), unit.rows, -1)
        np.testing.assert_array_equal(data[layout.units.expert[which]], ours)


def test_rows_of_q_and_k_alternate(tmp_path, llama):
    model = llama.model(tmp_path / "model", "mixtral")
    file = llama.write(tmp_path / "model", tmp_path / "a.gguf")
    held = container.read(file.path)
    stored = held.data("blk.0.attn_k.weight").view(np.float32).reshape(2, 8, 2, 64)
    own = model.model.layers[0].self_attn.k_proj.weight.detach().numpy().reshape(2, 2, 8, 64)
    np.testing.assert_array_equal(stored, own.swapaxes(1, 2))


def test_norms_and_routers_are_float32_and_the_rest_is_as_stored(tmp_path, llama):
    folder = tmp_path / "model"
    model = llama.model(folder, "mixtral").to(torch.bfloat16)
    model.save_pretrained(folder)
    file = llama.write(folder, tmp_path / "a.gguf", (Format.keep("bf16"),))
    entries = container.read(file.path).entries
    assert entries["blk.0.attn_norm.weight"].type == "f32"
    assert entries["blk.1.ffn_gate_inp.weight"].type == "f32"
    assert entries["token_embd.weight"].type == "bf16"
    assert entries["blk.1.ffn_up_exps.weight"].type == "bf16"
    value = model.model.layers[1].mlp.experts.down_proj.detach().view(torch.uint8).numpy()
    data = container.read(file.path).data("blk.1.ffn_down_exps.weight")
    np.testing.assert_array_equal(data, value.reshape(-1))


@pytest.mark.parametrize("format", [Format.keep("mxfp4"), Format.ggml("mxfp4")])
def test_mxfp4_of_gpt_oss_stays_exactly_what_it_is(tmp_path, llama, format):
    folder = tmp_path / "model"
    llama.model(folder, "gpt_oss")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        shape = (experts, rows, cols // 32)
        draws = {"blocks": (0, 256, (*shape, 16)), "scales": (122, 126, shape)}
        for part, (low, high, size) in draws.items():
            made = torch.randint(low, high, size, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_{part}"] = made
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    file = llama.write(folder, tmp_path / "a.gguf", (format,))
    layout = walk_headers(file.source.config, file.source.shapes)
    held = container.read(file.path)
    for run in stacks(layout.units):
        unit = layout.units.row(int(run[0]))
        data = held.data(f"blk.{unit.layer}.ffn_{unit.projection}_exps.weight")
        decoded = library.dequantize(data.reshape(4 * unit.rows, -1), "mxfp4", unit.cols)
        weights = read_stored(layout, run, file.source).flatten(0, 1).numpy()
        np.testing.assert_array_equal(decoded, weights)


def test_equal_inputs_give_equal_bytes(tmp_path, llama):
    llama.model(tmp_path / "model", "mixtral")
    one, other = (
        llama.write(tmp_path / "model", tmp_path / name, MENU).path.read_bytes()
        for name in ("a.gguf", "b.gguf")
    )
    assert one == other


def test_a_weight_that_is_nan_leaves_no_file(tmp_path, llama):
    folder = tmp_path / "model"
    model = llama.model(folder, "mixtral")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"output_norm\.weight: NaN"):
        llama.write(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_architecture_that_is_not_known_is_named(tmp_path, llama):
    llama.model(tmp_path / "model", "granitemoe")
    with pytest.raises(ModelError, match="model_type granitemoe: GGUF files are written for"):
        llama.write(tmp_path / "model", tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: False; llama.cpp computes"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"rope_parameters": YARN, **LONG}, "attention_factor or mscale"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank: llama.cpp loads"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, llama, family, changes, words):
    llama.model(tmp_path / "model", family, **changes)
    include = ("dense",) if family == "llama" else ()
    with pytest.raises(ModelError, match=words):
        llama.write(tmp_path / "model", tmp_path / "a.gguf", include=include)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"sliding_window": 16}, "attends to the last 16 tokens alone"),
        (
            "gpt_oss",
            {"rope_parameters": {**PLAIN_YARN, "truncate": False}, **LONG},
            "range of yarn",
        ),
        ("mixtral", {}, None),
    ],
)
def test_where_results_differ_is_said(tmp_path, llama, family, changes, words):
    llama.model(tmp_path / "model", family, **changes)
    said = llama.write(tmp_path / "model", tmp_path / "a.gguf").made.warnings
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_every_architecture_is_llama_cpps():
    from gguf import MODEL_ARCH_NAMES

    assert {one.name for one in ARCHITECTURES.values()} <= set(MODEL_ARCH_NAMES.values())
