"""Tables of names: known names, the nearest name to a misspelled one, and names from packages.

A `Catalog` is one table: Bitknap's own rows, and those that other packages offer as entry points.
It stores where each object is, and imports an object only on request.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions
from types import MappingProxyType
from typing import Any

from bitknap.errors import BitknapError, InputError

OWN = "bitknap"
# Similarity of letters, from 0 to 1, below which a name is not a misspelling of another.
_ALIKE = 0.4


def unknown(
    what: str, name: object, known: Iterable[str], error: type[BitknapError] = InputError
) -> BitknapError:
    """Return the error for an unknown name, with the nearest name and all known names.

    Args:
        what: the kind of name, such as "solver", or the argument or field that holds it.
        name: the name that was given.
        known: every name that exists.
        error: type of the error.
    """
    return error(f"{what} {refused(name, known)}")


def check_name(
    what: str, name: object, known: Iterable[str], error: type[BitknapError] = InputError
) -> None:
    """Raise the error of `unknown` unless a name is one of those known; takes its arguments."""
    names = list(known)
    if name not in names:
        raise unknown(what, name, names, error)


def one_of(what: str, known: Iterable[str]) -> Callable[[str], str]:
    """Return the `type` of an argparse argument that takes known names only.

    Unlike `choices`, it names the nearest one to a name that is not known.
    """
    names = tuple(known)

    def convert(name: str) -> str:
        if name not in names:
            raise ArgumentTypeError(f"{what} {refused(name, names)}")
        return name

    return convert


def refused(name: object, known: Iterable[str]) -> str:
    """Return "'name' is unknown; one of …", with all known names and the nearest one."""
    names = list(known)
    there = f"one of {', '.join(names)}" if names else "there are none"
    return f"{name!r} is unknown; {there}{guess(str(name), names)}"


def guess(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest name, or nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is spelled most like another, or "" if none is."""
    # Letters are compared in lower case; the known name is returned as it is written.
    written = {one.lower(): one for one in reversed(list(known))}
    near = get_close_matches(name.lower(), list(written), 1, _ALIKE)
    return written[near[0]] if near else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of a catalog.

    Attributes:
        name: its name at the command line.
        about: a description in one sentence; taken from the docstring if empty.
        place: its location, "module:attribute".
        settings: keywords that its factory is called with.
        kind: its kind, in a catalog with several kinds.
        cites: where it was published.
        package: the package that offers it: "bitknap", or a name and a version.
    """

    name: str
    about: str = ""
    place: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    kind: str = ""
    cites: str = ""
    package: str = OWN

    @property
    def own(self) -> bool:
        """Whether it belongs to Bitknap rather than to another package."""
        return self.package == OWN

    def load(self) -> Any:
        """Import the object that the row names.

        Raises:
            InputError: another package offers it, and it cannot be imported.
        """
        module, _, attribute = self.place.partition(":")
        if self.own:
            return getattr(import_module(module), attribute)
        try:
            return EntryPoint(self.name, self.place, "").load()
        # A package may raise any exception; it must not break the others.
        except (Exception, SystemExit) as error:
            raise self._broken(f"cannot import {self.place}", error) from None

    def accepts(self, keyword: str) -> bool:
        """Return whether the named object takes this keyword, by name or in `**kwargs`."""
        try:
            taken = inspect.signature(self.load()).parameters.values()
        except (TypeError, ValueError):
            return False
        return any(one.name == keyword or one.kind is one.VAR_KEYWORD for one in taken)

    def __call__(self, **more: Any) -> Any:
        """Return a new instance; an object that is not callable is returned unchanged.

        Args:
            more: further keywords.

        Raises:
            InputError: another package offers it, and it cannot be created.
        """
        made = self.load()
        if not callable(made):
            return made
        if self.own:
            return made(**self.settings, **more)
        try:
            return made(**more)
        except InputError:
            raise
        except Exception as error:
            raise self._broken(f"cannot make {self.place}", error) from None

    def described(self) -> str:
        """Return its description, or the first line of its docstring.

        Raises:
            InputError: another package offers it, and it cannot be imported.
        """
        if self.about:
            return self.about
        lines = (inspect.getdoc(self.load()) or "").strip().splitlines()
        return lines[0] if lines else ""

    def _broken(self, what: str, error: BaseException) -> InputError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return InputError(
            f"{self.name}: package {self.package} {what} ({reason}); repair or "
            "uninstall that package"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """One table of names.

    Attributes:
        what: the kind of each row, such as "solver".
        rows: Bitknap's own rows, in the order of lists.
        group: the entry point group in which packages offer more rows; "" for none.
    """

    what: str
    rows: tuple[Entry, ...]
    group: str = ""

    def entries(self) -> tuple[Entry, ...]:
        """Return every row: Bitknap's own first, then those of packages, sorted by name."""
        return (*self.rows, *_offered(self.group, tuple(sys.path)))

    def names(self) -> tuple[str, ...]:
        """Return every name once, in the order of `entries`."""
        return tuple(dict.fromkeys(one.name for one in self.entries()))

    def find(self, name: str) -> Entry:
        """Return the row with a name, without importing its object.

        Raises:
            InputError: no row has the name, or several packages offer it.
        """
        entries = self.entries()
        same = [one for one in entries if one.name == name]
        if not same:
            raise unknown(self.what, name, self.names())
        if len(same) > 1:
            raise self._clash(same)
        return same[0]

    def clashes(self) -> tuple[InputError, ...]:
        """Return an error for each name that several packages offer."""
        entries = self.entries()
        count = Counter(one.name for one in entries)
        return tuple(
            self._clash([one for one in entries if one.name == name])
            for name in self.names()
            if count[name] > 1
        )

    def _clash(self, same: list[Entry]) -> InputError:
        packages = " and ".join(dict.fromkeys(one.package for one in same))
        others = " or ".join(dict.fromkeys(one.package for one in same if not one.own))
        return InputError(
            f"{self.what} {same[0].name!r}: offered {len(same)} times, by {packages}; uninstall "
            f"{others}, or rename its entry point in {self.group}"
        )


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[Entry, ...]:
    """Return the rows that packages on a path offer in an entry point group, sorted by name.

    Reading the metadata of every package takes some 30 ms, and names are looked up often.
    """
    return tuple(sorted(_found(group, path), key=lambda one: (one.name, one.package)))


def _found(group: str, path: tuple[str, ...]) -> Iterator[Entry]:
    seen: set[str] = set()
    for distribution in distributions(path=list(path)) if group else ():
        points = _points(distribution, group)
        name = str(distribution.metadata["Name"] or "an unnamed package") if points else ""
        if name.lower() in seen:  # an older copy, later on the path
            continue
        seen.add(name.lower())
        for point in points:
            package = f"{name} {distribution.version}"
            yield Entry(name=point.name, place=point.value, package=package)


def _points(distribution: Distribution, group: str) -> list[EntryPoint]:
    try:
        return list(distribution.entry_points.select(group=group))
    # Metadata that cannot be parsed offers nothing, and must not hide other packages.
    except Exception:
        return []
