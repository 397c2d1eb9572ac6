"""Published rules with their own costs, ties and allocators, asked for the largest plan that fits.

A rule with a byte limit gets it. One that yields an average of its own has its knob scanned for
the largest plan within the limit. None sees the text its plans are judged on, but the uniform
recipe: that is chosen on it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, Format, Problem, Solver, solve
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import formats as make_formats
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.published import (
    Annealing,
    Lagrangian,
    MxMoe,
    PerLayer,
    Threshold,
    gemq_problem,
    mc_moe,
    mc_moe_cost,
)
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.allocation.tradeoffs.uniform_recipes import uniform_plans_within
from bitknap.api.quantizing import default_formats
from bitknap.benchmarks.published import costs
from bitknap.benchmarks.setting import FORMATS
from bitknap.errors import InfeasibleError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.baselines import Exl2Score, RandomScore
from bitknap.estimators.signals.moqa import moqa_plan
from bitknap.estimators.signals.neuron_variance import max_variances
from bitknap.estimators.signals.router_norm import chowdhury_plan, norm_changes
from bitknap.estimators.signals.scored import Scored
from bitknap.progress import Progress

# Widths of MC-MoE, GEMQ and Chowdhury et al.; the others choose among all formats.
LEVELS = (1, 2, 3)
BYTES = "bytes"


class Offer(NamedTuple):
    """A plan, and the value of the rule's knob that gave it, "" for a byte limit."""

    plan: BitPlan
    setting: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One published allocator.

    Attributes:
        name: in the report.
        source: where it is from.
        knob: what is turned to meet a size.
        ties: which units share a format.
        offers: plans of at most so many bytes; of several, the best on the judge's text counts.
    """

    name: str
    source: str
    knob: str
    ties: str
    offers: Callable[[int], Sequence[Offer]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What rules plan from.

    Attributes:
        evidence: the calibration pass, with curvature, traces and gradients.
        final: router norms at the end of training, by layer.
        initial: those at its start; None takes the final norms alone.
        sets: passes over several texts, for MoQa.
    """

    evidence: Evidence
    final: Mapping[int, Floats]
    initial: Mapping[int, Floats] | None
    sets: tuple[Evidence, ...]


def rules(material: Material, progress: Progress | None = None) -> Iterator[Rule]:
    """Yield every rule; what it measures is measured when it is drawn."""
    evidence = material.evidence
    yield _uniform(evidence)
    random = Scored(RandomScore()).estimate(evidence, FORMATS)
    yield _solved("random", "log-normal scores, seed 0", random)
    yield from chowdhury(material)
    yield _mc_moe(evidence)
    layer = Measured(kind="layer", progress=progress).estimate(evidence, FORMATS)
    per_layer = PerLayer(solver=MxMoe(exponent=1))
    yield _solved("MxMoE", "arXiv 2505.05799", layer, per_layer, "gate_eq_up")
    yield _gemq(evidence)
    yield _moqa(material.sets)
    yield _solved("Xie (rows)", "2025.findings-acl.1386", costs.xie(evidence, FORMATS))
    interpolated = costs.fri(evidence, FORMATS, progress)
    yield _solved("FRI-MxMoE", "2026.acl-long.982", interpolated, Lagrangian())
    yield _solved("AlphaQ", "arXiv 2606.04980", costs.alphaq(evidence, FORMATS))
    yield _solved("HAWQ", "arXiv 1911.03852", costs.hawq(evidence, FORMATS))
    relative = costs.each_format(evidence, FORMATS, lambda f: Exl2Score(f), "exl2")
    yield _solved("ExLlamaV2", "its annealing", relative, Annealing(), "layer")
    gradient = costs.first_order(evidence, FORMATS)
    yield _solved("AutoRound", "AutoScheme", gradient, ties="layer")
    yield _threshold(gradient)


def largest(
    plan_of: Callable[[Any], BitPlan], knobs: Sequence[Any], nbytes: int, text: str
) -> list[Offer]:
    """Return the plan of the last knob that fits; none if no plan does.

    Args:
        plan_of: from a knob to its plan.
        knobs: in the order of the plans' bytes.
        nbytes: largest size.
        text: how to write a knob.
    """
    size = bisect_right(knobs, nbytes, key=lambda knob: plan_of(knob).total_bytes)
    if not size:
        return []
    knob = knobs[size - 1]
    return [Offer(plan_of(knob), text.format(knob))]


def _solved(
    name: str, source: str, table: CostTable, solver: Solver | None = None, ties: str = "free"
) -> Rule:
    tied = under(table, profile(ties))

    def offers(nbytes: int) -> list[Offer]:
        return [Offer(solve(Problem(tied, Budget.bytes(nbytes)), solver).plan, "")]

    return Rule(name=name, source=source, knob=BYTES, ties=ties, offers=offers)


def _uniform(evidence: Evidence) -> Rule:
    """Every width × group size × zero point × metadata, pure or two widths round robin.

    Recipes that leave more than a twentieth of the bytes are not tried where others use them.
    """
    units = evidence.units
    options = default_formats(units)

    def offers(nbytes: int) -> list[Offer]:
        plans = uniform_plans_within(units, options, nbytes)
        return [Offer(plan, " + ".join(item.name for item in plan.formats)) for plan in plans]

    return Rule(
        name="uniform (best recipe)",
        source="all grids, chosen on the judge's text",
        knob="the recipe",
        ties="free",
        offers=offers,
    )


