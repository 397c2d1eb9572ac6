"""Options of `estimate` at the command line, and what their values mean."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitknap.cli.interrupts import stoppable
from bitknap.cli.options import common, measuring
from bitknap.cli.options.declare import options_of
from bitknap.cli.options.solving import given, listed
from bitknap.cli.terminal import progress_bars
from bitknap.disk.atomic import beside
from bitknap.disk.manifest import is_ours
from bitknap.disk.outputs import check_output
from bitknap.errors import InputError
from bitknap.progress import Progress
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation import Format
    from bitknap.api.requests import Calibration, Formats

estimating = options_of(
    measuring.estimator,
    measuring.texts,
    measuring.tokens,
    measuring.max_memory,
    measuring.thorough,
    measuring.device,
    measuring.dtype,
    measuring.device_memory,
    measuring.measure_time,
    measuring.seed,
    measuring.calibrate,
    measuring.check,
    measuring.journal,
    measuring.samples,
    measuring.measurements,
    measuring.initial_router,
    measuring.protect_bits,
    measuring.robust,
    measuring.risk,
    common.include,
    measuring.formats,
    measuring.group_size,
    measuring.metadata,
    measuring.keep,
    measuring.row_blocks,
    measuring.permute,
    measuring.rotate,
)


def files_of(options: dict[str, Any]) -> list[str | Path]:
    """Return the files and folders besides OUT that the options name for reading or writing."""
    named = [options[name] for name in ("journal", "samples")]
    initial = options["initial_router"]
    if initial is not None:
        from bitknap.quantization.source.checkpoint import places

        named += places(initial)
    return [one for one in (*named, *options["text"]) if one is not None]


def check_kept(options: dict[str, Any]) -> None:
    """Refuse measurement files that cannot be read or written, before anything is measured.

    Raises:
        InputError: --journal or --samples names a path that cannot be written, or a file that
            Bitknap did not write.
        FileError: existing samples cannot be read.
    """
    journal, samples = options["journal"], options["samples"]
    for path in (journal, samples):
        if path is not None and not path.is_file():
            check_output(path, "file", overwrite=False)
    if journal is not None and journal.is_file():
        if not is_ours(journal):
            raise InputError(f"--journal {journal}: not a journal of Bitknap; choose another file")
        if not os.access(journal, os.R_OK | os.W_OK):
            raise InputError(f"--journal {journal}: is not writable; choose another file")
    if samples is not None and samples.is_file():
        from bitknap.estimators.sparse.measured_cells import LossSamples

        LossSamples.load(samples)


def journal_of(out: Path) -> Path:
    """Return the path where measurements are kept until `out` is finished."""
    return beside(out, "journal", hidden=False)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """End a stopped block with one line; keep no copy of the model without measurements."""
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
        options: the options of `estimating`.
        out: path of the table, or of the result made from it; measurements are kept beside it.
        overwrite: whether to discard measurements of a run with other inputs.
    """
    from bitknap.api import quantizing
    from bitknap.api.requests import Resume
    from bitknap.quantization.transforms import transformed_model

    silence_transformers()
    resume = Resume(
        journal=journal_of(out), scratch=transformed_model.beside(out), overwrite=overwrite
    )
    with progress_bars() as progress:
        table = quantizing.estimate(
            model,
            _estimator(model, options, progress),
            formats_of(options),
            calibration=calibration_of(options),
            resume=resume,
            progress=progress,
        )
    if "router-norm" not in listed(options["estimator"]):
        return table
    # The compared norms are part of the identity of the costs.
    said = {"initial_router": options["initial_router"] is not None}
    return replace(table, provenance={**table.provenance, **said})


def forget(out: Path) -> None:
    """Delete the files kept beside a finished `out`."""
    from bitknap.estimators.measuring import readings
    from bitknap.quantization.transforms import transformed_model

    readings.forget(journal_of(out))
    transformed_model.forget(out)


