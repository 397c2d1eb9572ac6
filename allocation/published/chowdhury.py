"""Chowdhury et al.: rank experts by router norms and MaxVar, and assign widths by rank.

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

# A bounded distribution has at most 3 times the variance of a uniform one on the same support, so a
# larger ratio means a wider range (the paper's argument for its ζ).
ZETA = 3.0


def norm_changes(
    final: Mapping[int, npt.ArrayLike], initial: Mapping[int, npt.ArrayLike] | None = None
) -> dict[int, Floats]:
    """Return Λ, final minus initial norm, of every expert by layer, float64[E] each.

    Args:
        final: norms at the end of training, by layer.
        initial: norms at the start of training; None uses the final norms alone.

    Raises:
        MismatchError: the two differ in layers or numbers of experts.
        InputError: a norm is not a number of at least 0.
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
        raise InputError(f"{name}: give one finite number of at least 0 for each expert")
    return norms


def chowdhury_order(
    norms: npt.ArrayLike,
    variances: npt.ArrayLike | None = None,
    zeta: float = ZETA,
    *,
    one_pass: bool = False,
) -> Ints:
    """Return a layer's experts by sensitivity, most sensitive first, int32[E].

    Experts are sorted by ascending norm. Then an expert whose MaxVar is at least ζ times that of an
    earlier one moves in front of the first such expert, until no such pair is left. The paper does
    not say which pair to handle first. Here the highest-ranked expert that must move goes first,
    which keeps all experts before it in order, so one pass down the ranking resolves every pair.

    Args:
        norms: Λ of each expert, or its final norm, float64[E].
        variances: MaxVar of each expert, float64[E]; None orders by norms alone.
        zeta: above 1.
        one_pass: whether to follow the authors' code: one pass over the experts from the last rank
            to the first, moving each in front of the first expert whose MaxVar times ζ is below its
            own. This also resolves every pair, but the moved experts may end in another order.

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
        raise InputError("variances: give one finite number of at least 0 for each expert")
    if not (np.isfinite(zeta) and zeta > 1):
        raise InputError(f"zeta: {zeta} must be above 1; the paper takes 3")
    for expert in reversed(ranking[:]) if one_pass else ranking[:]:
        place = ranking.index(expert)
        ahead, own = spread[ranking[:place]], spread[expert]
        # Two experts with zero variance must not swap forever.
        wider = zeta * ahead < own if one_pass else (zeta * ahead <= own) & (ahead < own)
        if wider.any():
            ranking.insert(int(wider.argmax()), ranking.pop(place))
    return np.array(ranking, dtype=np.int32)


def chowdhury_counts(experts: int, average: float, levels: Sequence[int]) -> tuple[int, ...]:
    """Return the number of experts of a layer at each width, as in Chowdhury et al.'s code.

    With two levels, the number of experts at the wider one is rounded. With three equally spaced
    levels, the count starts from the two levels around the average; then pairs of experts at the
    middle level are exchanged for one above and one below. With D = high - low, nearly all pairs
    are exchanged for averages above `high - D/3`; from `high - 2D/3` on, pairs are exchanged until
    the middle is as rare as the exchanges; below that, none are.

    This has two quirks. Rounding may miss the requested average: 8 experts at 1.6 get 1.625. And a
    higher average may put more experts at the lowest width: of 64 experts, 16 get 1 bit at an
    average of 2.25, but 20 at 2.375.

    Args:
        experts: experts of one layer.
        average: bits per expert; clamped to the range of the levels.
        levels: two widths, or three equally spaced ones, in any order.

    Returns:
        Counts from the widest level to the narrowest.

    Raises:
        InputError: the levels are neither two nor three equally spaced ones, or a number is
            invalid.

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
    """Return the bits of each expert, widest first along `order`, int32 like `order`.

    Every layer gets the same average; no bits move between layers.

    Args:
        order: experts by sensitivity, most sensitive first, int[E] or int[L,E]. In the paper that
            is the smallest router norm first (or the smallest change of it in training).
        average: bits per expert.
        levels: as `chowdhury_counts` takes them.

    Raises:
        InputError: a row is not a permutation of its experts, or the levels are invalid.

    Source: Chowdhury et al., arXiv 2604.06515.
    """
    ranks = frozen("order", order, np.int64)
    if ranks.ndim not in (1, 2) or not ranks.size:
        raise InputError(f"order: shape {ranks.shape}, expected [experts] or [layers, experts]")
    experts = ranks.shape[-1]
    if (np.sort(ranks, axis=-1) != np.arange(experts)).any():
        raise InputError(f"order: each row must hold the numbers 0 to {experts - 1}, each once")
    counts = chowdhury_counts(experts, average, levels)
    given = np.repeat(np.array(sorted(levels, reverse=True), dtype=np.int32), counts)
    result = np.empty(ranks.shape, dtype=np.int32)
    np.put_along_axis(result, ranks, np.broadcast_to(given, ranks.shape), axis=-1)
    return result
