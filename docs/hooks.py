"""What mkdocs calls while it builds: formulas as MathML, and lists that are made from the code."""

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
_METHODS = "<!-- every published method -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with every command, or published method, where the mark is."""
    if _COMMANDS in markdown:
        from bitknap.cli.command import bitknap

        markdown = markdown.replace(_COMMANDS, "\n".join(_commands(bitknap, "bitknap")))
    if _METHODS in markdown:
        markdown = markdown.replace(_METHODS, "\n".join(_methods()))
    return markdown


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
    context = click.Context(group, info_name=name)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{name} {word}")
        elif command is not None:
            yield from _command(command, f"{name} {word}")


def _command(command: click.Command, name: str) -> Iterator[str]:
    from bitknap.cli.options.declare import EVERYTHING, GROUPS

    context = click.Context(command, info_name=name)
    context.meta[EVERYTHING] = True
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    yield f"\n## {name}\n"
    yield _escaped(inspect.cleandoc(command.help or "")) + "\n"
    yield f"    {' '.join([name, '[OPTIONS]', *arguments])}\n"
    for example in getattr(command, "examples", ()):
        line = " ".join(example.replace("\\\n", " ").split())
        yield f"Example: `{line}`\n"
    for group in GROUPS:
        within = [one for one in command.params if getattr(one, "group", "help") == group]
        rows = [record for one in within if (record := one.get_help_record(context))]
        if rows and group != "help":
            yield f"| {group} | |"
            yield "|---|---|"
            yield from (f"| <code>{_escaped(a)}</code> | {_escaped(b)} |" for a, b in rows)
            yield ""


def _methods() -> Iterator[str]:
    """Yield the lines of every published method: what it does, and what is missing of it."""
    from bitknap.estimators.published import RULES

    for name, method in RULES.items():
        yield f"\n### {method.title} {{ #{name} }}\n"
        yield _escaped(method.cites) + "\n"
        yield "| part | here |"
        yield "|---|---|"
        yield f"| cost | {_escaped(method.cost)} |"
        if method.allocator:
            yield f"| ties | `{method.ties}` |"
            yield f"| allocator | {_escaped(method.allocator)} |"
        if method.plans:
            yield f"| strategy of `compare` | `{name}` |"
        if method.signals:
            yield f"| signals | {', '.join(f'`{signal}`' for signal in method.signals)} |"
        if method.missing:
            yield "\nWhat is missing or ours:\n"
            yield from (f"* {_escaped(one)}" for one in method.missing)


def _escaped(text: str) -> str:
    return re.sub(r"[|<*_`\[\]]", lambda found: f"&#{ord(found[0])};", text)
