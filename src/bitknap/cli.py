"""The command line: a thin shell over the public verbs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from bitknap import __version__
from bitknap.errors import BitknapError, InputError

Progress = Callable[[str, int, int], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every error on purpose is one line on stderr and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _quiet():
            bitknap.main(args=None if argv is None else list(argv), standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _fail(error.format_message())
    except BitknapError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")


def _fail(message: str) -> None:
    print("bitknap: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from talking on stderr: what matters there is ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\..*)?")
        yield


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """Yield a callback that draws a bar on stderr, None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done + 1, total=total)

        yield advance


def _print(as_json: bool, document: Any, *tables: Any) -> None:
    if as_json:
        print(json.dumps(document, indent=1, sort_keys=True))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)


_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of all that is drawn.")
_include = click.option(
    "--include", default="", help="Roles beside routed experts: attention,shared,dense."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")


def _text(purpose: str) -> Callable[[Any], Any]:
    return click.option(
        "--text", default="builtin", show_default=True, help=f"{purpose} text: a file or builtin."
    )


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


_estimating = _options(
    click.option(
        "--estimator",
        default="calibrated",
        show_default=True,
        help="calibrated[,BASE], or one of moments, fisher, weight-error, data-free.",
    ),
    click.option("--formats", "bits", default="", help="Widths, such as 2,3,4,8. Default: 1-8."),
    click.option("--group-size", default="", help="Group sizes, such as 64,128,row. Default: all."),
    click.option(
        "--metadata",
        default="",
        help="fp16, compact or both. Default: both, with and without zero.",
    ),
    click.option("--tokens", type=int, default=None, help="Calibration tokens. Default: 8192."),
    _text("Calibration"),
    _include,
    _seed,
)
_solving = _options(
    click.option("--solver", type=click.Choice(["knapsack"]), default="knapsack"),
    click.option("--profile", default="gate_eq_up", show_default=True, help="Which units share."),
    click.option(
        "--pin", multiple=True, metavar="PATTERN=BITS", help="Such as layer=0,proj=down=8."
    ),
)


def _given(count: int | None, default: int) -> int:
    return default if count is None else count


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _formats(bits: str, group_size: str, metadata: str) -> Any:
    from bitknap.allocation import formats
    from bitknap.api import GROUP_SIZES

    if not (bits or group_size or metadata):
        return None
    try:
        widths = [int(b) for b in _list(bits)] or list(range(1, 9))
    except ValueError:
        raise InputError(f"--formats {bits!r}: widths are numbers, such as 2,3,4,8") from None
    sizes = _list(group_size) or GROUP_SIZES
    return formats(widths, sizes, (False, True), _list(metadata) or ("fp16", "compact"))


def _estimator(names: str, progress: Progress | None) -> Any:
    from bitknap.estimators.calibrated import Calibrated
    from bitknap.estimators.data_free import DataFree
    from bitknap.estimators.fisher import Fisher
    from bitknap.estimators.moments import SecondMoments
    from bitknap.estimators.weight_error import WeightError

    known = {e.name: e for e in (SecondMoments(), Fisher(), WeightError(), DataFree())}
    parts = _list(names)
    bases = [known[p] for p in parts if p in known]
    unknown = [p for p in parts if p not in known and p != "calibrated"]
    if unknown or len(bases) > 1 or not parts:
        raise InputError(
            f"--estimator {names!r}: give one of {', '.join(known)}, or calibrated with one of them"
        )
    if "calibrated" not in parts:
        return bases[0]
    return Calibrated(base=bases[0] if bases else SecondMoments(), progress=progress)


def _estimate(model: str, options: dict[str, Any]) -> Any:
    from bitknap import api

    _silence_transformers()
    with _progress() as progress:
        return api.estimate(
            model,
            _estimator(options["estimator"], progress),
            _formats(options["bits"], options["group_size"], options["metadata"]),
            text=options["text"],
            tokens=_given(options["tokens"], api.CALIBRATION_TOKENS),
            include=_list(options["include"]),
            seed=options["seed"],
            progress=progress,
        )


def _solve(table: Any, budget: str, options: dict[str, Any]) -> Any:
    from bitknap.allocation import Budget
    from bitknap.planning import plan_for

    for pin in options["pin"]:
        pattern, _, bits = pin.rpartition("=")
        if "=" not in pattern or not bits.isdigit():
            raise InputError(f"--pin {pin!r}: write PATTERN=BITS, such as layer=0,proj=down=8")
        table = table.pin(pattern, bits=int(bits))
    return plan_for(table, Budget.parse(budget), profile_name=options["profile"])


def _solved(solution: Any) -> dict[str, Any]:
    return {
        "status": solution.status.name,
        "cost": solution.cost,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": round(solution.seconds, 6),
        "solver": solution.solver,
        **solution.plan.totals,
    }


def _free(path: str, overwrite: bool) -> Path:
    out = Path(path)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name or pass --overwrite")
    return out


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def bitknap() -> None:
    """Choose bits for every expert of a Mixture-of-Experts model, prove it, pack it.

    Example: bitknap quantize reference:mixtral --budget 2.5bpw -o out
    """


@bitknap.command()
@click.argument("model")
@_include
@_json
def inspect(model: str, include: str, as_json: bool) -> None:
    """Show units, formats and the feasible budgets of MODEL from its headers alone.

    Example: bitknap inspect reference:mixtral
    """
    from bitknap.inspect import inspect as look
    from bitknap.render import facts_table

    report = look(model, _list(include))
    shown = dict(report)
    sizes = shown.pop("uniform_bytes")
    _print(
        as_json, report, facts_table(model, shown), facts_table("all units in one format", sizes)
    )


@bitknap.command()
@click.argument("model")
@_estimating
@click.option("-o", "out", required=True, help="TABLE to write, .safetensors.")
@_overwrite
@_json
def estimate(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Fill a cost table: what every format would cost every unit of MODEL.

    Example: bitknap estimate reference:mixtral --formats 2,3,4 -o table.safetensors
    """
    from bitknap.render import cost_table

    path = _free(out, overwrite)
    table = _estimate(model, options)
    table.save(path)
    _print(as_json, _table_summary(table) | {"path": out}, cost_table(table), _coverage(table))


@bitknap.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--budget", required=True, help="2.5bpw, 12GiB (whole checkpoint) or 40%.")
@_solving
@click.option("-o", "out", required=True, help="PLAN to write, .json.")
@_overwrite
@_seed
@_json
def solve(
    table: Path, budget: str, out: str, overwrite: bool, seed: int, as_json: bool, **options: Any
) -> None:
    """Choose a format for every unit of TABLE under a budget.

    Example: bitknap solve table.safetensors --budget 2.5bpw -o plan.json
    """
    from bitknap.allocation import CostTable
    from bitknap.render import bits_table, facts_table

    path = _free(out, overwrite)
    solution = _solve(CostTable.load(table), budget, options)
    solution.plan.save(path)
    facts = _solved(solution)
    _print(
        as_json, facts | {"path": out}, bits_table(solution.plan), facts_table("solution", facts)
    )


@bitknap.command()
@click.argument("model")
@click.option("--plan", type=click.Path(path_type=Path), default=None, help="PLAN to apply.")
@click.option("--budget", default=None, help="Instead of a plan: 2.5bpw, 12GiB or 40%.")
@_estimating
@_solving
@click.option("--method", type=click.Choice(["rtn"]), default="rtn", show_default=True)
@click.option("-o", "out", required=True, help="OUT folder to write.")
@_overwrite
@_json
def quantize(
    model: str,
    plan: Path | None,
    budget: str | None,
    method: str,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL packed, by a plan or measured and solved for a budget in one go.

    Example: bitknap quantize reference:mixtral --budget 2.5bpw -o out
    """
    from bitknap import api
    from bitknap.allocation import BitPlan
    from bitknap.render import bits_table, facts_table, widths_table

    if (plan is None) == (budget is None):
        raise InputError("give --plan or --budget, one of them")
    _free(out, overwrite)
    facts: dict[str, Any] = {}
    notes = []
    if plan is not None:
        chosen = BitPlan.load(plan)
    else:
        table = _estimate(model, options)
        solution = _solve(table, str(budget), options)
        chosen, facts = solution.plan, _solved(solution)
        notes.append(_coverage(table))
    sizes = api.quantize(model, chosen, out, overwrite=overwrite)
    facts |= {
        "bytes predicted": sizes["predicted"],
        "bytes on disk": sizes["written"],
        "checkpoint bytes": sizes["checkpoint"],
    }
    document = {name.replace(" ", "_"): value for name, value in facts.items()} | {"path": out}
    tables = bits_table(chosen), widths_table(chosen), facts_table(out, facts)
    _print(as_json, document, *tables, *notes)


@bitknap.command()
@click.argument("model")
@click.option("--reference", default=None, help="What KL and agreement refer to.")
@click.option("--uniform", is_flag=True, help="Also the best uniform recipe at the same bytes.")
@_text("Evaluation")
@click.option("--tokens", type=int, default=None, help="Evaluation tokens. Default: 32768.")
@_seed
@_json
def evaluate(
    model: str,
    reference: str | None,
    uniform: bool,
    text: str,
    tokens: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure MODEL's perplexity; with a reference also KL, its standard error and agreement.

    Example: bitknap evaluate out --reference reference:mixtral
    """
    from bitknap import api
    from bitknap.evaluation import rows_for
    from bitknap.render import losses_table

    _silence_transformers()
    if uniform and reference is None:
        raise InputError("--uniform needs --reference, the model that recipes are applied to")
    with _progress() as progress:
        count = _given(tokens, api.EVALUATION_TOKENS)
        rows = rows_for(model, reference, text, count, uniform=uniform, progress=progress)
    _print(as_json, rows, losses_table(rows))


@bitknap.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json
def show(path: Path, as_json: bool) -> None:
    """Show what is in a plan, a table or a packed checkpoint: per layer, projection and width.

    Example: bitknap show out
    """
    from bitknap.allocation import BitPlan, CostTable
    from bitknap.render import bits_table, cost_table, plan_summary, widths_table

    if path.suffix == ".safetensors":
        table = CostTable.load(path)
        _print(as_json, _table_summary(table), cost_table(table), _coverage(table))
        return
    file = path / "bitknap_plan.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(
            f"{path}: no bitknap_plan.json; pass a plan, a table or a packed checkpoint"
        )
    plan = BitPlan.load(file)
    _print(as_json, plan_summary(plan), bits_table(plan), widths_table(plan))


def _table_summary(table: Any) -> dict[str, Any]:
    return {
        "kind": "table",
        "units": len(table.units),
        "weights": table.weights,
        "formats": {
            f.name: {"bytes": int(size), "cost": float(cost)}
            for f, size, cost in zip(
                table.formats, table.nbytes.sum(0), table.cost.sum(0), strict=True
            )
        },
        "provenance": dict(table.provenance),
    }


def _coverage(table: Any) -> str:
    few = table.provenance.get("coverage", [])
    if not few:
        return "every expert saw enough tokens"
    named = ", ".join(f"{layer}/{expert} ({seen})" for layer, expert, seen in few[:12])
    more = f" and {len(few) - 12} more" if len(few) > 12 else ""
    return f"few tokens, shrunk to the layer's mean: layer/expert (tokens) {named}{more}"
