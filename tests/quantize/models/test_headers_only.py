"""The walker over headers finds what the walker over the live model finds."""

import json

import numpy as np
import pytest
import torch

from bitknap.errors import InputError, ModelError
from bitknap.quantization.models.headers_only import count_of, experts_per_token, walk_headers
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import FAMILIES, tiny_model

ALL = ("shared", "attention", "dense")
COLUMNS = ("layer", "role", "expert", "projection", "block", "rows", "cols")


def same_units(one, other):
    assert one.projections == other.projections
    for column in COLUMNS:
        assert np.array_equal(getattr(one, column), getattr(other, column)), column


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "jetmoe"])
def test_headers_agree_with_the_live_model(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    stored = {name: source.read(name) for name in source.headers}
    tensors = dict(model.named_parameters())
    for include in (ALL,) if family == "llama" else ((), ALL):
        live = walk(model, include)
        disk = walk_headers(source.config, source.shapes, include)
        same_units(live.units, disk.units)
        for i in range(len(live.units)):
            assert torch.equal(matrix(live, i, tensors), matrix(disk, i, stored)), disk.views[i]
    for ours, theirs in zip(live.layers, disk.layers, strict=True):
        for field in ("layer", "experts", "hidden", "intermediate", "gated", "biased"):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.router and theirs.router
        assert torch.equal(tensors[ours.router], stored[theirs.router])


# Sizes at which a transposed matrix has the shape of a straight one.
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama4_text", {"hidden_size": 32, "intermediate_size": 16, "head_dim": 16}),
        ("llama4_text", {"hidden_size": 16, "intermediate_size": 16}),
        ("aria_text", {"hidden_size": 32, "intermediate_size": 16, "head_dim": 16}),
        ("aria_text", {"hidden_size": 16, "intermediate_size": 16}),
        ("gpt_oss", {"hidden_size": 32, "intermediate_size": 16, "head_dim": 16}),
        ("gpt_oss", {"hidden_size": 16, "intermediate_size": 16}),
        ("granitemoeshared", {"hidden_size": 32, "intermediate_size": 16}),
        ("granitemoeshared", {"hidden_size": 16, "intermediate_size": 32}),
    ],
)
def test_orientation_when_sizes_coincide(family, sizes, tmp_path):
    model = tiny_model(family, **sizes)
    model.save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    live, disk = walk(model), walk_headers(source.config, source.shapes)
    tensors = dict(model.named_parameters())
    stored = {name: source.read(name) for name in source.headers}
    same_units(live.units, disk.units)
    for i in range(len(live.units)):
        assert torch.equal(matrix(live, i, tensors), matrix(disk, i, stored))


def bf16(shapes):
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def glu(prefix, leaves, experts=2):
    shapes = {}
    for e in range(experts):
        for leaf, shape in zip(leaves, ((6, 4), (6, 4), (4, 6)), strict=True):
            shapes[f"{prefix}.experts.{e}.{leaf}.weight"] = shape
    return shapes


HUB = ("gate_proj", "up_proj", "down_proj")


def test_mixtral_names_on_the_hub():
    prefix = "model.layers.5.block_sparse_moe"
    shapes = glu(prefix, ("w1", "w3", "w2")) | {f"{prefix}.gate.weight": (2, 4)}
    layout = walk_headers({"model_type": "mixtral", "num_hidden_layers": 6}, bf16(shapes))
    assert [view.tensor.split(".")[-2] for view in layout.views[:3]] == ["w1", "w3", "w2"]
    (layer,) = layout.layers
    assert (layer.module, layer.router) == (f"{prefix}.experts", f"{prefix}.gate.weight")


def test_vision_language_names_and_transposed_experts():
    prefix = "model.language_model.layers.0.mlp"
    shapes = {
        f"{prefix}.experts.gate_up_proj": (2, 4, 12),
        f"{prefix}.experts.down_proj": (2, 6, 4),
        "model.visual.blocks.0.mlp.linear_fc1.weight": (9, 9),
        "model.visual.blocks.0.attn.proj.weight": (9, 9),
    }
    config = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}
    layout = walk_headers(config, bf16(shapes), ALL)
    assert layout.units.rows.tolist() == [6, 6, 4] * 2
    assert layout.layers[0].transposed


