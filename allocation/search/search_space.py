"""Knobs: the parameters of a study, and their effect on a cost table.

Every knob has a neutral value that leaves the table as it is, so an unfitted knob changes nothing
(methods.md#modifiers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Ints, numbered
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InfeasibleError, InputError, MismatchError
from bitknap.names import check_name

if TYPE_CHECKING:
    from optuna.trial import Trial

GROUPS = ("layer", "proj")
# Largest k in cost + k * spread, and largest exponent of a feature.
_RISK, _EXPONENT = 3.0, 1.0
# A larger tilt would swamp the table: exp(10) is 22,000.
_WIDEST = 10.0
_BY = ("layer", "role", "expert", "proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """The knobs that a study may turn; none by default.

    Attributes:
        exponents: names of feature tables; each multiplies the cost by exp(theta * z), theta from
            -1 to 1, z the feature's `signal`.
        risk: add k times the table's spread to the cost, k from 0 to 3.
        formats: switch off families of formats: a group size with a kind of metadata.
        floor: forbid the narrowest widths.
        cap: forbid the widest widths.
        tilts: columns of the units ("layer", "role", "expert", "proj") that make groups; each
            group's cost is multiplied by exp(tilt).
        width: tilts go from -width to width.
        budget: lowest and highest bits per weight, to trade size against loss.
    """

    exponents: tuple[str, ...] = ()
    risk: bool = False
    formats: bool = False
    floor: bool = False
    cap: bool = False
    tilts: tuple[str, ...] = ()
    width: float = 1.0
    budget: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("exponents", "tilts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_groups(self.tilts)
        check_width(self.width)
        if self.budget is not None:
            low, high = (float(bits) for bits in self.budget)
            if not 0 < low < high < np.inf:
                raise InputError(f"budgets: {low:g} to {high:g} bpw is not a range above 0")
            object.__setattr__(self, "budget", (low, high))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Knobs:
        """Build from what `to_dict` returned.

        Raises:
            InputError: a field is unknown.
        """
        known = sorted(field.name for field in fields(cls))
        for name in sorted(values):
            check_name("knob", name, known)
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The range of one parameter, and its neutral value.

    Attributes:
        low: least value.
        high: greatest value.
        neutral: value that leaves the table as it is.
        kind: real number, whole number, or switch (1 is on, 0 is off).
    """

    low: float
    high: float
    neutral: float
    kind: str = "real"


def check_groups(by: Sequence[str]) -> None:
    """Raise InputError unless every name is a column that can define groups."""
    for name in by:
        check_name("tilt", name, _BY)


def check_width(width: float) -> None:
    """Raise InputError unless the width of tilts is in range."""
    if not 0 < width <= _WIDEST:
        raise InputError(f"width: {width} is not above 0 and at most {_WIDEST:g}")


def space(knobs: Knobs, table: CostTable) -> dict[str, Range]:
    """Return the range of every parameter of a study of `table`, by name.

    Args:
        knobs: the knobs that may be turned.
        table: the table with its ties; tied units belong to the group of the first one.

    Raises:
        InputError: a knob has nothing to turn in this table.
    """
    exponent = Range(low=-_EXPONENT, high=_EXPONENT, neutral=0.0)
    ranges = {f"exponent:{name}": exponent for name in knobs.exponents}
    if knobs.risk:
        if table.spread is None:
            raise InputError("knob risk: the table has no spread; leave the knob out")
        ranges["risk"] = Range(low=0.0, high=_RISK, neutral=0.0)
    if knobs.formats:
        families = _families(table.formats)
        if len(families) < 2:
            raise InputError("knob formats: the table has only one family of formats; leave it out")
        ranges |= {
            f"allow:{name}": Range(low=0, high=1, neutral=1, kind="switch") for name in families
        }
    if knobs.floor or knobs.cap:
        ranges |= _widths(knobs, table.formats)
    if knobs.tilts:
        names = groups(table, knobs.tilts)[1]
        ranges |= {name: Range(low=-knobs.width, high=knobs.width, neutral=0.0) for name in names}
    if knobs.budget is not None:
        low, high = knobs.budget
        ranges["bits"] = Range(low=low, high=high, neutral=(low + high) / 2)
    return ranges


def suggest(trial: Trial, knobs: Knobs, table: CostTable) -> dict[str, Any]:
    """Return a value for every parameter, drawn by the trial's sampler.

    Raises:
        InputError: a knob has nothing to turn in this table.
    """
    return {name: _drawn(trial, name, where) for name, where in space(knobs, table).items()}


def neutral(knobs: Knobs, table: CostTable) -> dict[str, Any]:
    """Return the parameters that leave the table as it is, the budget in the middle.

    Raises:
        InputError: a knob has nothing to turn in this table.
    """
    kinds = {"real": float, "whole": int, "switch": bool}
    return {name: kinds[at.kind](at.neutral) for name, at in space(knobs, table).items()}


def _drawn(trial: Trial, name: str, where: Range) -> Any:
    if where.kind == "switch":
        return trial.suggest_categorical(name, [True, False])
    if where.kind == "whole":
        return trial.suggest_int(name, int(where.low), int(where.high))
    return trial.suggest_float(name, where.low, where.high)


def _family(item: Format) -> str:
    group = f"g{item.group_size}" if item.group_size else "row"
    return group if item.metadata == "fp16" else f"{group}-{item.metadata}"


def _families(formats: Sequence[Format]) -> list[str]:
    """Return the families of the grids, each once; kept precisions belong to none."""
    return list(dict.fromkeys(_family(item) for item in formats if item.kind == "grid"))


