r"""As few patterns as match exactly the modules of each format, and nothing else.

A pattern is anchored and escaped, and matches whole names: numbers of layers and experts, and last
parts of names, are joined where the same ones go together.

    ^model\.layers\.(?:0|5)\.mlp\.experts\.\d+\.(?:gate_proj|up_proj)$
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bitknap.allocation.problem.format import Format
from bitknap.errors import MismatchError

_NAME = re.compile(r"(.*?\.)(\d+)((?:\..*?)?)(?:\.(\d+))?\.([^.]+)")
# An expert's number where a module has none.
_NONE = -1


class Pattern(NamedTuple):
    """A regular expression, and the format of the modules that it matches; None: left as it is."""

    regex: str
    format: Format | None


class _Place(NamedTuple):
    """A module's name, taken apart."""

    stem: str
    layer: int
    middle: str
    expert: int
    leaf: str


def patterns(groups: Mapping[Format | None, Sequence[str]], every: Iterable[str]) -> list[Pattern]:
    """Return patterns for groups of modules, those that match the fewest first.

    Args:
        groups: names of modules, by the format that they get.
        every: names of all modules of the model, which no pattern of another group may match.
    """
    known = _Known(every)
    made = []
    for format, names in groups.items():
        made += [(count, Pattern(regex, format)) for regex, count in known.joined(names)]
    return [pattern for _, pattern in sorted(made, key=lambda one: (one[0], one[1].regex))]


class _Known:
    """All names of a model, which tell when a number may stand for any number."""

    def __init__(self, every: Iterable[str]) -> None:
        self._experts: defaultdict[tuple[str, int, str, str], set[int]] = defaultdict(set)
        self._layers: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
        for name in every:
            place = _taken_apart(name)
            if place is not None:
                stem, layer, middle, expert, leaf = place
                self._experts[stem, layer, middle, leaf].add(expert)
                self._layers[stem, middle, leaf].add(layer)

    def joined(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Return regular expressions that match exactly these names, and how many each matches."""
        found: list[tuple[str, int]] = []
        experts: defaultdict[tuple[str, int, str, str], set[int]] = defaultdict(set)
        for name in names:
            place = _taken_apart(name)
            if place is None:
                found.append((f"^{re.escape(name)}$", 1))
            else:
                stem, layer, middle, expert, leaf = place
                experts[stem, layer, middle, leaf].add(expert)
        # Last parts of names that have the same experts in a layer go together ...
        leaves: defaultdict[tuple[str, int, str, str, int], list[str]] = defaultdict(list)
        for (stem, layer, middle, leaf), numbers in experts.items():
            text = _experts(numbers, self._experts[stem, layer, middle, leaf])
            leaves[stem, layer, middle, text, len(numbers)].append(leaf)
        # ... and so do layers that have the same of both.
        layers: defaultdict[tuple[str, str, str, tuple[str, ...]], dict[int, int]]
        layers = defaultdict(dict)
        for (stem, layer, middle, text, count), some in leaves.items():
            layers[stem, middle, text, tuple(sorted(some))][layer] = count * len(some)
        for (stem, middle, text, ends), counts in layers.items():
            whole = set.union(*(self._layers[stem, middle, leaf] for leaf in ends))
            start = f"^{re.escape(stem)}{_numbers(set(counts), whole)}{re.escape(middle)}{text}"
            last = _one_of([re.escape(end) for end in ends])
            found.append((rf"{start}\.{last}$", sum(counts.values())))
        return found


def first_matches(regexes: Sequence[str], names: Iterable[str]) -> dict[str, int]:
    """Return the first expression that matches the start of each name, by its place in the list.

    Most expressions begin with plain text, and only names that begin with that text are tried.

    Args:
        regexes: expressions that begin with "^".
        names: the names; those that nothing matches are left out.
    """
    ordered = sorted(names)
    found: dict[str, int] = {}
    for place, regex in enumerate(regexes):
        match, start = re.compile(regex).match, _plain_start(regex)
        first = bisect_left(ordered, start)
        last = bisect_left(ordered, f"{start}{chr(sys.maxunicode)}")
        for name in ordered[first:last]:
            if name not in found and match(name):
                found[name] = place
    return found


def check_matches(
    target: str, wanted: Mapping[str, Format | None], given: Mapping[str, Format | None]
) -> None:
    """Raise MismatchError for the first module that a target would treat in another way.

    Args:
        target: name of the target.
        wanted: each module's format; None for one that must stay as it is.
        given: the same as the target's own rules read the settings.
    """
    for name, format in wanted.items():
        if given[name] != format:
            raise MismatchError(
                f"{target}: its rules give {name} {_said(given[name])}, the plan says "
                f"{_said(format)}; report this as a bug"
            )


def _plain_start(regex: str) -> str:
    """Return the text that everything begins with that an expression beginning with "^" matches."""
    plain = re.match(r"\^((?:[\w/-]|\\[^\w])*)(?![*?{+|])", regex)
    text = "" if plain is None or "|" in re.sub(r"\(.*?\)", "", regex) else plain[1]
    return text.replace("\\", "")


def _said(format: Format | None) -> str:
    return "no format" if format is None else str(format)


def _taken_apart(name: str) -> _Place | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stem, layer, middle, expert, leaf = match.groups()
    return _Place(stem, int(layer), middle, _NONE if expert is None else int(expert), leaf)


def _experts(some: set[int], every: set[int]) -> str:
    """Return an expression for experts' numbers with the dot before them; "" where none has one."""
    return "" if some == {_NONE} else rf"\.{_numbers(some, every)}"


def _numbers(some: set[int], every: set[int]) -> str:
    """Return an expression for numbers: any number if they are all there are."""
    if len(some) > 1 and some == every:
        return r"\d+"
    return _one_of([str(number) for number in sorted(some)])


def _one_of(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"
