"""Shell completion of the names that options and arguments take, without loading torch.

Names are read from the tables that commands use, when the shell asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import click
from click.shell_completion import CompletionItem

STRATEGIES = ("quick", "all", "published", "uniform")
KNOBS = ("tilts", "risk", "formats", "floor", "cap", "exponents")

_Names = Callable[[], Sequence[str]]
_Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _in_catalog(place: str) -> _Names:
    """Return a function that reads the names of a catalog, including those of other packages."""

    def names() -> Sequence[str]:
        module, _, attribute = place.partition(":")
        known: Sequence[str] = getattr(import_module(module), attribute).names()
        return known

    return names


def _profiles() -> Sequence[str]:
    from bitknap.allocation.problem.profiles import PROFILES

    return tuple(PROFILES)


def _models() -> Sequence[str]:
    from bitknap.quantization.source.bundled import bundled

    return tuple(bundled())


def _kinds() -> Sequence[str]:
    from bitknap.api.listing import KINDS

    return tuple(KINDS)


def _listed(names: _Names) -> _Complete:
    """Return a function that completes the last name of a comma-separated list."""

    def complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
        before, comma, last = typed.rpartition(",")
        used = before.split(",")
        left = [name for name in names() if name.startswith(last) and name not in used]
        return [CompletionItem(f"{before}{comma}{name}") for name in left]

    return complete


def _or_path(names: _Names, kind: str) -> _Complete:
    """Return a function that completes a name, or a path of a kind: "file" or "dir"."""

    def complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
        # bash drops the completions before a path, so the names come last.
        named = [CompletionItem(name) for name in names() if name.startswith(typed)]
        return [CompletionItem(typed, type=kind), *named]

    return complete


def _fixed(*names: str) -> _Names:
    return lambda: names


solvers = _in_catalog("bitknap.allocation.catalog:SOLVERS")
methods = _in_catalog("bitknap.quantization.rounding.catalog:METHODS")
targets = _in_catalog("bitknap.quantization.targets.catalog:TARGETS")
models = _or_path(_models, "dir")
texts = _or_path(_fixed("builtin"), "file")
estimators = _listed(_in_catalog("bitknap.estimators.catalog:ESTIMATORS"))
profiles = _listed(_profiles)
kinds = _listed(_kinds)
roles = _listed(_fixed("attention", "shared", "dense"))
widths = _listed(_fixed(*"12345678"))
group_sizes = _listed(_fixed("32", "64", "128", "256", "row"))
metadata = _listed(_fixed("fp16", "compact", "compact6"))
strategies = _listed(_fixed(*STRATEGIES))
knobs = _listed(_fixed(*KNOBS))
