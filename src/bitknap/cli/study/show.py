"""`bitknap study show`: how a study stands."""

from __future__ import annotations

from pathlib import Path

import click

from bitknap.cli.options import common
from bitknap.cli.options.commands import Command
from bitknap.cli.study import stored


@click.command(
    cls=Command, examples=("bitknap study show s --storage sqlite:///s.db -o study.html",)
)
@stored.name
@stored.storage
@stored.moved
@stored.features
@common.output("PAGE", "HTML page to write.", required=False)
@common.overwrite
@common.as_json
def show(
    name: str,
    storage: str,
    out: str | None,
    table: Path | None,
    features: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show how the study NAME stands; with -o, as an HTML page with plots as well."""
    from bitknap.allocation.search.study import load
    from bitknap.cli.views.study_view import present_study

    path = None if out is None else stored.free(out, overwrite, storage, table, features)
    found = load(name, storage, table=table, features=features)
    if path is not None:
        from bitknap.disk.atomic import write_whole
        from bitknap.report.study_page import page

        write_whole(path, page(found).encode())
    present_study(found, as_json, {} if out is None else {"path": out})
