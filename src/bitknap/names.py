"""Tables of names: what there is, the nearest name to a wrong one, and what packages add.

A `Catalog` is one table: the rows that Bitknap has, and those that other packages offer as entry
points. It knows where each thing is, and imports it only when it is asked for.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions
from types import MappingProxyType
from typing import Any

from bitknap.errors import InputError

OWN = "bitknap"
# Share of letters in order, from 0 to 1, below which a name is no misspelling of another.
_ALIKE = 0.4


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error that says that a name is unknown, which is nearest, and what there is.

    Args:
        what: what the name should be the name of, such as "solver".
        name: as it was given.
        known: every name that exists.
    """
    names = list(known)
    there = f"one of {', '.join(names)}" if names else "there are none"
    return InputError(f"{what} {name!r} is unknown; {there}{guess(name, names)}")


def guess(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest name, or nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is spelled most like another, or "" if none is."""
    # Letters are compared in lower case; the name is said as it is written.
    written = {one.lower(): one for one in reversed(list(known))}
    near = get_close_matches(name.lower(), list(written), 1, _ALIKE)
    return written[near[0]] if near else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of a catalog.

    Attributes:
        name: what it is called at the command line.
        about: one sentence; read off the docstring if it is empty.
        place: where it is, "module:attribute".
        settings: keywords that its factory is called with.
        kind: what sort of thing it is, where a catalog has several.
        cites: where it was published.
        package: what offers it: "bitknap", or a name and a version.
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
        """Whether Bitknap has it, and not another package."""
        return self.package == OWN

    def load(self) -> Any:
        """Import what the row names.

        Raises:
            InputError: another package offers it, and it cannot be imported.
        """
        module, _, attribute = self.place.partition(":")
        if self.own:
            return getattr(import_module(module), attribute)
        try:
            return EntryPoint(self.name, self.place, "").load()
        # A package may fail in any way; the others must not.
        except (Exception, SystemExit) as error:
            raise self._broken(f"cannot import {self.place}", error) from None

    def accepts(self, keyword: str) -> bool:
        """Return whether what the row names is called with this keyword, or could be."""
        try:
            taken = inspect.signature(self.load()).parameters.values()
        except (TypeError, ValueError):
            return False
        return any(one.name == keyword or one.kind is one.VAR_KEYWORD for one in taken)

    def __call__(self, **more: Any) -> Any:
        """Return a new instance; what is no class or function is returned as it is.

        Args:
            more: further keywords.

        Raises:
            InputError: another package offers it, and it cannot be made.
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
        """Return the sentence about it, or the first line of its docstring.

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
        what: what each row is, such as "solver".
        rows: what Bitknap has, in the order of lists.
        group: the entry points that packages offer more in; "" for none.
    """

    what: str
    rows: tuple[Entry, ...]
    group: str = ""

    def entries(self) -> tuple[Entry, ...]:
        """Return every row, Bitknap's first, then those of packages by name."""
        return (*self.rows, *sorted(_offered(self.group), key=lambda one: (one.name, one.package)))

    def names(self) -> tuple[str, ...]:
        """Return every name once, in the order of `entries`."""
        return tuple(dict.fromkeys(one.name for one in self.entries()))

    def find(self, name: str) -> Entry:
        """Return the row of a name; nothing of it is imported.

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


def _offered(group: str) -> Iterator[Entry]:
    """Yield what installed packages offer in a group of entry points."""
    seen: set[str] = set()
    for distribution in distributions() if group else ():
        points = _points(distribution, group)
        name = str(distribution.metadata["Name"] or "an unnamed package") if points else ""
        if name.lower() in seen:  # an older copy, further down the path
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
