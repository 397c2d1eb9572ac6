"""What studies start from: a table, a design, a made-up loss, and a journal to keep them in."""

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, formats
from bitknap.allocation.search.study_design import Design
from bitknap.testing import routed_units

AT = Budget.bits(4.5)
WIDTHS = formats((2, 3, 4), (8, "row"))


def design(**how):
    return Design(budget=AT, **how)


def save(path, seed=0, model="abc"):
    draw = np.random.default_rng(seed)
    units = routed_units(3, 4)
    decay = np.array([4.0**-item.bits * (2 if item.group_size == 0 else 1) for item in WIDTHS])
    cost = draw.lognormal(size=(len(units), 1)) * decay
    table = CostTable.from_arrays(
        cost, units=units, formats=WIDTHS, spread=0.2 * cost, provenance={"model": model}
    )
    table.save(path)
    return path


def loss(plan):
    """Return a loss that no sum gives: the largest unit cost of a layer, layers weighed apart."""
    bits = np.array([item.bits for item in plan.formats])[plan.choice]
    each = 4.0**-bits
    return float(sum((1 + 4 * i) * each[plan.units.layer == i].max() for i in range(3)))


@pytest.fixture
def table(tmp_path):
    return save(tmp_path / "table.safetensors")


@pytest.fixture
def journal(tmp_path):
    return f"journal:{tmp_path}/s.log"


_design = pytest.fixture(name="design", scope="session")(lambda: design)
_save = pytest.fixture(name="save", scope="session")(lambda: save)
_loss = pytest.fixture(name="loss", scope="session")(lambda: loss)
