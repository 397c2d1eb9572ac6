"""The commands of `bitknap study`: Optuna studies over any storage, shared by workers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import (
    as_json_option,
    free_path,
    given,
    listed,
    overwrite_option,
    seed_option,
)
from bitknap.cli.terminal import present
from bitknap.errors import InputError, MismatchError
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation.search.search_space import Knobs
    from bitknap.allocation.search.study import Study

_KNOBS = ("tilts", "risk", "formats", "floor", "cap", "exponents")
# What `run` measures, as the study and its plans say.
_WHAT = "KL, nats/token"

_storage = click.option(
    "--storage", required=True, metavar="URL", help="sqlite:///study.db, journal:study.log, …"
)
_moved = click.option(
    "--table", type=click.Path(path_type=Path), default=None, help="Where the table lies now."
)
_features = click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Path(path_type=Path),
    help="TABLE of another estimator; several times.",
)


@click.group()
def study() -> None:
    """Search for plans by what they truly lose, in a study that workers share.

    Example: bitknap study create s --storage sqlite:///s.db --table table.safetensors
    --budget 2.5bpw
    """


@study.command()
@click.argument("name")
@_storage
@click.option("--table", required=True, type=click.Path(path_type=Path), help="TABLE to solve.")
@_features
@click.option("--budget", default=None, help="What every plan keeps: 2.5bpw, 12GiB or 40%.")
@click.option("--budgets", default=None, help="Instead, a range for nsga2: 2bpw-4bpw.")
@click.option("--profile", default="gate_eq_up", show_default=True, help="Which units share.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "cmaes", "nsga2"]),
    default=None,
    help="Default: tpe, and nsga2 with --budgets.",
)
@click.option(
    "--knobs",
    default=None,
    help=f"What is turned: {','.join(_KNOBS)}. Default: tilts, risk and exponents if known.",
)
@seed_option
@as_json_option
def create(
    name: str,
    storage: str,
    table: Path,
    features: tuple[Path, ...],
    budget: str | None,
    budgets: str | None,
    profile: str,
    sampler: str | None,
    knobs: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Create the study NAME; its first trial is the knapsack's plan.

    Example: bitknap study create s --storage sqlite:///s.db --table table.safetensors
    --budget 2.5bpw
    """
    from bitknap.allocation.search.study import create as make
    from bitknap.cli.views.study_view import present_study

    check_options("study create")
    made = make(
        name,
        storage,
        table,
        features=features,
        budget=budget,
        profile_name=profile,
        sampler=sampler or ("nsga2" if budgets else "tpe"),
        knobs=_knobs(knobs, table, features, budgets),
        seed=seed,
    )
    present_study(made, as_json)


