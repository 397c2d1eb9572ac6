"""Gains of groups from joint readings and the groups' own, where some of either are missing.

The logarithm of a group's gain at an anchor is its kind's, from the joint reading, plus an offset,
how the group's own reading differs. Offsets are interpolated in logarithms of predicted sums
between the widths that were read, and constant beyond; a group that was not read by itself gets
them interpolated between the nearest layers that were. What that misses is known from the groups
that were read: each is predicted from the others of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats
from bitknap.estimators.group_kl.chosen_readings import Groups, Reading

# KL below this, in nats per token, is rounding noise of float32 logits.
FLOOR = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class GroupKl:
    """The KL of groups at the anchors, read or estimated.

    Attributes:
        kl: nats per token, float64 [groups, anchors].
        read: whether a group was read by itself at any anchor, bool [groups].
        error: root mean square error of the logarithm of gains that are interpolated between
            layers; NaN where no group was read by itself.
    """

    kl: Floats
    read: Bools
    error: float


def group_kl(sums: Floats, groups: Groups, readings: Mapping[Reading, float]) -> GroupKl:
    """Return the KL of every group at every anchor.

    Args:
        sums: predicted sums of each group at each anchor, float64 [groups, anchors].
        groups: the groups.
        readings: KL of those that were read, nats per token; at least one.
    """
    size = np.log(np.maximum(sums, 1e-300))
    joint = _joint_gains(sums, groups, readings)
    offset = np.full(sums.shape, np.nan)
    for reading, kl in readings.items():
        if len(reading.groups) == 1:
            group, width = reading.groups[0], reading.width
            gain = np.log(max(kl, FLOOR)) - size[group, width]
            offset[group, width] = gain - joint[groups.kind[group], width]
    read = np.isfinite(offset).any(1)
    for group in np.flatnonzero(read).tolist():
        known = np.isfinite(offset[group])
        offset[group] = _between(size[group], size[group, known], offset[group, known])
    misses: list[float] = []
    for kind in range(groups.kinds):
        members = np.array(groups.members(kind))
        layers = np.array([groups.layer[group] for group in members], dtype=np.float64)
        seen = read[members]
        if not seen.any():
            offset[members] = 0.0
            continue
        for width in range(sums.shape[1]):
            own = offset[members[seen], width]
            offset[members, width] = np.interp(layers, layers[seen], own)
            misses += _misses(layers[seen], own) if len(members) > 1 else []
    error = float(np.sqrt(np.mean(np.square(misses)))) if misses else float("nan")
    kinds = np.array(groups.kind)
    return GroupKl(np.exp(size + joint[kinds] + offset), read, error)


def _joint_gains(sums: Floats, groups: Groups, readings: Mapping[Reading, float]) -> Floats:
    """Return the log gain of each kind at each anchor, float64 [kinds, anchors].

    A kind without joint readings gets the mean of the others, or 0 where its groups were read by
    themselves or nothing was read jointly.
    """
    found = np.full((groups.kinds, sums.shape[1]), np.nan)
    size = np.stack([sums[groups.members(kind)].sum(0) for kind in range(groups.kinds)])
    size = np.log(np.maximum(size, 1e-300))
    for reading, kl in readings.items():
        kind = groups.kind[reading.groups[0]]
        if len(reading.groups) == len(groups.members(kind)):
            found[kind, reading.width] = np.log(max(kl, FLOOR)) - size[kind, reading.width]
    for kind, gains in enumerate(found):
        known = np.isfinite(gains)
        if known.any():
            found[kind] = _between(size[kind], size[kind, known], gains[known])
    jointly = np.isfinite(found).all(1)
    if not jointly.any():
        return np.zeros_like(found)
    mean = found[jointly].mean(0)
    return np.where(np.isfinite(found), found, mean)


def _between(at: Floats, known: Floats, values: Floats) -> Floats:
    """Return values interpolated between known places, in any order; constant beyond."""
    order = np.argsort(known)
    between: Floats = np.interp(at, known[order], values[order])
    return between


def _misses(layers: Floats, own: Floats) -> list[float]:
    """Return how far each layer's value is from what the others' say; from 0 if there are none."""
    if len(own) == 1:
        return [float(own[0])]
    others = [np.arange(len(own)) != place for place in range(len(own))]
    return [
        float(own[place] - np.interp(layers[place], layers[rest], own[rest]))
        for place, rest in enumerate(others)
    ]
