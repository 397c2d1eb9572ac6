"""Limits on bytes, devices and shares against all plans of a small model, by definition."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Format,
    Problem,
    Units,
    formats,
    solve,
)
from bitknap.allocation.limits import (
    bits_per_layer,
    bytes_per_token,
    count_at_least,
    count_at_most,
    device_bytes,
    share_at_most,
)
from bitknap.errors import InfeasibleError
from bitknap.testing import routed_units

# Bytes per token.


def test_bytes_per_token_weigh_by_routing(table, nbytes_of, check):
    def within(choice):
        return (table.frequency * nbytes_of(table, choice)).sum(axis=-1) <= 4500

    limit = bytes_per_token(table, 4500)
    assert (limit.name, limit.unit) == ("bytes per token", "bytes")
    check(table, [limit], within)
    # Beside a budget, rarely read experts get the wider formats.
    check(
        table,
        [limit, Budget.bytes(18_000)],
        lambda c: within(c) & (nbytes_of(table, c).sum(axis=-1) <= 18_000),
    )


def test_a_frequency_can_be_given(table):
    ones = np.ones(len(table.units))
    assert np.array_equal(bytes_per_token(table, 1, ones).weight, table.nbytes)
    batch = 1 - (1 - table.frequency) ** 8
    weight = bytes_per_token(table, 1, batch, name="batch").weight
    np.testing.assert_allclose(weight, batch[:, None] * table.nbytes)


def test_bytes_per_token_say_what_is_wrong(table, message):
    bare = CostTable.from_arrays([[1.0]], [[1]])
    assert message(lambda: bytes_per_token(bare, 5)) == (
        "bytes_per_token: the table has no frequency; estimate it from a text, or give it"
    )
    wrong = np.full(len(table.units), np.nan)
    assert message(lambda: bytes_per_token(table, 5, wrong)) == (
        "frequency: layer=0 role=routed expert=0 proj=gate has nan; "
        "a share of tokens is from 0 to 1"
    )
    assert "shape (2,), expected (26,)" in message(lambda: bytes_per_token(table, 5, [1, 1]))
    values: Any = (-1, np.nan, "5", None, True)
    for value in values:
        said = message(partial(bytes_per_token, table, value))
        assert said == f"at_most: {value} is not at least 0"
    with pytest.raises(InfeasibleError, match="bytes per token: smallest plan needs"):
        solve(Problem(table, [bytes_per_token(table, 100)]))


# Devices.


def eight_ranks() -> Units:
    """16 experts of one projection: two on each of 8 ranks, and 65,536 plans in 2 formats."""
    return routed_units(1, 16, ("down",), rows=32, cols=64)


@pytest.mark.parametrize("seed", range(3))
def test_balance_over_eight_ranks(seed, table_of, check, held):
    table = table_of(eight_ranks(), seed, formats(bits=(2, 4), group_size=32))
    budget = Budget.bits(4)
    limits = device_bytes(table, 8, balance=1.2, budget=budget)
    assert [limit.name for limit in limits] == [f"rank {rank}" for rank in range(8)]
    total = 16 * 2048 * 4 // 8
    each = held(table, np.arange(16) // 2, 8)

    def within(choice):
        sizes = each(choice)
        return (sizes.sum(axis=1) <= total) & (sizes.max(axis=1) <= 1.2 * total / 8)

    choice = check(table, [budget, *limits], within)
    free = solve(Problem(table, budget)).choice
    assert each(free[None]).max() > each(choice[None]).max()


def test_bytes_of_a_rank_hold_what_every_rank_holds(table, check, held):
    # Experts 0 and 1 of 4 lie on the first of two ranks; attention lies on both.
    units = table.units
    place = np.where(units.expert < 0, -1, units.expert // 2)
    each = held(table, place, 2)
    check(
        table,
        [*device_bytes(table, 2, at_most=9_000)],
        lambda choice: (each(choice) <= 9_000).all(axis=1),
    )
    by_hand = device_bytes(table, 2, at_most=9_000, device=place)
    for one, other in zip(by_hand, device_bytes(table, 2, at_most=9_000), strict=True):
        assert np.array_equal(one.weight, other.weight)


def test_balance_shares_what_the_budget_leaves(table, nbytes_of, check):
    place = np.where(table.units.expert < 0, -1, table.units.expert // 2)
    budget = 15_000

    def within(choice):
        sizes = nbytes_of(table, choice)
        everywhere = sizes[:, place < 0].sum(axis=1)
        experts = np.stack([sizes[:, place == r].sum(axis=1) for r in range(2)])
        fits = sizes.sum(axis=1) <= budget
        return fits & (experts.max(axis=0) <= 1.05 * (budget - everywhere) / 2 + 1e-6)

    limits = device_bytes(table, 2, balance=1.05, budget=budget)
    check(table, [Budget.bytes(budget), *limits], within)
    resolved = Budget.bytes(budget).limit(table)
    for given in (Budget.bytes(budget), resolved):
        again = device_bytes(table, 2, balance=1.05, budget=given)
        assert [limit.bound for limit in again] == [limit.bound for limit in limits]


def test_contiguous_runs_of_experts(table_of, model):
    table = table_of(model(layers=2, experts=5, attention=False))
    limits = device_bytes(table, 3, at_most=1, name="gpu")
    held_by = np.array([limit.weight[:, 0] > 0 for limit in limits]).argmax(axis=0)
    assert held_by.tolist() == [e * 3 // 5 for _ in range(2) for e in range(5) for _ in range(3)]
    assert [limit.name for limit in limits] == ["gpu 0", "gpu 1", "gpu 2"]
    # Every unit is on one rank only, so the weights of all ranks are the table's bytes.
    assert np.array_equal(sum(limit.weight for limit in limits), table.nbytes)


def test_devices_say_what_is_wrong(table, table_of, message):
    count = len(table.units)
    dense = Units.build(
        layer=[0], role=["dense"], expert=[-1], projection=["up"], rows=[64], cols=[32]
    )
    bare = table_of(dense)
    wrong: Any = 2.0
    one = "device_bytes: give either at_most, or balance and budget"
    for make, text in (
        (lambda: device_bytes(table, 0, at_most=1), "ranks: 0 is not a whole number of at least 1"),
        (
            partial(device_bytes, table, wrong, at_most=1),
            "ranks: 2.0 is not a whole number of at least 1",
        ),
        (
            lambda: device_bytes(table, 5, at_most=1),
            "ranks: 5 is more than the 4 experts of layer 0; lower it or give device",
        ),
        (lambda: device_bytes(table, 2), one),
        (lambda: device_bytes(table, 2, at_most=1, balance=1.1, budget=5), one),
        (lambda: device_bytes(table, 2, balance=1.1), one),
        (lambda: device_bytes(table, 2, at_most=1, budget=5), one),
        (lambda: device_bytes(table, 2, at_most=-1), "at_most: -1 is not at least 0"),
        (lambda: device_bytes(table, 2, balance=0.9, budget=5), "balance: 0.9 is not at least 1"),
        (
            lambda: device_bytes(table, 2, balance=np.nan, budget=5),
            "balance: nan is not at least 1",
        ),
        (lambda: device_bytes(table, 2, balance=1.1, budget=-5), "budget: -5 is not at least 0"),
        (
            lambda: device_bytes(
                table, 2, balance=1.1, budget=share_at_most(table, 0.5, 2, name="share")
            ),
            "budget: the limit share is not a number of bytes",
        ),
        (lambda: device_bytes(table, 2, at_most=1, device=[0]), "device: shape (1,), expected"),
        (
            lambda: device_bytes(table, 2, at_most=1, device=[2] * count),
            "device: layer=0 role=routed expert=0 proj=gate is on rank 2; expected 0 to 1, or -1",
        ),
        (
            lambda: device_bytes(table, 99, at_most=1, device=[0] * count),
            "ranks: 99 is more than the 26 units; lower it",
        ),
        (
            lambda: device_bytes(bare, 2, at_most=1),
            "the table has no routed experts to place; give device",
        ),
    ):
        assert text in message(make)
    limits = device_bytes(table, 2, at_most=4000)
    with pytest.raises(
        InfeasibleError, match=r"rank 0: smallest plan needs .* limit is 3\.906 KiB"
    ):
        solve(Problem(table, limits))


# Shares.


def test_share_of_narrow_weights(table, nbytes_of, check):
    limit = share_at_most(table, 0.1, 1)
    numel = table.units.numel
    assert limit.name == "share at 1 bits or fewer"
    check(
        table,
        [Budget.bits(3), limit],
        lambda c: (
            (nbytes_of(table, c).sum(axis=1) <= 3 * numel.sum() // 8)
            & (((c == 0) * numel).sum(axis=1) <= 0.1 * numel.sum())
        ),
    )


def test_share_of_a_pattern(table, nbytes_of, check):
    limit = share_at_most(table, 0.5, 2, "layer=0,role=routed")
    part = table.units.matches("layer=0,role=routed")
    numel = table.units.numel * part
    assert limit.name == "share at 2 bits or fewer of layer=0,role=routed"
    check(
        table,
        [Budget.bits(3), limit],
        lambda c: (
            (nbytes_of(table, c).sum(axis=1) <= 3 * table.weights // 8)
            & (((c <= 1) * numel).sum(axis=1) <= 0.5 * numel.sum())
        ),
    )


def test_a_share_is_what_was_written(table_of):
    units = routed_units(100, 1, ("up",), rows=1, cols=1)
    table = table_of(units)
    # 0.29 * 100 is 28.999999999999996 in floats.
    assert [share_at_most(table, s, 1).bound for s in (0.29, 1 / 3, 0, 1)] == [29, 33, 0, 100]


def test_kept_precisions_are_never_narrow(table_of, model):
    options = (Format(8, 32), Format.keep("fp8"))
    table = table_of(model(layers=1), options=options)
    assert (share_at_most(table, 0.5, 8).weight[:, 1] == 0).all()
    assert (share_at_most(table, 0.5, 8).weight[:, 0] > 0).all()


def test_shares_say_what_is_wrong(table, message):
    bare = CostTable.from_arrays([[1.0]], [[1]])
    shapeless = CostTable.from_arrays([[1.0]], [[1]], formats=[Format(2)])
    values: Any = (-0.1, 1.5, np.nan, np.inf, None, "0.3")
    for value in values:
        said = message(partial(share_at_most, table, value, 2))
        assert said == f"share: {value} is not from 0 to 1"
    assert message(lambda: share_at_most(table, 0.5, -1)) == "bits: -1 is not at least 0"
    assert "pattern 'layer=9' matches no unit" in message(
        lambda: share_at_most(table, 0.5, 2, "layer=9")
    )
    assert message(lambda: share_at_most(bare, 0.5, 2)) == (
        "bits: option-0 is made up and has none; build the table with formats"
    )
    assert message(lambda: share_at_most(shapeless, 0.5, 2)) == (
        "share_at_most: layer=0 role=routed expert=0 proj=unit has no shape; "
        "build the units with rows and cols"
    )
    narrow = table.pin("layer=0", bits=1)
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(narrow, share_at_most(narrow, 0.2, 1)))
    assert "share at 1 bits or fewer: smallest plan needs 26624, limit is 10649 of 53248" in str(
        error.value
    )


def test_limits_of_one_table_have_names_of_their_own(table):
    every: list[Any] = [
        Budget.bits(2.5),
        bytes_per_token(table, 10**6),
        *device_bytes(table, 2, at_most=10**6),
        *device_bytes(table, 2, balance=1.5, budget=10**6, name="balance"),
        share_at_most(table, 0.3, 1),
        share_at_most(table, 0.9, 2),
        share_at_most(table, 0.3, 1, "layer=0"),
        *bits_per_layer(table, 1, 4),
        *bits_per_layer(table, 1, 4, "proj=down"),
        *count_at_least(table, 1, 3),
        *count_at_least(table, 1, 2),
        *count_at_least(table, 1, 2, wider=True),
        *count_at_most(table, 3, 2),
        *count_at_most(table, 3, 1, name="narrow"),
    ]
    assert len(Problem(table, every).limits) == 1 + 1 + 2 + 2 + 3 + 8 + 10
