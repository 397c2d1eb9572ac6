"""`bitknap quantize`: a model packed, by a plan, or measured and solved for a budget in one go."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitknap.cli.interrupts import stoppable
from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import option
from bitknap.cli.options.estimating import (
    calibration_of,
    check_kept,
    estimating,
    files_of,
    forget,
    formats_of,
    journal_of,
    resumable,
    run_estimate,
)
from bitknap.cli.options.refining import check_refining, refine_journal, refining, run_refine
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import (
    check_solving,
    device_of,
    free_path,
    listed,
    run_solve,
    solved,
    solving,
)
from bitknap.cli.options.targeting import aim, check_target, target_of
from bitknap.cli.terminal import present, progress_bars
from bitknap.disk.outputs import Kind
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation import BitPlan, CostTable
    from bitknap.api.refining import Outcome
    from bitknap.api.requests import Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """A plan, and how it came about.

    Attributes:
        plan: what every unit gets.
        facts: on the solution, JSON values.
        notes: tables and lines to print below all else.
        prices: prices of all profiles, if asked for.
        table: the costs, if they were estimated.
        outcome: outcome of the closed loop, if it ran.
        device: what a device holds with the plan, bytes by name, if it was to fit one.
    """

    plan: BitPlan
    facts: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[Any] = ()
    prices: tuple[Any, ...] = ()
    table: CostTable | None = None
    outcome: Outcome | None = None
    device: dict[str, int] = field(default_factory=dict)


# What `quantize` returns, and what it is called on the terminal and in JSON.
_SHOWN = {
    "method": "method",
    "predicted": "bytes_predicted",
    "written": "bytes_on_disk",
    "checkpoint": "checkpoint_bytes",
}


@click.command(
    cls=Command,
    examples=("bitknap quantize reference:mixtral --budget 2.5bpw -o out",),
    usual=(
        "model",
        "budget",
        "plan",
        "profile",
        "target",
        "estimator",
        "text",
        "max_memory",
        "bits",
        "method",
        "out",
        "overwrite",
        "as_json",
    ),
)
@common.model
@common.sized
@option(
    "--plan",
    group="limits",
    type=click.Path(path_type=Path),
    default=None,
    metavar="PLAN",
    help="Plan to apply instead of a budget.",
)
@estimating
@solving
@refining
@common.method.but(usual="rtn, or the plan's")
@common.force
@common.output("OUT", "Packed checkpoint to write, a folder.")
@common.max_shard_size
@common.report
@common.overwrite
@common.as_json
def quantize(
    model: str,
    plan: Path | None,
    budget: str | None,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL to a budget, or as a plan says.

    A run that was stopped or killed continues when the command is repeated.
    """
    from bitknap.allocation.problem.budget import parse_size
    from bitknap.allocation.tradeoffs.profile_price import priced
    from bitknap.api.requests import Resume
    from bitknap.cli.views.tables import bits_table, facts_table, widths_table
    from bitknap.estimators.measuring import readings

    check_options("quantize")
    check_target(options)
    report = options["report"]
    others = [plan, *options["limits"], *files_of(options)]
    target = target_of(options)
    kind: Kind = "folder" if target is None else target.output(Path(out))
    path = free_path(out, overwrite, kind=kind, model=model, inputs=[*others, report])
    check_kept(options)
    page = None
    if report is not None:
        page = free_path(report, overwrite, model=model, inputs=[*others, out])
    parse_size(options["max_shard_size"])
    check_refining(options)
    if budget is not None:
        check_solving(budget, options)
    silence_transformers()
    choice = _choose(model, plan, budget, options, path, overwrite)
    resume = Resume(journal=journal_of(path), overwrite=overwrite)
    sizes = _write(model, choice.plan, path, options, resume)
    forget(path)
    readings.forget(refine_journal(path))
    facts = choice.facts | {shown: sizes[name] for name, shown in _SHOWN.items()}
    document = facts | priced(choice.prices, options["profile"]) | {"path": out}
    document |= {"device": choice.device} if choice.device else {}
    if page is not None:
        _write_page(page, model, budget, choice, sizes["method"], options)
        document["report"] = report
    tables = bits_table(choice.plan), widths_table(choice.plan), facts_table(out, facts)
    seen, notes = _seen_while_packing(sizes)
    present(as_json, document | seen, *tables, *choice.notes, *notes)


