"""Measured group gains: any estimator's costs scaled to measured KL.

A group is all experts of one projection in one layer. Groups are stored in one format at a time,
all layers' together or one alone (`chosen_readings`), and the KL is measured. An estimator ranks
experts well, but its scale over bits is wrong by a factor of 2 to 4 (methods.md#small-models); a
few group measurements correct that curve. A group's true KL is modelled as a function of its
predicted sum: known at a few anchor formats (`pooled_gains`), interpolated in logarithms between
them, with a constant gain beyond. So the number of measurements does not grow with the number of
formats or experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitknap.allocation.problem.arrays import Floats
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
from bitknap.estimators.group_kl.chosen_readings import Groups, Reading, by_worth
from bitknap.estimators.group_kl.pooled_gains import GroupKl, group_kl
from bitknap.estimators.group_kl.text_part import on_part
from bitknap.estimators.measuring.noise_floor import LEAST
from bitknap.estimators.signals.signal import Signal
from bitknap.estimators.sweep.variant_streams import TOGETHER
from bitknap.progress import Progress
from bitknap.quantization.stacks.grouping import stacks

# Tokens that groups are read on, of all that were calibrated on. All 8,192 gain 3 % at one of six
# budgets of the reference models and nothing on average (benchmarks/results/cheaper_costs.md).
READ_TOKENS = 2_048


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Another estimator's costs × gains measured on groups of units.

    Attributes:
        base: ranks units within a group.
        progress: called with (what, done, of).
        measurements: maximum number of KL measurements, the most valuable ones; groups that are not
            measured by themselves share a gain. All that `by_worth` names when not given.
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
            InputError: the evidence has no means to measure KL, `measurements` allows none, or too
                few plans differ to check the table.
        """
        check_measurable(evidence)
        table = self.base.estimate(evidence, formats)
        runs = stacks(evidence.units)
        groups = Groups.of(evidence.units, runs)
        chosen = anchors(formats, table.nbytes)
        effort = evidence.effort
        wanted = by_worth(groups, [formats[i].bits for i in chosen], thorough=effort.thorough)
        split = 2 * len(runs) if self.signals else 0
        asked = wanted[: _most(self.measurements, split)]
        reader = evidence if effort.thorough else on_part(evidence, READ_TOKENS)

        def measure(
            parts: Sequence[tuple[np.ndarray, int]], seconds: float | None = None
        ) -> list[float]:
            variants = [Variant.group(units, formats[column]) for units, column in parts]
            return group_kls(reader, variants, self.progress, seconds)

        parts = [
            (np.concatenate([runs[group] for group in one.groups]), chosen[one.width])
            for one in asked
        ]
        read = {
            one: kl
            for one, kl in zip(asked, measure(parts, effort.seconds), strict=True)
            if not math.isnan(kl)
        }
        scaled = _scaled(table, groups, chosen, read, evidence.floor)
        provenance = {
            **scaled.provenance,
            "estimator": self.name,
            "unit": "nats/token",
            "measurements": len(read) + split,
            "readings": {**scaled.provenance["readings"], "left": len(wanted) - len(read)},
        }
        frequency = token_share(evidence) if table.frequency is None else table.frequency
        scaled = replace(scaled, frequency=frequency, provenance=provenance)
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


def _most(measurements: int | None, split: int) -> int | None:
    """Return how many groups may be measured, beside `split` halves of them; None for all.

    Raises:
        InputError: none may be.
    """
    if measurements is None:
        return None
    if measurements - split < 1:
        also = f"after {split} for the signals " if split else ""
        raise InputError(
            f"measurements: {measurements} leaves none {also}to scale the costs; give at least "
            f"{split + 1}"
        )
    return measurements - split


