"""Whole models or one layer at a time, whichever fits a limit of memory."""

import pytest

from bitknap.errors import InputError
from bitknap.estimators.judging.memory import judging_bytes, judging_layer_bytes, way_to_judge
from bitknap.quantization.packed.opened import open_weights
from bitknap.testing import packed_checkpoint


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    out = packed_checkpoint(folder, num_hidden_layers=8, hidden_size=64)
    return [open_weights(folder / "source"), open_weights(out)]


@pytest.mark.parametrize("needs", [(), {"kl"}])
def test_the_whole_models_where_they_fit(both, needs):
    most = judging_bytes(both, 64, needs)
    least = judging_layer_bytes(both, 64, needs)
    assert least < most / 4
    for limit in (None, most):
        assert way_to_judge(both, 64, limit, needs) == "whole"
    for limit in (most - 1, least):
        assert way_to_judge(both, 64, limit, needs) == "layers"


def test_a_limit_too_low_names_the_least(both):
    with pytest.raises(InputError) as caught:
        way_to_judge(both, 64, judging_layer_bytes(both, 64) - 1)
    assert str(caught.value).startswith("memory: measuring takes about ")
    assert str(caught.value).endswith("raise `max_memory`, or take fewer `tokens`")


def test_one_model_takes_less_than_two(both):
    assert judging_bytes(both[:1], 64) < judging_bytes(both, 64)
