"""What the recorder adds up, against sums taken by hand from the experts' own inputs."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from bitknap.errors import ModelError
from bitknap.estimators.sweep.expert_recording import check_seen, recording
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.testing import tiny_model

# Those with a forward of their own come last.
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "nemotron_h",
    "llama4_text",
    "dbrx",
    "longcat_flash",
    "switch_transformers",
)
WATCHED = (*FAMILIES, "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe")
IDS = torch.arange(2, 38).view(3, 12) * 7 % 64


def run(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra, use_cache=False).logits


def experts_of(layout, layer, tensors):
    """Return each expert's matrices by projection, float64."""
    units = layout.units
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(layer.experts)]
    for i in range(len(units)):
        if units.layer[i] == layer.layer and units.role[i] == 0:
            name = units.projections[units.projection[i]]
            found[units.expert[i]][name] = matrix(layout, i, tensors).detach().double()
    return found


def middle(layer, module, z):
    """Return h of the first projections' outputs, by name."""
    if layer.interleaved:
        gate, up = z["gate"].clamp(max=module.limit), z["up"].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    if layer.kind == "modules":
        return module["expert_0"].act(z["up"])
    act = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    return act(z["gate"]) * z["up"] if layer.gated else act(z["up"])


def first_outputs(layer, module, weights, expert, x):
    names = ("gate", "up") if layer.gated else ("up",)
    z = {name: linear(x, weights[name]) for name in names}
    if layer.interleaved:
        bias = module.gate_up_proj_bias[expert].detach().double()
        z = {"gate": z["gate"] + bias[::2], "up": z["up"] + bias[1::2]}
    return z


def slope(layer, module, z, name, step=1e-6):
    """Return dh/dz by central differences."""
    high, low = ({**z, name: z[name] + sign * step} for sign in (1, -1))
    return (middle(layer, module, high) - middle(layer, module, low)) / (2 * step)


def watched_inputs(model, layout, ids):
    """Return what each experts module was called with, and what it gave."""
    found = {}
    handles = []
    for layer in layout.layers:

        def keep(module, args, output, layer=layer.layer):
            found[layer] = (*(x.detach() for x in args), output.detach())

        name = layer.module.removesuffix(".mlp") if "Dbrx" in type(model).__name__ else layer.module
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        run(model, ids)
    for handle in handles:
        handle.remove()
    return found


