"""Gains of groups from joint readings, or from the groups' own where all of a kind have them.

A joint reading gives all groups of a kind one gain: how layers differ is in the predicted sums,
which layers' own gains have scaled. Where every group of a kind was read by itself at some width,
each has its own gain, which stays in proportion to the joint one at widths that were not read. The
two are not mixed within a kind: KL of parts does not add up to the KL of the whole, so groups of
one sort of gain would look cheaper than those of the other. A few own readings still say how far
groups are from the gain that they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats
from bitknap.estimators.group_kl.chosen_readings import Groups, Reading
from bitknap.estimators.measuring.noise_floor import LEAST


@dataclass(frozen=True, slots=True, eq=False)
class GroupKl:
    """The KL of groups at the anchors, read or estimated.

    Attributes:
        kl: nats per token, float64 [groups, anchors].
        own: whether a group has a gain of its own, bool [groups].
        error: root mean square difference of logarithms between own gains that were read and the
            shared ones that are used instead; NaN if none were read.
    """

    kl: Floats
    own: Bools
    error: float


def group_kl(
    sums: Floats, groups: Groups, readings: Mapping[Reading, float], floor: float = LEAST
) -> GroupKl:
    """Return the KL of every group at every anchor.

    Args:
        sums: predicted sums of each group at each anchor, float64 [groups, anchors].
        groups: the groups.
        readings: KL of those that were read, nats per token; at least one.
        floor: KL below this is noise, and counts as this.
    """
    readings = {one: max(kl, floor) for one, kl in readings.items()}
    size = np.log(np.maximum(sums, 1e-300))
    alone = np.full(sums.shape, np.nan)
    for reading, kl in readings.items():
        if len(reading.groups) == 1:
            group, width = reading.groups[0], reading.width
            alone[group, width] = np.log(kl) - size[group, width]
    shared = _shared_gains(sums, groups, readings, alone)
    offset = alone - shared[np.array(groups.kind)]
    own, misses = np.zeros(len(sums), dtype=bool), [np.zeros(0)]
    for kind in range(groups.kinds):
        members = groups.members(kind)
        known = np.isfinite(offset[members])
        whole = known.all(0)
        if not whole.any():
            misses.append(offset[members][known])
            offset[members] = 0.0
            continue
        own[members] = True
        for group in members:
            offset[group] = _between(size[group], size[group, whole], offset[group, whole])
    missed = np.concatenate(misses)
    error = float(np.sqrt(np.mean(np.square(missed)))) if len(missed) else float("nan")
    return GroupKl(np.exp(size + shared[np.array(groups.kind)] + offset), own, error)


def _shared_gains(
    sums: Floats, groups: Groups, readings: Mapping[Reading, float], alone: Floats
) -> Floats:
    """Return the log gain of each kind at each anchor, float64 [kinds, anchors].

    A kind without joint readings gets the mean of its groups' own, and one without these either the
    mean of the other kinds.

    Args:
        sums: predicted sums of each group at each anchor, float64 [groups, anchors].
        groups: the groups.
        readings: KL of those that were read.
        alone: log gains of groups that were read by themselves, float64 [groups, anchors].
    """
    found = np.full((groups.kinds, sums.shape[1]), np.nan)
    size = np.stack([sums[groups.members(kind)].sum(0) for kind in range(groups.kinds)])
    size = np.log(np.maximum(size, 1e-300))
    for reading, kl in readings.items():
        kind = groups.kind[reading.groups[0]]
        if len(reading.groups) == len(groups.members(kind)):
            found[kind, reading.width] = np.log(kl) - size[kind, reading.width]
    for kind, gains in enumerate(found):
        if not np.isfinite(gains).any():
            own = alone[groups.members(kind)]
            for width in np.flatnonzero(np.isfinite(own).any(0)).tolist():
                gains[width] = np.nanmean(own[:, width])
        known = np.isfinite(gains)
        if known.any():
            found[kind] = _between(size[kind], size[kind, known], gains[known])
    read = np.isfinite(found).all(1)
    return np.where(np.isfinite(found), found, found[read].mean(0))


def _between(at: Floats, known: Floats, values: Floats) -> Floats:
    """Return values interpolated between known places, in any order; constant beyond."""
    order = np.argsort(known)
    between: Floats = np.interp(at, known[order], values[order])
    return between
