"""Tables of other tools' options: what each choice costs and takes, without a format of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitknap.allocation import CostTable, Format, Units
from bitknap.errors import FileError

_LAYER = re.compile(r"(?:^|.*?\.)layers\.(\d+)\.(.+)")
_ROLES = (
    ("routed", re.compile(r"(?:^|\.)(?:experts|block_sparse_moe)(?:\.|$)")),
    ("shared", re.compile(r"shared_expert")),
    ("attention", re.compile(r"attn|attention")),
    ("head", re.compile(r"^lm_head")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What one part of a model may be stored as.

    Attributes:
        name: the part, as the tool calls it.
        columns: number of the column of each option.
        nbytes: bytes of each option.
        costs: cost of each option.
    """

    name: str
    columns: Sequence[int]
    nbytes: Sequence[int]
    costs: Sequence[float]


def options_table(parts: Sequence[Choices], options: int, about: Mapping[str, Any]) -> CostTable:
    """Return the table of a tool's own options, which are its columns.

    What else the model holds is not known, so a budget is one of these parts alone.

    Args:
        parts: the units.
        options: number of columns; a part that lacks one is forbidden to have it.
        about: provenance of the costs.

    Raises:
        FileError: there are no parts, or two have the same name.
    """
    source = about["source"]
    if not parts:
        raise FileError(f"{source}: holds no measurements; let the tool finish them")
    shape = (len(parts), options)
    cost, nbytes = np.full(shape, np.inf), np.ones(shape, np.int64)
    for row, part in enumerate(parts):
        columns = list(part.columns)
        nbytes[row] = max(part.nbytes)  # of forbidden options, which nothing chooses
        nbytes[row, columns], cost[row, columns] = part.nbytes, part.costs
    places = [_place(part.name) for part in parts]
    units = Units.build(
        layer=[layer for layer, _, _ in places],
        role=[role for _, role, _ in places],
        expert=[-1] * len(parts),
        projection=[rest for _, _, rest in places],
        rows=[0] * len(parts),
        cols=[0] * len(parts),
    )
    return CostTable(
        units=units,
        formats=tuple(map(Format.made_up, range(options))),
        cost=cost,
        nbytes=nbytes,
        provenance={"fixed_bytes": 0, **about},
    )


def _place(name: str) -> tuple[int, str, str]:
    """Return the layer, the role and the rest of a part's name."""
    match = _LAYER.fullmatch(name)
    layer, rest = (int(match[1]), match[2]) if match else (-1, name)
    role = next((role for role, pattern in _ROLES if pattern.search(rest)), "dense")
    return layer, role, rest