def _scaled(
    table: CostTable,
    groups: Groups,
    chosen: Sequence[int],
    read: Mapping[Reading, float],
    floor: float,
) -> CostTable:
    """Return the table with the costs of each group scaled to its KL, read or interpolated.

    Its provenance has under "readings" the number of readings, of groups that share a gain and of
    readings that are noise, and the error of the logarithm of shared gains, if it is known.

    Args:
        table: the costs to scale.
        groups: the groups.
        chosen: columns of the anchors.
        read: the readings that were taken, nats per token.
        floor: KL below this is noise, and counts as this.
    """
    sums = np.stack([table.cost[run].sum(0) for run in groups.runs])
    found = group_kl(sums[:, chosen], groups, read, floor)
    cost, spread = table.cost.copy(), None if table.spread is None else table.spread.copy()
    for group, run in enumerate(groups.runs):
        gain = gains(sums[group], sums[group][chosen], found.kl[group])
        cost[run] *= gain
        if spread is not None:
            spread[run] *= gain
    sharing, below = int((~found.own).sum()), sum(kl < floor for kl in read.values())
    readings = {
        "taken": len(read),
        **({"sharing": sharing} if sharing else {}),
        **({"noise": below} if below else {}),
        **({"error": found.error} if math.isfinite(found.error) else {}),
    }
    spread = _with_gain_error(cost, spread, groups.runs, found)
    return replace(
        table, cost=cost, spread=spread, provenance={**table.provenance, "readings": readings}
    )


def _with_gain_error(
    cost: Floats, spread: Floats | None, runs: Sequence[np.ndarray], found: GroupKl
) -> Floats | None:
    """Return the spread with the error of gains that groups share, if it is known."""
    if found.own.all() or not math.isfinite(found.error):
        return spread
    whole = np.zeros_like(cost) if spread is None else spread.copy()
    for group in np.flatnonzero(~found.own).tolist():
        run = runs[group]
        whole[run] = np.hypot(whole[run], cost[run] * found.error)
    return whole


def gains(sums: np.ndarray, anchor_sums: np.ndarray, anchor_kl: np.ndarray) -> np.ndarray:
    """Return the ratio of true to predicted KL for sums [F], from measurements at some of them.

    KL is made non-decreasing in the predicted sum, then interpolated in logarithms; outside the
    measured range the nearest gain is used.
    """
    order = np.argsort(anchor_sums)
    x = np.log(np.maximum(anchor_sums[order], 1e-300))
    y = np.log(np.maximum.accumulate(np.maximum(anchor_kl[order], LEAST)))
    at = np.log(np.maximum(sums, 1e-300))
    ratio: np.ndarray = np.exp(np.interp(at, x, y - x))
    return ratio


def group_kls(
    evidence: Evidence,
    groups: Sequence[Variant],
    progress: Progress | None = None,
    seconds: float | None = None,
) -> list[float]:
    """Return the KL of the model with groups of units in another format, nats per token.

    Args:
        evidence: of the model; its journal keeps the readings.
        groups: of `Variant.group`.
        progress: called with ("measure groups", done, of).
        seconds: time after which no new reading begins, but for the first; NaN stands for those
            that were not taken. Readings in the journal take no time.

    Raises:
        InputError: the evidence has no means to measure KL.
        ModelError: a KL is NaN or infinite.
    """
    read = [math.nan] * len(groups)
    # A sweep takes readings in its own order, so under a limit it gets them in portions.
    portion = len(groups) if seconds is None or evidence.sweep is None else TOGETHER
    started, done = time.monotonic(), 0
    if progress:
        progress("measure groups", 0, len(groups))
    for start in range(0, len(groups), max(1, portion)):
        for place, kl in finite_kls(evidence, groups[start : start + portion]):
            number = start + place
            read[number], done = kl, done + 1
            if progress:
                progress("measure groups", done, len(groups))
            if evidence.sweep is None and _over(started, seconds):
                return read
        if _over(started, seconds):
            break
    return read


def _over(started: float, seconds: float | None) -> bool:
    return seconds is not None and time.monotonic() - started >= seconds


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
