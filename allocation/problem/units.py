"""Units: the matrices or row blocks that get one format each, stored as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Ints, Longs, frozen, numbered
from bitknap.allocation.problem.unit_pattern import matching
from bitknap.errors import InputError
from bitknap.names import check_name

ROLES = ("routed", "shared", "dense", "attention", "embedding", "head")

# Numbers of layers, experts and blocks go up to this, or to the number of units.
_MOST = 1 << 16
# Columns that `to_arrays` writes, in order; `projections` is stored separately.
COLUMNS: Mapping[str, type[np.signedinteger[Any]]] = {
    "layer": np.int32,
    "role": np.int8,
    "expert": np.int32,
    "projection": np.int16,
    "block": np.int32,
    "rows": np.int64,
    "cols": np.int64,
}


class Unit(NamedTuple):
    """One unit as `Units.row` returns it: its key, with names as text, and its shape."""

    layer: int
    role: str
    expert: int
    projection: str
    block: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of weights of the unit; 0 when the shape is unknown."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Units:
    """The units of one model, one array entry each.

    Attributes:
        layer: decoder layer, int32[U]; -1 outside decoder layers.
        role: index into `ROLES`, int8[U].
        expert: expert number in its layer, int32[U]; -1 outside experts.
        projection: index into `projections`, int16[U].
        block: number of the row block within its matrix, int32[U]; 0 when a matrix is one unit.
        rows: output features of the unit, int64[U]; 0 when the shape is unknown.
        cols: input features of the unit, int64[U]; 0 when the shape is unknown.
        projections: names that `projection` indexes, such as ("gate", "up", "down").
    """

    layer: Ints
    role: npt.NDArray[np.int8]
    expert: Ints
    projection: npt.NDArray[np.int16]
    block: Ints
    rows: Longs
    cols: Longs
    projections: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = np.shape(self.layer)
        if len(shape) != 1 or not shape[0]:
            raise InputError(f"layer: shape {shape}, expected one entry per unit, at least one")
        for name, dtype in COLUMNS.items():
            object.__setattr__(self, name, frozen(name, getattr(self, name), dtype, shape))
        object.__setattr__(self, "projections", tuple(self.projections))
        self._check_ranges()
        self._check_distinct()

    def _check_ranges(self) -> None:
        if len(set(self.projections)) != len(self.projections):
            raise InputError(
                f"projections: {self.projections}: a name appears twice; give each once"
            )
        # Arrays by layer or expert are made from these numbers, so a damaged one must not be huge.
        most = max(_MOST, len(self))
        ranges = {
            "layer": (-1, most),
            "role": (0, len(ROLES) - 1),
            "expert": (-1, most),
            "projection": (0, len(self.projections) - 1),
            "block": (0, most),
            "rows": (0, np.inf),
            "cols": (0, np.inf),
        }
        for name, (low, high) in ranges.items():
            column = getattr(self, name)
            wrong = (column < low) | (column > high)
            if wrong.any():
                unit = int(wrong.argmax())
                raise InputError(f"{name}[{unit}]: {column[unit]} is outside {low} to {high:g}")

    def _check_distinct(self) -> None:
        labels = numbered(self.layer, self.role, self.expert, self.projection, self.block)
        counts = np.bincount(labels)
        if len(counts) != len(self):
            unit = int(np.argmax(counts[labels] > 1))
            raise InputError(
                f"units: {self.label(unit)} appears twice; each unit needs its own key"
            )

    @classmethod
    def build(
        cls,
        *,
        layer: npt.ArrayLike,
        role: Sequence[str] | npt.ArrayLike,
        expert: npt.ArrayLike,
        projection: Sequence[str],
        rows: npt.ArrayLike,
        cols: npt.ArrayLike,
        block: npt.ArrayLike | None = None,
    ) -> Units:
        """Build from sequences of equal length, with roles and projections given by name.

        `projections` lists the names in order of first appearance.

        Raises:
            InputError: lengths differ, a role is unknown, or a key appears twice.
        """
        names = np.asarray(role)
        if names.dtype.kind == "U":
            for name in sorted(set(names.tolist())):
                check_name("role", name, ROLES)
            names = np.array([ROLES.index(name) for name in names.tolist()])
        vocabulary = {name: index for index, name in enumerate(dict.fromkeys(projection))}
        columns: dict[str, Any] = {
            "layer": layer,
            "role": names,
            "expert": expert,
            "projection": [vocabulary[name] for name in projection],
            "block": np.zeros(np.shape(layer), dtype=np.int32) if block is None else block,
            "rows": rows,
            "cols": cols,
        }
        return cls(**columns, projections=tuple(vocabulary))

    @classmethod
    def anonymous(cls, count: int) -> Units:
        """Make up `count` units without shapes, for tables that come from bare numbers."""
        columns: dict[str, Any] = dict.fromkeys(COLUMNS, np.zeros(count, dtype=np.int32))
        return cls(**columns | {"expert": np.arange(count)}, projections=("unit",))

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def numel(self) -> Longs:
        """Number of weights of each unit, int64[U]; 0 where the shape is unknown."""
        return self.rows * self.cols

    @property
    def has_shapes(self) -> bool:
        """Whether every unit has a shape, so that bits per weight are defined."""
        return bool((self.numel > 0).all())

    def row(self, unit: int) -> Unit:
        """Return one unit as a tuple, for rules that look at one unit at a time."""
        return Unit(
            layer=int(self.layer[unit]),
            role=ROLES[self.role[unit]],
            expert=int(self.expert[unit]),
            projection=self.projections[self.projection[unit]],
            block=int(self.block[unit]),
            rows=int(self.rows[unit]),
            cols=int(self.cols[unit]),
        )

    def label(self, unit: int) -> str:
        """Return the name of a unit in messages: "layer=3 role=routed expert=5 proj=gate"."""
        parts = [f"layer={self.layer[unit]}", f"role={ROLES[self.role[unit]]}"]
        if self.expert[unit] >= 0:
            parts.append(f"expert={self.expert[unit]}")
        parts.append(f"proj={self.projections[self.projection[unit]]}")
        if self.block.any():
            parts.append(f"block={self.block[unit]}")
        return " ".join(parts)

    def matches(self, pattern: str) -> Bools:
        """Return which units a pattern such as "layer=0-3,proj=down" selects, bool[U].

        Raises:
            InputError: the pattern is malformed or selects nothing.
        """
        numbers = {"layer": self.layer, "expert": self.expert, "block": self.block}
        names: dict[str, tuple[npt.NDArray[Any], Sequence[str]]]
        names = {"proj": (self.projection, self.projections), "role": (self.role, ROLES)}
        return matching(pattern, numbers, names)

    def same_as(self, other: Units) -> bool:
        """Return whether `other` holds the same units in the same order."""
        ours, theirs = (np.array(x.projections)[x.projection] for x in (self, other))
        return np.array_equal(ours, theirs) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in COLUMNS
            if name != "projection"
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns by name; `projections` must be saved separately."""
        return {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[Any]], projections: Sequence[str]
    ) -> Units:
        """Build from the columns that `to_arrays` returned.

        Raises:
            InputError: a column is missing or wrong.
        """
        missing = [name for name in COLUMNS if name not in arrays]
        if missing:
            raise InputError(f"units: column {missing[0]} is missing")
        return cls(**{name: arrays[name] for name in COLUMNS}, projections=tuple(projections))


def kinds(units: Units) -> dict[str, Bools]:
    """Return a mask of the units of each projection; names include the role unless it is routed."""
    codes = units.role.astype(np.int64) * len(units.projections) + units.projection
    masks = {}
    for code in np.unique(codes).tolist():
        role, projection = divmod(code, len(units.projections))
        name = units.projections[projection]
        title = name if ROLES[role] == "routed" else f"{ROLES[role]} {name}"
        masks[title] = codes == code
    return masks
