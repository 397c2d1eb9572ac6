"""A small model of which every plan can be listed, and limits judged by their definition."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Problem,
    Units,
    formats,
    profile,
    solve,
)
from bitknap.errors import InputError

FORMATS = formats(bits=(1, 2, 3), group_size=32)
PROJECTIONS = ["gate", "up", "down"]
Choices = npt.NDArray[Any]


def model(layers: int = 2, experts: int = 4, attention: bool = True) -> Units:
    """Layers of routed experts, each gate and up 64 x 32 and down 32 x 64, and an output."""
    layer, role, expert, projection, rows, cols = [], [], [], [], [], []
    for number in range(layers):
        keys = [("routed", e, p) for e in range(experts) for p in PROJECTIONS]
        for kind, e, name in [*keys, *([("attention", -1, "o")] if attention else [])]:
            layer.append(number)
            role.append(kind)
            expert.append(e)
            projection.append(name)
            rows.append(32 if name == "down" else 64)
            cols.append(64 if name == "down" else 32)
    return Units.build(
        layer=layer, role=role, expert=expert, projection=projection, rows=rows, cols=cols
    )


def table_of(units: Units, seed: int = 0, options: Any = FORMATS) -> CostTable:
    """A table of random costs that mostly fall with the bits, layer 1 dear; experts are tied."""
    random = np.random.default_rng(seed)
    width = 4.0 ** -np.arange(len(options))
    cost = random.lognormal(size=(len(units), 1)) * width * random.uniform(0.7, 1.3, width.shape)
    cost *= 1 + 9 * np.abs(units.layer[:, None])
    frequency = np.where(units.expert < 0, 1, random.uniform(0, 0.5, len(units)).round(3))
    table = CostTable.from_arrays(cost, units=units, formats=options, frequency=frequency)
    return table.tie(profile("expert"))


def plans(table: CostTable) -> Choices:
    """Return every plan that respects the ties, int[P,U]."""
    row_of = Problem(table, []).row_of
    rows = product(range(len(table.formats)), repeat=int(row_of.max()) + 1)
    return np.array(list(rows), dtype=np.int8)[:, row_of]


def nbytes_of(table: CostTable, choice: Choices) -> Choices:
    return table.nbytes[np.arange(len(table.units)), choice]


def check(table: CostTable, limits: list[Any], within: Callable[[Choices], Any]) -> Choices:
    """Check that `solve` finds the cheapest plan that `within` accepts, and that it has to."""
    every = plans(table)
    cost = table.cost[np.arange(len(table.units)), every].sum(axis=1)
    found = solve(Problem(table, limits))
    allowed = within(every)
    assert within(found.choice[None]).all()
    assert found.cost == pytest.approx(cost[allowed].min(), rel=1e-9)
    free = solve(Problem(table, [x for x in limits if isinstance(x, Budget)]))
    assert found.cost > free.cost * (1 + 1e-6)
    return found.choice


def message(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def held(table: CostTable, place: npt.ArrayLike, ranks: int) -> Callable[[Choices], Choices]:
    """Return the bytes of each rank, [P,ranks]; -1 is on every rank."""
    where = np.asarray(place)

    def of(choice: Choices) -> Choices:
        sizes = nbytes_of(table, choice)
        return np.stack(
            [sizes[:, (where == r) | (where < 0)].sum(axis=1) for r in range(ranks)], axis=1
        )

    return of


@pytest.fixture(scope="module")
def table() -> CostTable:
    return table_of(model())


_model = pytest.fixture(name="model", scope="session")(lambda: model)
_table_of = pytest.fixture(name="table_of", scope="session")(lambda: table_of)
_nbytes_of = pytest.fixture(name="nbytes_of", scope="session")(lambda: nbytes_of)
_check = pytest.fixture(name="check", scope="session")(lambda: check)
_message = pytest.fixture(name="message", scope="session")(lambda: message)
_held = pytest.fixture(name="held", scope="session")(lambda: held)
