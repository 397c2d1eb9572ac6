"""Rotation: an exact orthogonal transform, and models that compute what they did."""

import json

import pytest
import torch

from bitknap.errors import ModelError
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.transforms.rotation import (
    KNOWN,
    hadamard,
    random_signs,
    rotate_residual,
    rotated,
    turned,
    turns,
    unhadamard,
)
from bitknap.testing import tiny_model
from bitknap.testing.comparing import logits

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def trained(family, **changes):
    """Return a model whose norms and biases are not those of a new one."""
    model = tiny_model(family, **changes)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return model


def computed(model):
    return logits(model, IDS, use_cache=False)


def far(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 6, 64, 96, 1408])
def test_hadamard_is_orthonormal_and_goes_back(size):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, size, generator=draw, dtype=torch.float64)
    signs = random_signs(size, 7)
    turned_x = hadamard(x, signs)
    torch.testing.assert_close(turned_x.square().sum(-1), x.square().sum(-1))
    torch.testing.assert_close(unhadamard(turned_x, signs), x)
    q = hadamard(torch.eye(size, dtype=torch.float64), signs)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(x @ q, turned_x)


def test_hadamard_by_hand():
    signs = torch.tensor([1.0, -1, 1, 1, 1, 1])
    found = hadamard(torch.tensor([1.0, 2, 3, 5, 7, 11]), signs) * 2**0.5
    torch.testing.assert_close(found, torch.tensor([-1.0, 3, 8, -2, 18, -4]))  # blocks of 2
    flat = hadamard(torch.ones(1, 1408), torch.ones(1408))[0].view(11, 128)
    assert (flat[:, 1:] == 0).all()
    torch.testing.assert_close(flat[:, 0], torch.full((11,), 128**0.5))


def test_signs_are_drawn_by_the_seed():
    assert torch.equal(random_signs(64, 1), random_signs(64, 1))
    assert not torch.equal(random_signs(64, 1), random_signs(64, 2))
    assert set(random_signs(64, 1).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", KNOWN)
def test_the_model_computes_what_it_did(family, tied):
    model = trained(family, tie_word_embeddings=tied)
    wanted = computed(model)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    rotate_residual(model, seed=3)
    assert far(computed(model), wanted) < 1e-5
    changed = turns(family, [*before, "lm_head.weight"])
    for name, tensor in before.items():
        assert torch.equal(model.get_parameter(name), tensor) == (name not in changed), name
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "tied"),
    [("mixtral", False), ("mixtral", True), ("qwen3_moe", True), ("gpt_oss", False)],
)
def test_a_checkpoint_is_rotated_as_its_live_model(family, tied, tmp_path):
    model = trained(family, hidden_size=24, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    wanted = computed(model)
    rotated(tmp_path / "in", tmp_path / "out", seed=5)
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert far(computed(loaded), wanted) < 1e-5
    rotate_residual(model, seed=5)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), tensor, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    source = Checkpoint.open(tmp_path / "in")
    assert turned(source, 5).fingerprint != turned(source, 6).fingerprint


def test_weights_in_16_bits_stay_in_16_bits(tmp_path):
    trained("mixtral").bfloat16().save_pretrained(tmp_path / "in")
    rotated(tmp_path / "in", tmp_path / "out")
    assert {dtype for dtype, _ in Checkpoint.open(tmp_path / "out").shapes.values()} == {"BF16"}
    found, wanted = (computed(load(tmp_path / d, torch.float32)) for d in ("out", "in"))
    assert 1e-5 < far(found, wanted) < 0.05  # rounded once more


def test_rotation_spreads_outliers():
    model = tiny_model("mixtral", hidden_size=64)
    weight = model.model.layers[0].mlp.experts.gate_up_proj.detach()
    with torch.no_grad():
        weight[:, :, 5] *= 30  # one channel of the stream that all experts weigh most
        peak = float(weight.abs().amax() / weight.square().mean().sqrt())
    rotate_residual(model)
    assert float(weight.abs().amax() / weight.square().mean().sqrt()) < peak / 3


def test_what_is_not_known_is_refused(tmp_path):
    model = tiny_model("nemotron_h")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with pytest.raises(
        ModelError,
        match=r"nemotron_h: models of this type cannot be rotated; those that can are deepseek",
    ):
        rotate_residual(model)
    assert all(torch.equal(t, before[n]) for n, t in model.named_parameters())
    model = tiny_model("mixtral")
    model.model.layers[1].extra = torch.nn.Linear(16, 2)
    with pytest.raises(
        ModelError, match=r"layers\.1\.extra\.\w+: it is not known whether it reads or writes"
    ):
        rotate_residual(model)
    with pytest.raises(ModelError, match="hidden size 15 is odd"):
        rotate_residual(tiny_model("mixtral", hidden_size=15))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight: missing; rotate a whole"):
        turns("mixtral", ["lm_head.weight", "model.norm.weight"])
    with pytest.raises(ModelError, match=r"lm_head\.weight: its norm model\.norm\.weight is miss"):
        turns("mixtral", ["lm_head.weight"])
