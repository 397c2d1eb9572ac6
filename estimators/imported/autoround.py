"""AutoRound's scheme scores: the files `scheme_NN_KEY.json` that its `AutoScheme` keeps.

    unit    a matrix
    format  the file's scheme, as a format of Bitknap's: bits, group size, with or without zero
    cost    the file's own loss, Σ |∂L/∂W · ΔW| over the matrix, and over activations if it has them
    bytes   those of the format

Each file has one scheme; together they are the columns of one table. A plan can be quantized, or
exported to AutoRound and other targets.

Source: AutoRound 0.16, `auto_round/auto_scheme/delta_loss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import CostTable, Format, Units
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.units import ROLES
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.quantization.models.tensor_names import Stacks, take_apart

KEY = "layer_scores"
VERSION = 1
# What must be equal in the files of one table.
_SETTINGS = ("model_name", "dataset", "nsamples", "seqlen", "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One file.

    Attributes:
        path: the file.
        format: its scheme.
        losses: loss of each module, by name.
        settings: what the losses were measured on.
    """

    path: Path
    format: Format
    losses: Mapping[str, float]
    settings: Mapping[str, Any]


def read(path: Path, content: Mapping[str, Any]) -> Scores:
    """Return the scores of one file.

    Args:
        path: the file, for messages.
        content: its parsed JSON.

    Raises:
        FileError: it is not what AutoRound writes, or of another version.
        InputError: Bitknap has no format like its scheme.
    """
    if content.get("version") != VERSION or content.get("score_granularity") != "per_op":
        raise FileError(
            f"{path}: version {content.get('version')!r}, scores "
            f"{content.get('score_granularity')!r}: only version {VERSION} with scores per_op is "
            "known; score again with AutoRound 0.16"
        )
    losses = content.get(KEY)
    if not isinstance(losses, Mapping) or not losses:
        raise FileError(f"{path}: {KEY}: must be an object of modules; score again")
    for name, score in losses.items():
        if not fits(score, [(int, float), float]) or score[1] < 0:
            raise FileError(f"{path}: {KEY}.{name}: must be bits, and a loss of at least 0")
    settings = content.get("cache_config")
    return Scores(
        path=path,
        format=_format(path, content.get("scheme")),
        losses={str(name): float(score[1]) for name, score in losses.items()},
        settings=settings if isinstance(settings, Mapping) else {},
    )


def table(files: Sequence[Scores], units: Units, about: Mapping[str, Any]) -> CostTable:
    """Return the table of several schemes.

    Args:
        files: their scores.
        units: the matrices of the model; of all roles that may have been scored.
        about: what the table's provenance says about the model.

    Raises:
        InputError: two files have one scheme.
        MismatchError: files are of different runs, or of another model.
    """
    _check_together(files)
    places, left_out = _places(files[0], units)
    covered = np.unique(list(places.values()))
    _check_complete(files[0], units, covered)
    row = {unit: at for at, unit in enumerate(covered.tolist())}
    cost = np.zeros((len(covered), len(files)))
    for column, one in enumerate(files):
        for name, unit in places.items():
            cost[row[unit], column] = one.losses[name]
    kept = {name: values[covered] for name, values in units.to_arrays().items()}
    return CostTable.from_arrays(
        cost,
        units=Units.from_arrays(kept, units.projections),
        formats=[one.format for one in files],
        provenance={
            **about,
            "source": [one.path.name for one in files],
            "estimator": "imported(autoround)",
            "unit": "loss of AutoRound's AutoScheme",
            "left_out": left_out,
        },
    )


def _format(path: Path, scheme: Any) -> Format:
    wanted = {"bits": int, "group_size": int, "sym": bool, "data_type": str}
    if not fits(scheme, wanted):
        raise FileError(f"{path}: scheme: must have bits, group_size, sym and data_type")
    narrow = scheme.get("act_bits")
    plain = scheme["data_type"] == "int" and not scheme.get("super_bits")
    if not plain or (narrow is not None and narrow < 16) or scheme["group_size"] == 0:
        raise InputError(
            f"{path}: scheme {scheme['data_type']} of {scheme['bits']} bits, groups of "
            f"{scheme['group_size']}, activations of {narrow or 16} bits: only integers with "
            "scales for groups or rows, and activations of 16 bits, are formats of Bitknap"
        )
    size = max(0, scheme["group_size"])
    try:
        return Format(scheme["bits"], size, symmetric=scheme["sym"])
    except InputError as error:
        raise InputError(f"{path}: scheme: {error}") from None


def _check_together(files: Sequence[Scores]) -> None:
    first = files[0]
    for number, one in enumerate(files[1:], 1):
        for key in _SETTINGS:
            if one.settings.get(key) != first.settings.get(key):
                raise MismatchError(
                    f"{one.path}: {key} {one.settings.get(key)!r}, in {first.path} "
                    f"{first.settings.get(key)!r}; take the files of one run"
                )
        if other := set(one.losses) ^ set(first.losses):
            raise MismatchError(
                f"{one.path}: {min(other)} is not scored in both this file and {first.path}; take "
                "the files of one run"
            )
        same = next((two.path for two in files[:number] if two.format == one.format), None)
        if same:
            raise InputError(f"{one.path}: has the scheme of {same}, {one.format}; leave one out")


def _places(scores: Scores, units: Units) -> tuple[dict[str, int], list[str]]:
    """Return the unit of each module, and the modules that are no units."""
    keys: dict[tuple[int, str, int, str], int] = {}
    for unit in range(len(units)):
        one = units.row(unit)
        keys[one.layer, one.role, one.expert, one.projection] = unit
    stacks = Stacks(scores.losses)
    places, left_out = {}, []
    for name in scores.losses:
        place = stacks.split(name)
        parts = take_apart(place[2]) if place else None
        unit = -1
        if place and parts and len(parts.projections) == 1:
            unit = keys.get((place[1], parts.role, parts.expert, parts.projections[0]), -1)
        if unit < 0:
            left_out.append(name)
        else:
            places[name] = unit
    if not places:
        raise MismatchError(
            f"{scores.path}: none of its {len(scores.losses)} modules, such as "
            f"{next(iter(scores.losses))}, is a matrix of the model; pass the model that was scored"
        )
    return places, left_out


def _check_complete(scores: Scores, units: Units, covered: Longs) -> None:
    """Raise MismatchError if some matrices of a role are scored and others are not."""
    for role in np.unique(units.role[covered]).tolist():
        of_role = np.flatnonzero(units.role == role)
        missing = np.setdiff1d(of_role, covered)
        if len(missing):
            raise MismatchError(
                f"{scores.path}: {len(of_role) - len(missing):,} of {len(of_role):,} "
                f"{ROLES[role]} matrices are scored; {units.label(int(missing[0]))} is not; pass "
                "the model that was scored, or score all of them"
            )
