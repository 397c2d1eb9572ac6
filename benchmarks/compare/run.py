"""Strategies × budgets: judges every plan, isolates failures, and resumes a killed run."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, profile
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.refining import run_loop
from bitknap.api.requests import Refinement
from bitknap.benchmarks.compare.judge import bootstrap_error, mean_ranks
from bitknap.benchmarks.compare.models import Setting
from bitknap.benchmarks.compare.strategies import OURS, Strategy, plan_of, strategies
from bitknap.benchmarks.compare.tables import CALIBRATED, Tables
from bitknap.benchmarks.compare.tasks import Tasks
from bitknap.disk.append_log import append_lines, open_lines
from bitknap.errors import BitknapError, FileError, InfeasibleError
from bitknap.estimators.measuring.kl_replay import Losses
from bitknap.estimators.measuring.readings import Readings
from bitknap.report.quantize_document import steps_of

# Files read again when a killed run is resumed, and useless afterwards.
WORK = ".work"
OK, UNREACHABLE, FAILED = "ok", "unreachable", "failed"
# Plans that differ in size from Bitknap's by less than this share are compared with it unchanged.
_SAME_BYTES = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The result of one strategy at one budget.

    Attributes:
        strategy: its name.
        budget: bits per weight.
        status: "ok", "unreachable" or "failed".
        values: its values in the report, JSON values.
        kl: KL by window, [W]; empty without a plan.
        ours: KL of Bitknap's plan at the same bytes, [W].
        seconds: time that it took.
    """

    strategy: str
    budget: float
    status: str
    values: Mapping[str, Any]
    kl: Floats = field(default_factory=lambda: np.zeros(0))
    ours: Floats = field(default_factory=lambda: np.zeros(0))
    seconds: float = 0.0

    def line(self) -> dict[str, Any]:
        """Return the cell as JSON values."""
        fields = {
            "strategy": self.strategy,
            "budget": self.budget,
            "status": self.status,
            "values": dict(self.values),
            "kl": self.kl.tolist(),
            "ours": self.ours.tolist(),
            "seconds": self.seconds,
        }
        return {**fields, "sum": _sum(fields)}

    @classmethod
    def of_line(cls, line: bytes) -> Cell:
        """Return the cell of a line, the inverse of `line`.

        Raises:
            ValueError: the line is damaged.
        """
        fields: dict[str, Any] = json.loads(line)
        if not isinstance(fields, dict) or fields.pop("sum", None) != _sum(fields):
            raise ValueError("damaged")
        for name in ("kl", "ours"):
            fields[name] = np.array(fields[name], dtype=np.float64)
        return cls(**fields)


def _sum(values: Mapping[str, Any]) -> int:
    """Return the CRC-32 of JSON values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _cells(journal: Path, lines: Sequence[bytes]) -> Iterator[Cell]:
    """Yield the cells of a journal from the lines after its header."""
    for number, line in enumerate(lines, start=2):
        try:
            yield Cell.of_line(line)
        except (ValueError, RecursionError):
            raise FileError(
                f"{journal}: line {number} is damaged; delete {journal.parent} to start anew"
            ) from None


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
    cells = [] if journal is None else list(_cells(journal, open_lines(journal, about or {})))
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
    for strategy in _drawn(run, wanted):
        for budget in budgets:
            if setting.progress:
                setting.progress("strategies × budgets", len(run.done), total)
            if (strategy.name, budget) not in run.done:
                run.keep(_isolated(strategy.name, budget, lambda b: _judged(run, strategy, b)))  # noqa: B023
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
                    run.keep(_failure(name, budget, error))


def _isolated(name: str, budget: float, judge: Callable[[float], Cell]) -> Cell:
    try:
        return judge(budget)
    except Exception as error:  # one failing strategy must not stop the others
        return _failure(name, budget, error)


def _failure(name: str, budget: float, error: Exception) -> Cell:
    status = UNREACHABLE if isinstance(error, InfeasibleError) else FAILED
    kind = "" if isinstance(error, BitknapError) else f"{type(error).__name__}: "
    return Cell(strategy=name, budget=budget, status=status, values={"reason": f"{kind}{error}"})


def _judged(run: Comparison, strategy: Strategy, budget: float) -> Cell:
    """Return the losses of a strategy's plan, and of our plan at the same bytes."""
    setting, start = run.setting, time.perf_counter()
    about: dict[str, Any] = {
        "group": strategy.group,
        "source": strategy.source,
        "measurements": strategy.measurements,
    }
    offers = list(strategy.offers(run.limit(budget)))
    seconds = time.perf_counter() - start
    if not offers:
        reason = f"no plan of at most {run.limit(budget):,} bytes"
        values = {**about, "reason": reason}
        return Cell(strategy=strategy.name, budget=budget, status=UNREACHABLE, values=values)
    judged = [(offer, setting.judge.of(offer.plan)) for offer in offers]
    if strategy.average:
        offer, losses = judged[0][0], _mean([losses for _, losses in judged])
    else:
        offer, losses = min(judged, key=lambda pair: float(pair[1].kl.mean()))
    tasks = None if strategy.average else run.tasks
    values = {**about, "setting": offer.setting, **_facts(run, offer.plan, losses, tasks)}
    return Cell(
        strategy=strategy.name,
        budget=budget,
        status=OK,
        values=values,
        kl=losses.kl,
        ours=_ours_at(run, budget, offer.plan.total_bytes),
        seconds=seconds,
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


def _ours_at(run: Comparison, budget: float, nbytes: int) -> Floats:
    """Return our KL by window at a plan's bytes, of the refined plan or of a newly solved one."""
    plan = run.plans[budget]
    if abs(plan.total_bytes - nbytes) > _SAME_BYTES * nbytes:
        plan = plan_of(run.setting, run.tables.of(CALIBRATED), nbytes)
    return run.setting.judge.of(plan).kl


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