def _estimator(model: str, options: dict[str, Any], progress: Progress | None) -> Any:
    from bitknap.estimators.named import Settings, named

    settings = Settings(
        routers=lambda: _routers(model, options["initial_router"]),
        calibrate=options["calibrate"],
        check=options["check"],
        journal=options["journal"],
        samples=options["samples"],
        measurements=options["measurements"],
        progress=progress,
    )
    return named(listed(options["estimator"]), settings)


def _routers(model: str, initial: str | None) -> Any:
    """Return the router-norm signal of a model, relative to the routers of another if given."""
    from bitknap.estimators.published.chowdhury import RouterNorm, router_norms
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve

    def norms(name: str) -> Any:
        source = Checkpoint.open(resolve(name))
        return router_norms(source, walk_headers(source.config, source.shapes, ()))

    return RouterNorm(final=norms(model), initial=None if initial is None else norms(initial))


def calibration_of(options: dict[str, Any], *, text: str | None = None) -> Calibration:
    """Return the calibration that the options ask for.

    Args:
        options: the options of `estimating`.
        text: the only text, for commands that take one; the texts of the options when not given.
    """
    from bitknap.api.requests import CALIBRATION_TOKENS, Calibration, TextSets

    texts, robust = (options["text"], options["robust"]) if text is None else ((text,), None)
    return Calibration(
        text=texts[0] if len(texts) == 1 else TextSets(texts),
        tokens=given(options["tokens"], CALIBRATION_TOKENS),
        include=listed(options["include"]),
        seed=options["seed"],
        rounding=options["method"] or "rtn",
        **computing_of(options),
        robust=robust,
        risk=1.0 if options["risk"] is None else options["risk"],
        thorough=options["thorough"],
        measure_time=seconds_of(options["measure_time"]),
    )


def formats_of(options: dict[str, Any]) -> Formats:
    """Return the formats, row blocks and transforms that the options ask for."""
    from bitknap.api.requests import Formats

    return Formats(
        options=grids_of(options),
        keep=options["keep"],
        protect=options["protect_bits"],
        row_blocks=options["row_blocks"],
        permute=options["permute"],
        rotate=options["rotate"],
        target=options["target"],
    )


def grids_of(options: dict[str, Any]) -> tuple[Format, ...] | None:
    """Return the grids that the options ask for, None if they ask for none."""
    from bitknap.allocation import formats
    from bitknap.allocation.problem.format import GROUP_SIZES

    bits, size, metadata = (listed(options[x]) for x in ("bits", "group_size", "metadata"))
    try:
        widths = [int(b) for b in bits] or list(range(1, 9))
    except ValueError:
        raise InputError(
            f"--formats {options['bits']!r}: widths are numbers, such as 2,3,4,8"
        ) from None
    if not (bits or size or metadata):
        return None
    sizes, ways = size or GROUP_SIZES, metadata or ("fp16", "compact")
    return formats(widths, sizes, (False, True), ways)


def seconds_of(text: str | None) -> float | None:
    """Return a time such as 30min in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(s|min|h)", text.strip())
    if match is None:
        raise InputError(f"--measure-time {text!r}: write a time, such as 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def computing_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return where the options want models to run, as arguments of requests."""
    return {
        "device": options["device"],
        "dtype": options["dtype"],
        "max_memory": size_of(options["max_memory"]),
        "device_memory": size_of(options["device_memory"], "--device-memory"),
    }


def size_of(text: str | None, option: str = "--max-memory") -> int | None:
    """Return a size such as 12GiB in bytes.

    Args:
        text: the size.
        option: the option that has it.
    """
    from bitknap.allocation import Budget

    if text is None:
        return None
    try:
        size = Budget.parse(text)
    except InputError:
        size = None
    if size is None or size.kind != "checkpoint":
        raise InputError(f"{option} {text!r}: write a size, such as 12GiB or 800MB")
    return int(size.value)