def chowdhury(material: Material) -> Iterator[Rule]:
    """Yield the rule as published, and with one thing changed at a time."""
    evidence = material.evidence
    experts = evidence.layout.layers[0].experts
    averages = [total / experts for total in range(experts, 3 * experts + 1)]
    final, change = material.final, norm_changes(material.final, material.initial)
    widest = max_variances(evidence)
    longest = max_variances(evidence, largest_norm=True)
    ways: dict[str, dict[str, Any]] = {
        "Chowdhury": {"norms": change, "variances": widest},
        "Chowdhury, norms alone": {"norms": change},
        "Chowdhury, final norm": {"norms": final, "variances": widest},
        "Chowdhury, final norm alone": {"norms": final},
        "Chowdhury, one pass": {"norms": change, "variances": widest, "one_pass": True},
        "Chowdhury, longest row": {"norms": change, "variances": longest},
    }
    for name, way in ways.items():

        def plan_of(average: float, way: dict[str, Any] = way) -> BitPlan:
            return chowdhury_plan(evidence.layout, FORMATS, average, LEVELS, **way)

        def offers(nbytes: int, plan_of: Callable[[float], BitPlan] = plan_of) -> list[Offer]:
            return largest(plan_of, averages, nbytes, "{:.4g} bits")

        yield Rule(
            name=name,
            source="arXiv 2604.06515",
            knob="average bits of a layer",
            ties="expert",
            offers=offers,
        )


def _mc_moe(evidence: Evidence) -> Rule:
    layers = [evidence.layers[number] for number in sorted(evidence.layers)]
    grids = _levels()
    cost = mc_moe_cost(
        costs.block_errors(evidence, grids),
        np.stack([layer.count.numpy() for layer in layers]),
        np.stack([layer.gate_sum.numpy() for layer in layers]),
    )
    experts = cost.shape[1]
    units = evidence.units
    at = np.searchsorted(sorted(evidence.layers), units.layer)

    def plan_of(total: int) -> BitPlan:
        bits = mc_moe(cost, total, bits=LEVELS)
        choice = np.searchsorted(LEVELS, bits)[at, units.expert]
        return BitPlan.from_choice(units, grids, choice, header={"solver": "mc-moe"})

    return Rule(
        name="MC-MoE",
        source="arXiv 2410.06270",
        knob="total bits of a layer's experts",
        ties="expert",
        offers=lambda nbytes: largest(
            plan_of, range(experts + 3, 3 * experts + 1), nbytes, "{} bits"
        ),
    )


def _gemq(evidence: Evidence) -> Rule:
    table = under(costs.gemq(evidence, _levels()), profile("expert"))
    count = sum(layer.experts for layer in evidence.layout.layers)
    least = count + 3 * len(evidence.layout.layers)

    def plan_of(total: int) -> BitPlan:
        return solve(gemq_problem(table, total / count)).plan

    return Rule(
        name="GEMQ",
        source="arXiv 2605.23078",
        knob="total bits of all experts",
        ties="expert",
        offers=lambda nbytes: largest(plan_of, range(least, 3 * count + 1), nbytes, "{} bits"),
    )


def _moqa(sets: Sequence[Evidence]) -> Rule:
    """Every choice of two to four widths, and three fuzzifiers: nothing else moves its size."""
    widths = [item.bits for item in FORMATS]
    found = []
    for count in range(4, 1, -1):
        for precisions in combinations(widths, count):
            for fuzzifier in (2.0, 1.5, 3.0):
                plan = moqa_plan(sets, FORMATS, precisions=precisions, m=fuzzifier)
                text = f"{'/'.join(map(str, precisions))} bits, m = {fuzzifier:g}"
                found.append(Offer(plan, text))
    found.sort(key=lambda offer: offer.plan.total_bytes)

    def offers(nbytes: int) -> list[Offer]:
        fitting = [offer for offer in found if offer.plan.total_bytes <= nbytes]
        return fitting[-1:]

    return Rule(
        name="MoQa",
        source="arXiv 2503.21135",
        knob="the clusters' widths and the fuzzifier",
        ties="expert",
        offers=offers,
    )


def _threshold(table: CostTable) -> Rule:
    tied = under(table, profile("layer_proj"))

    def offers(nbytes: int) -> list[Offer]:
        problem = Problem(tied, Budget.bytes(nbytes))
        for low, high in reversed(list(pairwise(FORMATS))):
            try:
                plan = solve(problem, Threshold(low=low, high=high)).plan
            except InfeasibleError:
                continue
            return [Offer(plan, f"{low.bits} and {high.bits} bits")]
        return []

    return Rule(
        name="mlx-lm",
        source="its dynamic_quant",
        knob="the two widths and the threshold",
        ties="layer_proj",
        offers=offers,
    )


def _levels() -> tuple[Format, ...]:
    return make_formats(bits=LEVELS, group_size="row", symmetric=True)
