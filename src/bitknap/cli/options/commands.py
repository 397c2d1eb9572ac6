"""Commands with grouped help: a short version for most people, and one with every option.

An option names its group, which is its heading in the help. A command names the few options that
most people need; `--help` shows those, `--help-all` shows every one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click

from bitknap.cli.options.declare import EVERYTHING, GROUPS, Option, warn_former
from bitknap.names import refused

# Maximum width of option names; longer names get their own line.
_NAMES_WIDTH = 28


class Command(click.Command):
    """A command with a short and a long help text, both with examples.

    Attributes:
        examples: Command lines to copy.
        usual: Parameters that the short help shows; all parameters if empty.
    """

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), usual: Sequence[str] = (), **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.usual = frozenset(usual)
        self.params.append(
            Option(
                ["--help-all"],
                group="help",
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_print_everything,
                help="Show every option, with details.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after replacing other spellings of options, old ones with a warning."""
        options = [param for param in self.params if isinstance(param, Option)]
        also = {name: one.opts[-1] for one in options for name in one.also}
        former = {name: one.opts[-1] for one in options for name in one.former}
        return super().parse_args(ctx, _renamed(args, also | former, warn=former))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description of the command, and examples as lines to copy."""
        whole = self.help
        try:
            if whole and not ctx.meta.get(EVERYTHING, False):
                self.help = whole.partition("\n\n")[0]
            super().format_help_text(ctx, formatter)
        finally:
            self.help = whole
        write_examples(self.examples, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        everything = ctx.meta.get(EVERYTHING, False)
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            group = getattr(param, "group", "help")
            brief = group != "help" and (not self.usual or param.name in self.usual)
            shown = everything or brief
            record = param.get_help_record(ctx) if shown else None
            if record is not None:
                rows.setdefault(group, []).append(record)
        names = [name for group in rows.values() for name, _ in group if len(name) <= _NAMES_WIDTH]
        width = max(map(len, names), default=0)
        for group in GROUPS:
            if group in rows:
                with formatter.section(group.capitalize()):
                    formatter.write_dl(
                        [(name.ljust(width), text) for name, text in rows[group]],
                        col_max=_NAMES_WIDTH,
                    )
        if not everything:
            formatter.write_paragraph()
            formatter.write(f"All options: {ctx.command_path} --help-all\n")


class Group(click.Group):
    """A group of commands that loads a command when it is run, or when its own help is shown.

    Attributes:
        homes: For each command, in the order of the help: "module:function" and a description.
        examples: Command lines to copy.
    """

    def __init__(
        self,
        name: str,
        *,
        homes: Mapping[str, tuple[str, str]],
        examples: Sequence[str],
        **settings: Any,
    ) -> None:
        super().__init__(name, invoke_without_command=True, callback=_without_command, **settings)
        self.homes = homes
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name; None if there is no such command."""
        from importlib import import_module

        if cmd_name not in self.homes:
            return None
        module, _, name = self.homes[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names.

        Raises:
            click.UsageError: There is no such command; the message names the nearest one.
        """
        if args and args[0] not in self.homes and not args[0].startswith("-"):
            raise click.UsageError(f"command {refused(args[0], self.homes)}", ctx)
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description of the group, and examples as lines to copy."""
        super().format_help_text(ctx, formatter)
        write_examples(self.examples, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their descriptions, and then the options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.homes.items()])
        super(click.Group, self).format_options(ctx, formatter)


@click.pass_context
def _without_command(ctx: click.Context) -> None:
    """If no command is named, explain how to name one and exit with status 2."""
    if ctx.invoked_subcommand is None and isinstance(ctx.command, Group):
        print(
            f"{ctx.command_path}: name a command, for example:\n"
            f"  {ctx.command.examples[0]}\n"
            f"{ctx.command_path} --help lists all commands.",
            file=sys.stderr,
        )
        sys.exit(2)


def missing(error: click.MissingParameter) -> str:
    """Return one line that names the missing parameter, says what to give, and has an example."""
    param, context = error.param, error.ctx
    if param is None or context is None:
        return error.format_message()
    record = param.get_help_record(context) or ("", "")
    name = "/".join(param.opts) if isinstance(param, click.Option) else param.human_readable_name
    metavar = f" {param.make_metavar(context)}" if isinstance(param, click.Option) else ""
    about = str(getattr(param, "about", None) or getattr(param, "help", None) or record[1])
    about = about[:1].lower() + about[1:].rstrip(".")
    examples = getattr(context.command, "examples", ())
    example = f"; example: {examples[0]}" if examples else ""
    return f"{name}{metavar} is missing ({about}){example}"


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Write examples with their line breaks."""
    formatter.write_paragraph()
    for example in examples:
        lines = example.split("\n")
        formatter.write("".join(f"  {'' if i else 'Example: '}{x}\n" for i, x in enumerate(lines)))


def _renamed(
    words: Sequence[str], new_of: Mapping[str, str], *, warn: Collection[str]
) -> list[str]:
    """Return the words of a command line with spellings of options replaced, up to "--"."""
    renamed: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*renamed, word, *rest]
        name, equals, value = word.partition("=")
        if name in new_of:
            if name in warn:
                warn_former(f"the option {name}", new_of[name])
            word = f"{new_of[name]}{equals}{value}"
        renamed.append(word)
    return renamed


def _print_everything(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[EVERYTHING] = True
        click.echo(ctx.get_help())
        ctx.exit()
