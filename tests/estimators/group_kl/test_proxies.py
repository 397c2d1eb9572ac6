from types import SimpleNamespace

import numpy as np
import pytest

from bitknap.allocation import CostTable, formats
from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.group_kl.proxies import with_proxies
from bitknap.testing import routed_units

FORMATS = formats((2, 4), "row", True)
# All that is read of it.
EVIDENCE = SimpleNamespace(floor=1e-9)


class Told:
    """A signal that is told its scores."""

    needs: frozenset[str] = frozenset()

    def __init__(self, name: str, scores: Floats) -> None:
        self.name, self.scores = name, scores

    def score(self, evidence: object) -> Floats:
        return self.scores


def case(groups: int = 6, experts: int = 16) -> tuple[CostTable, Floats, Floats, list[np.ndarray]]:
    """Layers of experts that all cost alike, and the truth: cost × score^1.5."""
    units = routed_units(groups, experts, ("up",), rows=64, cols=64)
    flat = np.tile([0.01, 0.001], (len(units), 1))
    table = CostTable.from_arrays(flat, units=units, formats=FORMATS)
    score = np.exp(np.random.default_rng(0).normal(size=len(units)))
    runs = np.split(np.arange(len(units)), groups)
    return table, score, score**1.5, runs


def test_a_signal_that_tells_is_used_and_totals_are_kept():
    table, score, weight, runs = case()
    truth = table.cost * weight[:, None]
    readings: list[int] = []

    def measure(groups):
        readings.extend(len(units) for units, _ in groups)
        return [float(truth[units, column].sum() / weight.mean()) for units, column in groups]

    found = with_proxies(table, EVIDENCE, [Told("score", score)], runs, 0, measure)  # type: ignore[arg-type]
    assert readings == [8, 8] * 6
    proxies = found.provenance["proxies"]
    assert proxies["exponents"]["score"] > 0.5
    assert proxies["error"] < proxies["error_without"]
    for run in runs:
        assert found.cost[run].sum(0) == pytest.approx(table.cost[run].sum(0))
        assert np.corrcoef(np.log(found.cost[run, 0]), np.log(truth[run, 0]))[0, 1] > 0.999


def test_a_signal_that_does_not_tell_changes_nothing():
    table, _, _, runs = case()
    noise = np.exp(np.random.default_rng(1).normal(size=len(table.units)))

    def measure(groups):
        return [float(table.cost[units, column].sum()) for units, column in groups]

    found = with_proxies(table, EVIDENCE, [Told("noise", noise)], runs, 0, measure)  # type: ignore[arg-type]
    assert np.abs(np.log(found.cost / table.cost)).max() < 0.05


def test_halves_that_lose_nothing_are_no_evidence():
    table, score, _, runs = case()

    def measure(groups):
        return [0.0] * len(groups)

    found = with_proxies(table, EVIDENCE, [Told("score", score)], runs, 0, measure)  # type: ignore[arg-type]
    assert np.array_equal(found.cost, table.cost)
    assert found.provenance["proxies"] == {
        "exponents": {"score": 0.0},
        "halves": 0,
        "note": "no half of a group lost enough to be distinguished from noise; exponents stay 0",
    }
