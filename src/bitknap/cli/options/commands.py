"""Commands with grouped help: a short one for most people, and one with every option.

An option names the group whose heading it stands under. A command names the few options that most
people need; `--help` shows those, `--help-all` shows every one.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click

from bitknap.cli.options.declare import EVERYTHING, GROUPS, Option, did_you_mean, warn_former

# Columns that the names of options may take; longer ones get a line of their own.
_NAMES_WIDTH = 28


class Command(click.Command):
    """A command with a short help, a long help, and an example in both.

    Attributes:
        examples: Command lines to copy.
        usual: Parameters that the short help shows; all of them if none is named.
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
        """Parse the words, other spellings of options replaced, old ones with a warning."""
        options = [param for param in self.params if isinstance(param, Option)]
        also = {name: one.opts[-1] for one in options for name in one.also}
        former = {name: one.opts[-1] for one in options for name in one.former}
        return super().parse_args(ctx, _renamed(args, also | former, warn=former))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the command does, and examples as lines to copy."""
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
        homes: Of each command, in the order of the help: "module:function" and what it does.
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
        """Return a command by its name; None if there is none of that name."""
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
            click.UsageError: It names none; the message says which one is nearest.
        """
        if args and args[0] not in self.homes and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.homes)
            known = ", ".join(self.homes)
            raise click.UsageError(f"no command {args[0]!r}{near}; commands are {known}", ctx)
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the commands do together, and examples as lines to copy."""
        super().format_help_text(ctx, formatter)
        write_examples(self.examples, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each with what it does, and then the options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.homes.items()])
        super(click.Group, self).format_options(ctx, formatter)


@click.pass_context
def _without_command(ctx: click.Context) -> None:
    """Say how to name a command, and exit with status 2, if none is named."""
    if ctx.invoked_subcommand is None and isinstance(ctx.command, Group):
        print(
            f"{ctx.command_path}: name a command, for example:\n"
            f"  {ctx.command.examples[0]}\n"
            f"{ctx.command_path} --help lists all commands.",
            file=sys.stderr,
        )
        sys.exit(2)


def missing(error: click.MissingParameter) -> str:
    """Return one line that says what is missing, what to give, and an example."""
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
    """Write examples, which keep their line breaks."""
    formatter.write_paragraph()
    for example in examples:
        lines = example.split("\n")
        formatter.write("".join(f"  {'' if i else 'Example: '}{x}\n" for i, x in enumerate(lines)))


def _renamed(
    words: Sequence[str], new_of: Mapping[str, str], *, warn: Collection[str]
) -> list[str]:
    """Return the words of a command line, some spellings of options replaced, up to "--"."""
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
