"""`bitknap export`: a plan written as the files of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.interrupts import stoppable
from bitknap.cli.options import common, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import argument, option
from bitknap.cli.options.estimating import computing_of
from bitknap.cli.options.solving import free_path, given
from bitknap.cli.terminal import present, progress_bars
from bitknap.quiet import silence_transformers


@click.command(
    cls=Command,
    examples=("bitknap export plan.json --model reference:mixtral --to mlx -o out",),
    usual=("plan", "model", "to", "coarsen", "out", "overwrite", "as_json"),
)
@argument("plan", "Plan that bitknap solve wrote.", type=click.Path(path_type=Path))
@common.of_model.but(required=True)
@common.target.but(required=True, usual=None, help="Runtime to write for.", more="").named("--to")
@option(
    "--coarsen",
    group="limits",
    is_flag=True,
    help="First give units that the runtime ties one format, never with fewer bits.",
)
@option(
    "--imatrix",
    group="measuring",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Importance matrix of llama.cpp to round by, instead of a text.",
)
@measuring.text
@measuring.tokens
@measuring.max_memory
@measuring.device
@measuring.dtype
@measuring.device_memory
@measuring.seed
@common.output("OUT", "File or folder to write.")
@common.overwrite
@common.as_json
def export(
    plan: Path,
    model: str,
    to: str,
    coarsen: bool,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write PLAN of a model as the files of another runtime, and verify them.

    A text is read only if the plan's rounding method needs one.
    """
    from bitknap.allocation import BitPlan
    from bitknap.api import exporting
    from bitknap.api.requests import CALIBRATION_TOKENS, Calibration, Resume
    from bitknap.cli.views.tables import bits_table, facts_table
    from bitknap.quantization.targets.catalog import target_of

    target = target_of(to)
    kind = target.output(Path(out))
    path = free_path(
        out, overwrite, kind=kind, model=model, inputs=[plan, options["text"], options["imatrix"]]
    )
    asked = BitPlan.load(plan)
    wanted = exporting.coarsen(asked, target) if coarsen else asked
    silence_transformers()
    calibration = Calibration(
        text=options["text"],
        tokens=given(options["tokens"], CALIBRATION_TOKENS),
        seed=options["seed"],
        **computing_of(options),
        imatrix=options["imatrix"],
    )
    with stoppable(), progress_bars() as progress:
        written = exporting.export(
            wanted,
            model,
            target,
            path,
            calibration=calibration,
            resume=Resume(overwrite=overwrite),
            progress=progress,
        )
    facts = {
        "target": target.name,
        "bytes_predicted": wanted.total_bytes,
        "bytes_on_disk": written.unit_bytes,
        "output_bytes": written.nbytes,
        "files": list(written.files),
    }
    if coarsen:
        facts["coarsened_by_bytes"] = wanted.total_bytes - asked.total_bytes
    said = {"checks": list(written.checks), "warnings": list(written.warnings)}
    shown = facts | {"files": ", ".join(written.files)}
    tables = bits_table(wanted), facts_table(out, shown)
    present(as_json, facts | said | {"path": out}, *tables, *written.checks, *written.warnings)
