"""Output of a comparison: JSON, CSV, plans, a picture, one page; all but times are reproducible."""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation import Budget, profile
from bitknap.allocation.tradeoffs.profile_price import price, priced, under
from bitknap.benchmarks.compare.run import WORK, Comparison, rows
from bitknap.benchmarks.compare.strategies import OURS
from bitknap.benchmarks.compare.tables import CALIBRATED, facts
from bitknap.disk.append_log import open_lines
from bitknap.disk.atomic import beside, write_whole
from bitknap.disk.manifest import MANIFEST, names_in, sign
from bitknap.disk.outputs import check_only, drop, place, writing
from bitknap.errors import FileError, MismatchError
from bitknap.report.quantize_document import coverage_of, frontier_points

# All that a comparison writes into its folder, folders with a slash. It is listed before it is
# written, so that a kill leaves nothing unknown.
_TO_COME = (
    "compare.json",
    "pareto.png",
    "plans/",
    "report.html",
    "rows.csv",
    "times.json",
    f"{WORK}/",
)
_NAMES = "|".join(re.escape(name.rstrip("/")) for name in (*_TO_COME, MANIFEST))
# What is in the folder of working files.
_WORKING = r"journal|tables|.*bpw\.json|refine\..*bpw\.journal"
_PACKAGES = ("numpy", "torch", "transformers", "optuna", "highspy", "scikit-fuzzy")


def about(run: Comparison, command: str) -> dict[str, Any]:
    """Return a description of the comparison as JSON values."""
    setting = run.setting
    options, units = setting.options, setting.evidence.units
    loop = setting.loop
    return {
        "model": options.model,
        "fingerprint": setting.source.fingerprint,
        "method": options.method,
        "profile": options.profile,
        "seed": options.seed,
        "units": len(units),
        "weights": int(units.numel.sum()),
        "formats": [item.name for item in options.formats],
        "calibration_tokens": options.tokens,
        "refine_tokens": sum(part.windows.numel() for part in loop.parts),
        "gate_tokens": loop.gate.windows.numel(),
        "evaluation_tokens": setting.judge.sample.windows.numel(),
        "domains": list(setting.judge.names),
        "versions": {package: version(package) for package in _PACKAGES},
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "command": command,
    }


def document(run: Comparison, command: str) -> dict[str, Any]:
    """Return the whole comparison as JSON values, none of which depends on the clock."""
    table = run.tables.of(CALIBRATED)
    name = run.setting.options.profile
    tied = under(table, profile(name))
    middle = run.budgets[len(run.budgets) // 2]
    prices = price(table, Budget.bits(middle))
    ours = {budget: run.done[OURS, budget].values for budget in run.budgets}
    return {
        "format": "bitknap.compare",
        "version": "1.0",
        "about": about(run, command),
        "budgets": [
            {
                "budget": f"{budget:g}bpw",
                "bytes": run.limit(budget),
                "plan": f"plans/{budget:g}bpw.json",
            }
            for budget in run.budgets
        ],
        "rows": rows(run),
        "frontier": frontier_points(tied),
        "price": [
            {key: value for key, value in row.items() if key != "seconds"} | {"budget": middle}
            for row in priced(prices, name)["price"]
        ],
        "coverage": coverage_of(table),
        "original": original(run),
        "refine": {f"{budget:g}bpw": values["refine"] for budget, values in ours.items()},
        "loop": {f"{budget:g}bpw": values["loop"] for budget, values in ours.items()},
    }


def original(run: Comparison) -> dict[str, Any]:
    """Return the losses of the original model, and its scores if tasks were requested."""
    row: dict[str, Any] = {"perplexity": run.setting.judge.original().perplexity}
    if run.tasks is not None:
        row["tasks"] = run.tasks.scores(run.setting, None)
    return row


def times(run: Comparison) -> dict[str, Any]:
    """Return the seconds for each table, and for each strategy's plans by budget."""
    plans: dict[str, dict[str, float]] = {}
    for (name, budget), cell in sorted(run.done.items()):
        plans.setdefault(name, {})[f"{budget:g}bpw"] = round(cell.seconds, 3)
    return {"tables": facts(run.tables), "plans": plans}


@contextlib.contextmanager
def writing_into(out: Path, about: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, which takes its place at the end.

    A stopped run continues in the same hidden folder. At the end, what a stopped run continues
    from leaves the folder in one step, so that `out` is never seen unfinished.

    Args:
        out: the folder to write.
        about: the inputs of the run.
        overwrite: whether an existing output, and a stopped run with other inputs, may be replaced
            if Bitknap wrote them.

    Raises:
        InputError: another process is writing it.
        MismatchError: a stopped run with other inputs is there.
        FileError: its journal is damaged.
    """
    with writing(out):
        part = beside(out, "partial")
        check_only(part, _NAMES)
        _take_back(out, part)
        if not _goes_on(part, about, overwrite=overwrite):
            drop(part, _NAMES)
        if not part.exists():  # never there without the folder that marks an unfinished run
            new = beside(out, "new")
            check_only(new, _NAMES)
            (new / WORK).mkdir(parents=True, exist_ok=True)
            sign(new, _TO_COME)
            new.rename(part)
        (part / WORK).mkdir(exist_ok=True)
        sign(part, [*_written(part), *_TO_COME])
        yield part
        _drop_work(out)
        sign(part, [name for name in _written(part) if not name.startswith(f"{WORK}/")])
        (part / WORK).rename(_put_aside(out))
        place(part, out, overwrite=overwrite)
        _drop_work(out)


def _put_aside(out: Path) -> Path:
    """Return where a finished run's working files are until they are deleted."""
    return beside(out, "work")


def _take_back(out: Path, part: Path) -> None:
    """Give a run that was killed before its folder took its place its working files again."""
    aside = _put_aside(out)
    check_only(aside, _WORKING)
    if aside.exists() and part.exists() and not (part / WORK).exists():
        aside.rename(part / WORK)


def _drop_work(out: Path) -> None:
    aside = _put_aside(out)
    check_only(aside, _WORKING)
    drop(aside, _WORKING)


def _goes_on(folder: Path, about: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Return whether the folder belongs to a stopped run with the same inputs.

    Raises:
        MismatchError: it belongs to one with other inputs, and may not be replaced.
        FileError: its journal is damaged, and may not be replaced.
    """
    journal = folder / WORK / "journal"
    if not journal.is_file():
        return False
    try:
        open_lines(journal, about, way_out=f"pass `overwrite=True` or delete {folder}")
    except (FileError, MismatchError):
        if not overwrite:
            raise
        return False
    return True


def _written(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if re.fullmatch(_NAMES, name.partition("/")[0])]


def write(run: Comparison, folder: Path, command: str) -> dict[str, Any]:
    """Write all files, and return the document."""
    from bitknap.report.run_files import write_report

    results = document(run, command)
    plans = {f"{budget:g}bpw": plan for budget, plan in run.plans.items()}
    for name, plan in plans.items():
        (folder / "plans").mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plans" / f"{name}.json")
    write_whole(folder / "compare.json", _bytes(results))
    write_report(results, plans, folder)
    write_whole(folder / "times.json", _bytes(times(run)))
    return results


def _bytes(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"
