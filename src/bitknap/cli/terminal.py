"""Terminal output: one line for an error, bars on stderr, tables or JSON on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from bitknap.cli.argument_names import in_options
from bitknap.errors import BitknapWarning
from bitknap.progress import Progress


def fail(message: str) -> None:
    """Print the message as one line on stderr and exit with status 2."""
    print("bitknap: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def print_any_name() -> None:
    """Escape names that the terminal cannot show, so that they do not end a finished command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from writing to stderr: only Bitknap writes there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\..*)?")
        warnings.simplefilter("always", BitknapWarning)
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            if issubclass(category, BitknapWarning):
                print(f"bitknap: {in_options(str(message))}", file=sys.stderr)
            else:
                others(message, category, *where, **options)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress | None]:
    """Yield a callback that draws a bar on stderr; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done + 1, total=total)

        yield advance


def present(as_json: bool, document: Any, *tables: Any) -> None:
    """Print one JSON document, or tables for people."""
    if as_json:
        print(json.dumps(document, indent=1, sort_keys=True))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        # Brackets in file names are text, not markup.
        console.print(table, markup=not isinstance(table, str))
