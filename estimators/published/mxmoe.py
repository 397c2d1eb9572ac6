"""MxMoE: output errors of single matrices, gate and up alike, every layer at the same average.

    cost       ‖Ô − O‖ of the decoder layer's output with one matrix rounded, not squared
    ties       gate and up of an expert
    allocator  L^r T^(1−r) of each layer at the same average; r = 1 for weights alone

The paper takes the output of the block of experts, its code that of the decoder layer, which adds
the same residual to both: the change is the same. The allocator is in
`bitknap.allocation.published.mxmoe`.

Not reproduced: the time T of the authors' kernels, which r = 1 ignores; quantized activations;
errors of rotated weights.

Source: Duanmu et al., MxMoE, ICML 2025, arXiv 2505.05799, and its code (`layer_out_norm`). Eq. 5 is
L, eq. 6 the cost and eq. 7 the program, as an account of the paper numbers them; its text was not
at hand.
"""

from __future__ import annotations

from bitknap.allocation.published import (
    MxMoe,
    PerLayer,
)
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    solved,
)
from bitknap.progress import Progress


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; every matrix is measured in every format."""
    table = Measured(kind="layer", progress=progress).estimate(material.evidence, FORMATS)
    return solved("mxmoe", table, PerLayer(solver=MxMoe(exponent=1)))
