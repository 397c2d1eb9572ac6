"""Signals of papers: sound on a tiny model, and asking for what they need."""

import numpy as np
import pytest

from bitknap.allocation import Format, formats
from bitknap.errors import InputError
from bitknap.estimators.published.alphaq import AlphaQ
from bitknap.estimators.published.autoround import AutoRoundScore
from bitknap.estimators.published.exllamav2 import Exl2Score
from bitknap.estimators.published.hawq import HessianTrace
from bitknap.estimators.published.mc_moe import Frequency, McMoe, RoutingWeight
from bitknap.estimators.published.owq import Owq
from bitknap.estimators.published.quantmoe_bench import OutlierRatio
from bitknap.estimators.signals.plain import Kurtosis, RandomScore, Uniform
from bitknap.estimators.signals.scored import Scored, checked
from bitknap.testing.evidence import UNSEEN

ALONE = (Uniform(), RandomScore(), Kurtosis(), OutlierRatio(), AlphaQ(), AlphaQ(tile=4, most=5))


SEEING = (
    Frequency(),
    RoutingWeight(),
    McMoe(),
    HessianTrace(),
    HessianTrace(curvature=True),
    Owq(),
    Exl2Score(),
    Exl2Score(full=True),
    AutoRoundScore(),
)


@pytest.mark.parametrize("signal", [*ALONE, *SEEING], ids=repr)
def test_scores_are_sound(case, signal):
    score = checked(signal, case.evidence)
    assert np.array_equal(score, checked(signal, case.evidence))
    assert (score[case.units.expert == UNSEEN] > 0).all()
    table = Scored(signal).estimate(case.evidence, formats((2, 4), 8))
    assert (table.cost > 0).all()
    assert (np.diff(table.cost, axis=1) < 0).all()
    assert table.provenance["estimator"] == f"scored({signal.name})"


@pytest.mark.parametrize("signal", ALONE, ids=repr)
def test_weights_are_enough_for_some(case, signal):
    assert signal.needs == frozenset()
    assert np.array_equal(signal.score(case.bare), signal.score(case.evidence))


@pytest.mark.parametrize("signal", SEEING, ids=repr)
def test_others_ask_for_a_pass(case, signal):
    assert signal.needs
    with pytest.raises(InputError, match="calibrat"):
        signal.score(case.bare)


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (HessianTrace(curvature=True), "curvature=True"),
        (AutoRoundScore(), "curvature=True"),
        (Exl2Score(full=True), "full=True"),
    ],
    ids=repr,
)
def test_what_was_not_recorded_is_asked_for(case, signal, message):
    with pytest.raises(InputError, match=message):
        signal.score(case.plain)


def test_names_are_distinct():
    names = [signal.name for signal in (*ALONE[:5], *SEEING)]
    assert len(set(names)) == len(names) - 2  # two signals come in two kinds


def test_formats_that_round_nothing_are_refused(case):
    for signal in (Owq, AutoRoundScore, Exl2Score):
        with pytest.raises(InputError, match="keep-bf16 rounds nothing; give a grid"):
            signal(Format.keep("bf16")).score(case.evidence)
