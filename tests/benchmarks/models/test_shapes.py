"""The table of real models: headers alone give the figures that the models really have."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitknap.benchmarks.models.random_checkpoint import generate
from bitknap.benchmarks.models.shapes import config, headers, shape_of, shapes
from bitknap.errors import InputError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.low_bit_codes import logical
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo

NAMES = tuple(shape.name for shape in shapes())


def close(figure):
    """A figure as it is printed, to two or three digits."""
    return pytest.approx(figure, rel=0.006)


def shortened(shape):
    """Layers that show everything: those without experts and two with them."""
    return shape.dense_layers + 2 * shape.every


@pytest.mark.parametrize("name", NAMES)
def test_headers_give_the_figures_of_the_model(name):
    shape = shape_of(name)
    layers = shortened(shape)
    layout = walk_headers(config(shape, layers), headers(shape, layers))
    units = layout.units
    assert len(layout.layers) == 2
    for layer in layout.layers:
        assert (layer.experts, layer.hidden) == (shape.experts, shape.hidden)
        assert layer.intermediate == shape.size
        assert layer.gated
        assert layer.router is not None
    moe = sum(shape.is_moe(layer) for layer in range(shape.layers))
    assert len(units) // 2 * moe == shape.figures["units"]
    expert = int(units.numel[(units.layer == units.layer[0]) & (units.expert == 0)].sum())
    assert expert / 1e6 == close(shape.figures["expert_m"])
    one_layer = int(units.numel[units.layer == units.layer[0]].sum())
    assert 2 * one_layer / 1e9 == close(shape.figures["layer_gb"])
    if shape.figures["routed_b"] is not None:
        assert one_layer * moe / 1e9 == close(shape.figures["routed_b"])


@pytest.mark.parametrize("name", ["OLMoE-1B-7B", "gpt-oss-20b", "Mixtral-8x22B"])
def test_all_layers_of_a_model(name):
    shape = shape_of(name)
    layout = walk_headers(config(shape), headers(shape))
    assert len(layout.units) == shape.figures["units"]
    assert int(layout.units.numel.sum()) / 1e9 == close(shape.figures["routed_b"])


# Where attention is known, everything adds up; the rest is linear attention or an indexer.
@pytest.mark.parametrize("name", [shape.name for shape in shapes() if shape.attention])
def test_all_weights_of_a_model(name):
    shape = shape_of(name)
    total = sum(math.prod(size) for _, size in headers(shape).values())
    assert total / 1e9 == pytest.approx(shape.figures["total_b"], rel=0.004)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "DeepSeek-V3", "MiniMax-M2"])
def test_published_precision_is_the_same_model(name, tmp_path):
    shape = shape_of(name)
    layers = shortened(shape)
    stored = {
        tensor: TensorInfo(dtype, size, tmp_path, 0, math.prod(size) * DTYPES[dtype].itemsize)
        for tensor, (dtype, size) in headers(shape, layers, published=True).items()
    }
    seen, low = logical(config(shape, layers), stored)
    plain = headers(shape, layers)
    assert {tensor: (info.dtype, info.shape) for tensor, info in seen.items()} == plain
    units = walk_headers(config(shape, layers), plain).units
    experts = [one for tensor, one in low.items() if ".experts." in tensor]
    nbytes = sum(one.nbytes for one in experts)
    bits = {"mxfp4": 4.25, "fp8": 8 + 32 / 128**2}[shape.published]
    assert 8 * nbytes == bits * int(units.numel.sum())


SMALL = replace(
    shape_of("OLMoE-1B-7B"),
    layers=3,
    hidden=128,
    size=64,
    experts=4,
    vocabulary=512,
    attention={"kind": "gqa", "heads": 4, "kv_heads": 2, "head_size": 32, "norm": "whole"},
)


def test_a_generated_checkpoint(tmp_path):
    folder = generate(SMALL, tmp_path / "olmoe", layers=2, seed=3, shard=200_000)
    source = Checkpoint.open(folder)
    assert source.shapes == headers(SMALL, 2)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 5
    assert max(file.stat().st_size for file in files) < 210_000
    layout = walk_headers(source.config, source.shapes)
    assert len(layout.units) == 24
    weights = source.read_matrix(layout.views[5]).float()
    assert float(weights.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(128, dtype=torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(model.state_dict()) >= {"model.layers.1.mlp.experts.down_proj"}


def test_a_generated_checkpoint_depends_on_the_seed_alone(tmp_path):
    made = [generate(SMALL, tmp_path / str(n), seed=n // 2) for n in range(3)]
    first, again, other = (Checkpoint.open(folder) for folder in made)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_an_unknown_model_or_a_folder_that_is_there(tmp_path):
    with pytest.raises(InputError, match=r"shape 'GPT-7' is unknown; one of Mixtral-8x7B, "):
        shape_of("GPT-7")
    with pytest.raises(InputError, match=r"exists; choose another folder"):
        generate("OLMoE-1B-7B", tmp_path)
