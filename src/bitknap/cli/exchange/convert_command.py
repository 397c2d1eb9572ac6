"""`bitknap convert`: writes a packed checkpoint in another byte layout."""

from __future__ import annotations

from pathlib import Path

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import OneOf, argument, option
from bitknap.cli.options.solving import free_path
from bitknap.cli.terminal import present


@click.command(cls=Command, examples=("bitknap convert out --layout tiles -o out-tiles",))
@argument("folder", "Packed checkpoint.", type=click.Path(path_type=Path))
@option(
    "--layout",
    group="output",
    type=OneOf(("plain", "tiles")),
    required=True,
    metavar="NAME",
    help="Byte layout: plain (smallest) or tiles (for GPUs).",
)
@common.output("OUT", "Packed checkpoint to write, a folder.")
@common.overwrite
@common.as_json
def convert(folder: Path, layout: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Change the byte layout of the packed checkpoint FOLDER; its weights stay the same."""
    from bitknap.cli.views.tables import facts_table
    from bitknap.quantization.packed.convert_layout import convert as rewrite

    path = free_path(out, overwrite, kind="folder", inputs=[folder])
    sizes = rewrite(folder, layout, path, overwrite=overwrite)
    facts = {
        "layout": layout,
        "bytes_of_plan": sizes["plan"],
        "bytes_on_disk": sizes["written"],
        "checkpoint_bytes": sizes["checkpoint"],
    }
    present(as_json, facts | {"path": out}, facts_table(out, facts))