@study.command()
@click.argument("name")
@_storage
@click.option("--model", required=True, help="MODEL that the table was made on.")
@click.option("--trials", type=int, default=20, show_default=True, help="Trials to complete.")
@click.option("--text", default=None, help="Calibration text: a file or builtin.")
@click.option("--tokens", type=int, default=None, help="Tokens of it. Default: 8192.")
@_moved
@_features
@as_json_option
def run(
    name: str,
    storage: str,
    model: str,
    trials: int,
    text: str | None,
    tokens: int | None,
    table: Path | None,
    features: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure plans on MODEL: KL to the unquantized model; start it as often as there are workers.

    Example: bitknap study run s --storage sqlite:///s.db --model reference:mixtral --trials 20
    """
    from bitknap.allocation.search.study import load
    from bitknap.allocation.search.study import run as go
    from bitknap.cli.views.study_view import present_study, watching

    found = load(name, storage, table=table, features=features)
    measure, measured = _measurement(found, model, text, tokens)
    with watching(trials, as_json) as watch:
        go(found, measure, trials, measured=measured, watch=watch)
    present_study(found, as_json)


@study.command()
@click.argument("name")
@_storage
@click.option("-o", "out", default=None, help="PAGE to write, .html.")
@_moved
@_features
@overwrite_option
@as_json_option
def show(
    name: str,
    storage: str,
    out: str | None,
    table: Path | None,
    features: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show how the study NAME stands, on request as one page of plots that needs no network.

    Example: bitknap study show s --storage sqlite:///s.db -o study.html
    """
    from bitknap.allocation.search.study import load
    from bitknap.cli.views.study_view import present_study

    path = None if out is None else _free(out, overwrite, storage, table, features)
    found = load(name, storage, table=table, features=features)
    if path is not None:
        from bitknap.disk.atomic import write_whole
        from bitknap.report.study_page import page

        write_whole(path, page(found).encode())
    present_study(found, as_json, {} if out is None else {"path": out})


@study.command()
@click.argument("name")
@_storage
@click.option("--budget", default=None, help="With a range of budgets: what the plan keeps.")
@click.option("-o", "out", default=None, help="PLAN to write, .json.")
@_moved
@_features
@overwrite_option
@as_json_option
def best(
    name: str,
    storage: str,
    budget: str | None,
    out: str | None,
    table: Path | None,
    features: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the plan of the least measured loss; with a range of budgets, the one for a budget.

    Example: bitknap study best s --storage sqlite:///s.db -o plan.json
    """
    from bitknap.allocation.search.best_trials import best as least
    from bitknap.allocation.search.study import load, plan_of
    from bitknap.cli.views.study_view import present_study, row_of, trials_table
    from bitknap.cli.views.tables import bits_table

    path = None if out is None else _free(out, overwrite, storage, table, features)
    found = load(name, storage, table=table, features=features)
    if found.knobs.budget and budget is None:
        if path is not None:
            raise InputError("the study trades size against loss; say which with --budget 3bpw")
        present_study(found, as_json)
        return
    record = least(found, budget)
    plan = plan_of(found, record.params, record)
    document = {"study": name, "best": row_of(record)}
    if path is not None:
        plan.save(path)
        document["path"] = str(out)
    present(as_json, document, bits_table(plan), trials_table("best trial", [record]))


def _free(
    out: str, overwrite: bool, storage: str, table: Path | None, features: tuple[Path, ...]
) -> Path:
    """Return the path of an output if it may be written; neither a table nor the storage is."""
    from bitknap.allocation.search.optuna_trials import file_of

    return free_path(out, overwrite, inputs=[table, *features, file_of(storage)])


def _knobs(
    words: str | None, table: Path, features: tuple[Path, ...], budgets: str | None
) -> Knobs:
    """Return the knobs that the words name; what the table and the features allow if none do."""
    from bitknap.allocation import CostTable
    from bitknap.allocation.search.search_space import GROUPS, Knobs

    if words is None:
        spread = CostTable.load(table).spread is not None
        names = ["tilts", *["risk"] * spread, *["exponents"] * bool(features)]
    else:
        names = listed(words)
    unknown = [name for name in names if name not in _KNOBS]
    if unknown or not names:
        raise InputError(f"--knobs {words!r}: name some of {', '.join(_KNOBS)}")
    return Knobs(
        exponents=tuple(path.stem for path in features) if "exponents" in names else (),
        risk="risk" in names,
        formats="formats" in names,
        floor="floor" in names,
        cap="cap" in names,
        tilts=GROUPS if "tilts" in names else (),
        budget=None if budgets is None else _range(budgets),
    )


def _range(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"\s*(\d+\.?\d*)(?:bpw)?\s*-\s*(\d+\.?\d*)bpw\s*", text.lower())
    if not found:
        raise InputError(f"--budgets {text!r}: write LOW-HIGH in bits per weight: 2bpw-4bpw")
    return float(found[1]), float(found[2])


def _measurement(
    found: Study, model: str, text: str | None, tokens: int | None
) -> tuple[Callable[[Any], float], dict[str, Any]]:
    """Return how a plan is measured on the model, and what identifies the measurement."""
    import torch

    from bitknap.api import calibration, quantizing
    from bitknap.estimators.measuring.kl_replay import Replay
    from bitknap.estimators.measuring.text import BUILTIN, read_text
    from bitknap.estimators.sweep.in_memory import digest_of
    from bitknap.quantization.models.live_model import walk
    from bitknap.quantization.packed import writer
    from bitknap.quantization.packed.buildable import check
    from bitknap.quantization.packed.folder import roles_of
    from bitknap.quantization.runtime import loading
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve
    from bitknap.quantization.stacks.apply import applied

    silence_transformers()
    source = Checkpoint.open(resolve(model))
    if source.fingerprint != found.about["model"]:
        raise MismatchError(
            f"{model}: not the model that the table of study {found.name!r} was made on; "
            "pass that model, or make a table of this one"
        )
    words = read_text(text or BUILTIN, "calibration")
    if words == read_text(BUILTIN, "evaluation"):
        raise InputError(f"--text {text}: the evaluation text; a study must not see it")
    count = given(tokens, found.measured.get("tokens", quantizing.CALIBRATION_TOKENS))
    check(source.folder, reads_text=True)
    writer.check_finite(source)
    live = loading.load(source.folder, torch.float32)
    layout = walk(live, roles_of(found.table.units))
    document = calibration.encoded(source.folder, words, live.config)
    windows = document.windows(count, calibration.longest_of(live.config))
    replay = Replay(live, layout, windows, cache=False)

    def measure(plan: Any) -> float:
        with applied(live, layout, plan):
            return replay.kl()

    return measure, {
        "what": _WHAT,
        "model": source.fingerprint,
        "tokens": windows.ids.numel(),
        "text": digest_of(windows.ids),
    }
