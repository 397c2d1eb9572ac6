"""`bitknap convert`: a packed checkpoint in another byte layout."""

from __future__ import annotations

from pathlib import Path

import click

from bitknap.cli.options.solving import as_json_option, free_path, overwrite_option
from bitknap.cli.terminal import present


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["plain", "tiles"]), required=True, help="Of streams.")
@click.option("-o", "out", required=True, help="OUT folder to write.")
@overwrite_option
@as_json_option
def convert(folder: Path, layout: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Write the packed checkpoint FOLDER in another layout, without rounding anything again.

    Tiles are what kernels read; plain streams are as small as can be.

    Example: bitknap convert out --layout tiles -o out-tiles
    """
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
