"""Strategies × budgets: judges every plan, isolates failures, and resumes a killed run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, profile
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.refining import run_loop
from bitknap.api.requests import Refinement
from bitknap.benchmarks.compare.cells import OK, UNREACHABLE, Cell, cells_of, failure
from bitknap.benchmarks.compare.judge import Judge, bootstrap_error, mean_ranks
from bitknap.benchmarks.compare.models import Setting
from bitknap.benchmarks.compare.strategies import OURS, Strategy, plan_of, strategies
from bitknap.benchmarks.compare.tables import CALIBRATED, Tables
from bitknap.benchmarks.compare.tasks import Tasks
from bitknap.disk.append_log import append_lines, open_lines
from bitknap.estimators.measuring.kl_replay import Losses
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.published.rule import Offer
from bitknap.report.quantize_document import steps_of

# Files read again when a killed run is resumed, and useless afterwards.
WORK = ".work"
# Plans that differ in size from Bitknap's by less than this share are compared with it unchanged.
_SAME_BYTES = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A comparison under way.

    Attributes:
        setting: what strategies plan from.
        tables: cost tables by name.
        budgets: bits per weight.
        journal: file that keeps finished cells; they are not kept when not given.
        done: finished cells.
        plans: our plans, by budget.
        tasks: tasks that plans are also evaluated on.
    """

    setting: Setting
    tables: Tables
    budgets: tuple[float, ...]
    journal: Path | None = None
    done: dict[tuple[str, float], Cell] = field(default_factory=dict)
    plans: dict[float, BitPlan] = field(default_factory=dict)
    tasks: Tasks | None = None

    def limit(self, budget: float) -> int:
        """Return the bytes of a budget."""
        return int(Budget.bits(budget).limit(self.tables.of(CALIBRATED)).bound)

    def keep(self, cell: Cell) -> None:
        """Add a finished cell, and write it to disk."""
        self.done[cell.strategy, cell.budget] = cell
        if self.journal is not None:
            append_lines(self.journal, [cell.line()])


def compare(
    setting: Setting,
    wanted: Sequence[str],
    budgets: Sequence[float],
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    tasks: Tasks | None = None,
    tables: Mapping[str, CostTable] | None = None,
) -> Comparison:
    """Judge the wanted strategies at every budget.

    Args:
        setting: the model and the texts.
        wanted: names of strategies, including ours.
        budgets: bits per weight.
        folder: folder that keeps tables and journals, so that a killed run can continue.
        about: the inputs that the journal belongs to.
        tasks: tasks that plans are also evaluated on, except averages over several plans.
        tables: existing cost tables, by name.

    Raises:
        MismatchError: the journal in `folder` belongs to other inputs.
        FileError: the journal is damaged.
    """
    work = None if folder is None else folder / WORK
    journal = None if work is None else work / "journal"
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    cells = [] if journal is None else list(cells_of(journal, open_lines(journal, about or {})))
    run = Comparison(
        setting=setting,
        tables=Tables(
            setting=setting,
            folder=None if work is None else work / "tables",
            known=dict(tables or {}),
        ),
        budgets=tuple(budgets),
        journal=journal,
        done={(cell.strategy, cell.budget): cell for cell in cells},
        tasks=tasks,
    )
    total = len(wanted) * len(budgets)
    for budget in budgets:
        _ours(run, budget, work)
    waiting: list[_Planned] = []
    for strategy in _drawn(run, wanted):
        for budget in budgets:
            if setting.progress:
                setting.progress("strategies × budgets", len(run.done), total)
            if (strategy.name, budget) not in run.done:
                waiting += _planned(run, strategy, budget)
            if sum(len(one.offers) for one in waiting) >= setting.judge.together:
                _judge(run, waiting)
                waiting = []
    _judge(run, waiting)
    return run


def _drawn(run: Comparison, wanted: Sequence[str]) -> Iterator[Strategy]:
    """Yield strategies with work left; a strategy that cannot be created counts as failed."""
    left = [
        name for name in wanted if any((name, budget) not in run.done for budget in run.budgets)
    ]
    setting, tables = run.setting, run.tables
    for name in left:
        yield from _made(run, [name], lambda name=name: strategies(setting, tables, [name]))  # type: ignore[misc]


