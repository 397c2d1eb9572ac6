"""What mkdocs calls while it builds: formulas as MathML, and the command line's help as a page."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from typing import Any

import click
from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $…$ and of $$…$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_COMMANDS = "<!-- every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with every command where the mark is."""
    if _COMMANDS not in markdown:
        return markdown
    from bitknap.cli.command import bitknap

    return markdown.replace(_COMMANDS, "\n".join(_commands(bitknap, "bitknap")))


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with formulas as MathML, which browsers draw, and a ± b on one line."""
    content = content.replace(" ± ", "&nbsp;±&nbsp;")
    content = _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return _BLOCK.sub(
        lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>', content
    )


def _mathml(tex: str, display: str) -> str:
    return convert(html.unescape(tex).strip(), display=display)


def _commands(group: click.Group, name: str) -> Iterator[str]:
    """Yield the lines of a group's commands, one after the other."""
    for word, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{name} {word}")
            continue
        yield from _command(command, f"{name} {word}")


def _command(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    text, *examples = re.split(r"\s*\bExample: ", inspect.cleandoc(command.help or ""))
    yield f"\n## {name}\n"
    yield _escaped(text.strip()) + "\n"
    yield f"    {' '.join([name, '[OPTIONS]', *arguments])}\n"
    for example in examples:
        yield f"Example: `{' '.join(example.split())}`\n"
    yield "| option | meaning |"
    yield "|---|---|"
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
            option, meaning = record
            yield f"| <code>{_escaped(option)}</code> | {_escaped(meaning)} |"


def _escaped(text: str) -> str:
    return re.sub(r"[|<*_`\[\]]", lambda found: f"&#{ord(found[0])};", text)
