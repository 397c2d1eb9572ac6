"""`bitknap import`: what another tool has measured, as a cost table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import common, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import argument
from bitknap.cli.options.estimating import grids_of
from bitknap.cli.options.solving import free_path, listed
from bitknap.cli.terminal import present


@click.command(
    "import",
    cls=Command,
    examples=("bitknap import measurement.json -o table.safetensors",),
)
@argument(
    "files",
    "Files of ExLlamaV2, AutoRound, ModelOpt or llama.cpp.",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@common.of_model
@common.include
@measuring.formats
@measuring.group_size
@measuring.metadata
@common.output("TABLE", "Cost table to write, .safetensors.")
@common.overwrite
@common.as_json
def import_costs(
    files: tuple[Path, ...],
    model: str | None,
    out: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn the measurements in FILES into a cost table, which `solve` plans with.

    ExLlamaV2's measurement.json, ModelOpt's search state; AutoRound's scheme_NN_KEY.json, one for
    each scheme of a run, with the model that was scored; or an importance matrix of llama.cpp, with
    its model and the formats to charge.
    """
    from bitknap.api import importing
    from bitknap.cli.views.tables import facts_table

    path = free_path(out, overwrite, inputs=files)
    roles, grids = listed(options["include"]), grids_of(options)
    table = importing.import_costs(*files, model=model, formats=grids, include=roles)
    table.save(path)
    left_out = list(table.provenance.get("left_out", ()))
    facts = {
        "units": len(table.units),
        "formats": len(table.formats),
        "unit_of_costs": table.provenance["unit"],
        "left_out": len(left_out),
    }
    notes = [f"left out, as it is no unit: {name}" for name in left_out[:5]]
    if len(left_out) > len(notes):
        notes.append(f"and {len(left_out) - len(notes):,} more")
    present(as_json, facts | {"path": out}, facts_table(out, facts), *notes)