def _made(
    run: Comparison, names: Sequence[str], make: Callable[[], Iterator[Strategy]]
) -> Iterator[Strategy]:
    try:
        yield from make()
    except Exception as error:  # one failing strategy must not stop the others
        for name in names:
            for budget in run.budgets:
                if (name, budget) not in run.done and name != OURS:
                    run.keep(failure(name, budget, error))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A strategy's plans at a budget, which are still to be judged.

    Attributes:
        strategy: the strategy.
        budget: bits per weight.
        offers: its plans, at least one.
        seconds: time that the plans took.
    """

    strategy: Strategy
    budget: float
    offers: Sequence[Offer]
    seconds: float

    def best(self, judge: Judge) -> tuple[Offer, Losses]:
        """Return the plan that counts, and the strategy's losses."""
        judged = [(offer, judge.of(offer.plan)) for offer in self.offers]
        if self.strategy.average:
            return judged[0][0], _mean([losses for _, losses in judged])
        return min(judged, key=lambda pair: float(pair[1].kl.mean()))

    @property
    def about(self) -> dict[str, Any]:
        """The strategy as JSON values."""
        fields = ("group", "source", "measurements")
        return {name: getattr(self.strategy, name) for name in fields}


def _planned(run: Comparison, strategy: Strategy, budget: float) -> list[_Planned]:
    """Return a strategy's plans; none if it has none or fails, which its cell then says."""
    start = time.perf_counter()
    try:
        offers = list(strategy.offers(run.limit(budget)))
    except Exception as error:  # one failing strategy must not stop the others
        run.keep(failure(strategy.name, budget, error))
        return []
    seconds = time.perf_counter() - start
    planned = _Planned(strategy=strategy, budget=budget, offers=offers, seconds=seconds)
    if offers:
        return [planned]
    reason = f"no plan of at most {run.limit(budget):,} bytes"
    values = {**planned.about, "reason": reason}
    run.keep(Cell(strategy=strategy.name, budget=budget, status=UNREACHABLE, values=values))
    return []


def _judge(run: Comparison, waiting: Sequence[_Planned]) -> None:
    """Judge plans together, and keep their cells."""
    judge = run.setting.judge
    with contextlib.suppress(Exception):  # a plan that cannot be measured fails alone, below
        judge.read([offer.plan for one in waiting for offer in one.offers])
        best = [(one, one.best(judge)[0].plan.total_bytes) for one in waiting]
        judge.read([_ours_at(run, one.budget, nbytes) for one, nbytes in best])
    for one in waiting:
        try:
            run.keep(_judged(run, one))
        except Exception as error:  # one failing strategy must not stop the others
            run.keep(failure(one.strategy.name, one.budget, error))


def _judged(run: Comparison, planned: _Planned) -> Cell:
    """Return the losses of a strategy's plan, and of our plan at the same bytes."""
    judge, strategy = run.setting.judge, planned.strategy
    offer, losses = planned.best(judge)
    facts = _facts(run, offer.plan, losses, None if strategy.average else run.tasks)
    return Cell(
        strategy=strategy.name,
        budget=planned.budget,
        status=OK,
        values={**planned.about, "setting": offer.setting, **facts},
        kl=losses.kl,
        ours=judge.of(_ours_at(run, planned.budget, offer.plan.total_bytes)).kl,
        seconds=planned.seconds,
    )


def _mean(losses: Sequence[Losses]) -> Losses:
    parts = {n: np.mean([getattr(one, n) for one in losses], axis=0) for n in ("nll", "kl", "top1")}
    return Losses(**parts)


def _facts(run: Comparison, plan: BitPlan, losses: Losses, tasks: Tasks | None) -> dict[str, Any]:
    """Return the size of a plan with its predicted and measured losses, as JSON values."""
    facts = {
        "bytes": plan.total_bytes,
        "bpw": plan.bpw,
        "predicted": _predicted(run, plan),
        "perplexity": losses.perplexity,
        "top1": float(losses.top1.mean()),
    }
    return facts if tasks is None else facts | {"tasks": tasks.scores(run.setting, plan)}


def _predicted(run: Comparison, plan: BitPlan) -> float | None:
    """Return the loss that the calibrated table predicts; None if it lacks a format or unit."""
    table = run.tables.of(CALIBRATED)
    if not plan.units.same_as(table.units) or not set(plan.formats) <= set(table.formats):
        return None
    columns = np.array([table.formats.index(item) for item in plan.formats])[plan.choice]
    return float(table.cost[np.arange(len(columns)), columns].sum())


