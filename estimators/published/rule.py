"""Common parts of the published rules: their inputs, their results, and helpers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, Format, Problem, Solver, solve
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import formats as make_formats
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.errors import InputError
from bitknap.estimators.published import RULES
from bitknap.names import check_name
from bitknap.progress import Progress

if TYPE_CHECKING:
    from bitknap.estimators.evidence.evidence import Evidence
    from bitknap.estimators.signals.signal import Signal

# All rules choose from these formats, so that they differ only in their choice.
FORMATS = make_formats(bits=(1, 2, 3, 4), group_size="row", symmetric=True)
# Widths of MC-MoE, GEMQ and Chowdhury et al., and their formats.
LEVELS = (1, 2, 3)
LEVEL_FORMATS = make_formats(bits=LEVELS, group_size="row", symmetric=True)
BYTES = "bytes"


class Offer(NamedTuple):
    """A plan, and the value of the rule's knob that produced it; "" for a byte limit."""

    plan: BitPlan
    setting: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One allocator, ready to plan.

    Attributes:
        name: its title in the report.
        source: the paper or program.
        knob: the parameter that is changed to meet a size.
        ties: which units share a format.
        offers: returns plans within a number of bytes; if there are several, the best on the
            evaluation text counts.
    """

    name: str
    source: str
    knob: str
    ties: str
    offers: Callable[[int], Sequence[Offer]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The inputs of rules.

    Attributes:
        evidence: the calibration pass, with curvature, traces and gradients.
        final: router norms at the end of training, by layer.
        initial: router norms at its start; None uses the final norms alone.
        sets: passes over several texts, for rules that ask for them.
    """

    evidence: Evidence
    final: Mapping[int, Floats]
    initial: Mapping[int, Floats] | None
    sets: tuple[Evidence, ...]


def rule_of(name: str, material: Material, progress: Progress | None = None) -> Rule:
    """Return a published rule by its name in `RULES`; what it measures is measured now.

    Args:
        name: name of an entry that makes plans.
        material: the inputs of the rule.
        progress: called with (what, done, of) while it measures.

    Raises:
        InputError: no entry of that name makes plans.
    """
    known = [key for key, entry in RULES.items() if entry.plans]
    if name in RULES and name not in known:
        raise InputError(f"rule {name!r} makes no plans; those that do are {', '.join(known)}")
    check_name("rule", name, known)
    made: Rule = _module(name).rule(material, progress)
    return made


def _module(name: str) -> Any:
    """Import a paper's file now; most of them need torch."""
    return import_module(f"bitknap.estimators.published.{name.replace('-', '_')}")


def named(
    name: str,
    offers: Callable[[int], Sequence[Offer]],
    *,
    knob: str = BYTES,
    title: str | None = None,
) -> Rule:
    """Return the rule of an entry, with another title for a variation of it."""
    entry = RULES[name]
    return Rule(
        name=title or entry.title, source=entry.source, knob=knob, ties=entry.ties, offers=offers
    )


def tied_to(name: str, table: CostTable) -> CostTable:
    """Return a table under the ties of an entry."""
    return under(table, profile(RULES[name].ties))


def solved(name: str, table: CostTable, solver: Solver | None = None) -> Rule:
    """Return the rule of an entry that solves a table under its ties, within a byte limit.

    Args:
        name: name of the entry.
        table: its costs.
        solver: its allocator; the knapsack when not given.
    """
    tied = tied_to(name, table)

    def offers(nbytes: int) -> list[Offer]:
        return [Offer(solve(Problem(tied, Budget.bytes(nbytes)), solver).plan, "")]

    return named(name, offers)


def largest(
    plan_of: Callable[[Any], BitPlan], knobs: Sequence[Any], nbytes: int, text: str
) -> list[Offer]:
    """Return the plan of the last knob that fits; none if no plan does.

    Args:
        plan_of: maps a knob to its plan.
        knobs: values of the knob, in the order of the plans' bytes.
        nbytes: maximum size.
        text: format string for a knob.
    """
    size = bisect_right(knobs, nbytes, key=lambda knob: plan_of(knob).total_bytes)
    if not size:
        return []
    knob = knobs[size - 1]
    return [Offer(plan_of(knob), text.format(knob))]


def ranked(evidence: Evidence, formats: Sequence[Format], cost: Floats, name: str) -> CostTable:
    """Return a table of costs that only rank.

    Args:
        evidence: gives the units.
        formats: F formats.
        cost: float64[U,F], in the paper's unit, which is never nats.
        name: the estimator in the table's provenance.
    """
    return CostTable.from_arrays(
        cost,
        units=evidence.units,
        formats=tuple(formats),
        provenance={**evidence.provenance, "unit": "score", "estimator": name},
    )


def each_format(
    evidence: Evidence, formats: Sequence[Format], signal: Callable[[Format], Signal], name: str
) -> CostTable:
    """Return a table of a signal's scores at every format, which only rank."""
    cost = np.stack([signal(format).score(evidence) for format in formats], axis=1)
    return ranked(evidence, formats, cost, name)
