"""Every kind of limit against all plans of a small model, judged by its definition."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Format,
    Limit,
    Problem,
    Units,
    formats,
    profile,
    solve,
)
from bitknap.allocation.limits import (
    bits_per_layer,
    bytes_per_token,
    count_at_least,
    count_at_most,
    custom,
    device_bytes,
    share_at_most,
)
from bitknap.errors import InfeasibleError, InputError

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


@pytest.fixture(scope="module")
def table() -> CostTable:
    return table_of(model())


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


# Bytes per token.


def test_bytes_per_token_weigh_by_routing(table):
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


def test_bytes_per_token_say_what_is_wrong(table):
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
        assert said == f"at_most: {value} is not from 0"
    with pytest.raises(InfeasibleError, match="bytes per token: smallest plan needs"):
        solve(Problem(table, [bytes_per_token(table, 100)]))


# Devices.


def eight_ranks(seed: int = 0) -> CostTable:
    """16 experts of one projection: two on each of 8 ranks, and 65,536 plans."""
    units = Units.build(
        layer=[0] * 16,
        role=["routed"] * 16,
        expert=list(range(16)),
        projection=["down"] * 16,
        rows=[32] * 16,
        cols=[64] * 16,
    )
    return table_of(units, seed, formats(bits=(2, 4), group_size=32))


def held(table: CostTable, place: npt.ArrayLike, ranks: int) -> Callable[[Choices], Choices]:
    """Return the bytes of each rank, [P,ranks]; -1 is on every rank."""
    where = np.asarray(place)

    def of(choice: Choices) -> Choices:
        sizes = nbytes_of(table, choice)
        return np.stack(
            [sizes[:, (where == r) | (where < 0)].sum(axis=1) for r in range(ranks)], axis=1
        )

    return of


@pytest.mark.parametrize("seed", range(3))
def test_balance_over_eight_ranks(seed):
    table = eight_ranks(seed)
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


def test_bytes_of_a_rank_hold_what_every_rank_holds(table):
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


def test_balance_shares_what_the_budget_leaves(table):
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


def test_contiguous_runs_of_experts():
    table = table_of(model(layers=2, experts=5, attention=False))
    limits = device_bytes(table, 3, at_most=1, name="gpu")
    held_by = np.array([limit.weight[:, 0] > 0 for limit in limits]).argmax(axis=0)
    assert held_by.tolist() == [e * 3 // 5 for _ in range(2) for e in range(5) for _ in range(3)]
    assert [limit.name for limit in limits] == ["gpu 0", "gpu 1", "gpu 2"]
    # Every unit is on one rank only, so the weights of all ranks are the table's bytes.
    assert np.array_equal(sum(limit.weight for limit in limits), table.nbytes)


def test_devices_say_what_is_wrong(table):
    count = len(table.units)
    dense = Units.build(
        layer=[0], role=["dense"], expert=[-1], projection=["up"], rows=[64], cols=[32]
    )
    bare = table_of(dense)
    wrong: Any = 2.0
    one = "device_bytes: give at_most, or balance and budget"
    for make, text in (
        (lambda: device_bytes(table, 0, at_most=1), "ranks: 0 is not a whole number from 1"),
        (partial(device_bytes, table, wrong, at_most=1), "ranks: 2.0 is not a whole number from 1"),
        (
            lambda: device_bytes(table, 5, at_most=1),
            "ranks: 5 is more than the 4 experts of layer 0; lower it or give device",
        ),
        (lambda: device_bytes(table, 2), one),
        (lambda: device_bytes(table, 2, at_most=1, balance=1.1, budget=5), one),
        (lambda: device_bytes(table, 2, balance=1.1), one),
        (lambda: device_bytes(table, 2, at_most=1, budget=5), one),
        (lambda: device_bytes(table, 2, at_most=-1), "at_most: -1 is not from 0"),
        (lambda: device_bytes(table, 2, balance=0.9, budget=5), "balance: 0.9 is not from 1"),
        (lambda: device_bytes(table, 2, balance=np.nan, budget=5), "balance: nan is not from 1"),
        (lambda: device_bytes(table, 2, balance=1.1, budget=-5), "budget: -5 is not from 0"),
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
        (lambda: device_bytes(bare, 2, at_most=1), "the table has no routed experts; give device"),
    ):
        assert text in message(make)
    limits = device_bytes(table, 2, at_most=4000)
    with pytest.raises(
        InfeasibleError, match=r"rank 0: smallest plan needs .* limit is 3\.906 KiB"
    ):
        solve(Problem(table, limits))


# Shares.


def test_share_of_narrow_weights(table):
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


def test_share_of_a_pattern(table):
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


def test_a_share_is_what_was_written():
    units = Units.build(
        layer=range(100),
        role=["routed"] * 100,
        expert=[0] * 100,
        projection=["up"] * 100,
        rows=[1] * 100,
        cols=[1] * 100,
    )
    table = table_of(units)
    # 0.29 * 100 is 28.999999999999996 in floats.
    assert [share_at_most(table, s, 1).bound for s in (0.29, 1 / 3, 0, 1)] == [29, 33, 0, 100]


def test_kept_precisions_are_never_narrow():
    options = (Format(8, 32), Format.keep("fp8"))
    table = table_of(model(layers=1), options=options)
    assert (share_at_most(table, 0.5, 8).weight[:, 1] == 0).all()
    assert (share_at_most(table, 0.5, 8).weight[:, 0] > 0).all()


def test_shares_say_what_is_wrong(table):
    bare = CostTable.from_arrays([[1.0]], [[1]])
    shapeless = CostTable.from_arrays([[1.0]], [[1]], formats=[Format(2)])
    values: Any = (-0.1, 1.5, np.nan, np.inf, None, "0.3")
    for value in values:
        said = message(partial(share_at_most, table, value, 2))
        assert said == f"share: {value} is not from 0 to 1"
    assert message(lambda: share_at_most(table, 0.5, -1)) == "bits: -1 is not from 0"
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


# Floors and caps on layers.


def test_every_layer_has_a_floor_and_a_cap(table):
    limits = bits_per_layer(table, at_least=2.3, at_most=2.9)
    assert [limit.name for limit in limits] == [
        "bits per weight, layer 0, at least",
        "bits per weight, layer 0, at most",
        "bits per weight, layer 1, at least",
        "bits per weight, layer 1, at most",
    ]
    layers = [table.units.layer == n for n in (0, 1)]

    def within(choice):
        sizes = nbytes_of(table, choice)
        bits = np.array([8 * sizes[:, x].sum(axis=1) / table.units.numel[x].sum() for x in layers])
        fits = sizes.sum(axis=1) <= 2.6 * table.weights / 8
        return fits & (bits >= 2.3).all(axis=0) & (bits <= 2.9).all(axis=0)

    check(table, [Budget.bits(2.6), *limits], within)


def test_floors_of_a_pattern_alone(table):
    down = table.units.matches("proj=down")
    limits = bits_per_layer(table, at_least=3, pattern="proj=down", name="down")

    def within(choice):
        sizes = nbytes_of(table, choice)
        fits = sizes.sum(axis=1) <= 3.1 * table.weights / 8
        for layer in (0, 1):
            rows = down & (table.units.layer == layer)
            fits &= 8 * sizes[:, rows].sum(axis=1) >= 3 * table.units.numel[rows].sum()
        return fits

    check(table, [Budget.bits(3.1), *limits], within)
    assert limits[1].name == "down of proj=down, layer 1, at least"


def test_layers_say_what_is_wrong(table):
    shapeless = CostTable.from_arrays([[1.0]], [[1]])
    head = Units.build(
        layer=[-1], role=["head"], expert=[-1], projection=["head"], rows=[64], cols=[32]
    )
    for make, text in (
        (lambda: bits_per_layer(table), "bits_per_layer: give at_least, at_most or both"),
        (lambda: bits_per_layer(table, at_least=-1), "at_least: -1 is not from 0"),
        (lambda: bits_per_layer(table, at_most=np.nan), "at_most: nan is not from 0"),
        (lambda: bits_per_layer(table, 4, 3), "at_least: 4 is above at_most, 3; swap them"),
        (lambda: bits_per_layer(table, 2, pattern="proj=x"), "proj=x is none of gate, up"),
        (lambda: bits_per_layer(shapeless, 2), "bits_per_layer: layer=0 role=routed expert=0"),
        (lambda: bits_per_layer(table_of(head), 2), "units: none is in a layer; choose others"),
    ):
        assert text in message(make)
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, bits_per_layer(table, at_least=9)))
    assert "bits per weight, layer 0, at least: " in str(error.value)
    assert "(9 bits per weight)" in str(error.value)


# Counts.


def counts(table: CostTable, choice: Choices, column: int, layer: int) -> Choices:
    down = table.units.matches(f"proj=down,layer={layer}")
    found: Choices = (choice[:, down] == column).sum(axis=1)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [1.75, 2.0, 2.5])
def test_the_rule_of_mc_moe(seed, bits):
    # Bits are summed over experts, whatever their size, and 1, 2, 3 bits are columns 0, 1, 2.
    table = table_of(model(experts=4, attention=False), seed)
    total = custom(
        table, "bits", lambda unit, f: f.bits * (unit.projection == "down"), at_most=8 * bits
    )
    rule = [*count_at_least(table, 1, 3), *count_at_least(table, 1, 2)]
    assert [limit.name for limit in rule[:2]] == [
        "role=routed,proj=down at 3 bits, at least 1, layer 0",
        "role=routed,proj=down at 3 bits, at least 1, layer 1",
    ]

    def within(choice):
        down = table.units.matches("proj=down")
        fits = (choice[:, down] + 1).sum(axis=1) <= 8 * bits
        for layer in (0, 1):
            for column in (1, 2):
                fits &= counts(table, choice, column, layer) >= 1
        return fits

    check(table, [total, *rule], within)


def test_counts_at_most_and_wider(table):
    few = count_at_most(table, 1, 1)
    wide = count_at_least(table, 2, 2, wider=True)
    budget = Budget.bytes(18_000)

    def within(choice):
        fits = nbytes_of(table, choice).sum(axis=1) <= 18_000
        for layer in (0, 1):
            narrow = counts(table, choice, 0, layer)
            fits &= (narrow <= 1) & (4 - narrow >= 2)
        return fits

    check(table, [budget, *few, *wide], within)
    assert wide[0].name == "role=routed,proj=down at 2 bits or more, at least 2, layer 0"


def test_counts_over_all_layers(table):
    (limit,) = count_at_most(table, 3, 3, "proj=down", per_layer=False)
    assert limit.name == "proj=down at 3 bits, at most 3"
    down = table.units.matches("proj=down")
    check(table, [limit], lambda c: (c[:, down] == 2).sum(axis=1) <= 3)


def test_a_kept_precision_counts_as_wider():
    options = (Format(2, 32), Format.keep("bf16"))
    table = table_of(model(layers=1), options=options)
    (limit,) = count_at_least(table, 1, 3, wider=True)
    assert limit.weight[2].tolist() == [0, -1]
    assert limit.weight[0].tolist() == [0, 0]


def test_counts_say_what_is_wrong(table):
    half: Any = 1.5
    for make, text in (
        (lambda: count_at_least(table, -1, 3), "count: -1 is not a whole number from 0"),
        (partial(count_at_most, table, half, 3), "count: 1.5 is not a whole number from 0"),
        (lambda: count_at_least(table, True, 3), "count: True is not a whole number from 0"),
        (
            lambda: count_at_least(table, 5, 3),
            "count: 5 is more than the 4 units of role=routed,proj=down, layer 0; lower it",
        ),
        (
            lambda: count_at_least(table, 9, 3, "proj=down", per_layer=False),
            "count: 9 is more than the 8 units of proj=down; lower it",
        ),
        (lambda: count_at_least(table, 1, 4), "bits: no format has 4; there are 1, 2, 3"),
        (
            lambda: count_at_least(table, 1, 4, wider=True),
            "bits: no format has 4 or more; there are 1, 2, 3",
        ),
        (lambda: count_at_least(table, 1, 3, "proj=w2"), "pattern 'proj=w2': proj=w2 is none of"),
    ):
        assert text in message(make)
    assert count_at_least(table, 0, 4)[0].bound == 0
    assert solve(Problem(table, count_at_most(table, 99, 4))).gap == 0
    pinned = table.pin("layer=0", at_most=2)
    with pytest.raises(InfeasibleError, match="at 3 bits, at least 1, layer 0: "):
        solve(Problem(pinned, count_at_least(pinned, 1, 3)))


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


# One's own.


def test_a_function_of_unit_and_format(table):
    seen = []

    def latency(unit, item):
        seen.append((unit, item))
        return item.bits * unit.numel / 1000 if unit.role == "routed" else 0

    limit = custom(table, "latency", latency, at_most=80)
    assert len(seen) == len(set(seen)) == len(table.units) * 3
    routed = table.units.matches("role=routed")
    each = np.where(routed, table.units.numel, 0) / 1000
    check(table, [limit], lambda c: (each * (c + 1)).sum(axis=1) <= 80 + 1e-9)


def test_arrays_broadcast(table):
    per_format = custom(table, "a", [1, 3, 4], at_least=70)
    assert (per_format.bound, per_format.weight[5].tolist()) == (-70, [-1, -3, -4])
    check(
        table,
        [Budget.bits(3), per_format],
        lambda c: (
            (nbytes_of(table, c).sum(axis=1) <= 3 * table.weights / 8)
            & (np.array([1, 3, 4])[c].sum(axis=1) >= 70)
        ),
    )
    per_unit = custom(table, "b", np.arange(26)[:, None], at_most=1)
    assert per_unit.weight[7].tolist() == [7, 7, 7]
    assert custom(table, "c", 2, at_most=1, unit="bytes").weight.tolist() == [[2, 2, 2]] * 26
    assert custom(table, "d", table.cost < 1, at_most=-1.5).bound == -1.5


def test_infinity_forbids(table):
    def only(unit, item):
        return np.inf if unit.layer == 0 and item.bits < 2 else 0

    choice = solve(Problem(table, [Budget.bits(2.7), custom(table, "no", only, at_most=0)])).choice
    assert (choice[table.units.layer == 0] >= 1).all()


def test_own_limits_say_what_is_wrong(table):
    first = "layer=0 role=routed expert=0 proj=gate int1-g32-asym"

    def fails(unit, item):
        raise KeyError("no\nsuch")

    def text(unit, item):
        return "3"

    def nothing(unit, item):
        return None

    word: Any = "3"

    one = "limit x: give at_most or at_least, one of them"
    for make, said in (
        (lambda: custom(table, "x", 1), one),
        (lambda: custom(table, "x", 1, 2, 3), one),
        (
            lambda: custom(table, "x", fails, 1),
            f"limit x: weight of {first} raised KeyError: 'no\\nsuch'",
        ),
        (
            lambda: custom(table, "x", text, 1),
            f"limit x: weight of {first} is '3'; return a number",
        ),
        (
            lambda: custom(table, "x", nothing, 1),
            f"limit x: weight of {first} is None; return a number",
        ),
        (
            lambda: custom(table, "x", lambda unit, item: np.nan, 1),
            f"limit x: weight of {first} is nan; expected a number (+inf forbids under at_most)",
        ),
        (
            lambda: custom(table, "x", np.full((26, 3), -np.inf), 1),
            f"limit x: weight of {first} is -inf; expected a number",
        ),
        (
            lambda: custom(table, "x", np.full((26, 3), np.inf), at_least=1),
            f"limit x: weight of {first} is inf; expected a number",
        ),
        (
            lambda: custom(table, "x", np.zeros(26), 1),
            "limit x: weight has shape (26,), expected (26, 3), [F], or [U,1] for one number",
        ),
        (lambda: custom(table, "x", np.zeros((1, 26, 3)), 1), "weight has shape (1, 26, 3)"),
        (lambda: custom(table, "x", ["1", "2", "3"], 1), "weight has dtype <U1, expected numbers"),
        (lambda: custom(table, "x", 1j, 1), "weight has dtype complex128, expected numbers"),
        (lambda: custom(table, "x", 1, np.nan), "at_most: nan is not a number"),
        (lambda: custom(table, "x", 1, at_least=word), "at_least: 3 is not a number"),
        (lambda: custom(table, "x", lambda unit, item: 10**400, 1), "return a number"),
    ):
        assert said in message(make)
    with pytest.raises(InputError) as error:
        custom(table, "x", fails, 1)
    assert isinstance(error.value.__cause__, KeyError)
    assert isinstance(custom(table, "x", 1, np.inf), Limit)
