"""GEMQ: squared changes of block outputs weighed by gradients; one program over all layers.

    cost     Σ g² Δz² of an expert at a width, over tokens and outputs
    ties     all matrices of an expert
    program  a sum of bits over all experts, in each layer one at the widest and one at the second

The program is in `bitknap.allocation.published.gemq`. Not reproduced: training of the router, and
repeated estimation on the partly quantized model.

Source: Deng et al., GEMQ, ICML 2026, arXiv 2605.23078, and its code. Equation numbers are not
given: the paper was read through its code and a note of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bitknap.allocation import BitPlan, CostTable, Format, solve
from bitknap.allocation.published import (
    gemq_problem,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    LEVEL_FORMATS,
    Material,
    Offer,
    Rule,
    largest,
    named,
    ranked,
    tied_to,
)
from bitknap.estimators.sweep.expert_traces import block_of, runs
from bitknap.progress import Progress


def gemq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return Σ g² Δz² of whole experts, divided equally among matrices (GEMQ, arXiv 2605.23078).

    An expert without tokens costs 0, as in the paper. Labels are drawn from the model; the paper
    uses the text's.
    """
    cost = np.zeros((len(evidence.units), len(formats)))
    for number in evidence.traces:
        block, by_projection = block_of(evidence, number), runs(evidence.units, number)
        gradient = block.trace.gradient
        square = torch.ones(len(block.trace.hidden), 1) if gradient is None else gradient.square()
        for column, format in enumerate(formats):
            changed = {
                name: evidence.round_trip(run, block.weights[name], format)
                for name, run in by_projection.items()
            }
            for expert, token, change in block.changes(changed):
                total = float((square[token] * change.square()).double().sum())
                for run in by_projection.values():
                    cost[run[expert], column] = total / len(by_projection)
    return ranked(evidence, formats, cost, "gemq")


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; its knob is the sum of bits of all experts."""
    evidence = material.evidence
    table = tied_to("gemq", gemq(evidence, LEVEL_FORMATS))
    count = sum(layer.experts for layer in evidence.layout.layers)
    least = count + 3 * len(evidence.layout.layers)

    def plan_of(total: int) -> BitPlan:
        return solve(gemq_problem(table, total / count)).plan

    def offers(nbytes: int) -> list[Offer]:
        return largest(plan_of, range(least, 3 * count + 1), nbytes, "{} bits")

    return named("gemq", offers, knob="total bits of all experts")
