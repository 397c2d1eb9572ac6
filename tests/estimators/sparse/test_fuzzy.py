"""The estimator by fuzzy interpolation on a tiny model."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bitknap.allocation import Format, Units, formats
from bitknap.errors import MismatchError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weighed_errors import token_share
from bitknap.estimators.sparse.cell_choice import AtRandom
from bitknap.estimators.sparse.cell_features import nats
from bitknap.estimators.sparse.fuzzy import Fuzzy, features, measured
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.predictors import Residual
from bitknap.testing.evidence import UNSEEN, lopsided_case

ORIGIN = {"model": "m", "method": "rtn", "text": "t", "tokens": 1, "seed": 0}
FORMATS = formats((1, 2, 4), (8, "row"), False, "fp16")


@pytest.fixture(scope="module")
def case():
    evidence = lopsided_case(windows=4).evidence
    units = evidence.units
    free = np.ones((len(units), len(FORMATS)), dtype=np.bool_)
    cells = AtRandom().pick(units, free, None, 60, 0)
    unit, column = cells // len(FORMATS), cells % len(FORMATS)
    samples = LossSamples(
        units=units,
        formats=FORMATS,
        unit=unit,
        column=column,
        loss=measured(evidence, FORMATS, cells),
        provenance=ORIGIN,
    )
    return SimpleNamespace(evidence=evidence, samples=samples, units=units)


WAYS = {
    "over a base": {},
    "trusted in full": {"shrink": False},
    "published": {"predictor": FuzzyRules(kind="idw", neighbours=3), "base": None},
    "plain": {"base": None},
    "on log-linear": {"predictor": Residual(inner=FuzzyRules()), "base": None},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_fuzzy_costs_are_sound(way, case):
    wanted = (*FORMATS[::2], Format.keep("fp32"))
    found = Fuzzy(case.samples, **{"base": SecondMoments(), **way}).estimate(case.evidence, wanted)
    assert found.units is case.units
    assert np.isfinite(found.cost).all()
    assert (found.cost[:, :-1] > 0).all()  # the unseen expert's too
    assert found.spread is not None
    assert not found.cost[:, -1].any() and not found.spread[:, -1].any()
    assert found.frequency is not None
    assert np.array_equal(found.frequency, token_share(case.evidence))
    assert found.provenance["unit"] == "nats/token"
    base = way.get("base", SecondMoments())
    assert found.provenance["estimator"] == ("fuzzy(moments)" if base else "fuzzy")
    assert found.provenance["measurements"] == 60
    assert found.provenance["samples"] == ORIGIN
    if way == WAYS["on log-linear"]:
        assert "60 samples for" in found.provenance["note"]
    if not way:
        assert "by cross-validation" in found.provenance["note"]


def test_rules_over_a_base_say_what_it_gets_wrong(case):
    # A base that is 3 times too small everywhere is repaired everywhere.
    base = SecondMoments().estimate(case.evidence, FORMATS)
    loss = 3 * base.cost[case.samples.unit, case.samples.column]
    samples = replace(case.samples, loss=loss)
    found = Fuzzy(samples, base=SecondMoments()).estimate(case.evidence, FORMATS)
    assert found.cost == pytest.approx(3 * base.cost, rel=1e-6)


@pytest.mark.slow
def test_rules_are_followed_as_far_as_they_predict_units_left_out(case):
    base = SecondMoments().estimate(case.evidence, FORMATS)
    known = base.cost[case.samples.unit, case.samples.column]
    generator = np.random.default_rng(0)
    noise = replace(case.samples, loss=known * np.exp(generator.normal(size=len(known))))
    bits = np.array([f.bits for f in FORMATS])[case.samples.column]
    curve = replace(case.samples, loss=known * np.exp(0.5 * bits))

    def moved(samples, **way):
        found = Fuzzy(samples, base=SecondMoments(), **way).estimate(case.evidence, FORMATS)
        return float(np.log(found.cost / base.cost).std()), found.provenance["note"]

    trusting, _ = moved(noise, shrink=False)
    wary, said = moved(noise)
    assert wary < trusting / 2
    assert float(said.split("followed by ")[1].split(",")[0]) < 0.4
    _, said = moved(curve)
    assert float(said.split("followed by ")[1].split(",")[0]) > 0.8


def test_measured_cells_keep_what_was_measured(case):
    found = Fuzzy(case.samples, base=None).estimate(case.evidence, FORMATS)
    kept = found.cost[case.samples.unit, case.samples.column]
    assert kept == pytest.approx(np.exp(case.samples.logs))


def test_features_are_oriented_and_distinguished(case):
    found = features(case.evidence, FORMATS)
    column = {name: found.values[:, :, i] for i, name in enumerate(found.names)}
    assert (np.diff(column["distortion"][:, ::2], axis=1) < 0).all()  # more bits, less
    for name in ("activation", "routing", "scale", "depth", "projection"):
        assert (column[name] == column[name][:, :1]).all(), name
    layer = case.evidence.layers[0]
    here = (case.units.layer == 0) & (case.units.projection == 0)
    share = layer.shrunk(layer.count).numpy()
    assert column["routing"][here, 0] == pytest.approx(np.log2(share[case.units.expert[here]]))
    assert sorted(set(column["depth"].ravel())) == [0.5, 1.0]
    assert len(set(column["projection"].ravel())) == 3


def test_samples_of_something_else_are_refused(case):
    with pytest.raises(MismatchError, match="int3-g8-asym was not measured"):
        Fuzzy(case.samples, base=None).estimate(case.evidence, formats(3, 8))
    others = LossSamples(
        units=Units.anonymous(3),
        formats=FORMATS,
        unit=np.array([0]),
        column=np.array([0]),
        loss=np.ones(1),
        provenance=ORIGIN,
    )
    with pytest.raises(MismatchError, match="their 3 units differ from the 30"):
        Fuzzy(others, base=None).estimate(case.evidence, FORMATS)


def test_nats_of_logarithms():
    loss, spread = nats(np.array([0.0, 1.0]), np.array([np.log(2), 0.0]))
    assert loss == pytest.approx([1, np.e])
    assert spread == pytest.approx([1, 0])


def test_what_no_token_uses_is_not_measured(monkeypatch):
    evidence, alone = lopsided_case(windows=4).evidence, list[int]()

    def counted(evidence, variants):
        alone.extend(int(one.units[0]) for one in variants)
        return enumerate([1e-3] * len(variants))

    monkeypatch.setattr("bitknap.estimators.sparse.fuzzy.finite_kls", counted)
    loss = measured(evidence, formats((2, 4), 0, True), np.arange(2 * len(evidence.units)))
    unseen = np.repeat(evidence.units.expert == UNSEEN, 2)
    np.testing.assert_array_equal(loss == 0, unseen)
    assert len(alone) == (~unseen).sum()
