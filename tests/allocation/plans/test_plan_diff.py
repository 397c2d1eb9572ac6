from itertools import product

import numpy as np
import pytest

from bitknap.allocation import BitPlan, Format, Units, formats
from bitknap.allocation.plans.plan_diff import Moved, plan_diff
from bitknap.errors import MismatchError

FORMATS = formats(bits=(2, 4), group_size=32, symmetric=True)
SAME_BITS = Format(2, 32, symmetric=True, metadata="compact")


def plan(choice, order=None, model="m", options=FORMATS, experts=2):
    """Two layers of gate and down, 64 × 32 weights a unit: 640 bytes at 2 bits, 1152 at 4."""
    keys = [*product(range(2), range(experts), ("gate", "down"))]
    order = np.arange(len(keys)) if order is None else np.array(order)
    layer, expert, projection = zip(*(keys[i] for i in order), strict=True)
    units = Units.build(
        layer=layer,
        role=["routed"] * len(keys),
        expert=expert,
        projection=projection,
        rows=[64] * len(keys),
        cols=[32] * len(keys),
    )
    return BitPlan.from_choice(units, options, np.array(choice)[order], model=model)


def test_equal_plans_differ_in_nothing():
    found = plan_diff(plan([0, 1] * 4), plan([0, 1] * 4))
    assert not found.changed.any()
    assert found.largest(20).tolist() == []
    assert all(group.same == 2 and group.nbytes == 0 for group in found.groups())
    names, _, counts = found.transitions()
    assert names == ["int2-g32-sym", "int4-g32-sym"]
    assert counts.tolist() == [[4, 0], [0, 4]]


def test_changes_are_counted_by_layer_and_projection():
    found = plan_diff(plan([0, 0, 0, 0, 1, 1, 1, 1]), plan([1, 0, 1, 0, 0, 1, 1, 1]))
    up = Moved(layer=0, kind="gate", up=2, down=0, other=0, same=0, nbytes=1024)
    down = Moved(layer=1, kind="gate", up=0, down=1, other=0, same=1, nbytes=-512)
    assert [group for group in found.groups() if group.nbytes] == [up, down]
    rows, columns, counts = found.transitions()
    assert (rows, columns) == (["int2-g32-sym", "int4-g32-sym"],) * 2
    assert counts.tolist() == [[2, 2], [1, 3]]
    assert found.largest(20).tolist() == [0, 2, 4]
    assert found.largest(1).tolist() == [0]
    assert found.delta.sum() == found.after.total_bytes - found.before.total_bytes


def test_another_format_of_as_many_bytes_is_a_change():
    # One group a row: a compact scale is the row's own, which takes as much as an fp16 one.
    found = plan_diff(plan([0] * 8), plan([1] + [0] * 7, options=(FORMATS[0], SAME_BITS)))
    assert found.changed.tolist() == [True] + [False] * 7
    (one,) = [group for group in found.groups() if group.other]
    assert (one.up, one.down, one.other, one.same, one.nbytes) == (0, 0, 1, 1, 0)


def test_the_order_of_units_and_of_projections_does_not_matter():
    first, second = [0, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1, 1, 1]
    shuffled = plan(second, order=[7, 2, 1, 0, 3, 6, 5, 4])
    assert shuffled.units.projections == ("down", "gate")
    found, same = plan_diff(plan(first), shuffled), plan_diff(plan(first), plan(second))
    assert found.delta.tolist() == same.delta.tolist()
    assert found.groups() == same.groups()
    assert found.largest(9).tolist() == same.largest(9).tolist()


def test_swapping_the_plans_swaps_the_signs():
    first, second = plan([0, 0, 1, 1, 0, 1, 0, 1]), plan([0, 1, 1, 0, 0, 1, 1, 1])
    there, back = plan_diff(first, second), plan_diff(second, first)
    assert there.delta.tolist() == (-back.delta).tolist()
    assert there.transitions()[2].tolist() == back.transitions()[2].T.tolist()
    for a, b in zip(there.groups(), back.groups(), strict=True):
        assert (a.up, a.down, a.same, a.nbytes) == (b.down, b.up, b.same, -b.nbytes)


def test_plans_without_shapes():
    units, options = Units.anonymous(3), [Format.made_up(0), Format.made_up(1)]
    plans = [
        BitPlan.from_choice(units, options, choice, nbytes=sizes)
        for choice, sizes in (([0, 1, 0], [4, 9, 4]), ([0, 1, 1], [4, 8, 9]))
    ]
    found = plan_diff(*plans)
    assert found.delta.tolist() == [0, -1, 5]
    assert found.largest(2).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            plan([0] * 8, model="another"),
            "plans: one is of model m, the other of another; compare plans of the same model",
        ),
        (
            plan([0] * 4, experts=1),
            "plans: 8 and 4 units, which differ; only the first has layer=0 role=routed "
            "expert=1 proj=gate; compare plans made from one table",
        ),
        (
            plan([0] * 12, experts=3),
            "plans: 8 and 12 units, which differ; compare plans made from one table",
        ),
    ],
)
def test_plans_that_do_not_belong_together(other, message):
    with pytest.raises(MismatchError) as error:
        plan_diff(plan([0] * 8), other)
    assert str(error.value) == message
