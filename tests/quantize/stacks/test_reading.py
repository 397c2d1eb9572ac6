"""Weights are read in float32, and one that is no number is named."""

import pytest
import torch

from bitknap.errors import ModelError
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.stacks.grouping import stacks
from bitknap.quantization.stacks.reading import read_units
from bitknap.testing import tiny_model


def test_read_units_is_the_views_in_float32():
    model = tiny_model("gpt_oss").to(torch.bfloat16)
    layout = walk(model)
    tensors = dict(model.named_parameters())
    run = stacks(layout.units)[0]
    read = read_units(layout, run, tensors)
    assert read.dtype == torch.float32
    for place, i in enumerate(run):
        assert torch.equal(read[place], matrix(layout, i, tensors).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(value, mixed):
    model = tiny_model("mixtral")
    layout = walk(model)
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[2, 3, 4] = value
    before = {n: tensor.detach().clone() for n, tensor in model.named_parameters()}
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
