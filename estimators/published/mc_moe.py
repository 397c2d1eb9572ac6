"""MC-MoE (PMQ): frequency × routing weight × measured error; whole experts at 1 to 3 bits.

    cost     phi^1 w^1.5 eps^1 of an expert at a width, with the code's exponents
    ties     all matrices of an expert
    program  for each layer: least cost, a sum of bits, one expert at 3 bits and one at 2

phi and w are an expert's share of its layer's tokens and routing weights, eps the change of the
block's output with that expert alone rounded. Frequency and routing weight give frequent experts
more bits. Any measured output error already contains them, so the rule counts them twice; as
signals they belong on the data-free base only (methods.md#pitfalls, pitfalls 1 and 2). The program
is in `bitknap.allocation.published.pmq`.

Not reproduced: the authors sum routing weights before renormalisation, which a pass through the
experts does not see; errors are measured with the quantizer that is deployed, the authors' with
min-max rounding in blocks of 128; pruning of tokens (ODP) is left out.

Source: Huang et al., MC-MoE, ICLR 2025, arXiv 2410.06270, pre-loading mixed-precision quantization,
and its code. Eq. 4 is what the program minimises, as reviews of the paper number it; the paper's
text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitknap.allocation import BitPlan, Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.published import (
    mc_moe,
    mc_moe_cost,
)
from bitknap.errors import InputError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.estimators.published.rule import (
    LEVEL_FORMATS,
    LEVELS,
    Material,
    Offer,
    Rule,
    largest,
    named,
)
from bitknap.estimators.signals.unit_statistics import by_expert
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True)
class Frequency:
    """Share of tokens routed to the unit's expert, shrunk; 1 for units that every token uses.

    Source: the frequency baseline of MC-MoE, arXiv 2410.06270, and of many others.
    """

    name = "frequency"
    needs = frozenset({"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """
        return by_expert(evidence, lambda layer: layer.shrunk(layer.count))


@dataclass(frozen=True, slots=True)
class RoutingWeight:
    """Summed routing weights of the unit's expert per token of the text, shrunk; 1 if not routed.

    These are the weights with which the experts are called, renormalised if the model does so.
    MC-MoE sums them before renormalisation, which a pass through the experts does not see.

    Source: MC-MoE, arXiv 2410.06270, w.
    """

    name = "routing-weight"
    needs = frozenset({"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """
        return by_expert(evidence, lambda layer: layer.shrunk(layer.gate_sum))


@dataclass(frozen=True, slots=True)
class McMoe:
    """MC-MoE's significance phi^alpha w^beta, shares of its layer times E, without its error term.

    So an average expert scores 1 in every layer, as do units that are not routed; the paper takes
    shares layer by layer, where a factor changes nothing. See `RoutingWeight` for w, and
    `mc_moe_cost` for the whole rule on measured errors.

    Attributes:
        alpha: exponent of the frequency.
        beta: exponent of the routing weight.

    Source: MC-MoE, arXiv 2410.06270; exponents are its code's defaults.
    """

    alpha: float = 1.0
    beta: float = 1.5
    name = "mc-moe"
    needs = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not np.isfinite([self.alpha, self.beta]).all():
            raise InputError(f"mc-moe: exponents {self.alpha} and {self.beta} must be finite")

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """

        def significance(layer: LayerEvidence) -> Tensor:
            frequency = layer.shrunk(layer.count)
            weight = layer.shrunk(layer.gate_sum)
            relative = frequency / frequency.mean(), weight / weight.mean()
            return relative[0] ** self.alpha * relative[1] ** self.beta

        return by_expert(evidence, significance)


def block_errors(evidence: Evidence, formats: Sequence[Format]) -> Floats:
    """Return MC-MoE's eps of every expert, the change of the block's output, float64[L,E,F]."""
    table, units = Measured(kind="block").estimate(evidence, formats), evidence.units
    layers, at = np.unique(units.layer, return_inverse=True)
    errors = np.zeros((len(layers), int(units.expert.max()) + 1, len(formats)))
    np.add.at(errors, (at, units.expert), table.cost)
    return errors


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; its knob is the sum of bits of a layer's experts."""
    evidence = material.evidence
    layers = [evidence.layers[number] for number in sorted(evidence.layers)]
    cost = mc_moe_cost(
        block_errors(evidence, LEVEL_FORMATS),
        np.stack([layer.count.numpy() for layer in layers]),
        np.stack([layer.gate_sum.numpy() for layer in layers]),
    )
    experts = cost.shape[1]
    units = evidence.units
    at = np.searchsorted(sorted(evidence.layers), units.layer)

    def plan_of(total: int) -> BitPlan:
        bits = mc_moe(cost, total, bits=LEVELS)
        choice = np.searchsorted(LEVELS, bits)[at, units.expert]
        return BitPlan.from_choice(units, LEVEL_FORMATS, choice, header={"solver": "mc-moe"})

    def offers(nbytes: int) -> list[Offer]:
        return largest(plan_of, range(experts + 3, 3 * experts + 1), nbytes, "{} bits")

    return named("mc-moe", offers, knob="total bits of a layer's experts")
