"""What ordinary linears see, and the moments of inputs of every role."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bitknap.allocation import ROLES
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import PRIOR_TOKENS, Evidence
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.linear_recording import recording_linears
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model
from bitknap.testing.evidence import lopsided_model

IDS = torch.arange(2, 38).view(3, 12) * 7 % 64
close = partial(torch.testing.assert_close, rtol=2e-3, atol=1e-5)


def linears_of(model, layout, full):
    """Return what ordinary linears saw, and their inputs [tokens, in] by unit, float64."""
    inputs: dict[int, torch.Tensor] = {}
    handles = []
    for unit, view in enumerate(layout.views):
        if ROLES[layout.units.role[unit]] == "routed":
            continue

        def keep(module, args, unit=unit):
            inputs[unit] = args[0].detach().double().flatten(0, -2)

        module = model.get_submodule(view.tensor.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad(), recording_linears(model, layout, full=full) as sums:
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {unit: seen.evidence() for unit, seen in sums.items()}, inputs


@pytest.mark.parametrize(
    ("family", "roles"),
    [("qwen2_moe", ("attention", "shared")), ("deepseek_v3", ("attention", "shared", "dense"))],
)
def test_linears_have_the_moments_of_their_own_inputs(family, roles):
    model = tiny_model(family)
    layout = walk(model, roles)
    found, inputs = linears_of(model, layout, full=True)
    units = layout.units
    assert {ROLES[units.role[unit]] for unit in found} == set(roles)
    for unit, x in inputs.items():
        assert found[unit].tokens == len(x) == IDS.numel()
        close(found[unit].input_square, x.square().sum(0))
        close(found[unit].input_full.double(), x.T @ x)
    before = sum(found[unit].tokens for unit in found)
    model(input_ids=IDS, use_cache=False)
    assert sum(found[unit].tokens for unit in found) == before  # the hooks are gone


def test_linears_keep_whole_moments_only_when_asked():
    model = tiny_model("qwen2_moe")
    found, _ = linears_of(model, walk(model, ("attention",)), full=False)
    assert found
    assert all(seen.input_full is None for seen in found.values())


def evidence_of(model, layout, linears):
    """Return the evidence of a full pass, with what ordinary linears saw."""
    return replace(calibrate(model, layout, IDS, Recorded(full=True)), linears=linears)


def test_inputs_are_moments_a_token_for_every_role():
    model = tiny_model("qwen2_moe")
    layout = walk(model, ("attention", "shared"))
    linears, inputs = linears_of(model, layout, full=True)
    evidence = evidence_of(model, layout, linears)
    units = layout.units
    for unit, x in inputs.items():
        known = evidence.inputs(np.array([unit]))
        assert known.tokens.tolist() == [len(x)]
        close(known.moments[0].double(), x.T @ x / len(x))
    layer = evidence.layers[0]
    for name, full in (("gate", layer.input_full), ("down", layer.middle_full)):
        at = (units.layer == 0) & (units.role == 0)
        assert full is not None
        routed = np.flatnonzero(at & (units.projection == units.projections.index(name)))
        known = evidence.inputs(routed)
        assert known.tokens.tolist() == layer.count.tolist()
        mean = full.sum(0) / layer.count.sum()
        for expert, seen in enumerate(layer.count.tolist()):
            expected = (full[expert] + PRIOR_TOKENS * mean) / (seen + PRIOR_TOKENS)
            close(known.moments[expert], expected)
        one = evidence.inputs(routed[1:2])  # the layer's mean is not that of the run
        assert torch.equal(one.moments[0], known.moments[1])


def test_an_expert_without_tokens_has_its_layers_moments():
    model = lopsided_model()
    evidence: Evidence = calibrate(model, walk(model), IDS, Recorded(full=True))
    units = evidence.units
    gate = (units.layer == 0) & (units.projection == units.projections.index("gate"))
    known = evidence.inputs(np.flatnonzero(gate))
    assert known.tokens[4] == 0
    full, count = evidence.layers[0].input_full, evidence.layers[0].count
    assert full is not None
    close(known.moments[4], full.sum(0) / count.sum())


@pytest.mark.parametrize("include", [(), ("attention",)])
def test_inputs_that_were_not_recorded_name_the_unit(include):
    model = tiny_model("qwen2_moe")
    layout = walk(model, include)
    linears, _ = linears_of(model, layout, full=False)
    evidence = replace(calibrate(model, layout, IDS), linears=linears)
    roles = layout.units.role
    unit = int(np.flatnonzero(roles == (ROLES.index("attention") if include else 0))[0])
    with pytest.raises(InputError) as error:
        evidence.inputs(np.array([unit]))
    assert str(error.value) == (
        f"{layout.units.label(unit)}: second moments of its inputs were not recorded; calibrate "
        "with full moments"
    )
