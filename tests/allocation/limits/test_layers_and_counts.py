"""Limits on layers, counts and by functions of one's own against all plans of a small model."""

from functools import partial
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
    solve,
)
from bitknap.allocation.limits import (
    bits_per_layer,
    count_at_least,
    count_at_most,
    custom,
)
from bitknap.errors import InfeasibleError, InputError

Choices = npt.NDArray[Any]


# Floors and caps on layers.


def test_every_layer_has_a_floor_and_a_cap(table, nbytes_of, check):
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


def test_floors_of_a_pattern_alone(table, nbytes_of, check):
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


def test_layers_say_what_is_wrong(table, table_of, message):
    shapeless = CostTable.from_arrays([[1.0]], [[1]])
    head = Units.build(
        layer=[-1], role=["head"], expert=[-1], projection=["head"], rows=[64], cols=[32]
    )
    for make, text in (
        (lambda: bits_per_layer(table), "bits_per_layer: give at_least, at_most or both"),
        (lambda: bits_per_layer(table, at_least=-1), "at_least: -1 is not at least 0"),
        (lambda: bits_per_layer(table, at_most=np.nan), "at_most: nan is not at least 0"),
        (lambda: bits_per_layer(table, 4, 3), "at_least: 4 is above at_most, 3; swap them"),
        (
            lambda: bits_per_layer(table, 2, pattern="proj=x"),
            "proj 'x' is unknown; one of gate, up",
        ),
        (lambda: bits_per_layer(shapeless, 2), "bits_per_layer: layer=0 role=routed expert=0"),
        (
            lambda: bits_per_layer(table_of(head), 2),
            "units: none of these units is in a layer; choose others",
        ),
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
def test_the_rule_of_mc_moe(seed, bits, table_of, model, check):
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


def test_counts_at_most_and_wider(table, nbytes_of, check):
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


def test_counts_over_all_layers(table, check):
    (limit,) = count_at_most(table, 3, 3, "proj=down", per_layer=False)
    assert limit.name == "proj=down at 3 bits, at most 3"
    down = table.units.matches("proj=down")
    check(table, [limit], lambda c: (c[:, down] == 2).sum(axis=1) <= 3)


def test_a_kept_precision_counts_as_wider(table_of, model):
    options = (Format(2, 32), Format.keep("bf16"))
    table = table_of(model(layers=1), options=options)
    (limit,) = count_at_least(table, 1, 3, wider=True)
    assert limit.weight[2].tolist() == [0, -1]
    assert limit.weight[0].tolist() == [0, 0]


def test_counts_say_what_is_wrong(table, message):
    half: Any = 1.5
    for make, text in (
        (lambda: count_at_least(table, -1, 3), "count: -1 is not a whole number of at least 0"),
        (partial(count_at_most, table, half, 3), "count: 1.5 is not a whole number of at least 0"),
        (lambda: count_at_least(table, True, 3), "count: True is not a whole number of at least 0"),
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
        (
            lambda: count_at_least(table, 1, 3, "proj=w2"),
            "pattern 'proj=w2': proj 'w2' is unknown; one of",
        ),
    ):
        assert text in message(make)
    assert count_at_least(table, 0, 4)[0].bound == 0
    assert solve(Problem(table, count_at_most(table, 99, 4))).gap == 0
    pinned = table.pin("layer=0", at_most=2)
    with pytest.raises(InfeasibleError, match="at 3 bits, at least 1, layer 0: "):
        solve(Problem(pinned, count_at_least(pinned, 1, 3)))


# One's own.


def test_a_function_of_unit_and_format(table, check):
    seen = []

    def latency(unit, item):
        seen.append((unit, item))
        return item.bits * unit.numel / 1000 if unit.role == "routed" else 0

    limit = custom(table, "latency", latency, at_most=80)
    assert len(seen) == len(set(seen)) == len(table.units) * 3
    routed = table.units.matches("role=routed")
    each = np.where(routed, table.units.numel, 0) / 1000
    check(table, [limit], lambda c: (each * (c + 1)).sum(axis=1) <= 80 + 1e-9)


def test_arrays_broadcast(table, nbytes_of, check):
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


def test_own_limits_say_what_is_wrong(table, message):
    first = "layer=0 role=routed expert=0 proj=gate int1-g32-asym"

    def fails(unit, item):
        raise KeyError("no\nsuch")

    def text(unit, item):
        return "3"

    def nothing(unit, item):
        return None

    word: Any = "3"

    one = "limit x: give either at_most or at_least"
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
