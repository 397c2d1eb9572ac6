"""A plan on live weights: applied exactly, and taken back exactly, whatever happens."""

import pytest
import torch

from bitknap.errors import MismatchError
from bitknap.quantization.models.live_model import matrix
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import applied, apply, replaced
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.mark.slow
def test_every_unit_is_its_own_round_trip(case, mixed):
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
def test_applied_puts_back_also_after_an_error(case, mixed, picked):
    before = weights(case.model)
    plan = mixed(case.layout.units)
    with applied(case.model, case.layout, plan):
        assert not same(case.model, before)
    assert same(case.model, before)
    with pytest.raises(ZeroDivisionError), applied(case.model, case.layout, plan):
        raise ZeroDivisionError
    assert same(case.model, before)
    fewer = mixed(picked(plan.units, slice(1, None)))
    with pytest.raises(MismatchError), applied(tiny_model("llama"), case.layout, fewer):
        raise AssertionError("never entered")


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
