"""What traces keep, against the experts' own inputs; running from them, against the model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitknap.errors import InputError, ModelError
from bitknap.estimators.evidence.evidence import LayerTrace
from bitknap.estimators.measuring.windows import logits_of
from bitknap.estimators.sweep.expert_recording import recording
from bitknap.estimators.sweep.expert_traces import block_of
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "deepseek_v3")
# Those with a forward of their own, and what a trace asks of them.
OTHERS = {
    "dbrx": {},
    "longcat_flash": {},
    "switch_transformers": {},
    "llama4_text": {"num_experts_per_tok": 1},
}
IDS = torch.arange(2, 38).view(3, 12) * 7 % 64


def run(model, ids=IDS):
    return logits_of(model, ids)


def watched(model, layout):
    """Return what each experts module was called with and what it gave, gradients kept."""
    found = {}
    for layer in layout.layers:

        def keep(module, args, output, layer=layer.layer):
            if output.requires_grad:
                output.retain_grad()
            found[layer] = (*args, output)

        name = layer.module.removesuffix(".mlp") if "Dbrx" in type(model).__name__ else layer.module
        model.get_submodule(name).register_forward_hook(keep)
    return found


def added(layer, seen):
    """Return what a layer's experts add to each token [T, H]; Llama 4 has a row of each expert."""
    copies = layer.experts if len(seen) == 2 else 1
    return seen[-1].reshape(copies, -1, layer.hidden).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_are_what_the_experts_were_given(family):
    model = tiny_model(family)
    layout = walk(model)
    evidence = calibrate(model, layout, IDS, Recorded(traces=True))
    found = watched(model, layout)
    with torch.no_grad():
        run(model)
    assert set(evidence.traces) == {layer.layer for layer in layout.layers}
    for number, trace in evidence.traces.items():
        hidden, index, weights, _ = found[number]
        torch.testing.assert_close(
            trace.hidden, hidden.reshape(-1, hidden.shape[-1]), rtol=1e-3, atol=1e-4
        )
        assert torch.equal(trace.index, index)
        torch.testing.assert_close(trace.weights, weights, rtol=1e-3, atol=1e-5)
        assert trace.hidden.dtype == trace.weights.dtype == torch.float32
        assert trace.gradient is None
        layer = evidence.layers[number]
        assert torch.equal(trace.count(len(layer.count)), layer.count)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_at_the_experts_output(family):
    model = tiny_model(family)
    layout = walk(model)
    labels = IDS[:, 1:].flatten()
    with recording(model, layout, trace_tokens=20, gradients=True) as sums:
        cross_entropy(run(model), labels, reduction="sum").backward()
    found = watched(model, layout)
    model.zero_grad()
    cross_entropy(run(model), labels, reduction="sum").backward()
    for number, layer in sums.items():
        trace = layer.trace()
        assert trace is not None
        assert trace.gradient is not None
        expected = found[number][3].grad.reshape(-1, layer.layer.hidden)
        assert len(trace.hidden) == 20
        torch.testing.assert_close(trace.gradient, expected[:20], rtol=1e-3, atol=1e-4)


def test_a_frozen_model_has_gradients_too():
    model = tiny_model("mixtral")
    layout = walk(model)
    expected = calibrate(model, layout, IDS, Recorded(gradients=True))
    frozen = calibrate(model.requires_grad_(False), layout, IDS, Recorded(gradients=True))
    for number, trace in expected.traces.items():
        torch.testing.assert_close(
            frozen.traces[number].gradient, trace.gradient, rtol=1e-4, atol=1e-7
        )
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_running_from_a_trace_is_running_the_layer(family):
    model = tiny_model(family, **OTHERS.get(family, {}))
    layout = walk(model)
    evidence = calibrate(model, layout, IDS, Recorded(traces=True))
    found = watched(model, layout)
    units, layers = layout.units, {x.layer: x for x in layout.layers}
    with torch.no_grad():
        run(model)
        before = {number: added(layers[number], seen) for number, seen in found.items()}
        for stack in stacks(units):
            layer, name = int(units.layer[stack[0]]), units.projections[units.projection[stack[0]]]
            block = block_of(evidence, layer)
            changed = {name: block.weights[name] * 1.5}
            moved = {expert: (token, dz) for expert, token, dz in block.changes(changed)}
            hit = (evidence.layers[layer].count > 0).nonzero()[:, 0].tolist()
            assert list(moved) == hit
            for unit in stack:
                if int(units.expert[unit]) not in moved:
                    continue
                token, dz = moved[int(units.expert[unit])]
                with replaced(model, layout, [unit], lambda w: w * 1.5):
                    run(model)
                expected = added(layers[layer], found[layer]) - before[layer]
                assert dz.abs().max() > 1e-4
                full = torch.zeros_like(expected).index_add(0, token, dz)
                torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-4)


