"""Models of every way to store experts, and plans that mix formats."""

from types import SimpleNamespace

import pytest

from bitknap.allocation import Units, formats
from bitknap.quantization.models.live_model import walk
from bitknap.testing import random_plan, tiny_model

FORMATS = formats((1, 2, 3, 5, 8), (8, "row"), (False, True), ("fp16", "compact"), keep="fp32")
# Plain stacks, interleaved and transposed, ungated, halves of a transposed one, one module an
# expert, experts one above the other.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text", "switch_transformers", "dbrx")


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def case(model):
    return SimpleNamespace(model=model, layout=walk(model))


@pytest.fixture(scope="session")
def mixed():
    """Return what makes a plan of random formats."""
    return lambda units: random_plan(units, FORMATS, model="m")


@pytest.fixture(scope="session")
def picked():
    """Return what takes some of the units."""

    def pick(units, which):
        columns = {name: column[which] for name, column in units.to_arrays().items()}
        return Units.from_arrays(columns, units.projections)

    return pick
