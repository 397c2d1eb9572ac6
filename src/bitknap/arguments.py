"""Arguments shared by the programs besides the command line: benchmarks and kernel tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitknap.deprecation import message


def add_output(parser: argparse.ArgumentParser, about: str, *, required: bool = True) -> None:
    """Add -o/--output, which fills `out`; the old spelling --out works with a warning.

    Args:
        parser: The parser of the program.
        about: The help text, which says what is written.
        required: Whether the program needs it.
    """
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("-o", "--output", dest="out", type=Path, metavar="PATH", help=about)
    group.add_argument("--out", action=_Former, type=Path, help=argparse.SUPPRESS)


class _Former(argparse.Action):
    """Take the value, and print one line on stderr that names the new spelling."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the value where the new spelling does."""
        print(f"{parser.prog}: {message('the option --out', '--output')}", file=sys.stderr)
        setattr(namespace, self.dest, values)
