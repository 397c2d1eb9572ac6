import numpy as np
import pytest

from bitknap.allocation import CostTable, Units, formats
from bitknap.allocation.problem.divisible import divisible
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError

CHOSEN = formats(4, (32, 64, 128, 256, "row"), True, keep="bf16")


def table(hidden, inner, chosen=CHOSEN):
    """One expert: gate and up are inner x hidden, down is hidden x inner."""
    units = Units.build(
        layer=[0] * 3,
        role=["routed"] * 3,
        expert=[0] * 3,
        projection=["gate", "up", "down"],
        rows=[inner, inner, hidden],
        cols=[hidden, hidden, inner],
    )
    return CostTable.from_arrays(np.ones((3, len(chosen))), units=units, formats=chosen)


def left(found, projection):
    row = found.units.projections.index(projection)
    return [item.name for item, cost in zip(CHOSEN, found.cost[row], strict=True) if cost < np.inf]


def test_group_sizes_that_divide_the_rows_are_left():
    found = divisible(table(2048, 1408))
    every = [item.name for item in CHOSEN]
    assert left(found, "gate") == left(found, "up") == every
    assert left(found, "down") == [n for n in every if "g256" not in n]


@pytest.mark.parametrize(
    ("inner", "devices", "groups"),
    [(1408, 2, (32, 64)), (768, 4, (32, 64)), (768, 2, (32, 64, 128)), (2880, 1, (32, 64))],
)
def test_tensor_parallelism_splits_the_inputs_of_down(inner, devices, groups):
    # The cases that vLLM's users ran into.
    found = divisible(table(2048, inner), tensor_parallel=devices)
    names = [f"int4-g{size}-sym" for size in groups]
    assert left(found, "down") == [*names, "int4-row-sym", "keep-bf16"]
    assert left(found, "gate") == [item.name for item in CHOSEN]


def test_super_blocks_leave_only_the_source_precision():
    found = divisible(table(2048, 1408), multiple_of=256)
    assert left(found, "down") == ["keep-bf16"]
    assert left(found, "up") == [item.name for item in CHOSEN]


def test_what_was_forbidden_stays_forbidden():
    pinned = table(2048, 1408).pin("proj=gate", format="int4-g64-sym")
    assert left(divisible(pinned), "gate") == ["int4-g64-sym"]


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda: table(64, 96, (Format(4, 64),)), {}, "proj=down is 64 x 96, no group size left"),
        (lambda: table(64, 90), {"tensor_parallel": 4}, "proj=gate is 90 x 64, 4 devices do not"),
        (lambda: table(64, 64), {"tensor_parallel": 0}, "tensor_parallel: 0 must be at least 1"),
        (lambda: table(64, 64), {"multiple_of": 0}, "multiple_of: 0 must be at least 1"),
        (lambda: CostTable.from_arrays([[1.0]], [[1]]), {}, "the units have no shapes"),
    ],
)
def test_what_cannot_be_divided(build, options, words):
    with pytest.raises(InputError, match=words):
        divisible(build(), **options)
