"""Experts one by one against their class's own forward; what is added reaches every token once."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitknap.estimators.measuring.expert_forward import experts_at
from bitknap.quantization.models.live_model import walk
from bitknap.testing import FAMILIES, tiny_model

# Without experts, without known experts, and without experts that transformers calls rightly.
WATCHED = [name for name in FAMILIES if name not in ("llama", "jetmoe", "nllb_moe")]
IDS = torch.arange(2, 38).view(3, 12) * 7 % 64


def calls_of(model, experts):
    """Return what each experts module was called with, and what it gave."""
    found = {}
    handles = [
        one.module.register_forward_hook(
            lambda module, args, output, number=number: found.update({number: (args, output)})
        )
        for number, one in experts.items()
    ]
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=IDS, **extra, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", WATCHED)
def test_experts_one_by_one_are_the_module(family):
    model = tiny_model(family)
    experts = {layer.layer: experts_at(model, layer) for layer in walk(model).layers}
    assert experts
    for number, (args, output) in calls_of(model, experts).items():
        one = experts[number]
        hidden, index, weights = one.routed(*args)
        total = torch.zeros_like(hidden)
        for row in range(len(hidden)):
            for expert, share in zip(index[row].tolist(), weights[row], strict=True):
                if 0 <= expert < one.layer.experts:
                    (first, last), biases = one.weights(expert), one.biases(expert)
                    with torch.no_grad():
                        h = one.activate(linear(hidden[row : row + 1], first, biases[0]))
                        total[row] += share * one.finish(linear(h, last, biases[1]))[0]
                elif expert >= one.layer.experts:
                    assert one.identity
                    total[row] += share * hidden[row]
        assert total.abs().max() > 1e-3
        torch.testing.assert_close(total, output.reshape(total.shape), rtol=1e-3, atol=1e-4)


def test_experts_of_step_with_their_clamp():
    modeling = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    config = SimpleNamespace(
        num_local_experts=3, hidden_size=8, moe_intermediate_size=6, hidden_act="silu"
    )
    model, block = nn.Module(), nn.Module()
    block.experts = modeling.Step3p7Experts(config, swiglu_limit=0.5)
    layer = nn.Module()
    layer.mlp = block
    model.layers = nn.ModuleList([layer])
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    one = experts_at(model, walk(model).layers[0])
    x = torch.randn(4, 8, generator=generator)
    index, weights = torch.tensor([[0, 2]] * 4), torch.tensor([[0.75, 0.25]] * 4)
    total = torch.zeros_like(x)
    with torch.no_grad():
        for expert, share in ((0, 0.75), (2, 0.25)):
            first, last = one.weights(expert)
            total += share * linear(one.activate(linear(x, first)), last)
        torch.testing.assert_close(total, one.module(x, index, weights))


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "llama4_text", "switch_transformers"])
def test_a_change_moves_what_the_layer_adds(family):
    model = tiny_model(family)
    experts = {layer.layer: experts_at(model, layer) for layer in walk(model).layers}
    for number, (_, output) in calls_of(model, experts).items():
        one = experts[number]
        before = one.summed(output)
        assert before.shape == (IDS.numel(), one.layer.hidden)
        change = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        moved = one.moved(output, change)
        assert moved.shape == output.shape
        torch.testing.assert_close(one.summed(moved), before + change)
        assert torch.equal(one.summed(output), before)


def test_a_change_of_llama_4s_experts_reaches_the_model_once():
    model = tiny_model("llama4_text")
    (layer,) = walk(model).layers
    experts = experts_at(model, layer)
    block = model.get_submodule(layer.module.rpartition(".")[0])
    x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = block(x)[0]
        handle = experts.module.register_forward_hook(
            lambda module, args, output: experts.moved(output, torch.ones_like(x))
        )
        torch.testing.assert_close(block(x)[0], before + 1)
        handle.remove()
