"""What the recorder adds up, against sums taken by hand from the experts' own inputs."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from bitknap.errors import ModelError
from bitknap.estimators.calibrate import calibrate
from bitknap.estimators.recording import check_seen, recording
from bitknap.quantize.experts import matrix, walk
from bitknap.testing import tiny_model

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
DECORATED = (*FAMILIES, "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe")
IDS = torch.arange(2, 38).view(3, 12) * 7 % 64


def run(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


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
    if layer.gated:
        return module.act_fn(z["gate"]) * z["up"]
    return module.act_fn(z["up"])


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

        handles.append(model.get_submodule(layer.module).register_forward_hook(keep))
    with torch.no_grad():
        run(model, ids)
    for handle in handles:
        handle.remove()
    return found


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
        hidden, index, weights, output = seen[layer.layer]
        hidden = hidden.reshape(-1, layer.hidden)
        found = sums[layer.layer]
        assert found.input_full is not None
        assert found.middle_full is not None
        module = model.get_submodule(layer.module)
        assert found.tokens == IDS.numel()
        assert int(found.count.sum()) == index.numel()
        close(found.output_square[0], output.double().square().sum())
        for expert, own in enumerate(experts_of(layout, layer, tensors)):
            token, place = torch.where(index == expert)
            x, a = hidden[token].double(), weights[token, place].double()
            z = first_outputs(layer, module, own, expert, x)
            h = middle(layer, module, z)
            assert found.count[expert] == len(token)
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
    evidence = calibrate(model, walk(model), IDS, curvature=True)
    for layer in evidence.layers.values():
        for squares in layer.curvature.values():
            assert squares.isfinite().all()
            hit = layer.count > 0
            assert (squares.sum((1, 2))[hit] > 0).all()
            assert not squares[~hit].any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", DECORATED)
def test_recording_leaves_the_output_and_the_model_as_they_were(family):
    model = tiny_model(family)
    layout = walk(model)
    before = model.config._experts_implementation
    with torch.no_grad():
        expected = run(model)
        with recording(model, layout) as sums:
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
        assert model.config._experts_implementation == before
        assert torch.equal(run(model), expected)
        with pytest.raises(ZeroDivisionError), recording(model, layout):
            raise ZeroDivisionError
        assert model.config._experts_implementation == before
        counted = {n: s.count.clone() for n, s in sums.items()}
        assert torch.equal(run(model), expected)
    assert all(torch.equal(sums[n].count, counted[n]) for n in sums)


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
    with pytest.raises(ModelError, match=r"layer 0 .*saw no expert call") as error:
        check_seen(sums)
    assert "\n" not in str(error.value)
    with recording(model, layout) as sums, torch.no_grad():
        layer = model.model.layers[1]
        layer.forward = lambda hidden, *args, **kwargs: hidden
        run(model)
        del layer.forward
    with pytest.raises(ModelError, match=r"layer 1 \(model.layers.1.mlp.experts\)"):
        check_seen(sums)


@pytest.mark.parametrize("family", ["llama4_text", "switch_transformers", "dbrx", "longcat_flash"])
def test_experts_that_cannot_be_watched_name_the_way_out(family):
    model = tiny_model(family)
    with (
        pytest.raises(ModelError, match="--estimator data-free") as error,
        recording(model, walk(model)),
    ):
        raise AssertionError("never entered")
    assert "\n" not in str(error.value)
