"""`bitknap list`: lists every name that commands take, from the tables that the commands use."""

from __future__ import annotations

from typing import Any

import click

from bitknap.cli.options import common, completing
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import argument
from bitknap.cli.terminal import present


@click.command("list", cls=Command, examples=("bitknap list solvers",))
@argument(
    "kind",
    "estimators, solvers, methods, formats, rules, profiles, models or targets.",
    required=False,
    default=None,
    shell_complete=completing.kinds,
)
@common.as_json
def list_names(kind: str | None, as_json: bool) -> None:
    """List the names that commands take, each with what it is and which package offers it.

    Without KIND the kinds are listed. Other packages can add estimators and solvers; two packages
    that offer the same name are an error.
    """
    from bitknap.api.listing import KINDS, kind_of, rows_of

    if kind is None:
        kinds = [{"name": name, "about": one.about} for name, one in KINDS.items()]
        present(as_json, {"kinds": kinds}, _table("bitknap list KIND", kinds))
        return
    for error in kind_of(kind).clashes():
        raise error
    rows = rows_of(kind)
    present(as_json, {kind: rows}, _table(kind, rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    """Return rows as a table; columns that no row fills are left out."""
    from rich.table import Table
    from rich.text import Text

    heads = [head for head in dict.fromkeys(key for row in rows for key in row) if head != "error"]
    table = Table(title=title)
    for head in heads:
        table.add_column(head.replace("_", " "), no_wrap=head == "name")
    for row in rows:
        # Brackets in a name or a reason are text, not markup.
        filled = {**row, "about": row.get("about", row.get("error", ""))}
        table.add_row(*(Text(_cell(filled.get(head, ""))) for head in heads))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
