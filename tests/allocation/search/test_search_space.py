"""Knobs: neutral ones change nothing, turned ones change what they say."""

import numpy as np
import optuna
import pytest

from bitknap.allocation import CostTable, formats, profile
from bitknap.allocation.problem.format import Format
from bitknap.allocation.search.search_space import (
    Knobs,
    apply,
    groups,
    neutral,
    signal,
    space,
    suggest,
)
from bitknap.errors import InfeasibleError, InputError, MismatchError
from bitknap.testing import routed_units

EVERY = Knobs(
    exponents=("other",),
    risk=True,
    formats=True,
    floor=True,
    cap=True,
    tilts=("layer", "proj"),
    budget=(2.0, 4.0),
)


def units(layers=2, experts=3):
    return routed_units(layers, experts, ("gate", "up", "down"))


def table(seed=0, spread=True, widths=None):
    draw = np.random.default_rng(seed)
    every = widths or formats((2, 3, 4), (8, "row"), metadata=("fp16", "compact"), keep="bf16")
    cost = draw.lognormal(size=(18, len(every)))
    return CostTable.from_arrays(
        cost, units=units(), formats=every, spread=0.1 * cost if spread else None
    )


@pytest.fixture
def trial():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return study.ask()


def test_neutral_knobs_give_the_same_table():
    given = table().tie(profile("gate_eq_up"))
    features = {"other": signal(given, table(seed=1))}
    assert apply(given, neutral(EVERY, given), features) is given
    assert apply(given, {}) is given


def test_every_parameter_has_a_name():
    assert list(space(EVERY, table())) == [
        "exponent:other",
        "risk",
        "allow:g8-compact",
        "allow:g8",
        "allow:row-compact",
        "allow:row",
        "floor",
        "cap",
        "tilt:layer=0,proj=gate",
        "tilt:layer=0,proj=up",
        "tilt:layer=0,proj=down",
        "tilt:layer=1,proj=gate",
        "tilt:layer=1,proj=up",
        "tilt:layer=1,proj=down",
        "bits",
    ]
    assert space(Knobs(), table()) == {}


def test_suggestions_lie_in_the_space(trial):
    params = suggest(trial, EVERY, table())
    ranges = space(EVERY, table())
    assert list(params) == list(ranges)
    assert all(ranges[name].low <= value <= ranges[name].high for name, value in params.items())
    assert isinstance(params["allow:g8"], bool)
    assert params["floor"] <= 4 <= params["cap"]


def test_risk_adds_the_spread():
    given = table()
    turned = apply(given, {"risk": 2.0})
    assert np.allclose(turned.cost, 1.2 * given.cost)
    assert turned.spread is given.spread


def test_an_exponent_follows_the_feature():
    given, other = table(), table(seed=1)
    z = signal(given, other)
    turned = apply(given, {"exponent:other": 0.5}, {"other": z})
    assert np.allclose(turned.cost, given.cost * np.exp(0.5 * z)[:, None])
    assert turned.spread is not None
    assert np.allclose(turned.spread, 0.1 * turned.cost)
    dearer = (turned.cost > given.cost).all(axis=1)
    assert dearer[np.argmax(z)] and not dearer[np.argmin(z)]


def test_a_signal_is_standardised_within_projections():
    given, other = table(), table(seed=1)
    z = signal(given, other)
    assert np.isclose(z.std(), 1)
    for projection in range(3):
        assert np.isclose(z[given.units.projection == projection].mean(), 0)
    # Another unit of cost, or another scale of one projection, is the same signal.
    scale = np.where(given.units.projection == 1, 100.0, 3.0)[:, None]
    scaled = CostTable.from_arrays(other.cost * scale, units=other.units, formats=other.formats)
    assert np.allclose(signal(given, scaled), z)


def test_costs_that_say_nothing_are_no_signal():
    given = table()
    cost = np.ones(given.cost.shape)
    cost[3] = np.inf
    cost[4] = 0.0
    flat = CostTable.from_arrays(cost, units=given.units, formats=given.formats)
    assert signal(given, flat).tolist() == [0.0] * 18
    cost[5] = 2.0
    z = signal(given, CostTable.from_arrays(cost, units=given.units, formats=given.formats))
    assert np.isfinite(z).all()
    assert z[3] == z[4] == 0
    assert z.argmax() == 5


