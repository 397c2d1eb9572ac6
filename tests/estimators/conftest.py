"""A tiny model with what was recorded on it, and evidence of given weights."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.reading import read_units
from bitknap.testing import tiny_model

# The expert that no token reaches.
UNSEEN = 4


@pytest.fixture(scope="session")
def case():
    """A model whose last expert never sees a token."""
    model = tiny_model("mixtral", num_local_experts=5, num_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1], router[3], router[UNSEEN] = -router[0], -router[2], 0
    layout = walk(model)
    tensors = dict(model.named_parameters())
    windows = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    bare = Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=lambda which: read_units(layout, which, tensors).detach(),
        replay=None,
        provenance={},
    )
    evidence = calibrate(model, layout, windows, Recorded(full=True, curvature=True))
    plain = calibrate(model, layout, windows[:1])
    return SimpleNamespace(
        layout=layout,
        bare=bare,
        evidence=evidence,
        plain=plain,
        units=layout.units,
        pick=partial(_pick, layout.units),
    )


def _pick(units, layer, expert, projection):
    at = units.projections.index(projection)
    here = (units.layer == layer) & (units.expert == expert) & (units.projection == at)
    return int(np.flatnonzero(here)[0])


@pytest.fixture(scope="session")
def evidence_of():
    """Return what makes evidence of one stack of given matrices."""
    return _evidence_of


def _evidence_of(weights):
    """Return evidence of one stack of matrices that were given."""
    count = len(weights)
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=count, num_experts=count)
    layout = walk(model)
    return Evidence(
        layout=layout,
        layers={},
        linears={},
        weights=lambda which: weights[: len(which)],
        replay=None,
        provenance={},
    )
