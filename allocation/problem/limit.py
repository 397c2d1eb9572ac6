"""Limits: linear resources that a plan must not exceed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import frozen
from bitknap.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """The sum over units of `weight[unit, choice[unit]]` must not exceed `bound`.

    Attributes:
        name: shown in messages; unique in a problem.
        weight: float64[U,F], or [U,1] or [1,F] to broadcast; +inf forbids a choice. Whole
            numbers are summed exactly up to 2**53.
        bound: in the unit of `weight`; +inf means no limit.
        unit: "bytes" makes messages show GiB and bits per weight.
        note: text after the bound in messages, such as what else the memory holds.
        floor: whether this is an "at least" limit: weights and bound are stored negated, and shown
            without the sign in messages.
        per: divisor for amounts in messages: the total weights for a share, or an eighth of the
            weights for bits per weight.
    """

    name: str
    weight: npt.NDArray[Any]
    bound: float
    unit: str = field(default="", kw_only=True)
    note: str = field(default="", kw_only=True)
    floor: bool = field(default=False, kw_only=True)
    per: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        weight = frozen(f"limit {self.name}: weight", self.weight, np.float64)
        if weight.ndim != 2:
            raise InputError(f"limit {self.name}: weight has shape {weight.shape}, expected [U,F]")
        if np.isnan(weight).any() or np.isneginf(weight).any():
            unit, column = np.argwhere(np.isnan(weight) | np.isneginf(weight))[0]
            value = weight[unit, column]
            raise InputError(
                f"limit {self.name}: weight[{unit},{column}] is {value}; expected a number"
            )
        bound = float(self.bound)
        if not bound > -np.inf:
            raise InputError(f"limit {self.name}: bound is {bound}, expected a number")
        if not 0 < self.per < np.inf:
            raise InputError(f"limit {self.name}: per is {self.per}, expected a number above 0")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bound", bound)

    def shown(self, value: float) -> float:
        """Return an amount of this limit as shown to people, such as a share or a floor's count."""
        return (0.0 - value if self.floor else value) / self.per
