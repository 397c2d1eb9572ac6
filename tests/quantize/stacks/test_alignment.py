"""A plan in the order of a model's units, or refused where it is of another model."""

import numpy as np
import pytest

from bitknap.allocation import BitPlan, formats
from bitknap.errors import MismatchError
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.alignment import aligned
from bitknap.testing import random_plan, tiny_model


def test_a_saved_plan_comes_back_in_the_models_order(case, mixed, picked, tmp_path):
    plan = mixed(case.layout.units)
    shuffled = np.random.default_rng(1).permutation(len(plan.units))
    other = BitPlan.from_choice(picked(plan.units, shuffled), plan.formats, plan.choice[shuffled])
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
    plan = random_plan(layout.units, formats((2, 4)), model="m", header={"solver": "x"})
    back = aligned(plan, layout)
    assert (back.model, dict(back.header)) == ("m", {"solver": "x"})


def test_a_plan_of_other_units_is_refused(mixed, picked):
    mixtral, qwen = (walk(tiny_model(family)) for family in ("mixtral", "qwen3_moe"))
    plan = mixed(mixtral.units)
    with pytest.raises(MismatchError, match="the shapes of the plan's units differ"):
        aligned(plan, qwen)
    fewer = mixed(picked(mixtral.units, slice(1, None)))
    deeper = walk(tiny_model("mixtral", num_hidden_layers=3))
    for wrong, layout in ((plan, deeper), (mixed(deeper.units), mixtral), (fewer, mixtral)):
        with pytest.raises(MismatchError, match=r"units differ from the .* of the model") as error:
            aligned(wrong, layout)
        assert "\n" not in str(error.value)
