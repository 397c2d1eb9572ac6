"""What `estimate` is asked for at the command line, and what its words mean."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from bitknap.cli.interrupts import stoppable
from bitknap.cli.options.solving import given, include_option, listed, options_of, seed_option
from bitknap.cli.terminal import progress_bars
from bitknap.disk.atomic import beside
from bitknap.disk.manifest import is_ours
from bitknap.disk.outputs import check_output
from bitknap.errors import InputError
from bitknap.estimators.tables.several_texts import Rule
from bitknap.estimators.tables.super_expert_floor import FLOOR
from bitknap.progress import Progress
from bitknap.quiet import silence_transformers

estimating = options_of(
    click.option(
        "--estimator",
        default="calibrated",
        show_default=True,
        help="calibrated[,BASE[,SIGNAL…]], fuzzy[,BASE] or BASE alone: moments, fisher, "
        "fisher-output, weight-error, data-free, measured-kl, …; a wrong name lists them all.",
    ),
    click.option(
        "--calibrate",
        type=int,
        default=None,
        metavar="N",
        help="Calibrate with at most N group measurements. Default: a few widths of each.",
    ),
    click.option(
        "--check",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Of calibrated: measure N held-out plans too, and say how well they are predicted.",
    ),
    click.option(
        "--journal",
        type=click.Path(path_type=Path),
        default=None,
        help="Of measured-…: where it keeps what is measured, also when the table is done.",
    ),
    click.option(
        "--samples",
        type=click.Path(path_type=Path),
        default=None,
        help="Of fuzzy: FILE of measured cells, .safetensors; measured and kept if not there.",
    ),
    click.option(
        "--measurements",
        type=int,
        default=None,
        metavar="N",
        help="Of fuzzy: measure at most N cells. Default: one in fifteen.",
    ),
    click.option(
        "--initial-router",
        default=None,
        metavar="MODEL",
        help="Of router-norm: the model before training. Default: final norms alone.",
    ),
    click.option(
        "--protect-bits",
        type=int,
        default=FLOOR,
        show_default=True,
        help="Least bits of experts whose output is far above their layer's; 0 protects none.",
    ),
    click.option(
        "--method",
        type=click.Choice(["rtn", "hqq", "gptq"]),
        default=None,
        help="How weights are rounded, which is what costs are of. Default: rtn, or the plan's.",
    ),
    click.option(
        "--row-blocks",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Cut each matrix into N runs of rows with a format each.",
    ),
    click.option(
        "--permute",
        is_flag=True,
        help="Of --row-blocks: sort the experts' neurons by sensitivity first, so that blocks "
        "differ. A copy of the model is written beside OUT while that lasts.",
    ),
    click.option(
        "--rotate",
        is_flag=True,
        help="Turn the residual stream by random Hadamard transforms first (--seed), by way of a "
        "copy as well.",
    ),
    click.option(
        "--keep", is_flag=True, help="Offer the precision that weights are stored in as well."
    ),
    click.option("--formats", "bits", default="", help="Widths, such as 2,3,4,8. Default: 1-8."),
    click.option("--group-size", default="", help="Group sizes, such as 64,128,row. Default: all."),
    click.option(
        "--metadata",
        default="",
        help="fp16, compact, compact6 or several. Default: the first two, with and without zero.",
    ),
    click.option("--tokens", type=int, default=None, help="Calibration tokens. Default: 8192."),
    click.option(
        "--text",
        multiple=True,
        default=("builtin",),
        help="Calibration text: a file or builtin; several times for several sets.  "
        "[default: builtin]",
    ),
    click.option(
        "--robust",
        type=click.Choice(get_args(Rule)),
        default=None,
        help="What a cost becomes over several texts. Default: mean.",
    ),
    click.option(
        "--risk", type=float, default=None, metavar="K", help="Of mean+sd: K deviations. Default: 1"
    ),
    click.option(
        "--max-memory",
        default=None,
        metavar="SIZE",
        help="Such as 12GiB: what would take more, gradients or all, goes layer by layer.",
    ),
    include_option,
    seed_option,
)


def files_of(options: dict[str, Any]) -> list[str | Path]:
    """Return the files and folders that the options name, to be read or written besides OUT."""
    named = [options[name] for name in ("journal", "samples")]
    initial = options["initial_router"]
    if initial is not None:
        from bitknap.quantization.source.checkpoint import places

        named += places(initial)
    return [one for one in (*named, *options["text"]) if one is not None]


def check_kept(options: dict[str, Any]) -> None:
    """Refuse files of measurements that could not be read or written, before anything is measured.

    Raises:
        InputError: --journal or --samples names a place that cannot be written, or a file of
            somebody else's.
        FileError: the samples that are there cannot be read.
    """
    journal, samples = options["journal"], options["samples"]
    for path in (journal, samples):
        if path is not None and not path.is_file():
            check_output(path, "file", overwrite=False)
    if journal is not None and journal.is_file():
        if not is_ours(journal):
            raise InputError(
                f"--journal {journal}: not a journal of Bitknap's; choose another file"
            )
        if not os.access(journal, os.R_OK | os.W_OK):
            raise InputError(f"--journal {journal}: may not be written; choose another file")
    if samples is not None and samples.is_file():
        from bitknap.estimators.sparse.measured_cells import LossSamples

        LossSamples.load(samples)


def journal_of(out: Path) -> Path:
    """Return where measurements are kept while `out` is in the making."""
    return beside(out, "journal", hidden=False)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """End a stopped block with one line; without measurements no copy of the model is kept."""
    from bitknap.estimators.measuring.readings import count
    from bitknap.quantization.transforms import transformed_model

    with stoppable():
        try:
            yield
        except BaseException:
            if not count(journal_of(out)):
                transformed_model.forget(out)
            raise


def run_estimate(model: str, options: dict[str, Any], out: Path, *, overwrite: bool) -> Any:
    """Return the cost table that the options ask for.

    Args:
        model: MODEL.
        options: those of `estimating`.
        out: what the table, or what is made of it, is written to: measurements are kept beside it.
        overwrite: whether what a run with other inputs kept may be lost.
    """
    from bitknap.api import quantizing
    from bitknap.quantization.transforms import transformed_model

    silence_transformers()
    with progress_bars() as progress:
        table = quantizing.estimate(
            model,
            _estimator(model, options, progress),
            _formats(model, options),
            text=options["text"],
            robust=options["robust"],
            risk=1.0 if options["risk"] is None else options["risk"],
            tokens=given(options["tokens"], quantizing.CALIBRATION_TOKENS),
            include=listed(options["include"]),
            protect=options["protect_bits"],
            method=options["method"] or "rtn",
            row_blocks=options["row_blocks"],
            permute=options["permute"],
            rotate=options["rotate"],
            max_memory=size_of(options["max_memory"]),
            seed=options["seed"],
            journal=journal_of(out),
            scratch=transformed_model.beside(out),
            overwrite=overwrite,
            progress=progress,
        )
    if "router-norm" not in listed(options["estimator"]):
        return table
    # Which norms were compared is part of what the costs are.
    said = {"initial_router": options["initial_router"] is not None}
    return replace(table, provenance={**table.provenance, **said})


def forget(out: Path) -> None:
    """Delete what was kept beside a finished `out`."""
    from bitknap.estimators.measuring import readings
    from bitknap.quantization.transforms import transformed_model

    readings.forget(journal_of(out))
    transformed_model.forget(out)


def _estimator(model: str, options: dict[str, Any], progress: Progress | None) -> Any:
    from bitknap.estimators.catalog import named

    return named(
        listed(options["estimator"]),
        routers=lambda: _routers(model, options["initial_router"]),
        calibrate=options["calibrate"],
        check=options["check"],
        journal=options["journal"],
        samples=options["samples"],
        measurements=options["measurements"],
        progress=progress,
    )


def _routers(model: str, initial: str | None) -> Any:
    """Return the router-norm signal of a model, against the routers of another if given."""
    from bitknap.estimators.signals.router_norm import RouterNorm, router_norms
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve

    def norms(name: str) -> Any:
        source = Checkpoint.open(resolve(name))
        return router_norms(source, walk_headers(source.config, source.shapes, ()))

    return RouterNorm(final=norms(model), initial=None if initial is None else norms(initial))


def _formats(model: str, options: dict[str, Any]) -> Any:
    from bitknap.allocation import formats
    from bitknap.api.quantizing import GROUP_SIZES

    bits, size, metadata = (listed(options[x]) for x in ("bits", "group_size", "metadata"))
    if not (bits or size or metadata or options["keep"]):
        return None
    try:
        widths = [int(b) for b in bits] or list(range(1, 9))
    except ValueError:
        raise InputError(
            f"--formats {options['bits']!r}: widths are numbers, such as 2,3,4,8"
        ) from None
    kept = _precision(model) if options["keep"] else None
    return formats(
        widths, size or GROUP_SIZES, (False, True), metadata or ("fp16", "compact"), kept
    )


def _precision(model: str) -> str:
    """Return the precision that a model's experts are stored in, all of them in one."""
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve

    source = Checkpoint.open(resolve(model))
    views = walk_headers(source.config, source.shapes, ()).views
    found = {source.precision(view.tensor) for view in views}
    if len(found) > 1:
        raise InputError(f"--keep: experts are stored in {', '.join(sorted(found))}; leave it out")
    kept = found.pop()
    if not kept:
        raise InputError("--keep: experts are stored in a form that cannot be kept; leave it out")
    return kept


def size_of(text: str | None) -> int | None:
    """Return the bytes of a size such as 12GiB."""
    from bitknap.allocation import Budget

    if text is None:
        return None
    try:
        found = Budget.parse(text)
    except InputError:
        found = None
    if found is None or found.kind != "checkpoint":
        raise InputError(f"--max-memory {text!r}: write a size, such as 12GiB or 800MB")
    return int(found.value)