def routed(layer, seen, expert):
    """Return the inputs [n, H] and routing weights [n] of one expert, float64."""
    if len(seen) == 2:  # Llama 4: a copy of all tokens for each expert, scaled by the router
        x = seen[0].view(layer.experts, -1, layer.hidden)[expert].double()
        x = x[x.any(1)]
        return x, torch.ones(len(x), dtype=torch.float64)
    hidden, index, weights, _ = seen
    if layer.kind == "modules":  # Switch: a mask, zero beyond an expert's capacity
        token, place = torch.where(index[:, :, expert] > 0)
    else:
        token, place = torch.where(index == expert)
    return hidden.reshape(-1, layer.hidden)[token].double(), weights[token, place].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_taken_by_hand(family):
    model = tiny_model(family)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    seen = watched_inputs(model, layout, IDS)
    with torch.no_grad(), recording(model, layout, full=True) as sums:
        run(model)
    check_seen(sums)
    assert set(sums) == {layer.layer for layer in layout.layers}
    for layer in layout.layers:
        found = sums[layer.layer]
        assert found.input_full is not None
        assert found.middle_full is not None
        module = model.get_submodule(layer.module)
        assert found.tokens == IDS.numel()
        total = seen[layer.layer][-1].reshape(-1, IDS.numel(), layer.hidden).sum(0)
        close(found.output_square[0], total.double().square().sum())
        for expert, own in enumerate(experts_of(layout, layer, tensors)):
            x, a = routed(layer, seen[layer.layer], expert)
            z = first_outputs(layer, module, own, expert, x)
            h = middle(layer, module, z)
            assert found.count[expert] == len(x)
            close(found.gate_sum[expert], a.sum())
            close(found.gate_square[expert], a.square().sum())
            close(found.input_square[expert], (a[:, None] * x).square().sum(0))
            close(found.middle_square[expert], (a[:, None] * h).square().sum(0))
            close(found.input_full[expert].double(), (a[:, None] * x).T @ (a[:, None] * x))
            close(found.middle_full[expert].double(), (a[:, None] * h).T @ (a[:, None] * h))
            assert set(found.slopes) == set(z)
            for name in z:
                by_hand = (a[:, None] * slope(layer, module, z, name)).square().sum(0)
                close(found.slopes[name][expert], by_hand)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_curvature_is_the_sum_of_squared_gradients_of_single_tokens(family):
    model = tiny_model(family)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    ids, labels = IDS[0, :6, None], IDS[1, :6]  # six sequences of one token each
    units = layout.units
    expected = [torch.zeros(int(r), int(c)) for r, c in zip(units.rows, units.cols, strict=True)]
    if any(layer.decorated for layer in layout.layers):
        model.set_experts_implementation("eager")
    for token, label in zip(ids, labels, strict=True):
        model.zero_grad()
        cross_entropy(run(model, token[None])[0], label[None]).backward()
        gradients = {n: t.grad for n, t in tensors.items() if t.grad is not None}
        for i, view in enumerate(layout.views):
            if view.tensor in gradients:
                expected[i] += matrix(layout, i, gradients).square()
    model.zero_grad()
    with recording(model, layout, curvature=True) as sums:
        cross_entropy(run(model, ids)[:, 0], labels, reduction="sum").backward()
    for i in range(len(units)):
        name = units.projections[units.projection[i]]
        found = sums[int(units.layer[i])].curvature[name][units.expert[i]]
        torch.testing.assert_close(found, expected[i], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_catches_gradients_in_every_layer(family):
    model = tiny_model(family)
    evidence = calibrate(model, walk(model), IDS, Recorded(curvature=True))
    for layer in evidence.layers.values():
        for squares in layer.curvature.values():
            assert squares.isfinite().all()
            hit = layer.count > 0
            assert (squares.sum((1, 2))[hit] > 0).all()
            assert not squares[~hit].any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", WATCHED)
def test_recording_leaves_the_output_and_the_model_as_they_were(family):
    model = tiny_model(family)
    layout = walk(model)
    with torch.no_grad():
        expected = run(model)
        with recording(model, layout) as sums:
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(run(model), expected)
        with pytest.raises(ZeroDivisionError), recording(model, layout):
            raise ZeroDivisionError
        counted = {n: s.count.clone() for n, s in sums.items()}
        assert torch.equal(run(model), expected)
    assert all(torch.equal(sums[n].count, counted[n]) for n in sums)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_was_put_in_place_comes_back():
    model = tiny_model("mixtral")
    layout = walk(model)
    experts = model.get_submodule(layout.layers[0].module)
    before = experts.forward
    experts.forward = before
    with recording(model, layout):
        assert experts.forward is not before
    assert experts.forward is before


def test_sums_grow_with_every_batch():
    model = tiny_model("mixtral")
    layout = walk(model)
    with torch.no_grad():
        with recording(model, layout) as whole:
            run(model)
        with recording(model, layout) as parts:
            for ids in IDS:
                run(model, ids[None])
    for number in whole:
        assert torch.equal(whole[number].count, parts[number].count)
        close(whole[number].middle_square, parts[number].middle_square)


def test_a_layer_that_saw_nothing_is_an_error():
    model = tiny_model("mixtral")
    layout = walk(model)
    with recording(model, layout) as sums:
        pass
    with pytest.raises(
        ModelError, match=r"layer 0 .*calibration saw no call of its experts"
    ) as error:
        check_seen(sums)
    assert "\n" not in str(error.value)
    with recording(model, layout) as sums, torch.no_grad():
        layer = model.model.layers[1]
        layer.forward = lambda hidden, *args, **kwargs: hidden
        run(model)
        del layer.forward
    with pytest.raises(ModelError, match=r"layer 1 \(model.layers.1.mlp.experts\)"):
        check_seen(sums)


def test_zero_experts_pass_their_input_on():
    model = tiny_model("longcat_flash")
    layout = walk(model)
    (seen,) = (watched_inputs(model, layout, IDS)[layer.layer] for layer in layout.layers[:1])
    assert (seen[1] >= layout.layers[0].experts).any()
    assert (seen[1] < layout.layers[0].experts).any()


def test_a_token_beyond_the_capacity_goes_to_no_expert():
    model = tiny_model("switch_transformers", expert_capacity=2)
    layout = walk(model)
    with torch.no_grad():
        expected = run(model)
        with recording(model, layout) as sums:
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    for layer in sums.values():
        assert layer.tokens == IDS.numel()
        assert int(layer.count.sum()) < IDS.numel()
        assert int(layer.count.max()) <= 2 * len(IDS)


def test_experts_that_transformers_calls_wrongly_are_refused():
    model = tiny_model("nllb_moe")
    called = set()
    for name, module in model.named_modules():
        if ".expert_" in name and name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, name=name: called.add(name[-1]))
    with torch.no_grad():
        run(model)
    assert called == {"0", "1"}  # of four; once this fails, NLLB can be watched
    with pytest.raises(ModelError) as error, recording(model, walk(model)):
        raise AssertionError("never entered")
    assert str(error.value) == (
        "model.encoder.layers.1.ffn.experts: experts of class NllbMoeExperts get every token sent "
        "to experts 0 and 1 by transformers; use `estimator=DataFree()`"
    )


def test_experts_of_an_unknown_class_name_the_way_out():
    model = tiny_model("longcat_flash")
    layout = walk(model)
    for layer in layout.layers:
        experts = model.get_submodule(layer.module)
        experts.__class__ = type("Unheard", (type(experts),), {})
    with pytest.raises(ModelError) as error, recording(model, layout):
        raise AssertionError("never entered")
    assert str(error.value) == (
        f"{layout.layers[0].module}: experts of class Unheard compute in a way that calibration "
        "does not know; use `estimator=DataFree()`"
    )
    assert not any("forward" in vars(module) for module in model.modules())
