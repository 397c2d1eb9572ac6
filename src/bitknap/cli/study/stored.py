"""Options of the commands of a study: where it is stored, and where its tables lie."""

from __future__ import annotations

from pathlib import Path

import click

from bitknap.cli.options.declare import argument, option
from bitknap.cli.options.solving import free_path

name = argument("name", "Name of the study.", group="study")
storage = option(
    "--storage",
    group="study",
    required=True,
    metavar="URL",
    help="Storage: sqlite:///s.db or journal:s.log.",
    more="Trials are kept there; any storage URL of Optuna works.",
)
moved = option(
    "--table",
    group="study",
    type=click.Path(path_type=Path),
    default=None,
    usual="where it was",
    metavar="TABLE",
    help="Cost table of the study, if it was moved.",
)
features = option(
    "--feature",
    "features",
    group="study",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="TABLE",
    help="Cost table of another estimator.",
    more="Can be repeated.",
)


def free(
    out: str, overwrite: bool, storage: str, table: Path | None, features: tuple[Path, ...]
) -> Path:
    """Return the path of an output if it may be written; neither a table nor the storage is."""
    from bitknap.allocation.search.optuna_trials import file_of

    return free_path(out, overwrite, inputs=[table, *features, file_of(storage)])
