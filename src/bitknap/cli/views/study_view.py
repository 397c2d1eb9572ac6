"""A study on the terminal: live while it runs, as tables and as JSON values afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from bitknap.allocation.search.best_trials import front, records
from bitknap.allocation.search.optuna_trials import shown
from bitknap.allocation.search.study import Study
from bitknap.allocation.search.trial_record import Record
from bitknap.cli.terminal import present, progress_bars
from bitknap.cli.views.tables import facts_table


@contextlib.contextmanager
def watching(trials: int, as_json: bool) -> Iterator[Callable[[Record], None]]:
    """Yield a callback for finished trials: a live table, plain lines, or a bar beside JSON."""
    done: list[Record] = []
    if as_json:
        with progress_bars() as bar:
            yield lambda record: bar("trials", record.number, trials) if bar else None
        return
    if not sys.stdout.isatty():
        yield lambda record: print(_line(record), flush=True)
        return
    with Live(trials_table("trials", done), transient=True) as live:

        def watch(record: Record) -> None:
            done.append(record)
            live.update(trials_table(f"trials: {len(done)} of {trials}", done[-10:], done))

        yield watch


def _line(record: Record) -> str:
    if record.loss is None:
        return f"trial {record.number}: {record.state}, {record.reason}"
    return (
        f"trial {record.number}: loss {record.loss:.6g}, predicted {record.predicted:.6g}, "
        f"{record.nbytes:,} bytes"
    )


def trials_table(title: str, rows: list[Record], every: list[Record] | None = None) -> Table:
    """Return trials as a table, with the best of all trials marked."""
    losses = [record.loss for record in every or rows if record.loss is not None]
    caption = f"best so far: {min(losses):.6g}" if every and losses else None
    table = Table(title=title, caption=caption)
    for head in ("trial", "measured", "predicted", "bpw", "bytes", ""):
        table.add_column(head, justify="right" if head else "left")
    for record in rows:
        note = escape(record.reason or record.state) if record.loss is None else ""
        if record.loss is not None and record.loss == min(losses):
            note = "best"
        cells = [_number(value) for value in (record.loss, record.predicted, record.bpw)]
        size = "–" if record.nbytes is None else f"{record.nbytes:,}"
        table.add_row(str(record.number), *cells, size, note)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def row_of(record: Record) -> dict[str, Any]:
    """Return a trial as JSON values."""
    names = ("number", "state", "loss", "predicted", "nbytes", "bpw", "reason", "seconds")
    row = {name: getattr(record, name) for name in names}
    return row | {"params": dict(record.params)}


def summary(study: Study) -> dict[str, Any]:
    """Return the state of a study as JSON values, without passwords."""
    every = records(study)
    states = [record.state for record in every]
    shortest = front(study)
    document: dict[str, Any] = {
        "study": study.name,
        "storage": shown(study.storage),
        "about": dict(study.about),
        "measured": dict(study.measured),
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "first": row_of(every[0]) if every else None,
    }
    if study.knobs.budget:
        return document | {"front": [row_of(record) for record in shortest]}
    losses = [r for r in every if r.loss is not None]
    least = min(losses, key=lambda r: (r.loss, r.number), default=None)
    return document | {"best": None if least is None else row_of(least)}


def present_study(study: Study, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """Print the state of the study: facts, and the best trials or the front; or all as JSON."""
    document = summary(study) | (more or {})
    about = study.about
    spoken = ", ".join(f"{count} {state}" for state, count in document["trials"].items())
    low, high = study.knobs.budget or (0, 0)
    facts = {
        "storage": document["storage"],
        "table": about["table"]["name"],
        "budget": about["budget"] or f"{low:g} to {high:g} bpw",
        "profile": about["profile"],
        "sampler": about["sampler"],
        "trials": spoken,
    }
    facts |= {"tokens": study.measured["tokens"]} if "tokens" in study.measured else {}
    complete = [record for record in records(study) if record.loss is not None]
    if complete and not study.knobs.budget:
        facts["loss of trial 0"] = _number(document["first"]["loss"])
        facts["smallest loss"] = _number(document["best"]["loss"])
    title, rows = "smallest losses", sorted(complete, key=lambda r: (r.loss, r.number))[:5]
    if study.knobs.budget:
        title, rows = "front of size and loss", front(study)
    tables = [facts_table(f"study {study.name}", facts | (more or {}))]
    present(as_json, document, *tables, *([trials_table(title, rows)] if rows else []))
