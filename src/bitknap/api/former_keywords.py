"""Former keywords of the public verbs, now fields of requests; kept for one more version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from bitknap.api.requests import Formats
from bitknap.deprecation import warn_renamed

P = ParamSpec("P")
R = TypeVar("R")
# The class of a request, and the field that each former keyword maps to.
Group = tuple[type[Any], Mapping[str, str]]


def group(kind: type[Any], *names: str, **renamed: str) -> Group:
    """Return a request's class with the former keywords that are now its fields.

    Args:
        kind: The class of the request.
        *names: Former keywords whose fields have the same name.
        **renamed: The field of each other former keyword.
    """
    return kind, {**{name: name for name in names}, **renamed}


def former_keywords(**groups: Group) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function that still takes former keywords; it warns once per call.

    Args:
        **groups: For each parameter that takes a request, from `group`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            used: dict[str, dict[str, Any]] = {}
            spent, new = set(), []
            for parameter, (kind, fields) in groups.items():
                mine = {old: kwargs[old] for old in fields if old in kwargs}
                if mine:
                    used[parameter] = {fields[old]: value for old, value in mine.items()}
                    said = ", ".join(f"{fields[old]}=…" for old in mine)
                    new.append(f"{parameter}={kind.__name__}({said})")
                    spent |= set(mine)
            if not used:
                return function(*args, **kwargs)
            rest = {name: value for name, value in kwargs.items() if name not in spent}
            bound = signature.bind_partial(*args, **rest)
            for parameter, values in used.items():
                request = _request(groups[parameter][0], bound.arguments.get(parameter))
                bound.arguments[parameter] = replace(request, **values)
            old = f"{function.__qualname__}({', '.join(f'{name}=…' for name in sorted(spent))})"
            warn_renamed(old, ", ".join(new))
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _request(kind: type[Any], given: Any) -> Any:
    """Return the request passed to a call, or an empty one."""
    if kind is Formats:
        return Formats.of(given)
    return kind() if given is None else given