def _write(
    model: str, plan: BitPlan, path: Path, options: dict[str, Any], resume: Resume
) -> dict[str, Any]:
    """Write a plan, packed or as the files of --target; return what `quantize` returns."""
    from bitknap.api import exporting, quantizing
    from bitknap.api.requests import Packing

    calibration = calibration_of(options, text=options["text"][0])
    target = target_of(options)
    with stoppable(), progress_bars() as progress:
        if target is not None and not target.cuts_rows:
            written = exporting.export(
                plan,
                model,
                target,
                path,
                calibration=calibration,
                resume=resume,
                progress=progress,
            )
            return exporting.sizes_of(written, plan)
        packing = Packing(
            rounding=options["method"],
            force=options["force"],
            max_shard_size=options["max_shard_size"],
        )
        return quantizing.quantize(
            model,
            plan,
            path,
            packing=packing,
            calibration=calibration,
            resume=resume,
            progress=progress,
        )


def _seen_while_packing(sizes: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return what packing has to report beside sizes: as JSON values, and as lines to print."""
    from bitknap.report.table_facts import decoded_note, few_tokens_note, left_out_note

    document: dict[str, Any] = {}
    notes: list[Any] = []
    for name in ("checks", "warnings"):
        if sizes.get(name):
            document[name] = list(sizes[name])
            notes += sizes[name]
    if sizes["few_tokens"]:
        document["few_tokens"] = sizes["few_tokens"]
        notes.append(few_tokens_note(sizes["few_tokens"]))
    if sizes["left_out"]:
        document["left_out"] = sizes["left_out"]
        notes.append(left_out_note(sizes["left_out"]))
    if sizes["decoded"]:
        document |= {name: sizes[name] for name in ("decoded", "decoded_bytes", "stored_bytes")}
        notes.append(decoded_note(sizes))
    return document, notes


def _choose(
    model: str,
    plan: Path | None,
    budget: str | None,
    options: dict[str, Any],
    path: Path,
    overwrite: bool,
) -> _Choice:
    """Return the plan of a file, or what estimating, solving and refining come to."""
    from bitknap.allocation import BitPlan
    from bitknap.api.forecasts.room import check_checkpoint_room
    from bitknap.cli.views.tables import facts_table, ledger_table, price_table
    from bitknap.estimators.measuring.readings import telling
    from bitknap.quantization.packed.buildable import check_source
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve
    from bitknap.report.table_facts import notes

    if plan is not None:
        return _Choice(plan=BitPlan.load(plan))
    # A table can be estimated from names and shapes alone; what is written has to be loaded.
    source, include = Checkpoint.open(resolve(model)), listed(options["include"])
    check_source(source, include)
    offered, target = formats_of(options), target_of(options)
    if target is not None:
        target.check_output(source, path)
    if target is None or target.reads_weights:
        check_checkpoint_room(source, offered, include, path)
    aim(options, offered.layout(source, include).units)
    with resumable(path):
        table = run_estimate(model, options, path, overwrite=overwrite)
        with telling(journal_of(path)):
            solution, prices = run_solve(table, str(budget), options)
    said: list[Any] = [price_table(prices, options["profile"])] if prices else []
    chosen, facts, outcome = solution.plan, solved(solution), None
    if options["refine"]:
        outcome = run_refine(model, table, str(budget), options, path)
        chosen, loop = outcome.plan, outcome.facts()
        said.append(facts_table("refined by measuring plans", loop))
        facts |= {f"refine_{name}": value for name, value in loop.items()}
    device = device_of(table, str(budget), chosen.choice).get("device", {})
    if device:
        said.append(ledger_table(device))
    return _Choice(
        plan=chosen,
        facts=facts,
        notes=(*said, notes(table)),
        prices=prices,
        table=table,
        outcome=outcome,
        device=device,
    )


def _write_page(
    page: Path,
    model: str,
    budget: str | None,
    choice: _Choice,
    method: str,
    options: dict[str, Any],
) -> None:
    from bitknap.disk.atomic import write_whole
    from bitknap.report.quantize_document import document_of
    from bitknap.report.run_page import report

    name = budget or f"{choice.plan.bpw:.4g}bpw"
    about = {
        "model": model,
        "method": method,
        "profile": choice.plan.header.get("profile"),
        "seed": options["seed"],
        "command": shlex.join(["bitknap", *sys.argv[1:]]),
    }
    steps = None if choice.outcome is None else choice.outcome.refined.steps
    document = document_of(name, choice.plan, about, choice.table, choice.prices, steps)
    document["device"] = choice.device
    write_whole(page, report(document, {name: choice.plan}).encode())
