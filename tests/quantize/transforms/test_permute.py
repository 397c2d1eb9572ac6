"""Neurons in another order: the same function, live and on disk, in every storage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitknap.disk.manifest import MANIFEST
from bitknap.errors import InputError, MismatchError, ModelError
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.transforms.permute import Permutation, order_neurons, permute, permuted
from bitknap.quantization.transforms.rewritten_checkpoint import write
from bitknap.testing import FAMILIES, tiny_model
from bitknap.testing.comparing import logits

MOE = [family for family in FAMILIES if family not in ("llama", "jetmoe")]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def shuffled(layout, seed=1):
    draw = np.random.default_rng(seed)
    scores = {at.layer: draw.random((at.experts, at.intermediate)) for at in layout.layers}
    return order_neurons(layout, scores)


def with_biases(model):
    """Give every vector its own values: biases are made as zeros."""
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if "bias" in n:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def computed(model):
    return logits(model, IDS, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", MOE)
def test_the_model_computes_what_it_did(family):
    model = with_biases(tiny_model(family))
    layout = walk(model)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    wanted = computed(model)
    permutation = shuffled(layout)
    permute(model, layout, permutation)
    torch.testing.assert_close(computed(model), wanted, rtol=1e-4, atol=1e-4)
    after = dict(model.named_parameters())
    units = layout.units
    for unit in range(len(units)):
        order = permutation.order[int(units.layer[unit])][units.expert[unit]].tolist()
        old, new = matrix(layout, unit, before), matrix(layout, unit, after)
        is_down = units.projections[units.projection[unit]] == "down"
        assert torch.equal(new, old[:, order] if is_down else old[order])
        assert not torch.equal(new, old)


def test_the_most_sensitive_neurons_come_first():
    layout = walk(tiny_model("mixtral"))
    scores = {n: np.tile(np.arange(24.0) % 5, (4, 1)) for n in (0, 1)}
    order = order_neurons(layout, scores).order[1][3]
    assert order[:10].tolist() == [4, 9, 14, 19, 3, 8, 13, 18, 23, 2]  # ties keep their order


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "granitemoeshared"])
def test_a_checkpoint_is_permuted_as_its_live_model(family, tmp_path):
    model = with_biases(tiny_model(family))
    model.save_pretrained(tmp_path / "in")
    layout = walk(model)
    permutation = shuffled(layout)
    changed = permuted(Checkpoint.open(tmp_path / "in"), permutation)
    write(changed, tmp_path / "out")
    permute(model, layout, permutation)
    loaded = load(tmp_path / "out")
    for name, tensor in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    written = Checkpoint.open(tmp_path / "out")
    assert {n: (i.dtype, i.shape) for n, i in written.headers.items()} == changed.shapes
    assert all(torch.equal(written.read(n), changed.read(n)) for n in written.headers)
    prints = [one.fingerprint for one in (changed.source, changed, written)]
    assert len(set(prints)) == 3
    assert permuted(changed.source, shuffled(layout)).fingerprint == prints[1]
    assert permuted(changed.source, shuffled(layout, seed=3)).fingerprint != prints[1]


def test_shards_stay_shards(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    source = Checkpoint.open(tmp_path / "in")
    write(permuted(source, shuffled(walk(tiny_model("mixtral")))), tmp_path / "out")
    names = {file.name for file in (tmp_path / "in").iterdir()}
    assert len(names) > 4
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, MANIFEST}
    index = "model.safetensors.index.json"
    before, after = (json.loads((tmp_path / d / index).read_text()) for d in ("in", "out"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == source.nbytes
    assert torch.isfinite(computed(load(tmp_path / "out"))).all()
    with pytest.raises(InputError, match="out exists; choose another name"):
        write(permuted(source, shuffled(walk(tiny_model("mixtral")))), tmp_path / "out")


def test_what_is_no_permutation():
    with pytest.raises(InputError, match="order: layer 0: not a permutation of the 3 neurons"):
        Permutation(order={0: np.array([[0, 1, 2], [0, 2, 2]])})
    layout = walk(tiny_model("mixtral"))
    with pytest.raises(InputError, match=r"scores: layer 1: .* shape \[4, 24\], got \[0\]"):
        order_neurons(layout, {0: np.zeros((4, 24))})
    nan = dict.fromkeys((0, 1), np.full((4, 24), np.nan))
    with pytest.raises(InputError, match=r"layer 0: .* got \[4, 24\] with NaN"):
        order_neurons(layout, nan)


def test_of_another_model(tmp_path):
    model = tiny_model("mixtral")
    foreign = shuffled(walk(tiny_model("mixtral", intermediate_size=28)))
    with pytest.raises(MismatchError, match=r"layer 0: the permutation has \(4, 28\) experts"):
        permute(model, walk(model), foreign)


def test_unknown_parameters_of_experts_are_not_passed_over():
    model = tiny_model("mixtral")
    layout = walk(model)
    model.model.layers[1].mlp.experts.scales = torch.nn.Parameter(torch.ones(24))
    with pytest.raises(
        ModelError, match=r"experts\.scales: it is not known whether it depends on the order"
    ):
        permute(model, layout, shuffled(layout))


def test_a_quantized_checkpoint_is_refused(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"the weights are quantized \(method awq\), but no tensor is; save"
    ):
        permuted(Checkpoint.open(tmp_path / "in"), shuffled(walk(model)))


def test_a_source_in_eight_bits_becomes_one_in_sixteen(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(tmp_path / "in")
    permutation = shuffled(walk(model))
    write(permuted(source, permutation), tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert "quantization_config" not in written.config
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    wanted = tensors[name].float()[:, permutation.order[1][2].tolist()] / 2
    assert torch.equal(written.read(name), wanted.bfloat16())
    assert load(tmp_path / "out").config.model_type == "mixtral"