def test_gradients_of_scaled_copies_are_those_of_their_tokens():
    model = tiny_model("llama4_text", **OTHERS["llama4_text"])
    layout = walk(model)
    labels = IDS[:, 1:].flatten()
    found = watched(model, layout)
    with recording(model, layout, trace_tokens=20, gradients=True) as sums:
        cross_entropy(run(model), labels, reduction="sum").backward()
    (layer,) = layout.layers
    trace = sums[layer.layer].trace()
    assert trace is not None
    assert trace.gradient is not None
    copies, output = found[layer.layer]
    shape = (layer.experts, -1, layer.hidden)
    # Each token's routed copy is the one that is not zero; all copies share its gradient.
    torch.testing.assert_close(trace.hidden, copies.view(shape).sum(0)[:20])
    torch.testing.assert_close(trace.gradient, output.grad.view(shape)[0][:20])
    assert torch.equal(trace.weights, torch.ones(20, 1))


def test_a_trace_keeps_one_scaled_copy_a_token():
    model = tiny_model("llama4_text", num_experts_per_tok=2)
    with pytest.raises(ModelError) as error:
        calibrate(model, walk(model), IDS, Recorded(traces=True))
    assert str(error.value) == (
        "layer 1: each expert scales its own input, and a token has 2 of them, but a trace keeps "
        "one; use an estimator without traces, such as moments"
    )


def test_a_token_routed_to_an_expert_twice_moves_once_by_both():
    model = tiny_model("mixtral")
    layout = walk(model)
    evidence = calibrate(model, layout, IDS, Recorded(traces=True))
    trace = evidence.traces[0]
    twice = LayerTrace(
        hidden=trace.hidden[:1],
        index=torch.tensor([[2, 2]]),
        weights=torch.tensor([[0.5, 0.25]]),
        gradient=None,
    )
    once = LayerTrace(
        hidden=trace.hidden[:1],
        index=torch.tensor([[2, 1]]),
        weights=torch.tensor([[0.75, 0.0]]),
        gradient=None,
    )
    moved = []
    for kept in (twice, once):
        fields = {n: getattr(evidence, n) for n in type(evidence).__dataclass_fields__}
        block = block_of(type(evidence)(**{**fields, "traces": {0: kept}}), 0)
        changes = list(block.changes({"down": block.weights["down"] * 2}))
        moved.append({expert: (token.tolist(), dz) for expert, token, dz in changes})
    assert moved[0][2][0] == [0]
    torch.testing.assert_close(moved[0][2][1], moved[1][2][1])


def test_what_was_not_kept_is_asked_for():
    model = tiny_model("mixtral")
    layout = walk(model)
    bare = calibrate(model, layout, IDS)
    assert bare.traces == {}
    with pytest.raises(InputError, match="calibrate with traces=True"):
        block_of(bare, 0)
    with pytest.raises(InputError, match="trace_tokens: 0 is below 1"):
        calibrate(model, layout, IDS, Recorded(traces=True, trace_tokens=0))


def test_largest_outputs_are_those_of_single_experts():
    model = tiny_model("mixtral")
    layout = walk(model)
    evidence = calibrate(model, layout, IDS, Recorded(traces=True))
    for number, layer in evidence.layers.items():
        block = block_of(evidence, number)
        for expert, seen in enumerate(block.seen):
            assert layer.output_max is not None
            added = (seen.output * seen.share[:, None]).abs()
            expected = float(added.max()) if len(added) else 0.0
            assert float(layer.output_max[expert]) == pytest.approx(expected, rel=1e-4)
