"""Declarations of options: spellings (old ones too), group, help and default."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import click
from click.shell_completion import CompletionItem

from bitknap.deprecation import message
from bitknap.names import refused

# The key in a context's `meta` that says whether its help shows all options.
EVERYTHING = "bitknap.help_all"
# Headings of help texts, in this order.
GROUPS = (
    "model",
    "study",
    "measuring",
    "formats",
    "limits",
    "solving",
    "rounding",
    "evaluation",
    "output",
    "help",
)


def warn_former(old: str, new: str) -> None:
    """Print one line on stderr that names an old spelling and what replaces it."""
    print(f"bitknap: {message(old, new)}", file=sys.stderr)


class Option(click.Option):
    """An option in a group, which shows its default even if the default is computed later.

    Attributes:
        group: Its heading in the help text, one of `GROUPS`.
        more: Text that only the help of all options shows.
        usual: The default as the help shows it, if it differs from the value that click has.
        also: Other spellings, which the help does not show.
        former: Old spellings that still work; each prints a warning.
        former_values: New words for old values that still work; each prints a warning.
    """

    def __init__(
        self,
        *names: Any,
        group: str,
        more: str = "",
        usual: str | None = None,
        also: Sequence[str] = (),
        former: Sequence[str] = (),
        former_values: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("show_default", True)
        if settings.get("required") and settings.get("default", "") is None:
            del settings["default"]  # click treats None as a given value
        super().__init__(*names, **settings)
        self.group = group
        self.more = more
        self.usual = usual
        self.also = tuple(also)
        self.former = tuple(former)
        self.former_values = dict(former_values or {})

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return the text in brackets after the help: the default, or "required"."""
        extra = super().get_help_extra(ctx)
        if self.usual is not None:
            extra["default"] = self.usual
        return extra

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the spellings and the help text, in full if all options are shown."""
        brief = self.help
        try:
            if self.more and ctx.meta.get(EVERYTHING, False):
                self.help = f"{brief} {self.more}"
            return super().get_help_record(ctx)
        finally:
            self.help = brief

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the converted value; an old value is replaced by the new one, with a warning."""
        if isinstance(value, str) and value in self.former_values:
            new = self.former_values[value]
            warn_former(f"{self.opts[-1]} {value}", f"{self.opts[-1]} {new}")
            value = new
        return super().type_cast_value(ctx, value)


class Argument(click.Argument):
    """An argument with a help text, shown under "Model" or another heading.

    Attributes:
        about: A phrase that says what to give.
        group: Its heading in the help text, one of `GROUPS`.
    """

    def __init__(self, *names: Any, about: str, group: str = "model", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.about = about
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the name and the help text."""
        return self.make_metavar(ctx), self.about


class OneOf(click.ParamType):  # type: ignore[type-arg]  # no parameter before click 8.4
    """A choice of names; an unknown name is refused with the list and the nearest name.

    Args:
        names: The names, or a function that returns them, called when needed.
        also: Other words, which the help does not show, and the names that they stand for.
    """

    name = "name"

    def __init__(
        self,
        names: Sequence[str] | Callable[[], Sequence[str]],
        also: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._names = names
        self._also = also

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the help."""
        return tuple(self._names() if callable(self._names) else self._names)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the names as the help shows them: [a|b|c]."""
        return f"[{'|'.join(self.names)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value if it is one of the names, or the name that it stands for."""
        value = self._also.get(value, value)
        if value not in self.names:
            self.fail(refused(value, self.names), param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin with the typed text."""
        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


@dataclass(frozen=True, slots=True)
class Declared:
    """An option or argument that commands share; used as a decorator.

    Attributes:
        kind: `Option` or `Argument`.
        names: Its spellings and the parameter that it sets.
        settings: Keyword arguments of the kind.
    """

    kind: type[click.Parameter]
    names: tuple[str, ...]
    settings: Mapping[str, Any]

    def __call__(self, function: Any) -> Any:
        """Add the option to a command."""
        if issubclass(self.kind, click.Argument):
            return click.argument(*self.names, cls=self.kind, **self.settings)(function)
        return click.option(*self.names, cls=Option, **self.settings)(function)

    def named(self, *names: str) -> Declared:
        """Return the option under other spellings."""
        return Declared(self.kind, names, self.settings)

    def but(self, **changes: Any) -> Declared:
        """Return the option with some of its settings changed."""
        return Declared(self.kind, self.names, {**self.settings, **changes})


def option(*names: str, **settings: Any) -> Declared:
    """Declare an option: its spellings, `group`, help, and keyword arguments of click."""
    return Declared(Option, names, settings)


def argument(name: str, about: str, **settings: Any) -> Declared:
    """Declare an argument: its parameter, help text, and keyword arguments of click."""
    return Declared(Argument, (name,), {"about": about, **settings})


def options_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Combine options into one decorator, in this order."""

    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add
