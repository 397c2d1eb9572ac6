"""Robust costs: tables of several calibration sets as one, with their spread.

MoQa (arXiv 2503.21135) re-quantizes when the data change; a plan here serves all data, so
the dependence on data goes into the costs (OURS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.checks import number
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.measuring.noise_floor import KEY
from bitknap.names import check_name

Rule = Literal["mean", "worst", "mean+sd"]
# Provenance that must be equal in tables of several calibration sets.
_SAME = ("model", "method", "unit")


def robust(tables: Sequence[CostTable], rule: Rule = "mean", k: float = 1.0) -> CostTable:
    """Return one table of the costs on several calibration sets.

    Its spread is the standard deviation over the sets (n − 1); the
    spread that the single tables have is not added. A format that any set forbids is forbidden.
    Frequencies are averaged. The provenance keeps entries that are equal in all tables and adds up
    numbers of measurements; of floors of KL it has the highest. The other entries of each table are
    in a list under "each".

    Args:
        tables: one per calibration set, at least two, from one model and one estimator.
        rule: how costs are combined: the mean, the worst (largest), or mean + k × deviation.
        k: factor of the deviation in "mean+sd", not negative.

    Raises:
        InputError: fewer than two tables or calibration sets, an unknown rule, or k below 0.
        MismatchError: the tables differ in models, units, formats, bytes, ties, quantizers or cost
            units.
    """
    check_name("rule", rule, get_args(Rule))
    number("k", k)
    check_sets([dict(table.provenance) for table in tables])
    first = tables[0]
    for index, table in enumerate(tables[1:], 1):
        _check_alike(index, first, table)
    costs = np.stack([table.cost for table in tables])
    allowed = np.isfinite(costs).all(axis=0)
    known = np.where(allowed, costs, 0.0)
    mean, spread = known.mean(axis=0), known.std(axis=0, ddof=1)
    chosen = {"mean": mean, "worst": known.max(axis=0), "mean+sd": mean + k * spread}[rule]
    frequencies = [table.frequency for table in tables if table.frequency is not None]
    every = len(frequencies) == len(tables)
    own = {
        "estimator": f"robust({first.provenance.get('estimator', 'table')})",
        "rule": f"mean+{k:g}sd" if rule == "mean+sd" else rule,
        "texts": [str(table.provenance.get("text", "")) for table in tables],
    }
    return replace(
        first,
        cost=np.where(allowed, chosen, np.inf),
        spread=spread,
        frequency=np.mean(frequencies, axis=0) if every else None,
        provenance={**_together([table.provenance for table in tables]), **own},
    )


def _together(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return common entries, sums of measurements, the highest floor, and the rest under "each"."""
    first, *others = provenances
    alike = {
        key: value
        for key, value in first.items()
        if key != "text" and all(other.get(key) == value for other in others)
    }
    sums = {
        key: sum(each[key] for each in provenances)
        for key in ("measurements", "check_measurements")
        if all(key in each for each in provenances)
    }
    floor = (
        {KEY: max(each[KEY] for each in provenances)}
        if all(KEY in each for each in provenances)
        else {}
    )
    said = {"text", *alike, *sums, *floor}
    rest = [{key: each[key] for key in each if key not in said} for each in provenances]
    return {**alike, **sums, **floor, **({"each": rest} if any(rest) else {})}


def check_sets(provenances: Sequence[Mapping[str, object]]) -> None:
    """Refuse a single calibration set, given once or several times.

    Args:
        provenances: "text" names the set, "estimator" the method.

    Raises:
        InputError: fewer than two sets, or all have the same text and estimator.
    """
    remedy = "calibrate on two or more texts (`text=TextSets([A, B])`)"
    if len(provenances) < 2:
        raise InputError(f"calibration sets: {len(provenances)} is below 2; {remedy}")
    origins = {(str(x.get("text", "")), str(x.get("estimator", ""))) for x in provenances}
    if len(origins) == 1 and origins.pop()[0]:
        raise InputError(f"calibration sets: all {len(provenances)} have the same text; {remedy}")


def _check_alike(index: int, first: CostTable, table: CostTable) -> None:
    for key in _SAME:
        ours, theirs = first.provenance.get(key), table.provenance.get(key)
        if ours != theirs:
            raise MismatchError(
                f"table {index}: {key} is {theirs!r}, the first has {ours!r}; estimate all tables "
                "with the same settings, except the text"
            )
    same = {
        "units": first.units.same_as(table.units),
        "formats": first.formats == table.formats,
        "bytes": np.array_equal(first.nbytes, table.nbytes),
        "ties": np.array_equal(_ties(first), _ties(table)),
    }
    for name, equal in same.items():
        if not equal:
            raise MismatchError(
                f"table {index}: its {name} differ from those of the first; estimate all tables "
                "with the same settings, except the text"
            )


def _ties(table: CostTable) -> npt.NDArray[np.integer]:
    return np.arange(len(table.units)) if table.ties is None else table.ties
