"""Triangular fuzzy sets, and the scale-and-move transformation between them.

A set is its three corners (a0, a1, a2), the last axis of an array. The transformation is that of
Huang and Shen (T-FRI; methods.md#fuzzy-rules). Scaling and moving keep a set's representative
value, so they never change a prediction; they change its support, which is read as uncertainty.
"""

from __future__ import annotations

import numpy as np

from bitknap.allocation.problem.arrays import Floats


def triangle(centre: Floats, half: Floats | float) -> Floats:
    """Return symmetric sets around `centre`, with one more axis than `centre`."""
    sets: Floats = np.stack(np.broadcast_arrays(centre - half, centre, centre + half), axis=-1)
    return sets


def representative(sets: Floats) -> Floats:
    """Return (a0 + a1 + a2) / 3, which is also the centroid of the triangle."""
    means: Floats = sets.mean(axis=-1)
    return means


def deviation(sets: Floats) -> Floats:
    """Return the standard deviation of the triangle read as a density."""
    low, middle, high = np.moveaxis(sets, -1, 0)
    a, b = middle - low, high - middle
    deviations: Floats = np.sqrt(np.maximum(a * a + a * b + b * b, 0) / 18)
    return deviations


def scaled(sets: Floats, ratio: Floats) -> Floats:
    """Return sets whose support is `ratio` times as wide, around the same representative value."""
    centre = representative(sets)[..., None]
    result: Floats = centre + ratio[..., None] * (sets - centre)
    return result


def moved(sets: Floats, ratio: Floats) -> Floats:
    """Return sets with both ends shifted one way and the middle shifted back by twice as much.

    A ratio from -1 to 1 keeps the corners in order; 0 changes nothing.
    """
    left, right = np.diff(sets, axis=-1).transpose(-1, *range(sets.ndim - 1))
    step = ratio * np.where(ratio >= 0, left, right) / 3
    result: Floats = sets + step[..., None] * np.array([1.0, -2.0, 1.0])
    return result


def scale_ratio(sets: Floats, target: Floats) -> Floats:
    """Return the ratio of the width of `target` to that of `sets`; 1 where a set has no width."""
    ours, theirs = sets[..., 2] - sets[..., 0], target[..., 2] - target[..., 0]
    return _over(theirs, ours, 1.0)


def move_ratio(sets: Floats, target: Floats) -> Floats:
    """Return the move that turns sets, already as wide as `target`, into it; within -1 to 1."""
    way = target[..., 0] - sets[..., 0]
    left, right = sets[..., 1] - sets[..., 0], sets[..., 2] - sets[..., 1]
    return np.clip(_over(3 * way, np.where(way >= 0, left, right), 0.0), -1, 1)


def scale_and_move(
    antecedents: Floats,
    consequents: Floats,
    observed: Floats,
    weights: Floats,
    slopes: Floats,
    importance: Floats,
) -> Floats:
    """Interpolate Q observations from n rules each; returns sets of the consequent, [Q,3].

    The rules are averaged into one intermediate rule, which is shifted onto the observation, then
    scaled and moved; the consequent undergoes the same (methods.md#fuzzy-rules).

    Args:
        antecedents: antecedents of each observation's rules, [Q,n,D,3].
        consequents: consequents of each observation's rules, [Q,n,3].
        observed: the observations, [Q,D,3].
        weights: weights of the rules for each antecedent, sum 1 over n, [Q,n,D].
        slopes: how far a shift of 1 in an antecedent shifts the consequent, [D].
        importance: weight of each antecedent in the consequent's scale and move, sum 1, [D].
    """
    middle = np.einsum("qnd,qndk->qdk", weights, antecedents)
    shift = representative(observed) - representative(middle)
    middle = middle + shift[..., None]
    consequent = np.einsum("qn,qnk->qk", weights.mean(axis=-1), consequents)
    consequent = consequent + (shift @ slopes)[:, None]
    wider = scale_ratio(middle, observed)
    middle = scaled(middle, wider)
    further = move_ratio(middle, observed)
    return moved(scaled(consequent, wider @ importance), np.clip(further @ importance, -1, 1))


def membership(values: Floats, corners: Floats) -> Floats:
    """Return the membership of `values` [N] in one set of `corners` [3], from 0 to 1."""
    from skfuzzy import trimf

    degrees: Floats = trimf(np.asarray(values, dtype=np.float64), np.asarray(corners))
    return degrees


def defuzzified(corners: Floats, method: str = "centroid") -> float:
    """Return one number for one set of `corners` [3], by any method of scikit-fuzzy.

    Prediction uses `representative`, which is the centroid in closed form for millions of sets.

    Args:
        corners: corners in ascending order, not all equal.
        method: "centroid", "bisector", "mom", "som" or "lom".
    """
    from skfuzzy import defuzz

    # The corners themselves are among the points, so the centroid is exact.
    grid = np.union1d(np.linspace(corners[0], corners[2], 201), corners)
    return float(defuzz(grid, membership(grid, corners), method))


def _over(above: Floats, below: Floats, otherwise: float) -> Floats:
    """Return above / below, or `otherwise` where below is zero."""
    ratio: Floats = np.full(np.broadcast(above, below).shape, otherwise)
    np.divide(above, below, out=ratio, where=np.abs(below) > 0)
    return ratio
