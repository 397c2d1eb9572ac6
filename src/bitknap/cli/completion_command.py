"""`bitknap completion`: the script that makes a shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import OneOf, argument

# bash splits words at colons, and then cannot complete reference:mixtral.
_COLONS = "COMP_WORDBREAKS=${COMP_WORDBREAKS//:}\n"


@click.command(
    cls=Command,
    examples=(
        'eval "$(bitknap completion bash)"',
        'eval "$(bitknap completion zsh)"',
        "bitknap completion fish | source",
    ),
)
@argument("shell", "Your shell: bash, zsh or fish.", type=OneOf(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, models and other names.

    Run it in the current shell as below, or add that line to the start-up file of your shell.
    """
    kind = get_completion_class(shell)
    if kind is None:  # click knows all three
        raise click.UsageError(f"click cannot complete in {shell}", ctx)
    script = kind(ctx.find_root().command, {}, "bitknap", "_BITKNAP_COMPLETE").source()
    print((_COLONS if shell == "bash" else "") + script)