def _ours_at(run: Comparison, budget: float, nbytes: int) -> BitPlan:
    """Return our plan at a plan's bytes: the refined plan, or a newly solved one."""
    plan = run.plans[budget]
    if abs(plan.total_bytes - nbytes) > _SAME_BYTES * nbytes:
        plan = plan_of(run.setting, run.tables.of(CALIBRATED), nbytes)
    return plan


def _ours(run: Comparison, budget: float, work: Path | None) -> None:
    """Refine the calibrated plan at a budget, let the gate judge it, and keep its plan."""
    file = None if work is None else work / f"{budget:g}bpw.json"
    if (OURS, budget) in run.done and file is not None and file.is_file():
        run.plans[budget] = BitPlan.load(file)
        return
    setting, tables = run.setting, run.tables
    start = time.perf_counter()
    table = under(tables.of(CALIBRATED), profile(setting.options.profile))
    journal = Readings()
    if work is not None:
        about = {"what": "measured plans", "budget": budget, "profile": setting.options.profile}
        journal = Readings.open(work / f"refine.{budget:g}bpw.journal", about)
    outcome = run_loop(
        setting.loop,
        table,
        [Budget.bits(budget)],
        Refinement(evaluations=setting.options.evaluations, seed=setting.options.seed),
        readings=journal,
        progress=setting.progress,
    )
    run.plans[budget] = outcome.plan
    seconds = time.perf_counter() - start
    losses = setting.judge.of(outcome.plan)
    if file is not None:
        outcome.plan.save(file)
    values = {
        "group": "ours",
        "source": "calibrated, refined, gated",
        "measurements": tables.measurements(CALIBRATED) + len(outcome.refined.steps),
        "setting": "" if outcome.passed else f"the gate chose {outcome.recipe}",
        **_facts(run, outcome.plan, losses, run.tasks),
        "refine": steps_of(outcome.refined.steps),
        "loop": outcome.facts(),
    }
    run.keep(
        Cell(
            strategy=OURS,
            budget=budget,
            status=OK,
            values=values,
            kl=losses.kl,
            ours=losses.kl,
            seconds=seconds,
        )
    )


def rows(run: Comparison) -> list[dict[str, Any]]:
    """Return all cells as rows of the report: ours first, then by budget and loss."""
    report_rows = []
    for budget in run.budgets:
        here = [cell for (_, at), cell in run.done.items() if at == budget]
        fine = sorted(
            (cell for cell in here if cell.status == OK),
            key=lambda cell: (cell.strategy != OURS, float(cell.kl.mean()), cell.strategy),
        )
        domains = [run.setting.judge.by_domain(cell.kl) for cell in fine]
        ranks = mean_ranks(domains)
        for cell, domain, rank in zip(fine, domains, ranks, strict=True):
            report_rows.append(_row(cell, domain, rank))
        bad = sorted((cell for cell in here if cell.status != OK), key=lambda cell: cell.strategy)
        report_rows += [_row(cell, None, None) for cell in bad]
    return report_rows


_NUMBERS = ("setting", "bytes", "bpw", "perplexity", "top1", "measurements", "predicted")


def _row(cell: Cell, domain: Mapping[str, float] | None, rank: float | None) -> dict[str, Any]:
    difference = cell.kl - cell.ours
    fine = cell.status == OK
    same = cell.strategy == OURS or not fine
    return {
        "strategy": cell.strategy,
        "group": cell.values.get("group", ""),
        "source": cell.values.get("source", ""),
        "budget": f"{cell.budget:g}bpw",
        "status": cell.status,
        "reason": cell.values.get("reason", ""),
        **{name: cell.values.get(name) for name in _NUMBERS},
        "kl": float(cell.kl.mean()) if fine else None,
        "kl_se": bootstrap_error(cell.kl) if fine else None,
        "difference": None if same else float(difference.mean()),
        "difference_se": None if same else bootstrap_error(difference),
        "ratio": None if same else float(cell.kl.mean() / cell.ours.mean()),
        "rank": rank,
        "domain_kl": domain,
        **({"tasks": cell.values["tasks"]} if "tasks" in cell.values else {}),
    }
