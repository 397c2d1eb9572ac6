"""`bitknap compare`: compares strategies at equal bytes."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitknap.cli.options import common, completing, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import option
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import free_path, given, listed
from bitknap.cli.terminal import present, progress_bars
from bitknap.errors import InputError
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation import Format
    from bitknap.benchmarks.compare.models import Options
    from bitknap.benchmarks.compare.tasks import Tasks

# Exit status when a strategy failed and the others succeeded.
_PARTLY = 1


@click.command(
    cls=Command,
    examples=("bitknap compare reference:mixtral --budget 2bpw,2.5bpw -o out",),
    usual=(
        "model",
        "budgets",
        "strategies",
        "profile",
        "bits",
        "text",
        "out",
        "overwrite",
        "as_json",
    ),
)
@common.model
@option(
    "--budget",
    "budgets",
    group="limits",
    also=("--budgets",),
    multiple=True,
    default=("2bpw,2.5bpw,3bpw",),
    metavar="SIZES",
    help="Sizes to compare at.",
    more="In bits per weight, such as 2bpw,2.5bpw. Can be repeated.",
)
@option(
    "--strategies",
    group="solving",
    default="quick",
    metavar="NAMES",
    help="quick, all, published, or names.",
    more="A name is a strategy or ESTIMATOR:SOLVER, such as fisher:greedy; an unknown name lists "
    "all.",
    shell_complete=completing.strategies,
)
@common.profile
@common.method
@measuring.formats
@measuring.group_size.but(usual="32,64,row")
@measuring.metadata.but(usual="compact")
@measuring.text
@measuring.tokens
@common.refine.but(
    default=None,
    usual="64, or 4 with --strategies quick",
    help="Measure N plans for Bitknap's own strategy, ours, at each budget.",
)
@common.refine_tokens
@option(
    "--evaluation-text",
    group="evaluation",
    multiple=True,
    default=("builtin",),
    usual="builtin",
    metavar="FILE",
    help="Text to judge plans on.",
    more="A file, or builtin, which is four texts. Repeat the option for several domains.",
    shell_complete=completing.texts,
)
@option(
    "--evaluation-tokens",
    group="evaluation",
    type=int,
    default=None,
    usual="8192",
    metavar="N",
    help="Number of evaluation tokens, all texts together.",
)
@option(
    "--tasks",
    group="evaluation",
    default="",
    usual="none",
    metavar="NAMES",
    help="Run these tasks of lm-eval as well, such as piqa,arc_easy.",
)
@option(
    "--task-path",
    group="evaluation",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Folder with tasks of your own.",
)
@option(
    "--task-limit",
    group="evaluation",
    type=int,
    default=None,
    usual="all",
    metavar="N",
    help="Number of documents of each task.",
)
@common.output("DIR", "Folder to write.")
@common.overwrite
@measuring.max_memory
@measuring.device
@measuring.dtype
@measuring.device_memory
@measuring.seed
@common.as_json
def compare(
    model: str,
    budgets: tuple[str, ...],
    strategies: str,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare ways to allocate bits on MODEL at equal sizes.

    Plans are judged on text that no strategy has seen. A run that was stopped or killed continues
    when the command is repeated. If a strategy fails, the others are still reported, and the exit
    status is 1.
    """
    from bitknap.benchmarks.compare.cells import FAILED
    from bitknap.benchmarks.compare.models import prepare
    from bitknap.benchmarks.compare.output import write, writing_into
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


def _budgets(texts: Sequence[str]) -> tuple[float, ...]:
    """Return bits per weight in ascending order."""
    sizes = []
    for word in [word for text in texts for word in listed(text)]:
        try:
            sizes.append(float(word.lower().removesuffix("bpw")))
        except ValueError:
            raise InputError(
                f"--budget {word!r}: compare takes bits per weight; write 2.5bpw, or several: "
                "2bpw,2.5bpw"
            ) from None
    if not sizes or not all(0 < size < math.inf for size in sizes) or len(set(sizes)) < len(sizes):
        given = ",".join(texts)
        raise InputError(f"--budget {given!r}: write bits per weight above 0, each once: 2bpw,3bpw")
    return tuple(sorted(sizes))


def _options(model: str, strategies: str, options: dict[str, Any]) -> Options:
    from bitknap.allocation import profile
    from bitknap.api.requests import REFINE_TOKENS
    from bitknap.benchmarks.compare.models import Options
    from bitknap.cli.options.estimating import size_of
    from bitknap.quantization.source.devices import device_of, dtype_name, dtype_of

    profile(options["profile"])
    device = device_of(options["device"])
    usual = 4 if listed(strategies) == ["quick"] else 64
    evaluations = given(options["refine"], usual)
    if evaluations < 1:
        raise InputError(
            f"--refine {evaluations}: must be at least 1, which measures the first plan alone"
        )
    return Options(
        model=model,
        method=options["method"] or "rtn",
        profile=options["profile"],
        text=options["text"],
        tokens=given(options["tokens"], 8192),
        evaluations=evaluations,
        refine_tokens=given(options["refine_tokens"], REFINE_TOKENS),
        evaluation=tuple(options["evaluation_text"]),
        judged=given(options["evaluation_tokens"], 8192),
        seed=options["seed"],
        formats=_formats(options),
        device=str(device),
        dtype=dtype_name(dtype_of(options["dtype"], device)),
        tasks=bool(listed(options["tasks"])),
        max_memory=size_of(options["max_memory"]),
        device_memory=size_of(options["device_memory"], "--device-memory"),
    )


def _tasks(options: dict[str, Any]) -> Tasks | None:
    from bitknap.benchmarks.compare.tasks import Tasks

    names, folder, limit = listed(options["tasks"]), options["task_path"], options["task_limit"]
    if not names:
        return None
    tasks = Tasks(names=tuple(names), folder=folder, limit=limit)
    tasks.check()
    return tasks


def _formats(options: dict[str, Any]) -> tuple[Format, ...]:
    from bitknap.allocation import formats
    from bitknap.benchmarks.compare.models import SIZES

    bits, size, metadata = (listed(options[x]) for x in ("bits", "group_size", "metadata"))
    try:
        widths = [int(b) for b in bits] or list(range(1, 9))
    except ValueError:
        raise InputError(
            f"--formats {options['bits']!r}: widths are numbers, such as 2,3,4"
        ) from None
    return formats(widths, size or SIZES, (False, True), metadata or ("compact",))


def _free(out: Path, model: str, overwrite: bool, options: dict[str, Any]) -> Path:
    """Return the folder if it may be written."""
    texts, tasks = (options["text"], *options["evaluation_text"]), options["task_path"]
    return free_path(out, overwrite, kind="folder", model=model, inputs=[*texts, tasks])


def _about(
    chosen: Options, wanted: tuple[str, ...], sizes: tuple[float, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Return what identifies a run: all of its options, and the texts themselves."""
    import hashlib
    from dataclasses import asdict

    from bitknap.estimators.measuring.text import ENCODING, read_text

    texts = [read_text(chosen.text, "calibration")]
    texts += [read_text(name, "evaluation") for name in chosen.evaluation]
    said = asdict(chosen) | {"formats": [item.name for item in chosen.formats]}
    for limit in ("max_memory", "device_memory"):  # a run may go on with less
        del said[limit]
    return said | {
        "strategies": list(wanted),
        "budgets": list(sizes),
        "encoding": ENCODING,
        "texts": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts],
        "tasks": [options["tasks"], options["task_limit"]],
    }


def _command(words: list[str]) -> str:
    return shlex.join(["bitknap", *words[1:]])