def test_multi_token_prediction_is_left_out():
    shapes = glu("model.layers.0.mlp", HUB) | glu("model.layers.1.mlp", HUB)
    shapes |= glu("mtp.layers.0.mlp", HUB)
    layout = walk_headers({"model_type": "deepseek_v3", "num_hidden_layers": 1}, bf16(shapes))
    assert set(layout.units.layer.tolist()) == {0}


def test_hub_size_in_seconds():
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(20):
        shapes |= glu(f"model.layers.{layer}.mlp", HUB, experts=256)
    layout = walk_headers({"model_type": "qwen3_moe"}, bf16(shapes))
    assert len(layout.units) == 20 * 256 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.0.mlp.experts.1.up_proj.weight": None}, r"expert 1: no up projection"),
        ({"model.layers.0.mlp.experts.1.w9.weight": (6, 4)}, r"experts\.1\.w9\.weight: mixtral"),
        ({"model.layers.0.mlp.experts.w13_weight": (2, 12, 4)}, r"w13_weight: mixtral stores"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (2, 12, 4)}, r"has only gate_up_proj"),
        (
            {
                "model.layers.0.mlp.experts.gate_up_proj": (2, 12, 4),
                "model.layers.0.mlp.experts.down_proj": (2, 4, 5),
            },
            r"shapes \[12, 4\] and \[4, 5\] do not make experts",
        ),
        (
            {
                "model.layers.0.mlp.experts.gate_up_proj": (2, 12, 4),
                "model.layers.0.mlp.experts.down_proj": (2, 4, 6),
            },
            r"layer 0: experts in both",
        ),
    ],
)
def test_refuses_experts_it_does_not_understand(changes, message):
    shapes = glu("model.layers.0.mlp", HUB) | changes
    shapes = {name: shape for name, shape in shapes.items() if shape}
    with pytest.raises(ModelError, match=message):
        walk_headers({"model_type": "mixtral"}, bf16(shapes))


def test_refuses_two_stacks():
    shapes = glu("thinker.model.layers.0.mlp", HUB) | glu("talker.model.layers.1.mlp", HUB)
    with pytest.raises(ModelError, match=r"2 stacks of layers \(talker\.model, thinker\.model\)"):
        walk_headers({"model_type": "omni"}, bf16(shapes))


@pytest.mark.parametrize(
    ("name", "entry", "method"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", ("U8", (2, 12, 1, 16)), "mxfp4"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", ("F8_E4M3", (6, 4)), "fp8"),
        ("model.layers.0.mlp.experts.0.up_proj.weight_packed", ("I32", (6, 1)), "ct"),
    ],
)
def test_refuses_quantized_checkpoints(name, entry, method):
    config = {"model_type": "x", "quantization_config": {"quant_method": method}}
    with pytest.raises(ModelError, match=rf"stored as {entry[0]} \(quantized, method {method}\)"):
        walk_headers(config, {name: entry})


def test_refuses_a_model_without_experts():
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 4)}
    with pytest.raises(ModelError, match=r"no routed experts; pass `include="):
        walk_headers({"model_type": "llama"}, bf16(shapes))
    assert len(walk_headers({"model_type": "llama"}, bf16(shapes), ("dense",)).units) == 1


def test_refuses_an_unknown_role():
    with pytest.raises(InputError, match=r"include 'router' is unknown; one of"):
        walk_headers({}, {}, ("router",))


def test_config_is_plain_json(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = Checkpoint.open(tmp_path).shapes
    assert len(walk_headers(config, shapes).units) == len(walk(model).units)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 2}, [2]),
        ({"moe_topk": [8, 4]}, [8, 4]),
        ({"top_k": None, "moe_top_k": 1}, [1]),
        ({"num_experts": [4, 4]}, None),
    ],
)
def test_experts_per_token_are_a_number_or_a_list_by_layer(config, expected):
    assert experts_per_token(config) == expected


@pytest.mark.parametrize("value", ["2", 2.0, True, -1, [], [2, None], [[2]], {"a": 1}])
def test_refuses_other_experts_per_token(value):
    with pytest.raises(ModelError, match=r"config.json: moe_topk: .* nor a list with one for each"):
        experts_per_token({"moe_topk": value})
    with pytest.raises(ModelError, match=r"config.json: depth: .* not a whole number"):
        count_of({"depth": value}, "depth")
