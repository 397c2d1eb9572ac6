"""The command line: a thin shell over the public verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from bitknap.cli.compare_command import compare
from bitknap.cli.convert_command import convert
from bitknap.cli.estimate_command import estimate
from bitknap.cli.evaluate_command import evaluate
from bitknap.cli.inspect_command import inspect
from bitknap.cli.quantize_command import quantize
from bitknap.cli.show_command import show
from bitknap.cli.solve_command import solve
from bitknap.cli.study.commands import study
from bitknap.cli.terminal import fail, print_any_name, quiet
from bitknap.disk.append_log import no_room
from bitknap.errors import BitknapError
from bitknap.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every error on purpose is one line on stderr and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print_any_name()
    try:
        with quiet():
            bitknap.main(args=None if argv is None else list(argv), standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        fail(error.format_message())
    except BitknapError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'output'}: {no_room(error) or error.strerror or error}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def bitknap() -> None:
    """Choose bits for every expert of a Mixture-of-Experts model, prove it, pack it.

    Example: bitknap quantize reference:mixtral --budget 2.5bpw -o out
    """


for _command in (
    inspect,
    estimate,
    solve,
    quantize,
    evaluate,
    compare,
    study,
    convert,
    show,
):
    bitknap.add_command(_command)
