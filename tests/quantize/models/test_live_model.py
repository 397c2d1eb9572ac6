"""The walker over live models, on every layout of experts that transformers has."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError, ModelError
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.testing import FAMILIES, tiny_model

ALL = ("shared", "attention", "dense")
MOE = [family for family in FAMILIES if family not in ("llama", "jetmoe")]


def routed(layout, layer, expert, tensors):
    """Return the projections of one expert by name."""
    units = layout.units
    of_expert = (units.layer == layer) & (units.expert == expert) & (units.role == 0)
    return {
        units.projections[units.projection[i]]: matrix(layout, i, tensors)
        for i in np.flatnonzero(of_expert).tolist()
    }


def by_model(model, layer, expert, x):
    """Run one expert through the class's own eager forward."""
    name = layer.module.removesuffix(".mlp") if "Dbrx" in type(model).__name__ else layer.module
    module = model.get_submodule(name)
    if layer.kind == "modules":
        return module[f"expert_{expert}"](x)
    if type(module).__name__ == "Llama4TextExperts":  # takes the inputs of all experts, sorted
        inputs = torch.zeros(layer.experts, *x.shape)
        inputs[expert] = x
        return module(inputs.flatten(0, 1)).view_as(inputs)[expert]
    if layer.decorated:
        module.config._experts_implementation = "eager"
    # A second expert of no weight: LongCat cannot run with one.
    index = torch.tensor([[expert, (expert + 1) % layer.experts]] * len(x))
    weight = torch.tensor([[1.0, 0.0]] * len(x))
    return module(x[None] if name != layer.module else x, index, weight).view_as(x)


def by_hand(model, layer, expert, x, tensors, layout):
    """Run one expert from the walker's matrices alone."""
    weights = routed(layout, layer.layer, expert, tensors)
    module = model.get_submodule(layer.module)
    if layer.kind == "modules":
        child = module[f"expert_{expert}"]
        first, last = (m for m in child.children() if isinstance(m, nn.Linear))
        hidden = child.act(linear(x, weights["up"], first.bias))
        return linear(hidden, weights["down"], last.bias)
    if layer.interleaved:
        bias = module.gate_up_proj_bias[expert]
        gate = linear(x, weights["gate"], bias[::2]).clamp(max=module.limit)
        up = linear(x, weights["up"], bias[1::2]).clamp(-module.limit, module.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        return linear(hidden, weights["down"], module.down_proj_bias[expert])
    act = getattr(module, "act_fn", None) or module.activation_fn
    if not layer.gated:
        return linear(act(linear(x, weights["up"])), weights["down"])
    return linear(act(linear(x, weights["gate"])) * linear(x, weights["up"]), weights["down"])


@pytest.mark.parametrize("family", MOE)
def test_views_are_the_experts(family):
    model = tiny_model(family)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    assert layout.layers
    assert set(layout.units.role.tolist()) == {ROLES.index("routed")}
    with torch.no_grad():
        for layer in layout.layers:
            x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(1))
            for expert in range(layer.experts):
                ours = by_hand(model, layer, expert, x, tensors, layout)
                theirs = by_model(model, layer, expert, x)
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_write_back_changes_one_expert(family):
    model = tiny_model(family)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    layer = layout.layers[-1]
    x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(1))
    first = "gate" if layer.gated else "up"
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        outputs = [by_model(model, layer, e, x) for e in range(layer.experts)]
        weight = routed(layout, layer.layer, 1, tensors)[first]
        weight.copy_(torch.zeros_like(weight))
        changed = sum(int((tensors[n] != before[n]).sum()) for n in tensors)
        assert changed == weight.numel() == layer.hidden * layer.intermediate
        for expert in range(layer.experts):
            after = by_model(model, layer, expert, x)
            assert torch.equal(after, outputs[expert]) == (expert != 1)
            ours = by_hand(model, layer, expert, x, tensors, layout)
            torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*MOE, "llama"])
def test_units_cover_what_they_name_and_nothing_else(family):
    model = tiny_model(family)
    layout = walk(model, ALL)
    tensors = dict(model.named_parameters())
    units = layout.units
    covered = dict.fromkeys(tensors, 0)
    for i, view in enumerate(layout.views):
        weight = matrix(layout, i, tensors)
        assert weight.shape == (units.rows[i], units.cols[i])
        storage = tensors[view.tensor].untyped_storage().data_ptr()
        assert weight.untyped_storage().data_ptr() == storage
        covered[view.tensor] += weight.numel()
    for name, count in covered.items():
        zero_experts = family == "longcat_flash" and name.endswith("experts.gate_up_proj")
        assert zero_experts or count in (0, tensors[name].numel()), name
        if re.search(r"norm\w*\.weight|embed|lm_head|router|shared_expert_gate|\.gate\.", name):
            assert not count, name
    for layer in layout.layers:
        assert layer.router in tensors
        assert not covered[layer.router]
        assert tensors[layer.router].shape[0] >= layer.experts


