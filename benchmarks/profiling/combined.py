"""Proxies on top of a base: cost = base × exp(Σ θ z), with θ from measured groups or 0.

z is a signal's standardised log score, so θ is the exponent of a score whose spread is one e-fold.
An exponent that nobody fitted is 0, so an unfitted proxy changes nothing (methods.md#modifiers).
Two more parts of the same work are offered from here: groups measured several at once (`design`,
`readings`, `decode`) and plans that check a table (`plans_for_check`, `check_plans`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.benchmarks.profiling.overlapping_groups import (
    Decoded,
    Design,
    decode,
    design,
    factors,
    readings,
)
from bitknap.errors import InputError
from bitknap.estimators.group_kl.exponents import (
    FitReport,
    Fitted,
    MeasuredGroup,
    checked_z,
    fit_exponents,
)
from bitknap.estimators.group_kl.rank_check import PlanCheck, check_plans, plans_for_check

if TYPE_CHECKING:
    from bitknap.estimators.costs.estimator import Estimator
    from bitknap.estimators.evidence.evidence import Evidence
    from bitknap.estimators.signals.signal import Signal

__all__ = [
    "Combined",
    "Decoded",
    "Design",
    "FitReport",
    "Fitted",
    "MeasuredGroup",
    "PlanCheck",
    "check_plans",
    "decode",
    "design",
    "factors",
    "fit_exponents",
    "modified",
    "plans_for_check",
    "readings",
]

# Largest |Σ θ z|: a proxy that moves a cost by more than e^50 is no correction any more.
_LARGEST = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Another estimator's costs × exp(Σ θ z) of signals × a gain for each format.

    With no exponent other than 0 and no gains this is the base, and the signals are not even
    computed. A signal whose scores are all alike within a projection changes nothing there.

    Attributes:
        base: gives the costs.
        signals: score the units.
        exponents: θ by the signal's name; 0 for those not named.
        gains: by format, as fitted on this base; empty leaves the base's scale, and its unit.
    """

    base: Estimator
    signals: tuple[Signal, ...] = ()
    exponents: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[Format, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signals", tuple(self.signals))
        object.__setattr__(self, "exponents", MappingProxyType(dict(self.exponents)))
        object.__setattr__(self, "gains", MappingProxyType(dict(self.gains)))
        names = [signal.name for signal in self.signals]
        if len(set(names)) != len(names):
            raise InputError(f"signals: {', '.join(names)} has a name twice")
        for name, theta in self.exponents.items():
            if name not in names:
                known = ", ".join(names) or "none"
                raise InputError(f"exponents: {name!r} is no signal given; there are {known}")
            if not np.isfinite(theta):
                raise InputError(f"exponents: {name} has {theta}; an exponent is a finite number")
        for format, gain in self.gains.items():
            if not (np.isfinite(gain) and gain > 0):
                raise InputError(f"gains: {format} has {gain}; a gain is a finite number above 0")

    @property
    def used(self) -> tuple[Signal, ...]:
        """The signals whose exponent is not 0."""
        return tuple(x for x in self.signals if self.exponents.get(x.name, 0.0))

    @property
    def name(self) -> str:
        """The base's name, with the signals that change it."""
        parts = [f" * {x.name}^{self.exponents[x.name]:g}" for x in self.used]
        return f"combined({self.base.name}{''.join(parts)})"

    @property
    def needs(self) -> frozenset[str]:
        """What the base and the signals that change it need."""
        return self.base.needs.union(*(signal.needs for signal in self.used))

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format; nats per token if there are gains.

        Raises:
            InputError: a grid has no gain though others have, or the exponents are too large.
        """
        table = self.base.estimate(evidence, formats)
        if not self.used and not self.gains:
            return table
        theta = np.array([self.exponents[x.name] for x in self.used])
        z = np.zeros((len(theta), len(table.units)))
        if self.used:
            from bitknap.estimators.signals.scored import standardised

            z = np.stack([standardised(x.score(evidence), table.units).values for x in self.used])
        changed = modified(table, z, theta, self._gains(formats))
        unit = {"unit": "nats/token"} if self.gains else {}
        own = {"estimator": self.name, "exponents": dict(self.exponents)}
        return replace(changed, provenance={**table.provenance, **unit, **own})

    def _gains(self, formats: Sequence[Format]) -> Floats | None:
        if not self.gains:
            return None
        for item in formats:
            if item.kind != "keep" and item not in self.gains:
                known = ", ".join(str(x) for x in self.gains)
                raise InputError(f"gains: none for {item}; there are {known}; fit with all formats")
        return np.array([self.gains.get(item, 1.0) for item in formats])


def modified(
    table: CostTable,
    signals_z: npt.ArrayLike,
    exponents: npt.ArrayLike,
    gains: npt.ArrayLike | None = None,
) -> CostTable:
    """Return the table with cost × exp(Σ θ z) × gain; its spread moves alike.

    Args:
        table: the base.
        signals_z: standardised log scores, float64[K,U].
        exponents: θ, float64[K].
        gains: by column, above 0, float64[F]; 1 when not given.

    Raises:
        InputError: shapes differ, or a cost would change by more than e^50.
    """
    theta = np.atleast_1d(np.asarray(exponents, dtype=np.float64))
    z = checked_z(signals_z, len(table.units))
    if theta.shape != z.shape[:1]:
        raise InputError(f"exponents: shape {theta.shape}, expected ({len(z)},)")
    scale = np.ones(len(table.formats)) if gains is None else np.asarray(gains, dtype=np.float64)
    if scale.shape != (len(table.formats),) or not (np.isfinite(scale) & (scale > 0)).all():
        raise InputError(f"gains: must be {len(table.formats)} finite numbers above 0")
    move = theta @ z
    if not np.abs(move).max(initial=0.0) <= _LARGEST:
        unit = int(np.abs(move).argmax())
        raise InputError(
            f"exponents: {table.units.label(unit)} changes by e^{move[unit]:.4g}, beyond "
            f"e^{_LARGEST:g}; use smaller ones"
        )
    factor = np.exp(move)[:, None] * scale
    spread = None if table.spread is None else table.spread * factor
    return replace(table, cost=table.cost * factor, spread=spread)
