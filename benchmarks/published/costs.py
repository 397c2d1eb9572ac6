"""Costs that published rules minimise and that no estimator of ours gives as they are.

None is in nats: each is what its authors add up, on the formats that are deployed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.weighed_errors import token_share, weighed_table
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals import baselines
from bitknap.estimators.signals.channel import channel_table
from bitknap.estimators.signals.unit_statistics import by_matrix
from bitknap.estimators.sparse.cell_choice import ByDepth
from bitknap.estimators.sparse.fuzzy import Fuzzy, unit_losses
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sweep.expert_traces import block_of, runs
from bitknap.progress import Progress

# Share of all cells that FRI-MxMoE's rule base has measured, as for its Qwen1.5-MoE.
RULE_BASE = 0.25


def table_of(evidence: Evidence, formats: Sequence[Format], cost: Floats, name: str) -> CostTable:
    """Return costs [U,F] as a table that only ranks."""
    return CostTable.from_arrays(
        cost,
        units=evidence.units,
        formats=tuple(formats),
        provenance={**evidence.provenance, "unit": "score", "estimator": name},
    )


def squared_errors(evidence: Evidence, formats: Sequence[Format]) -> Floats:
    """Return ‖ΔW‖² of every unit in every format, float64[U,F]."""

    def weigh(run: np.ndarray, weights: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda delta: delta.square().sum((1, 2))

    return weighed_table(evidence, formats, weigh, {}).cost


def hawq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return the mean Hessian trace × ‖ΔW‖² (HAWQ-V2, arXiv 1911.03852), Fisher for Hessian."""
    trace = baselines.HessianTrace(curvature=True).score(evidence)
    return table_of(evidence, formats, trace[:, None] * squared_errors(evidence, formats), "hawq")


def alphaq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return (median alpha / alpha) × Var(W) × 2^(−2b) (AlphaQ, arXiv 2606.04980)."""
    variance = by_matrix(evidence, lambda weights: weights.var((1, 2), correction=0))
    bits = np.array([format.bits for format in formats])
    score = baselines.AlphaQ().score(evidence) * variance
    return table_of(evidence, formats, score[:, None] * 2.0 ** (-2 * bits), "alphaq")


def each_format(
    evidence: Evidence, formats: Sequence[Format], signal: Callable[[Format], Any], name: str
) -> CostTable:
    """Return a signal's scores at every format as costs."""
    cost = np.stack([signal(format).score(evidence) for format in formats], axis=1)
    return table_of(evidence, formats, cost, name)


def first_order(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return Σ |g ΔW| of every unit, root mean square gradients standing in for |g|.

    What AutoRound's AutoScheme adds up, and mlx-lm's `dynamic_quant` in kind: theirs keep the sign
    of the text's own gradients, which are not recorded.
    """
    table = each_format(evidence, formats, lambda f: baselines.AutoRoundScore(f), "first-order")
    return replace(table, cost=table.cost * evidence.units.numel[:, None])


def gemq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return Σ g² Δz² of whole experts, each matrix an equal share (GEMQ, arXiv 2605.23078).

    An expert without tokens costs 0, as theirs. Labels are drawn from the model, theirs are the
    text's.
    """
    cost = np.zeros((len(evidence.units), len(formats)))
    for number, trace in evidence.traces.items():
        block, found = block_of(evidence, number), runs(evidence.units, number)
        square = trace.gradient.square() if trace.gradient is not None else torch.ones(1)
        for column, format in enumerate(formats):
            changed = {
                name: evidence.round_trip(run, block.weights[name], format)
                for name, run in found.items()
            }
            for expert, token, change in block.changes(changed):
                total = float((square[token] * change.square()).double().sum())
                for run in found.values():
                    cost[run[expert], column] = total / len(found)
    return table_of(evidence, formats, cost, "gemq")


def block_errors(evidence: Evidence, formats: Sequence[Format]) -> Floats:
    """Return MC-MoE's ε of every expert, float64[L,E,F]: change of the block's output."""
    table, units = Measured(kind="block").estimate(evidence, formats), evidence.units
    layers, at = np.unique(units.layer, return_inverse=True)
    found = np.zeros((len(layers), int(units.expert.max()) + 1, len(formats)))
    np.add.at(found, (at, units.expert), table.cost)
    return found


def fri(
    evidence: Evidence, formats: Sequence[Format], progress: Progress | None = None
) -> CostTable:
    """Return frequency × interpolated loss (FRI-MxMoE, ACL 2026): a quarter of the cells measured.

    Anchors by depth, whole experts; the target is the measured KL (theirs: ΔPPL or MSE), read by
    inverse distances.
    """
    units, shape = evidence.units, (len(evidence.units), len(formats))
    count = max(2, round(RULE_BASE * shape[0] * shape[1]))
    cells = ByDepth().pick(units, np.ones(shape, dtype=np.bool_), None, count, seed=0)
    measure = unit_losses(evidence, formats)
    loss = []
    for done, cell in enumerate(cells.tolist()):
        if progress:
            progress("measure rules", done, len(cells))
        loss.append(measure(cell // shape[1], cell % shape[1]))
    samples = LossSamples(
        units=units,
        formats=tuple(formats),
        unit=cells // shape[1],
        column=cells % shape[1],
        loss=np.array(loss),
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


def xie(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return S_c × Var × distortion of every output row, a unit each (Xie et al.; ours defined)."""
    bare = {number: replace(layer, curvature={}) for number, layer in evidence.layers.items()}
    rows = int(evidence.units.rows.max())
    return channel_table(replace(evidence, layers=bare), formats, blocks=rows)
