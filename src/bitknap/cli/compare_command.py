"""`bitknap compare`: strategies at equal bytes, in one command."""

from __future__ import annotations

import shlex
import sys
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
from bitknap.cli.terminal import present, progress_bars
from bitknap.errors import InputError
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation import Format
    from bitknap.benchmarks.compare.models import Options
    from bitknap.benchmarks.compare.tasks import Tasks

# Exit status when a strategy failed and the others are there.
_PARTLY = 1


@click.command()
@click.argument("model")
@click.option("--budgets", default="2,2.5,3", show_default=True, help="Bits per weight.")
@click.option(
    "--strategies",
    default="quick",
    show_default=True,
    help="all, quick, published, or names; ESTIMATOR:SOLVER too. A wrong name lists them.",
)
@click.option("--profile", default="free", show_default=True, help="Which units share a format.")
@click.option(
    "--method",
    type=click.Choice(["rtn", "hqq", "gptq"]),
    default="rtn",
    show_default=True,
    help="How weights are rounded.",
)
@click.option("--formats", "bits", default="", help="Widths. Default: 1,2,3,4,5,6,8.")
@click.option("--group-size", default="", help="Group sizes. Default: 32,64,row.")
@click.option("--metadata", default="", help="fp16, compact, compact6. Default: compact.")
@click.option("--text", default="builtin", show_default=True, help="Calibration text.")
@click.option("--tokens", type=int, default=None, help="Of it, to calibrate on. Default: 8192.")
@click.option(
    "--refine",
    type=int,
    default=None,
    metavar="N",
    help="Plans that our closed loop measures at each budget. Default: 64, and 4 for quick.",
)
@click.option(
    "--refine-tokens", type=int, default=None, help="Of the text, to measure on. Default: 16384."
)
@click.option(
    "--evaluation-text",
    multiple=True,
    default=("builtin",),
    help="Text to judge on, several times for several domains.  [default: builtin, four]",
)
@click.option("--evaluation-tokens", type=int, default=None, help="Of all. Default: 8192.")
@click.option("--tasks", default="", help="Also tasks of lm-eval, such as piqa,arc_easy.")
@click.option(
    "--task-path", type=click.Path(path_type=Path), default=None, help="Folder of your own tasks."
)
@click.option("--task-limit", type=int, default=None, help="Documents of each task. Default: all.")
@click.option("-o", "out", required=True, help="DIR to write.")
@overwrite_option
@seed_option
@as_json_option
def compare(
    model: str,
    budgets: str,
    strategies: str,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare ways to allocate bits on MODEL at equal bytes: a table, a picture and a page.

    Each strategy's plan is judged on text that none has seen, beside ours at its bytes. What is
    done is kept in DIR: a stopped or killed run goes on when the command is repeated. If a
    strategy fails, the others are there all the same, and the exit status is 1.

    Example: bitknap compare reference:mixtral --budgets 2,2.5,3 --strategies quick -o DIR
    """
    from bitknap.benchmarks.compare.models import prepare
    from bitknap.benchmarks.compare.output import write, writing_into
    from bitknap.benchmarks.compare.run import FAILED
    from bitknap.benchmarks.compare.run import compare as judge_all
    from bitknap.benchmarks.compare.strategies import names
    from bitknap.cli.views.compare_view import strategies_tables

    check_options("compare")
    wanted, sizes = names(listed(strategies)), _budgets(budgets)
    chosen = _options(model, strategies, options)
    folder = _free(Path(out), model, overwrite, options)
    about = _about(chosen, wanted, sizes, options)
    tasks = _tasks(options)
    silence_transformers()
    with progress_bars() as progress:
        setting = prepare(chosen, progress)
        with writing_into(folder, about, overwrite=overwrite) as part:
            run = judge_all(setting, wanted, sizes, part, about, tasks)
            document = write(run, part, _command(sys.argv))
    present(as_json, document | {"path": out}, *strategies_tables(document, run))
    if any(row["status"] == FAILED for row in document["rows"]):
        sys.exit(_PARTLY)


def _budgets(text: str) -> tuple[float, ...]:
    found = []
    for word in listed(text):
        try:
            found.append(float(word.removesuffix("bpw")))
        except ValueError:
            raise InputError(
                f"--budgets {text!r}: {word!r} is no number; write bits per weight, such as 2,2.5,3"
            ) from None
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise InputError(f"--budgets {text!r}: write bits per weight above 0, each once")
    return tuple(sorted(found))


def _options(model: str, strategies: str, options: dict[str, Any]) -> Options:
    from bitknap.allocation import profile
    from bitknap.api.refining import REFINE_TOKENS
    from bitknap.benchmarks.compare.models import Options

    profile(options["profile"])
    usual = 4 if listed(strategies) == ["quick"] else 64
    evaluations = given(options["refine"], usual)
    if evaluations < 1:
        raise InputError(f"--refine {evaluations}: at least 1, which measures the first plan alone")
    return Options(
        model=model,
        method=options["method"],
        profile=options["profile"],
        text=options["text"],
        tokens=given(options["tokens"], 8192),
        evaluations=evaluations,
        refine_tokens=given(options["refine_tokens"], REFINE_TOKENS),
        evaluation=tuple(options["evaluation_text"]),
        judged=given(options["evaluation_tokens"], 8192),
        seed=options["seed"],
        formats=_formats(options),
    )


def _tasks(options: dict[str, Any]) -> Tasks | None:
    from bitknap.benchmarks.compare.tasks import Tasks

    names, folder, limit = listed(options["tasks"]), options["task_path"], options["task_limit"]
    if not names:
        return None
    found = Tasks(names=tuple(names), folder=folder, limit=limit)
    found.check()
    return found


def _formats(options: dict[str, Any]) -> tuple[Format, ...]:
    from bitknap.allocation import formats
    from bitknap.benchmarks.compare.models import SIZES, WIDTHS

    bits, size, metadata = (listed(options[x]) for x in ("bits", "group_size", "metadata"))
    try:
        widths = [int(b) for b in bits] or list(WIDTHS)
    except ValueError:
        raise InputError(
            f"--formats {options['bits']!r}: widths are numbers, such as 2,3,4"
        ) from None
    return formats(widths, size or SIZES, (False, True), metadata or ("compact",))


def _free(out: Path, model: str, overwrite: bool, options: dict[str, Any]) -> Path:
    """Return the folder if it may be written, or holds what a stopped run left."""
    from bitknap.benchmarks.compare.run import WORK

    texts, tasks = (options["text"], *options["evaluation_text"]), options["task_path"]
    unfinished = (out / WORK).is_dir()
    return free_path(
        out, overwrite or unfinished, kind="folder", model=model, inputs=[*texts, tasks]
    )


def _about(
    chosen: Options, wanted: tuple[str, ...], sizes: tuple[float, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Return what makes two runs the same: all that was asked for, and the texts themselves."""
    import hashlib
    from dataclasses import asdict

    from bitknap.estimators.measuring.text import ENCODING, read_text

    texts = [read_text(chosen.text, "calibration")]
    texts += [read_text(name, "evaluation") for name in chosen.evaluation]
    said = asdict(chosen) | {"formats": [item.name for item in chosen.formats]}
    return said | {
        "strategies": list(wanted),
        "budgets": list(sizes),
        "encoding": ENCODING,
        "texts": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts],
        "tasks": [options["tasks"], options["task_limit"]],
    }


def _command(words: list[str]) -> str:
    return shlex.join(["bitknap", *words[1:]])
