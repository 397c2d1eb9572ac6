"""Which KL readings calibration takes, in the order of what they are worth.

Small errors add up: one reading of a projection in all layers together gives the gain of its
groups but for how they differ. So those readings come first, at every width. In a model of few
layers each group is then read by itself at narrow widths, where groups differ most and most is at
stake. The KL of a group at a wide width is near the noise, and stays what the joint reading says.
In a model of many layers such readings take most of the time and lower no KL
(benchmarks/results/cheaper_costs.md); one group of each kind tells how far groups differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.units import Units

# The widest grids that groups are read in by themselves.
NARROW = 3
# The most groups of a kind that are all read by themselves.
MOST_ALONE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of units, and which of them are of one kind: the same projection in other layers.

    Attributes:
        runs: the units of each group, int64 [n].
        kind: each group's kind.
        layer: each group's layer.
    """

    runs: tuple[np.ndarray, ...]
    kind: tuple[int, ...]
    layer: tuple[int, ...]

    @classmethod
    def of(cls, units: Units, runs: Sequence[np.ndarray]) -> Groups:
        """Return the groups of a model."""
        firsts = [int(run[0]) for run in runs]
        keys = [(int(units.role[unit]), int(units.projection[unit])) for unit in firsts]
        kinds = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        layers = tuple(int(units.layer[unit]) for unit in firsts)
        return cls(runs=tuple(runs), kind=tuple(kinds[key] for key in keys), layer=layers)

    @property
    def kinds(self) -> int:
        """Number of kinds."""
        return max(self.kind) + 1

    def members(self, kind: int) -> list[int]:
        """Return the groups of a kind, by layer."""
        same = [group for group, its in enumerate(self.kind) if its == kind]
        return sorted(same, key=lambda group: self.layer[group])


@dataclass(frozen=True, slots=True)
class Reading:
    """A reading of one or more groups in one format.

    Attributes:
        groups: the groups; all of a kind if they are several.
        width: place of the format among the anchors.
    """

    groups: tuple[int, ...]
    width: int


def by_worth(groups: Groups, bits: Sequence[int], *, thorough: bool) -> list[Reading]:
    """Return the readings to take, most valuable first.

    Args:
        groups: the groups.
        bits: width of each anchor, ascending.
        thorough: read every group by itself at every width.
    """
    narrow = [width for width, its in enumerate(bits) if its <= NARROW or width == 0]
    own = _middle_first(range(len(bits)) if thorough else narrow)
    every = [*own, *(width for width in range(len(bits)) if width not in own)]
    kinds = [groups.members(kind) for kind in range(groups.kinds)]
    first = [] if thorough else [(same, width) for width in every for same in kinds]
    few = [same for same in kinds if thorough or 1 < len(same) <= MOST_ALONE]
    many = [same for same in kinds if same not in few and len(same) > 1]
    return [
        *(Reading(tuple(same), width) for same, width in first),
        *(Reading((group,), width) for width in own for same in few for group in same),
        *(Reading((same[len(same) // 2],), own[0]) for same in many),
    ]


def _middle_first(places: Sequence[int]) -> list[int]:
    middle = places[len(places) // 2]
    return [middle, *(place for place in places if place != middle)]
