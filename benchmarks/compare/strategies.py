"""Every strategy by name: how it makes a plan within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from bitknap.allocation import (
    BitPlan,
    Budget,
    CostTable,
    Problem,
    Search,
    Solver,
    catalog,
    profile,
    solve,
)
from bitknap.allocation.problem.arrays import Ints
from bitknap.allocation.published.evopress import Evolution
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.allocation.tradeoffs.uniform_recipes import uniform_plans_within
from bitknap.api.plan_measures import measures
from bitknap.benchmarks.compare.hand_recipes import down_first, first_layers, offers
from bitknap.benchmarks.compare.models import Setting
from bitknap.benchmarks.compare.tables import CALIBRATED, ESTIMATORS, LADDER, SCORES, Tables
from bitknap.errors import InputError
from bitknap.estimators.catalog import ESTIMATORS as ESTIMATOR_NAMES
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.published import RULES
from bitknap.estimators.published.rule import Material, Offer, rule_of
from bitknap.estimators.signals.plain import RandomScore
from bitknap.estimators.signals.scored import Scored
from bitknap.names import guess

OURS, UNREFINED, ROWS = "ours", "ours-unrefined", "ours-rows"
EVOLUTION = "evolution"
RECIPES = ("uniform", "first-layers-high", "down-high")
SEEDS = 10
SOLVERS = tuple(row.name for row in catalog.SOLVERS.rows)
# Names of published rules here, and their names in reports.
PUBLISHED: Mapping[str, str] = MappingProxyType(
    {name: entry.title for name, entry in RULES.items() if entry.plans}
)
# Number of plans that the solver `search` measures, each on the first part of the text.
_TRIALS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to choose bits.

    Attributes:
        name: its name at the command line.
        group: the kind of strategy.
        source: its origin.
        offers: plans of at most the given bytes; of several, the best on the judge's text counts.
        average: whether the mean over all offers counts instead.
        measurements: number of KL readings on calibration text that its plan took.
    """

    name: str
    group: str
    source: str
    offers: Callable[[int], Sequence[Offer]]
    average: bool = False
    measurements: int = 0


def names(words: Sequence[str]) -> tuple[str, ...]:
    """Return the strategies that words name, ours first, each once.

    Args:
        words: "all", "quick", "published", or names; ESTIMATOR:SOLVER is a name too.

    Raises:
        InputError: a word is none of these.
    """
    chosen: dict[str, None] = dict.fromkeys((OURS, UNREFINED, ROWS, "uniform"))
    for word in words:
        estimator, _, solver = word.partition(":")
        if word in _SETS:
            chosen |= dict.fromkeys(_SETS[word])
        elif word in _ALONE or _made_of_two(estimator, solver):
            chosen[word] = None
        else:
            near = guess(word, (*_SETS, *_ALONE, *_SETS["all"]))
            raise InputError(
                f"--strategies {word!r}: write {', '.join(_SETS)}, one of {', '.join(_ALONE)}, or "
                f"ESTIMATOR:SOLVER, such as fisher:greedy, with {', '.join(ESTIMATORS)} and "
                f"{', '.join(SOLVERS)}{near}"
            )
    return tuple(chosen)


def _made_of_two(estimator: str, solver: str) -> bool:
    """Return whether both are known names, from Bitknap or another package."""
    others = ESTIMATOR_NAMES.names()
    return (estimator in ESTIMATORS or estimator in others) and solver in catalog.SOLVERS.names()


_ALONE = (OURS, UNREFINED, ROWS, *RECIPES, "random", EVOLUTION, *PUBLISHED)
_SETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "all": (
            *_ALONE,
            *(f"{name}:{solver}" for name in LADDER for solver in SOLVERS),
            *(f"{name}:{solver}" for name in SCORES for solver in SOLVERS[:3]),
        ),
        "quick": (
            "uniform",
            "down-high",
            "chowdhury",
            "mc-moe",
            *(f"{name}:knapsack" for name in ("weight-error", "moments", "fisher-output")),
            "frequency:knapsack",
            f"{CALIBRATED}:greedy",
        ),
        "published": tuple(PUBLISHED),
    }
)