def test_a_feature_of_other_units_is_refused():
    other = CostTable.from_arrays(np.ones((4, 2)), np.ones((4, 2)))
    with pytest.raises(
        MismatchError, match="feature x: its 4 units differ from the 18 of the table"
    ):
        signal(table(), other, "x")


def test_floor_and_cap_forbid_widths():
    given = table()
    bits = np.array([item.bits for item in given.formats])
    turned = apply(given, {"floor": 3, "cap": 4})
    assert np.array_equal(np.isfinite(turned.cost[0]), (bits >= 3) & (bits <= 4))
    assert np.array_equal(turned.cost[:, bits == 3], given.cost[:, bits == 3])


def test_a_family_can_be_switched_off():
    given = table()
    params = neutral(Knobs(formats=True), given) | {"allow:g8": False}
    off = [item.name for item in given.formats if item.group_size == 8 and item.metadata == "fp16"]
    left = np.isfinite(apply(given, params).cost[0])
    assert off == [item.name for item, on in zip(given.formats, left, strict=True) if not on]
    assert left[-1]  # a kept precision belongs to no family


def test_a_unit_without_formats_is_no_plan():
    given = table(widths=formats((2, 3), (8, "row")))
    params = dict.fromkeys(["allow:g8", "allow:row"], False)
    with pytest.raises(InfeasibleError) as error:
        apply(given, params)
    assert str(error.value) == (
        "knobs: the allowed formats leave none for layer=0 role=routed expert=0 proj=gate"
    )


def test_tilts_multiply_their_group():
    given = table()
    knobs = Knobs(tilts=("layer", "proj"))
    params = neutral(knobs, given) | {"tilt:layer=1,proj=down": 0.7}
    ratio = apply(given, params).cost / given.cost
    here = given.units.matches("layer=1,proj=down")
    assert np.allclose(ratio[here], np.exp(0.7))
    assert (ratio[~here] == 1).all()


def test_tied_units_share_a_group():
    tied = table().tie(profile("gate_eq_up"))
    label, names = groups(tied)
    assert names == tuple(f"tilt:layer={i},proj={p}" for i in (0, 1) for p in ("gate", "down"))
    assert np.array_equal(label[0::3], label[1::3])
    assert groups(table().tie(profile("layer")))[1] == tuple(
        f"tilt:layer={i},proj=gate" for i in (0, 1)
    )
    assert groups(table(), ("role",))[1] == ("tilt:role=routed",)


def test_tilts_of_other_groups_are_refused():
    other = neutral(Knobs(tilts=("proj",)), table()) | {"tilt:proj=sideways": 1.0}
    with pytest.raises(InputError) as error:
        apply(table(), other)
    assert str(error.value) == (
        "tilt:proj=sideways: the tilts do not match the table's groups; use the table of this study"
    )


def test_knobs_survive_json():
    assert Knobs.from_dict(EVERY.to_dict()) == EVERY
    with pytest.raises(InputError, match="knob 'nonsense' is unknown; one of budget, cap"):
        Knobs.from_dict({"nonsense": 1})


@pytest.mark.parametrize(
    ("knobs", "given", "message"),
    [
        (
            Knobs(risk=True),
            table(spread=False),
            "knob risk: the table has no spread; leave the knob out",
        ),
        (
            Knobs(formats=True),
            table(widths=formats((2, 3), 8)),
            "knob formats: the table has only one family of formats; leave it out",
        ),
        (
            Knobs(cap=True),
            table(widths=(Format(3, 8), Format(3, 0))),
            "knobs floor and cap: the table has only one width; leave them out",
        ),
    ],
)
def test_a_knob_needs_something_to_turn(knobs, given, message):
    with pytest.raises(InputError) as error:
        space(knobs, given)
    assert str(error.value) == message


def test_bad_ranges_are_refused():
    with pytest.raises(InputError, match="budgets: 4 to 2 bpw is not a range above 0"):
        Knobs(budget=(4, 2))
    with pytest.raises(InputError, match="exponent:x: no such feature; pass its table"):
        apply(table(), {"exponent:x": 0.5})
