"""Chowdhury et al.: experts ranked by router norms and MaxVar, and widths counted out by rank.

Source: Chowdhury et al., ICLR 2026, arXiv 2604.06515, and its code where a docstring says so. The
norms and variances are read in `bitknap.estimators.published.chowdhury`, which needs torch; this
file does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats, Ints, frozen
from bitknap.errors import InputError, MismatchError

# A bounded distribution varies at most 3 times as much as a uniform one on the same support, so
# more than that means a wider range (the paper's argument for its ζ).
ZETA = 3.0


def norm_changes(
    final: Mapping[int, npt.ArrayLike], initial: Mapping[int, npt.ArrayLike] | None = None
) -> dict[int, Floats]:
    """Return Λ of every expert by layer, float64[E] each: final minus initial norm.

    Args:
        final: norms at the end of training, by layer.
        initial: norms at its start; None takes them as equal, so that the final norm remains.

    Raises:
        MismatchError: the two have other layers or other numbers of experts.
        InputError: a norm is not a number from 0.
    """
    last = {layer: _checked(f"final[{layer}]", norms) for layer, norms in final.items()}
    if initial is None:
        return last
    first = {layer: _checked(f"initial[{layer}]", norms) for layer, norms in initial.items()}
    if first.keys() != last.keys():
        raise MismatchError(
            f"router norms: final of layers {sorted(last)}, initial of {sorted(first)}; "
            "read both from one architecture"
        )
    for layer, norms in last.items():
        if norms.shape != first[layer].shape:
            raise MismatchError(
                f"router norms: layer {layer} has {len(norms)} final and {len(first[layer])} "
                "initial ones; read both from one architecture"
            )
    return {layer: norms - first[layer] for layer, norms in last.items()}


def _checked(name: str, values: npt.ArrayLike) -> Floats:
    norms = frozen(name, values, np.float64)
    if norms.ndim != 1 or not norms.size or not (np.isfinite(norms) & (norms >= 0)).all():
        raise InputError(f"{name}: norms are one finite number from 0 for each expert")
    return norms


def chowdhury_order(
    norms: npt.ArrayLike,
    variances: npt.ArrayLike | None = None,
    zeta: float = ZETA,
    *,
    one_pass: bool = False,
) -> Ints:
    """Return a layer's experts by sensitivity, most sensitive first, int32[E].

    Ascending by norm; then an expert whose MaxVar is at least ζ times that of one before it moves
    in front of the first such one, until no such pair is left. The paper leaves open which pair
    comes first. Here the highest ranked expert that has to move does, which keeps all before it
    in order, so that one pass down the ranking ends with none left.

    Args:
        norms: Λ of each expert, or its final norm, float64[E].
        variances: MaxVar of each expert, float64[E]; None orders by norms alone.
        zeta: above 1.
        one_pass: as the authors' code: once over the experts from the last rank to the first,
            each in front of the first whose MaxVar times ζ is below its own. No pair is left
            either, but those that move may end in another order.

    Raises:
        InputError: shapes differ, a number is not finite, or zeta is not above 1.
    """
    given = frozen("norms", norms, np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise InputError("norms: give one finite number for each expert")
    ranking: list[int] = np.argsort(given, kind="stable").tolist()
    if variances is None:
        return np.array(ranking, dtype=np.int32)
    spread = frozen("variances", variances, np.float64, given.shape)
    if not (np.isfinite(spread) & (spread >= 0)).all():
        raise InputError("variances: give one finite number from 0 for each expert")
    if not (np.isfinite(zeta) and zeta > 1):
        raise InputError(f"zeta: {zeta} must be above 1; the paper takes 3")
    for expert in reversed(ranking[:]) if one_pass else ranking[:]:
        place = ranking.index(expert)
        ahead, own = spread[ranking[:place]], spread[expert]
        # Two experts without any variance must not chase each other.
        wider = zeta * ahead < own if one_pass else (zeta * ahead <= own) & (ahead < own)
        if wider.any():
            ranking.insert(int(wider.argmax()), ranking.pop(place))
    return np.array(ranking, dtype=np.int32)


def chowdhury_counts(experts: int, average: float, levels: Sequence[int]) -> tuple[int, ...]:
    """Return how many experts of a layer get each width, as Chowdhury et al.'s code counts them.

    Two levels: the share of the wider one is rounded. Three equally spaced levels start from the
    two around the average; then pairs at the middle are exchanged for one above and one below:
    nearly all of them above `high - D/3`, until the middle is as rare as the exchanges from
    `high - 2D/3` on, none below, with D = high - low.

    Two quirks come with it. The rounded average may miss the one asked for: 8 experts at 1.6 get
    1.625. And more bits may mean more experts at the lowest width: 64 experts have 16 at 1 bit
    for an average of 2.25, and 20 for 2.375.

    Args:
        experts: experts of one layer.
        average: bits an expert; beyond the levels it counts as the nearest one.
        levels: two widths, or three equally spaced ones, in any order.

    Returns:
        Counts from the widest level to the narrowest.

    Raises:
        InputError: the levels are of another kind, or a number makes no sense.

    Source: Chowdhury et al., arXiv 2604.06515, as their code computes it.
    """
    ordered = sorted(set(levels), reverse=True)
    if len(ordered) != len(levels) or len(levels) not in (2, 3):
        raise InputError(f"levels: {list(levels)} must be two or three different widths")
    if len(ordered) == 3 and ordered[0] - ordered[1] != ordered[1] - ordered[2]:
        raise InputError(f"levels: {list(levels)} are not equally spaced; use two levels")
    if experts < 1 or not math.isfinite(average):
        raise InputError(f"experts: {experts} at an average of {average}; both must be numbers")
    if len(ordered) == 2:
        return _two_levels(experts, average, ordered[0], ordered[1])
    high, middle, low = ordered
    if average >= middle:
        above, between = _two_levels(experts, average, high, middle)
        below = 0
    else:
        above = 0
        between, below = _two_levels(experts, average, middle, low)
    third = (high - low) / 3
    swaps = 0
    if average > high - third:
        swaps = between // 2
    elif average >= high - 2 * third:
        swaps = between // 3
    return above + swaps, between - 2 * swaps, below + swaps


def _two_levels(experts: int, average: float, high: int, low: int) -> tuple[int, int]:
    share = min(max((average - low) / (high - low), 0.0), 1.0)
    above = round(share * experts)
    return above, experts - above


def chowdhury_bits(order: npt.ArrayLike, average: float, levels: Sequence[int]) -> Ints:
    """Return the bits of each expert, the first of the order the widest, int32 like `order`.

    Every layer gets the same average; nothing is moved between layers.

    Args:
        order: experts by sensitivity, most sensitive first, int[E] or int[L,E]. In the paper that
            is the smallest router norm first (or the smallest change of it in training).
        average: bits an expert.
        levels: as `chowdhury_counts` takes them.

    Raises:
        InputError: a row is not an order of its experts, or the levels are wrong.

    Source: Chowdhury et al., arXiv 2604.06515.
    """
    ranks = frozen("order", order, np.int64)
    if ranks.ndim not in (1, 2) or not ranks.size:
        raise InputError(f"order: shape {ranks.shape}, expected [experts] or [layers, experts]")
    experts = ranks.shape[-1]
    if (np.sort(ranks, axis=-1) != np.arange(experts)).any():
        raise InputError(f"order: a row is not the numbers 0 to {experts - 1}, each once")
    counts = chowdhury_counts(experts, average, levels)
    given = np.repeat(np.array(sorted(levels, reverse=True), dtype=np.int32), counts)
    result = np.empty(ranks.shape, dtype=np.int32)
    np.put_along_axis(result, ranks, np.broadcast_to(given, ranks.shape), axis=-1)
    return result
