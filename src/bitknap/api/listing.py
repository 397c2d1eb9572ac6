"""The names that users can choose from: the rows of every table in which commands look up names.

No rows are stored here: each kind reads the table that the commands read. Heavy imports happen
only if the estimator of another package must be imported to describe it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from bitknap.errors import InputError
from bitknap.names import OWN, Catalog, check_name

# Rows and columns of the matrix for which bytes per weight are stated: row scales weigh little.
SIDE = 4096

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A table of names.

    Attributes:
        about: where its names are used.
        rows: yields its rows, each with "name", "about" and "from".
        catalog: location of its `Catalog`, "module:attribute"; "" if it has none.
    """

    about: str
    rows: Callable[[], Iterator[Row]]
    catalog: str = ""

    def clashes(self) -> tuple[InputError, ...]:
        """Return an error for each name that several packages offer."""
        return _catalog(self.catalog).clashes() if self.catalog else ()


def rows_of(kind: str) -> list[Row]:
    """Return the rows of a table as JSON values.

    Args:
        kind: a name in `KINDS`.

    Returns:
        For each row the "name"; "about", one sentence; "from", the package that offers it; and
        fields specific to the kind. A row of a package that cannot be imported has "error" in
        place of "about".

    Raises:
        InputError: there is no such kind.
    """
    return list(kind_of(kind).rows())


def kind_of(name: str) -> Kind:
    """Return a table by its name.

    Raises:
        InputError: there is no such table.
    """
    check_name("kind", name, KINDS)
    return KINDS[name]


def _row(name: str, about: str, package: str = OWN, **more: Any) -> Row:
    return {"name": name, "about": about, "from": package, **more}


def _catalog(place: str) -> Catalog:
    module, _, attribute = place.partition(":")
    catalog: Catalog = getattr(import_module(module), attribute)
    return catalog


def _entries(place: str) -> Iterator[Row]:
    """Yield the rows of a catalog, with those of other packages."""
    for entry in _catalog(place).entries():
        more = {"kind": entry.kind} if entry.kind else {}
        more |= {"cites": entry.cites} if entry.cites else {}
        try:
            yield _row(entry.name, entry.described(), entry.package, **more)
        except InputError as error:
            yield {"name": entry.name, "error": str(error), "from": entry.package}


def _formats() -> Iterator[Row]:
    from bitknap.allocation.problem.format import ggml_types, gptq_grids, menu

    for one in (*menu(), *gptq_grids(), *ggml_types()):
        size = int(one.nbytes(SIDE, SIDE)) / SIDE**2
        yield _row(one.name, one.about, bytes_per_weight=round(size, 6))


def _profiles() -> Iterator[Row]:
    from bitknap.allocation.problem.profiles import PROFILES

    for name, one in PROFILES.items():
        yield _row(name, one.about)


def _models() -> Iterator[Row]:
    from bitknap.quantization.source.bundled import bundled, config_of, parameters_of

    for name, folder in bundled().items():
        config = config_of(folder)
        about = (
            f"Bundled for trials: a small model of type {config['model_type']} with "
            f"{config['num_hidden_layers']} layers."
        )
        yield _row(name, about, parameters=parameters_of(folder))


def _rules() -> Iterator[Row]:
    from bitknap.estimators.published import RULES

    for name, rule in RULES.items():
        yield _row(name, f"{rule.title}: {rule.cost}.", cites=rule.cites)


def _targets() -> Iterator[Row]:
    from bitknap.quantization.targets.catalog import TARGETS

    for entry in TARGETS.entries():
        try:
            one = entry()
        except InputError as error:
            yield {"name": entry.name, "error": str(error), "from": entry.package}
            continue
        about = {"profile": one.profile, "bits": list(one.bits), "rounding": one.rounding or "any"}
        yield _row(one.name, one.about, entry.package, **about)


def _of_catalog(about: str, place: str) -> Kind:
    return Kind(about=about, catalog=place, rows=lambda: _entries(place))


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "estimators": _of_catalog(
            "Ways to fill a cost table: --estimator.", "bitknap.estimators.catalog:ESTIMATORS"
        ),
        "solvers": _of_catalog(
            "Ways to choose a format for every unit: --solver.",
            "bitknap.allocation.catalog:SOLVERS",
        ),
        "methods": _of_catalog(
            "Ways to round weights: --method.", "bitknap.quantization.rounding.catalog:METHODS"
        ),
        "formats": Kind(about="Ways to store a matrix: --formats, --pin.", rows=_formats),
        "rules": Kind(about="Published methods: compare --strategies.", rows=_rules),
        "profiles": Kind(about="Which units must share a format: --profile.", rows=_profiles),
        "models": Kind(about="Bundled models: MODEL.", rows=_models),
        "targets": Kind(
            about="Runtimes to plan and write for: --target, export --to.",
            rows=_targets,
            catalog="bitknap.quantization.targets.catalog:TARGETS",
        ),
    }
)