def _widths(knobs: Knobs, formats: Sequence[Format]) -> dict[str, Range]:
    """Return the ranges of floor and cap, which meet in the middle so that they never clash."""
    widths = sorted({item.bits for item in formats})
    if len(widths) < 2:
        raise InputError("knobs floor and cap: the table has only one width; leave them out")
    low, middle, high = widths[0], widths[len(widths) // 2], widths[-1]
    ranges = {}
    if knobs.floor:
        ranges["floor"] = Range(low=low, high=middle, neutral=low, kind="whole")
    if knobs.cap:
        ranges["cap"] = Range(low=middle, high=high, neutral=high, kind="whole")
    return ranges


def groups(table: CostTable, by: Sequence[str] = GROUPS) -> tuple[Ints, tuple[str, ...]]:
    """Return the group of each unit, int32[U], and the name of each group's parameter.

    Tied units belong to the group of the first one.

    Args:
        table: the table.
        by: columns of the units; units that agree in all of them make a group.
    """
    units = table.units
    columns: dict[str, npt.NDArray[Any]] = {"layer": units.layer, "role": units.role}
    columns |= {"expert": units.expert, "proj": units.projection}
    label = numbered(*(columns[name] for name in by))
    if table.ties is not None:
        tie = numbered(table.ties)
        label = numbered(label[np.unique(tie, return_index=True)[1]][tie])
    first = np.unique(label, return_index=True)[1]
    names: dict[str, Sequence[str]] = {"role": ROLES, "proj": units.projections}
    parts = [
        [f"{name}={names[name][i] if name in names else i}" for i in columns[name][first]]
        for name in by
    ]
    return label, tuple("tilt:" + ",".join(part) for part in zip(*parts, strict=True))


def signal(table: CostTable, feature: CostTable, name: str = "feature") -> Floats:
    """Return the standardised log-cost of each unit in another table, float64[U].

    The mean over formats of the logarithm of the unit's cost, centred within each projection and
    scaled to deviation 1. Forbidden costs and costs not above 0 are ignored; a unit without others
    gets 0.

    Raises:
        MismatchError: the tables have other units.
    """
    ours, theirs = table.units, feature.units
    if not ours.same_as(theirs):
        raise MismatchError(
            f"feature {name}: its {len(theirs)} units differ from the {len(ours)} of the table; "
            "estimate it on the same model with the same `include`"
        )
    usable = np.isfinite(feature.cost) & (feature.cost > 0)
    count = usable.sum(axis=1)
    level = np.log(np.where(usable, feature.cost, 1.0)).sum(axis=1) / np.maximum(count, 1)
    known = count > 0
    kind = numbered(ours.role, ours.projection)
    seen = np.maximum(np.bincount(kind, weights=known), 1)
    mean = np.bincount(kind, weights=np.where(known, level, 0.0)) / seen
    centred = np.where(known, level - mean[kind], 0.0)
    deviation = float(np.sqrt((centred**2).sum() / max(1, int(known.sum()))))
    # Differences this small are rounding errors of equal costs.
    return np.zeros(len(ours)) if deviation < 1e-9 else centred / deviation


def apply(
    table: CostTable, params: Mapping[str, Any], features: Mapping[str, Floats] | None = None
) -> CostTable:
    """Return `table` modified by the parameters.

    Costs become (cost + k * spread) * exp(sum of theta * z + tilt); then formats are forbidden.

    Args:
        table: the table.
        params: the parameters from `suggest` or `neutral`; their budget is ignored here.
        features: `signal` of each feature table, by name.

    Raises:
        InputError: a parameter is unknown, or its feature is not given.
        InfeasibleError: a unit is left without a format.
    """
    log = np.zeros(len(table.units))
    for name, theta in _named(params, "exponent:").items():
        if features is None or name not in features:
            raise InputError(f"exponent:{name}: no such feature; pass its table")
        log += theta * features[name]
    log += _tilt(table, {f"tilt:{key}": at for key, at in _named(params, "tilt:").items()})
    cost, spread = table.cost, table.spread
    if params.get("risk") and spread is not None:
        cost = cost + params["risk"] * spread
    if log.any():
        factor = np.exp(log)[:, None]
        cost, spread = cost * factor, None if spread is None else spread * factor
    allowed = _allowed(table.formats, params)
    if not allowed.all():
        cost = np.where(allowed, cost, np.inf)
        stuck = ~np.isfinite(cost).any(axis=1)
        if stuck.any():
            where = table.units.label(int(stuck.argmax()))
            raise InfeasibleError(f"knobs: the allowed formats leave none for {where}")
    return table if cost is table.cost else replace(table, cost=cost, spread=spread)


def _named(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    cut = len(prefix)
    return {name[cut:]: value for name, value in params.items() if name.startswith(prefix)}


def _tilt(table: CostTable, tilts: Mapping[str, float]) -> Floats | float:
    """Return the tilt of each unit, float64[U]; the parameters' names define the groups."""
    if not any(tilts.values()):
        return 0.0
    first = next(iter(tilts)).removeprefix("tilt:")
    by = [part.partition("=")[0] for part in first.split(",")]
    check_groups(by)
    label, names = groups(table, by)
    unknown = sorted(set(tilts) ^ set(names))
    if unknown:
        raise InputError(
            f"{unknown[0]}: the tilts do not match the table's groups; use the table of this study"
        )
    tilt: Floats = np.array([tilts[name] for name in names])[label]
    return tilt


def _allowed(formats: Sequence[Format], params: Mapping[str, Any]) -> Bools:
    """Return which formats the floor, the cap and the families allow, bool[F]."""
    off = {name for name, on in _named(params, "allow:").items() if not on}
    low, high = params.get("floor", 0), params.get("cap", np.inf)
    return np.array(
        [
            low <= item.bits <= high and not (item.kind == "grid" and _family(item) in off)
            for item in formats
        ]
    )