def strategies(setting: Setting, tables: Tables, wanted: Sequence[str]) -> Iterator[Strategy]:
    """Yield the wanted strategies except `OURS`; tables are made as needed."""
    units, fingerprint = setting.evidence.units, setting.source.fingerprint
    formats = setting.options.formats
    for name in wanted:
        if name == "uniform":
            yield Strategy(
                name=name,
                group="uniform",
                source="best recipe, chosen on the judge's text",
                offers=lambda nbytes: [
                    Offer(plan, " + ".join(item.name for item in plan.formats))
                    for plan in uniform_plans_within(units, formats, nbytes, fingerprint)
                ],
            )
        elif name in RECIPES:
            order = (first_layers if name == "first-layers-high" else down_first)(units)
            yield Strategy(
                name=name,
                group="uniform",
                source="two widths, best family on the judge's text",
                offers=lambda nbytes, order=order: offers(  # type: ignore[misc]
                    units, formats, order, nbytes, fingerprint
                ),
            )
        elif name == "random":
            yield _random(setting)
        elif name == UNREFINED:
            yield _of_table(setting, tables, name, CALIBRATED, "knapsack", "ours")
        elif name in PUBLISHED:
            yield _published(setting, name)
        elif name == ROWS:
            yield _rows(setting, tables)
        elif name == EVOLUTION:
            yield _evolution(setting, tables)
        elif ":" in name:
            estimator, _, solver = name.partition(":")
            group = "signal" if estimator in SCORES else "estimator"
            yield _of_table(setting, tables, name, estimator, solver, group)


def _published(setting: Setting, name: str) -> Strategy:
    """Return a paper's rule with its own costs, ties and allocator."""
    material = Material(
        evidence=setting.evidence,
        final=setting.final,
        initial=setting.initial,
        sets=setting.sets() if RULES[name].texts else (),
    )
    rule = rule_of(name, material, setting.progress)
    return Strategy(name=name, group="published", source=rule.source, offers=rule.offers)


def plan_of(
    setting: Setting, table: CostTable, nbytes: int, solver: Solver | None = None
) -> BitPlan:
    """Return a table's plan of at most `nbytes`, with the ties of the comparison."""
    tied = under(table, profile(setting.options.profile))
    return solve(Problem(tied, Budget.bytes(nbytes)), solver).plan


def _of_table(
    setting: Setting, tables: Tables, name: str, estimator: str, solver: str, group: str
) -> Strategy:
    table = tables.of(estimator)
    searched = _TRIALS if solver == "search" else 0

    def offers(nbytes: int) -> list[Offer]:
        return [Offer(plan_of(setting, table, nbytes, _solver(setting, table, solver)), "")]

    return Strategy(
        name=name,
        group=group,
        source=str(table.provenance.get("estimator", estimator)),
        offers=offers,
        measurements=tables.measurements(estimator) + searched,
    )


def _solver(setting: Setting, table: CostTable, name: str) -> Solver:
    if name == "search":
        measure = measures(setting.loop, table, Readings())[0]

        def objective(choice: Ints) -> float:
            return float(measure(choice).mean())

        return Search(objective=objective, trials=_TRIALS, seed=setting.options.seed)
    return catalog.solver_of(name)


def _rows(setting: Setting, tables: Tables) -> Strategy:
    """Return Bitknap's strategy without a choice of group size and zero point, as in papers."""
    table = in_rows(tables.of(CALIBRATED))

    def offers(nbytes: int) -> list[Offer]:
        return [Offer(plan_of(setting, table, nbytes), "")]

    return Strategy(
        name=ROWS,
        group="ours",
        source="calibrated, whole rows without zeros alone",
        offers=offers,
        measurements=tables.measurements(CALIBRATED),
    )


def in_rows(table: CostTable) -> CostTable:
    """Return the table with only whole-row formats without zeros, as published rules use them."""
    plain = np.array([item.group_size == 0 and item.symmetric for item in table.formats])
    return replace(table, cost=np.where(plain, table.cost, np.inf)) if plain.any() else table


def _random(setting: Setting) -> Strategy:
    """Return the strategy of log-normal random scores with the exact plan for them."""
    seeds = range(setting.options.seed, setting.options.seed + SEEDS)

    def offers(nbytes: int) -> list[Offer]:
        plans = []
        for seed in seeds:
            scored = Scored(RandomScore(seed))
            table = scored.estimate(setting.evidence, setting.options.formats)
            plans.append(Offer(plan_of(setting, table, nbytes), f"mean of {SEEDS} seeds"))
        return plans

    source = f"log-normal scores, mean of {SEEDS} seeds"
    return Strategy(name="random", group="random", source=source, offers=offers, average=True)


def _evolution(setting: Setting, tables: Tables) -> Strategy:
    """Return evolution over widths of whole rows, with as many measured plans as Bitknap."""
    table = in_rows(tables.of(CALIBRATED))
    count = tables.measurements(CALIBRATED) + setting.options.evaluations
    parts = measures(setting.loop, table, Readings())
    paper = RULES["evopress"]

    def offers(nbytes: int) -> list[Offer]:
        solver = Evolution(
            parts=parts,
            evaluations=count,
            seed=setting.options.seed,
            progress=setting.progress,
        )
        return [Offer(plan_of(setting, table, nbytes, solver), "")]

    return Strategy(
        name=EVOLUTION,
        group="search",
        source=f"{paper.title}, {paper.source}",
        offers=offers,
        measurements=count,
    )
