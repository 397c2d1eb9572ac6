"""A tiny model with what was recorded on it, several texts, and evidence of given weights."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.testing import tiny_model
from bitknap.testing.evidence import lopsided_case, lopsided_model, random_windows, weights_alone


@pytest.fixture(scope="session")
def case():
    """A model whose last expert never sees a token."""
    whole = lopsided_case(Recorded(full=True, curvature=True))
    return SimpleNamespace(
        layout=whole.layout,
        bare=weights_alone(whole.model),
        evidence=whole.evidence,
        plain=calibrate(whole.model, whole.layout, whole.windows[:1]),
        units=whole.layout.units,
        pick=partial(_pick, whole.layout.units),
    )


def _pick(units, layer, expert, projection):
    at = units.projections.index(projection)
    here = (units.layer == layer) & (units.expert == expert) & (units.projection == at)
    return int(np.flatnonzero(here)[0])


@pytest.fixture(scope="session")
def sets():
    """What three texts recorded on one model, whose last expert never sees a token."""
    model = lopsided_model(experts=8)
    return [calibrate(model, walk(model), random_windows(4, seed=seed)) for seed in range(3)]


@pytest.fixture(scope="session")
def evidence_of():
    """Return what makes evidence of one stack of given matrices."""
    return _evidence_of


def _evidence_of(weights):
    """Return evidence of one stack of matrices that were given."""
    count = len(weights)
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=count, num_experts=count)
    return replace(weights_alone(model), weights=lambda which: weights[: len(which)])


class Stop(Exception):
    """Ends a pass in the midst of it."""


@pytest.fixture
def stopped_often(monkeypatch):
    """Run something again and again, stopped each time after a few calls, until it ends.

    Called with the owners and names of functions, and with what is run; returns what that
    returned at last, and how often it was stopped.
    """

    def run_on(places, run, calls=4):
        left = [0]

        def counted(real):
            def called(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Stop
                return real(*args, **kwargs)

            return called

        stops = 0
        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            while True:
                left[0] = calls
                try:
                    return run(), stops
                except Stop:
                    if not calls:
                        raise  # all was kept, so nothing may be called
                    stops += 1

    return run_on
