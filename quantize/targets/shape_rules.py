"""Targets whose formats are integer grids: rules on shapes, and what all of them share.

A runtime's format has its own rules: rows that divide into its blocks, widths it has kernels for.
They are stated as of 2026; exporters check them again against names and the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.format import Format, formats
from bitknap.allocation.problem.units import Units
from bitknap.disk.outputs import Kind
from bitknap.errors import InputError
from bitknap.quantization.targets.requirements import check_plan
from bitknap.quantization.targets.target import Exported, ExportJob, Fit

if TYPE_CHECKING:
    from bitknap.quantization.source.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRule:
    """Matrix sizes that must be multiples of block sizes.

    Attributes:
        bits: widths that are stored.
        groups: group sizes; one of them must divide all rows.
        rows: output features must be a multiple of this.
        cols: input features must be a multiple of this.
        full_cols: input features must be a multiple of this for all types; 1 for no such rule.
        fallback: what happens to matrices that do not fit `full_cols`.
        fallback_bits: widths that are left for them.
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    rows: int = 1
    cols: int = 1
    full_cols: int = 1
    fallback: str = ""
    fallback_bits: tuple[int, ...] = ()

    def blocked(self, units: Units) -> str:
        """Return why some unit cannot be stored at all; "" if all can."""
        return _not_multiple(units, "rows", self.rows) or _not_multiple(units, "cols", self.cols)

    def lost(self, units: Units) -> str:
        """Return why some types are lost; "" if none are."""
        return _not_multiple(units, "cols", self.full_cols)


class GridTarget:
    """A target that stores integer grids under a rule on shapes; a base for targets.

    Attributes:
        name: the runtime's name on the command line.
        about: one sentence for lists.
        profile: which units must share a format.
        rule: its widths, group sizes and blocks.
        symmetric: whether grids have no zero point, or both.
        metadata: how scales and zeros are stored.
        rounding: the method that its files are rounded by; "" if any will do.
        reads_weights: whether weights are rounded and written.
        cuts_rows: whether row blocks of a matrix may have formats of their own.
    """

    name: str
    about: str
    profile: str
    rule: ShapeRule
    symmetric: tuple[bool, ...] = (False, True)
    metadata: str = "fp16"
    rounding: str = ""
    reads_weights: bool = True
    cuts_rows: bool = False

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths that the runtime stores."""
        return self.rule.bits

    def fit(self, units: Units) -> Fit:
        """Return how the shapes of all units together fit."""
        rule = self.rule
        groups = tuple(g for g in rule.groups if not (units.cols % g).any())
        if blocked := rule.blocked(units):
            return Fit(target=self, possible=False, bits=(), groups=groups, reason=blocked)
        if lost := rule.lost(units):
            reason, bits = f"{lost}: {rule.fallback}", rule.fallback_bits
        else:
            reason = "" if groups else "no group size divides all rows; one scale a row only"
            bits = rule.bits
        return Fit(target=self, possible=True, bits=bits, groups=groups, reason=reason)

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Every model is accepted, unless a target overrides this."""

    def formats(self) -> tuple[Format, ...]:
        """Return every format that the runtime has."""
        return formats(self.rule.bits, self.rule.groups, self.symmetric, self.metadata)

    def menu(self, units: Units) -> tuple[Format, ...]:
        """Return the formats that at least one of the units can have, from few bits to many."""
        sizes = np.unique(np.stack([units.rows, units.cols]), axis=1)
        return tuple(one for one in self.formats() if self.holds(one, *sizes).any())

    def holds(self, format: Format, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Bools:
        """Return whether matrices can be stored in a format, broadcast over `rows` and `cols`."""
        height, width = np.asarray(rows), np.asarray(cols)
        fits = (height % self.rule.rows == 0) & (width % self.rule.cols == 0)
        whole = width % (format.group_size or 1) == 0
        return np.asarray(fits & whole & (format in self.formats()), dtype=np.bool_)

    def check(self, plan: BitPlan) -> None:
        """Raise MismatchError unless the runtime can hold the plan."""
        check_plan(self, plan)

    def output(self, out: Path) -> Kind:
        """A folder is written."""
        return "folder"

    def check_output(self, source: Checkpoint, out: Path) -> None:
        """What can be written does not depend on the output's name."""

    def export(self, job: ExportJob) -> Exported:
        """Refuse: only shapes are judged for targets that do not override this."""
        raise InputError(
            f"target {self.name}: its files cannot be written yet, its rules are known only; "
            "choose another target"
        )


def _not_multiple(units: Units, side: str, step: int) -> str:
    """Describe the first unit whose size is not a multiple of `step`; "" if there is none."""
    sizes = units.rows if side == "rows" else units.cols
    wrong = sizes % step != 0
    if not wrong.any():
        return ""
    unit = units.row(int(np.argmax(wrong)))
    what = "outputs" if side == "rows" else "inputs"
    size = unit.rows if side == "rows" else unit.cols
    return f"{unit.role} {unit.projection} has {size} {what}, not a multiple of {step}"
