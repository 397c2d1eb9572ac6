"""Old spellings that keep working for one version, each with a `DeprecationWarning`.

A renamed keyword:           `@renamed_keywords(tokens="calibration_tokens")` on the function
Keywords that became one:    `@grouped_keywords("calibration", Calibration)` on the function
A renamed function or class: `__getattr__ = renamed_names(__name__, {"Old": "package.module:New"})`
A module that moved:         `__getattr__ = moved_module(__name__, "package.new_module")`
A renamed value:             `driver = renamed_value("driver", driver, {"old": "new"})`
Anything else:               `warn_renamed("the option --old", "--new")`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def message(old: str, new: str) -> str:
    """Return the one line that names an old spelling and what replaces it.

    Args:
        old: The old spelling with its kind, such as `the option --old`.
        new: The spelling to use from now on.
    """
    return f"{old} is deprecated and goes away in the next version: use {new}"


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that a spelling is deprecated.

    Args:
        old: The old spelling with its kind, such as `the option --old`.
        new: The spelling to use from now on.
        stacklevel: Which caller the warning points to: 1 is the function that calls this one,
            2 the function that calls that one.
    """
    warnings.warn(message(old, new), DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_value(
    what: str, value: Any, new_of_old: Mapping[str, str], *, stacklevel: int = 2
) -> Any:
    """Return the current spelling of a value; warn if the value is an old spelling.

    Args:
        what: The keyword or field that takes the value.
        value: The value as given.
        new_of_old: The new spelling of each old one.
        stacklevel: Which caller the warning points to; see `warn_renamed`.
    """
    if not isinstance(value, str) or value not in new_of_old:
        return value
    new = new_of_old[value]
    warn_renamed(f"{what}={value!r}", f"{what}={new!r}", stacklevel=stacklevel + 1)
    return new


def renamed_keywords(**new_of_old: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function that also takes keywords under their old names.

    Args:
        **new_of_old: The new name of each old one.

    Raises:
        TypeError: When a call gives a keyword under both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__qualname__

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_of_old.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{name}() got {old}= and {new}=, which are one: give {new}=")
                warn_renamed(f"{name}({old}=…)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def grouped_keywords(
    keyword: str, kind: type[Any], *, names: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function whose old keywords are now fields of one frozen value.

    A call with old keywords gets a `kind` made from them, or the given `kind` with those fields
    replaced.

    Args:
        keyword: The function's keyword that takes the value; callers pass it by name.
        kind: The dataclass of the value. It must work without arguments.
        names: Maps old keywords to fields; by default, every field under its own name.

    Raises:
        TypeError: When the function is decorated, if `kind` has no such field.
    """
    known = {field.name for field in fields(kind) if field.init}
    fields_of = dict(names) if names is not None else {name: name for name in sorted(known)}
    if missing := sorted(set(fields_of.values()) - known):
        raise TypeError(f"{kind.__name__} has no field {', '.join(missing)}")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = {old: kwargs.pop(old) for old in fields_of if old in kwargs}
            if given:
                for old in given:
                    new = f"{keyword}={kind.__name__}({fields_of[old]}=…)"
                    warn_renamed(f"{function.__qualname__}({old}=…)", new)
                value: Any = kwargs.get(keyword)
                changes = {fields_of[old]: one for old, one in given.items()}
                kwargs[keyword] = replace(kind() if value is None else value, **changes)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` for names that it used to have.

    Args:
        module: The module's own name, `__name__`.
        homes: Current location of each old name's object, as `package.module:name`.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = homes[name].partition(":")
        warn_renamed(f"{module}.{name}", f"{home}.{new}")
        return getattr(import_module(home), new)

    return get


def moved_module(old: str, new: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose contents are now in another one.

    Args:
        old: The old module's own name, `__name__`.
        new: The module that now has its contents.
    """

    def get(name: str) -> Any:
        # Python's own look-ups, such as __path__, do not count as uses of the module.
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(import_module(new), name)
        warn_renamed(f"{old}.{name}", f"{new}.{name}")
        return value

    return get
