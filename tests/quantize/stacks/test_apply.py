"""A plan on live weights: applied exactly, taken back exactly, and refused where it is foreign."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import BitPlan, Format, Units, formats
from bitknap.errors import MismatchError, ModelError
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import (
    aligned,
    applied,
    apply,
    read_units,
    replaced,
    stacks,
)
from bitknap.testing import tiny_model

FORMATS = (*formats((1, 2, 3, 5, 8), (8, "row"), (False, True), ("fp16", "compact"), keep="fp32"),)
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text", "switch_transformers", "dbrx")


def mixed(units, seed=0):
    choice = np.random.default_rng(seed).integers(0, len(FORMATS), len(units))
    return BitPlan.from_choice(units, FORMATS, choice, model="m")


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.fixture(params=FAMILIES)
def case(request):
    model = tiny_model(request.param)
    return SimpleNamespace(model=model, layout=walk(model))


@pytest.mark.slow
def test_every_unit_is_its_own_round_trip(case):
    before = weights(case.model)
    plan = mixed(case.layout.units)
    apply(case.model, case.layout, plan)
    after = dict(case.model.named_parameters())
    for i in range(len(plan.units)):
        source = matrix(case.layout, i, before)
        expected = round_trip(source[None], plan.format_of(i))[0]
        assert torch.equal(matrix(case.layout, i, after), expected), plan.units.label(i)
    units = {view.tensor for view in case.layout.views}
    assert all(torch.equal(after[n], before[n]) for n in after if n not in units)


@pytest.mark.slow
def test_applied_puts_back_also_after_an_error(case):
    before = weights(case.model)
    plan = mixed(case.layout.units)
    with applied(case.model, case.layout, plan):
        assert not same(case.model, before)
    assert same(case.model, before)
    with pytest.raises(ZeroDivisionError), applied(case.model, case.layout, plan):
        raise ZeroDivisionError
    assert same(case.model, before)
    with pytest.raises(MismatchError), applied(tiny_model("llama"), case.layout, foreign(plan)):
        raise AssertionError("never entered")


def foreign(plan):
    columns = plan.units.to_arrays()
    units = Units.from_arrays(
        {name: column[1:] for name, column in columns.items()}, plan.units.projections
    )
    return BitPlan.from_choice(units, plan.formats, plan.choice[1:])


def test_replaced_changes_these_units_and_puts_back(case):
    before = weights(case.model)
    run = stacks(case.layout.units)[-1]
    with replaced(case.model, case.layout, run, lambda w: 2 * w):
        after = dict(case.model.named_parameters())
        changed = sum(int((after[n] != before[n]).sum()) for n in after)
        assert changed == case.layout.units.numel[run].sum()
        for i in run:
            assert torch.equal(matrix(case.layout, i, after), 2 * matrix(case.layout, i, before))
    assert same(case.model, before)
    for change in (doubled, failing):
        with (
            pytest.raises(ZeroDivisionError),
            replaced(case.model, case.layout, run, change),
        ):
            raise ZeroDivisionError
        assert same(case.model, before)


def doubled(w):
    return 2 * w


def failing(w):
    raise ZeroDivisionError


def test_stacks_hold_every_unit_once_and_equal_shapes(case):
    units = case.layout.units
    runs = stacks(units)
    assert sorted(np.concatenate(runs).tolist()) == list(range(len(units)))
    for run in runs:
        for column in (units.layer, units.role, units.projection, units.rows, units.cols):
            assert len(set(column[run].tolist())) == 1
        assert (np.diff(run) > 0).all()


def test_a_saved_plan_comes_back_in_the_models_order(case, tmp_path):
    plan = mixed(case.layout.units)
    shuffled = np.random.default_rng(1).permutation(len(plan.units))
    columns = {name: column[shuffled] for name, column in plan.units.to_arrays().items()}
    other = BitPlan.from_choice(
        Units.from_arrays(columns, plan.units.projections), FORMATS, plan.choice[shuffled]
    )
    other.save(tmp_path / "plan.json")
    for loaded in (other, BitPlan.load(tmp_path / "plan.json")):
        back = aligned(loaded, case.layout)
        assert back.units is case.layout.units
        assert [back.format_of(i) for i in range(len(plan.units))] == [
            plan.format_of(i) for i in range(len(plan.units))
        ]
        assert np.array_equal(back.nbytes, plan.nbytes)


def test_aligned_keeps_model_and_header():
    layout = walk(tiny_model("mixtral"))
    plan = BitPlan.from_choice(
        layout.units, FORMATS, np.zeros(len(layout.units)), model="m", header={"solver": "x"}
    )
    back = aligned(plan, layout)
    assert (back.model, dict(back.header)) == ("m", {"solver": "x"})


def test_a_plan_of_other_units_is_refused():
    mixtral, qwen = (walk(tiny_model(family)) for family in ("mixtral", "qwen3_moe"))
    plan = mixed(mixtral.units)
    with pytest.raises(MismatchError, match="other shapes"):
        aligned(plan, qwen)
    deeper = walk(tiny_model("mixtral", num_hidden_layers=3))
    for wrong, layout in ((plan, deeper), (mixed(deeper.units), mixtral), (foreign(plan), mixtral)):
        with pytest.raises(MismatchError, match="units and the model") as error:
            aligned(wrong, layout)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(value):
    model = tiny_model("mixtral")
    layout = walk(model)
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[2, 3, 4] = value
    before = weights(model)
    with (
        pytest.raises(ModelError, match="NaN or infinite") as error,
        applied(model, layout, mixed(layout.units)),
    ):
        raise AssertionError("never entered")
    assert name in str(error.value)
    assert "layer=1 role=routed expert=2 proj=down" in str(error.value)
    with pytest.raises(ModelError), applied(model, layout, mixed(layout.units)):
        raise AssertionError("never entered")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], before[n]) for n in after if n != name)


def test_read_units_is_the_views_in_float32():
    model = tiny_model("gpt_oss").to(torch.bfloat16)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    run = stacks(layout.units)[0]
    read = read_units(layout, run, tensors)
    assert read.dtype == torch.float32
    for place, i in enumerate(run):
        assert torch.equal(read[place], matrix(layout, i, tensors).float())


def test_a_kept_precision_is_no_round_trip():
    w = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(w, Format.keep("fp32")), w)
