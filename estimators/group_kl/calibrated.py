"""Measured group gains: any estimator's costs scaled to measured KL.

A group is all experts of one projection in one layer. It is stored in one format at a time, and
the KL is measured. An estimator ranks experts well, but its scale over bits is wrong by a factor
of 2 to 4 (methods.md#small-models); a few group measurements correct that curve. A group's
true KL is modelled as a function of its predicted sum: measured at a few anchor formats,
interpolated in logarithms between them, with a constant gain beyond. So the number of measurements
does not grow with the number of formats or experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError, ModelError
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weighed_errors import token_share
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variant_kl import check_measurable, kl_of
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.signals.signal import Signal
from bitknap.progress import Progress
from bitknap.quantization.stacks.grouping import stacks

# KL below this, in nats per token, is rounding noise of float32 logits.
_FLOOR = 1e-9


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Another estimator's costs × gains measured on groups of units.

    Attributes:
        base: ranks units within a group.
        progress: called with (what, done, of).
        measurements: maximum number of KL measurements; fewer widths are measured if it binds, at
            least one per group. All widths that `anchors` names when not given.
        signals: proxies whose exponents are fitted on halves of the groups, with two more
            measurements per group; see `bitknap.estimators.group_kl.proxies`.
        check: number of held-out plans whose KL is measured after fitting and compared with the
            table's prediction; 0 for none. See `bitknap.estimators.group_kl.held_out_plans`.
        check_bits: bits per weight of those plans; 2.5 or the middle of the feasible range when
            not given.
    """

    base: Estimator = field(default_factory=SecondMoments)
    progress: Progress | None = None
    measurements: int | None = None
    signals: tuple[Signal, ...] = ()
    check: int = 0
    check_bits: float | None = None

    def __post_init__(self) -> None:
        if whole("check", self.check) in (1, 2):
            raise InputError(
                f"check: {self.check} is below 3, the fewest plans that can be ranked; give 3 or "
                "more, or 0 for no check"
            )

    @property
    def name(self) -> str:
        """The names of the base and the proxies, marked as calibrated."""
        return f"calibrated({', '.join([self.base.name, *(x.name for x in self.signals)])})"

    @property
    def needs(self) -> frozenset[str]:
        """Everything that the base and the proxies need, and the KL of groups."""
        return self.base.needs.union({"kl"}, *(signal.needs for signal in self.signals))

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token.

        Raises:
            InputError: the evidence has no means to measure KL, there are more groups than
                measurements, or too few plans differ to check the table.
        """
        check_measurable(evidence)
        table = self.base.estimate(evidence, formats)
        chosen = anchors(formats, table.nbytes)
        runs = stacks(evidence.units)
        split = 2 * len(runs) if self.signals else 0
        if self.measurements is not None:
            chosen = fewer(chosen, self.measurements - split, len(runs))

        def measure(groups: Sequence[tuple[np.ndarray, int]]) -> list[float]:
            asked = [Variant.group(units, formats[column]) for units, column in groups]
            return group_kls(evidence, asked, self.progress)

        cost, spread = table.cost.copy(), None if table.spread is None else table.spread.copy()
        read = measure([(run, column) for run in runs for column in chosen])
        for run, measured in zip(runs, np.reshape(read, (len(runs), -1)), strict=True):
            sums = cost[run].sum(0)
            gain = gains(sums, sums[chosen], measured)
            cost[run] *= gain
            if spread is not None:
                spread[run] *= gain
        provenance = {
            **table.provenance,
            "estimator": self.name,
            "unit": "nats/token",
            "measurements": len(runs) * len(chosen) + split,
        }
        frequency = token_share(evidence) if table.frequency is None else table.frequency
        scaled = replace(
            table, cost=cost, spread=spread, frequency=frequency, provenance=provenance
        )
        if self.signals:
            from bitknap.estimators.group_kl.proxies import with_proxies

            middle = chosen[len(chosen) // 2]
            scaled = with_proxies(scaled, evidence, self.signals, runs, middle, measure)
        return self._checked(scaled, evidence)

    def _checked(self, table: CostTable, evidence: Evidence) -> CostTable:
        """Return the table, with the check on held-out plans in its provenance if asked for."""
        if not self.check:
            return table
        from bitknap.estimators.group_kl.held_out_plans import on_held_out_plans

        check = on_held_out_plans(table, evidence, self.check, self.check_bits, self.progress)
        checked = {"check": check, "check_measurements": check["plans"]}
        return replace(table, provenance={**table.provenance, **checked})


def anchors(formats: Sequence[Format], nbytes: np.ndarray) -> list[int]:
    """Return the columns to measure: the median size of each width to 4 bits and of the widest."""
    grids = [i for i, f in enumerate(formats) if f.kind != "keep"]
    if not grids:
        raise InputError(
            "formats: all keep the stored precision, so there is nothing to measure; add a grid, "
            "such as int3-g128-asym"
        )
    size = nbytes.sum(0)
    widths = sorted({formats[i].bits for i in grids})
    wanted = [b for b in widths if b <= 4] + [b for b in widths[-1:] if b > 4]
    picked = []
    for bits in wanted:
        same = sorted((i for i in grids if formats[i].bits == bits), key=lambda i: (size[i], i))
        picked.append(same[len(same) // 2])
    return picked


def fewer(chosen: Sequence[int], measurements: int, groups: int) -> list[int]:
    """Return as many anchors as the measurements allow, evenly spaced over the widths.

    Raises:
        InputError: there are more groups than measurements.
    """
    count = min(measurements // groups, len(chosen))
    if count < 1:
        raise InputError(
            f"measurements: {measurements} is below {groups}, the number of groups (one for each "
            f"layer and projection); give at least {groups}"
        )
    if count == 1:
        return [chosen[len(chosen) // 2]]
    return [chosen[round(i * (len(chosen) - 1) / (count - 1))] for i in range(count)]


def gains(sums: np.ndarray, anchor_sums: np.ndarray, anchor_kl: np.ndarray) -> np.ndarray:
    """Return the ratio of true to predicted KL for sums [F], from measurements at some of them.

    KL is made non-decreasing in the predicted sum, then interpolated in logarithms; outside the
    measured range the nearest gain is used.
    """
    order = np.argsort(anchor_sums)
    x = np.log(np.maximum(anchor_sums[order], 1e-300))
    y = np.log(np.maximum.accumulate(np.maximum(anchor_kl[order], _FLOOR)))
    at = np.log(np.maximum(sums, 1e-300))
    ratio: np.ndarray = np.exp(np.interp(at, x, y - x))
    return ratio


def group_kls(
    evidence: Evidence, groups: Sequence[Variant], progress: Progress | None = None
) -> list[float]:
    """Return the KL of the model with groups of units in another format, nats per token.

    Args:
        evidence: of the model; its journal keeps the readings.
        groups: of `Variant.group`.
        progress: called with ("measure groups", done, of).

    Raises:
        InputError: the evidence has no means to measure KL.
        ModelError: a KL is NaN or infinite.
    """
    read = [math.nan] * len(groups)
    if progress:
        progress("measure groups", 0, len(groups))
    for done, (number, kl) in enumerate(finite_kls(evidence, groups), start=1):
        read[number] = kl
        if progress:
            progress("measure groups", done, len(groups))
    return read


def finite_kls(evidence: Evidence, groups: Sequence[Variant]) -> Iterator[tuple[int, float]]:
    """Yield each group's number and KL, as `group_kls` returns them, in the order measured."""
    for number, kl in kl_of(evidence, groups):
        if not math.isfinite(kl):
            first, format = int(groups[number].units[0]), groups[number].formats[0]
            raise ModelError(
                f"{evidence.units.label(first)} and its group in {format}: the KL is {kl}, as "
                "the model's output overflows float32; leave that format out, or estimate "
                "without calibration"
            )
        yield number, kl
