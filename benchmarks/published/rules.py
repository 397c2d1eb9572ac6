"""Published rules with their own costs, ties and allocators, run for the largest plan that fits.

A rule with a byte limit gets it. For a rule that controls the average itself, its parameter is
scanned for the largest plan within the limit. No rule sees the text that its plans are judged on,
except the uniform recipe, which is chosen on it. The rules are in `bitknap.estimators.published`,
one file per paper; this file adds the baselines.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitknap.allocation import Budget, Problem, solve
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.allocation.tradeoffs.uniform_recipes import uniform_plans_within
from bitknap.api.quantizing import default_formats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published import RULES, chowdhury
from bitknap.estimators.published.rule import BYTES, FORMATS, Material, Offer, Rule, rule_of
from bitknap.estimators.signals.plain import RandomScore
from bitknap.estimators.signals.scored import Scored
from bitknap.progress import Progress


def rules(material: Material, progress: Progress | None = None) -> Iterator[Rule]:
    """Yield every rule, with variants of Chowdhury et al.'s; a rule measures when it is yielded."""
    yield _uniform(material.evidence)
    yield _random(material.evidence)
    for name, entry in RULES.items():
        if name == "chowdhury":
            yield from chowdhury.variations(material)
        elif entry.plans:
            yield rule_of(name, material, progress)


def _uniform(evidence: Evidence) -> Rule:
    """Return the rule of uniform recipes: one format, or two widths round robin.

    Covers every width × group size × zero point × metadata. Recipes that leave more than a
    twentieth of the bytes unused are skipped if others use them.
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


def _random(evidence: Evidence) -> Rule:
    """Return the rule of random scores, which uses no information."""
    table = under(Scored(RandomScore()).estimate(evidence, FORMATS), profile("free"))

    def offers(nbytes: int) -> list[Offer]:
        return [Offer(solve(Problem(table, Budget.bytes(nbytes))).plan, "")]

    return Rule(
        name="random", source="log-normal scores, seed 0", knob=BYTES, ties="free", offers=offers
    )
