"""FRI-MxMoE: losses of some cells measured, the others interpolated; a Lagrangian multiplier.

    cost       frequency × loss of a matrix in a format
    ties       none
    allocator  the least of cost + multiplier × bytes for each unit; bisection meets the limit

Losses are interpolated by inverse distances (`FuzzyRules(kind="idw")`) from a quarter of the cells,
anchored by depth. The allocator is in `bitknap.allocation.published.fri_mxmoe`; rules that
interpolate better than the paper's are `bitknap.estimators.sparse`.

Not reproduced: losses are measured KL, the authors' are changes of perplexity or squared errors;
the latency of a device is left out.

Source: Qi et al., Profiling-Free Mixed-Precision Quantization for MoE LLMs via Fuzzy Rule
Interpolation (FRI-MxMoE), ACL 2026, 2026.acl-long.982. Equation numbers are not given: none were
noted when the paper was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitknap.allocation import CostTable, Format
from bitknap.allocation.published import (
    Lagrangian,
)
from bitknap.estimators.costs.weighed_errors import (
    token_share,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    solved,
)
from bitknap.estimators.sparse.cell_choice import ByDepth
from bitknap.estimators.sparse.fuzzy import Fuzzy, measured
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.progress import Progress

# Share of all cells that FRI-MxMoE measures for its rule base, as for its Qwen1.5-MoE.
RULE_BASE = 0.25


def fri(
    evidence: Evidence, formats: Sequence[Format], progress: Progress | None = None
) -> CostTable:
    """Return frequency × interpolated loss (FRI-MxMoE, ACL 2026): a quarter of the cells measured.

    Anchors are whole experts, chosen by depth; the target is the measured KL (in the
    paper: ΔPPL or MSE), interpolated by inverse distances.
    """
    units, shape = evidence.units, (len(evidence.units), len(formats))
    count = max(2, round(RULE_BASE * shape[0] * shape[1]))
    cells = ByDepth().pick(units, np.ones(shape, dtype=np.bool_), None, count, seed=0)
    samples = LossSamples(
        units=units,
        formats=tuple(formats),
        unit=cells // shape[1],
        column=cells % shape[1],
        loss=measured(evidence, formats, cells, progress),
        provenance={
            "model": "",
            "text": "",
            "tokens": 0,
            "seed": 0,
            "method": evidence.rounding.name,
            **evidence.provenance,
        },
    )
    table = Fuzzy(samples, FuzzyRules(kind="idw"), base=None).estimate(evidence, formats)
    return replace(table, cost=table.cost * token_share(evidence)[:, None], spread=None)


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; a quarter of all cells are measured."""
    return solved("fri-mxmoe", fri(material.evidence, FORMATS, progress), Lagrangian())
