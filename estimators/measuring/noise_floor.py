"""What arithmetic alone makes of KL: readings below it say nothing of a change.

A change in a layer moves every later sum to other roundings, so a reading has noise even where the
change is worth nothing. The same text is read once more with a change of no account, as large as a
few roundings of float32, at the first experts. Another order of batches would tell less: products
in bfloat16 hide it, and do not hide what a change makes of their roundings.
"""

from __future__ import annotations

import numpy as np

from bitknap.allocation.problem.arrays import Floats

# Size of the change that measures the noise, relative to what it changes: a few float32 roundings,
# so that a larger residual stream does not absorb it. Its own KL is far below the noise.
ROUNDINGS = 2.0**-18
# The least floor, in nats per token: a reading must have a logarithm.
LEAST = 1e-12
# Where nothing was measured: what float32 makes of KL on 2,048 tokens of the reference models.
USUAL = 1e-9
# Key of the floor in a provenance.
KEY = "kl_floor"


def floor_of(divergences: Floats) -> float:
    """Return the KL below which a mean over tokens is noise, nats per token.

    It is the mean's size and twice its standard error.

    Args:
        divergences: KL of each token under a change of no account, float64 [tokens].
    """
    error = float(divergences.std()) / len(divergences) ** 0.5
    floor = abs(float(divergences.mean())) + 2 * error
    return max(LEAST, floor) if np.isfinite(floor) else LEAST