def test_order_and_roles():
    layout = walk(tiny_model("deepseek_v3"), ALL)
    units = layout.units
    labels = [
        (int(units.layer[i]), ROLES[units.role[i]], int(units.expert[i])) for i in range(len(units))
    ]
    assert labels == sorted(labels, key=lambda key: (key[0], ROLES.index(key[1]), key[2]))
    names = [units.projections[p] for p in units.projection]
    assert names[:3] == ["gate", "up", "down"]
    assert {role for layer, role, _ in labels if layer == 0} == {"dense", "attention"}
    assert {role for layer, role, _ in labels if layer == 1} == {"routed", "shared", "attention"}
    attention = [n for n, (_, role, _) in zip(names, labels, strict=True) if role == "attention"]
    assert attention[:5] == ["o", "kv_a_with_mqa", "kv_b", "q_a", "q_b"]


def test_layers_say_how_experts_are_stored():
    oss = walk(tiny_model("gpt_oss")).layers[0]
    assert (oss.transposed, oss.interleaved, oss.biased, oss.decorated) == (True,) * 4
    assert (oss.experts, oss.hidden, oss.intermediate) == (4, 16, 24)
    nemotron = walk(tiny_model("nemotron_h")).layers
    assert [(layer.layer, layer.gated) for layer in nemotron] == [(2, False)]
    llama = walk(tiny_model("llama4_text")).layers
    assert [(m.layer, m.transposed, m.decorated) for m in llama] == [(1, True, False)]


def test_decoder_layers_follow_the_encoder():
    layout = walk(tiny_model("switch_transformers"), ALL)
    assert [layer.layer for layer in layout.layers] == [1, 3]
    assert [layer.module.split(".")[0] for layer in layout.layers] == ["encoder", "decoder"]
    cross = [name for name in layout.units.projections if name.startswith("cross.")]
    assert sorted(cross) == ["cross.k", "cross.o", "cross.q", "cross.v"]


def test_meta_device_is_enough():
    model = tiny_model("qwen3_moe")
    expected = walk(model).units
    assert np.array_equal(walk(model.to("meta")).units.rows, expected.rows)


class Expert(nn.Module):
    def __init__(self, leaves):
        super().__init__()
        for leaf in leaves:
            sizes = (6, 4) if leaf == "down_proj" else (4, 6)
            setattr(self, leaf, nn.Linear(*sizes, bias=False))


class Remote(nn.Module):
    """A model of somebody's own code: a list of experts, as before transformers v5."""

    def __init__(self, *experts):
        super().__init__()
        block = nn.Module()
        block.mlp = nn.Module()
        block.mlp.gate = nn.Linear(4, len(experts), bias=False)
        block.mlp.experts = nn.ModuleList(experts)
        self.layers = nn.ModuleList([block])


GLU = ("gate_proj", "up_proj", "down_proj")


def test_a_list_of_experts():
    layout = walk(Remote(Expert(GLU), Expert(GLU)))
    assert len(layout.units) == 6
    (layer,) = layout.layers
    assert (layer.kind, layer.router, layer.experts) == ("modules", "layers.0.mlp.gate.weight", 2)


def test_refuses_an_incomplete_expert():
    with pytest.raises(ModelError, match=r"layer 0 expert 1: no gate projection"):
        walk(Remote(Expert(GLU), Expert(("up_proj", "down_proj"))))


def test_refuses_a_model_without_experts():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"no routed experts; pass `include="):
        walk(model)
    assert len(walk(model, ("dense",)).units) == 6


def test_refuses_experts_it_does_not_understand():
    with pytest.raises(ModelError, match=r"mlp\.input_linear\.weight: JetMoeParallelExperts"):
        walk(tiny_model("jetmoe"))
    model = Remote(Expert(GLU), Expert(GLU))
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
    experts.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
    model.get_submodule("layers.0.mlp").experts = experts
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj: Module stores experts"):
        walk(model)


def test_refuses_quantized_experts():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"down_proj: torch\.uint8 is already quantized"):
        walk(model)


def test_refuses_two_stacks():
    model = nn.Module()
    model.thinker, model.talker = (Remote(Expert(GLU), Expert(GLU)) for _ in range(2))
    with pytest.raises(ModelError, match=r"claim this unit|2 stacks of layers"):
        walk(model)


def test_refuses_an_unknown_role():
    with pytest.raises(InputError, match=r"include 'head' is unknown; one of shared, attention"):
        walk(tiny_model("mixtral"), ("head",))


def test_refuses_an_unknown_family():
    with pytest.raises(InputError, match=r"'gpt2' is unknown; one of mixtral"):
        tiny_model("gpt2")
