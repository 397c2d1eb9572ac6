"""Published rules that give whole experts whole bits: MC-MoE, Chowdhury et al., GEMQ.

Reproduced as published, quirks included, so that they can be compared; none of them counts bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats, Ints, frozen
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InfeasibleError, InputError


def mc_moe_cost(
    error: npt.ArrayLike,
    frequency: npt.ArrayLike,
    weight: npt.ArrayLike,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
) -> Floats:
    """Return what MC-MoE's program minimises, phi^alpha * w^beta * eps^gamma, float64[L,E,F].

    phi and w are shares of their layer times 1000, as in the authors' code; the factor changes no
    plan. Frequency and routing weight are already inside an output error, so they count twice:
    their choice, kept.

    The defaults are those of the code, whose command line also takes gamma = 2 but never uses it:
    gamma = 1 gives the plans that were published with the paper, 2 does not.

    Args:
        error: eps, change of the block's output with one expert at one width, [L,E,F], from 0.
        frequency: tokens routed to each expert, [L,E].
        weight: summed routing weights of each expert, before they are renormalised, [L,E].
        alpha: exponent of the frequency.
        beta: exponent of the routing weight.
        gamma: exponent of the error.

    Raises:
        InputError: shapes differ, a number is negative or not finite, or a layer has no tokens.

    Source: Huang et al., MC-MoE, arXiv 2410.06270, the program of pre-loading mixed-precision
    quantization, and its code.
    """
    errors = frozen("error", error, np.float64)
    if errors.ndim != 3 or not errors.size:
        raise InputError(f"error: shape {errors.shape}, expected [layers, experts, widths]")
    shape = errors.shape[:2]
    counts = frozen("frequency", frequency, np.float64, shape)
    weights = frozen("weight", weight, np.float64, shape)
    for name, values in (("error", errors), ("frequency", counts), ("weight", weights)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise InputError(f"{name}: has numbers that are negative or not finite; measure again")
    for name, values in (("frequency", counts), ("weight", weights)):
        if not values.sum(axis=1).all():
            layer = int(np.argmin(values.sum(axis=1)))
            raise InputError(f"{name}: layer {layer} has none; calibrate on more text")
    phi = 1000 * counts / counts.sum(axis=1, keepdims=True)
    shares = 1000 * weights / weights.sum(axis=1, keepdims=True)
    cost: Floats = (phi**alpha * shares**beta)[:, :, None] * errors**gamma
    return cost


def mc_moe(
    cost: npt.ArrayLike,
    total: int,
    *,
    bits: Sequence[int] = (1, 2, 3),
    required: Sequence[int] = (3, 2),
) -> Ints:
    """Return the bits of each expert by MC-MoE's program, layer by layer, int32[L,E].

    Each layer on its own: least cost, at most `total` bits, and at least one expert at each of
    `required`. Exact, by dynamic programming over the bits spent and the widths present, where
    the authors call a commercial solver; the 2 bits they require are rarely worth it under their
    errors, and their plans use them because they must.

    Args:
        cost: of each expert at each width, [L,E,F], as `mc_moe_cost` gives it.
        total: bits of all experts of a layer together.
        bits: the widths, one a column.
        required: widths that at least one expert of each layer has.

    Raises:
        InputError: shapes differ, a cost is not finite, or a required width is not offered.
        InfeasibleError: the total is too small for the required widths.

    Source: MC-MoE, arXiv 2410.06270.
    """
    costs = frozen("cost", cost, np.float64)
    widths = frozen("bits", bits, np.int64)
    if costs.ndim != 3 or not costs.size or costs.shape[2:] != widths.shape:
        raise InputError(f"cost: shape {costs.shape}, expected [layers, experts, {len(widths)}]")
    if not np.isfinite(costs).all():
        raise InputError("cost: has numbers that are not finite; every width must be possible")
    if (widths < 1).any() or not set(required) <= set(widths.tolist()):
        raise InputError(f"bits: {list(bits)} must be above 0 and include {list(required)}")
    flags = [sum(1 << k for k, width in enumerate(required) if width == b) for b in widths.tolist()]
    value, chosen = _forward(costs, widths.tolist(), flags, int(total), 1 << len(set(required)))
    spent = value[:, :, -1].argmin(axis=1)
    if np.isinf(value[np.arange(len(costs)), spent, -1]).any():
        raise InfeasibleError(
            f"mc-moe: {total} bits are too few for {costs.shape[1]} experts with one at each of "
            f"{list(required)}; raise the total"
        )
    return _traced(chosen, spent, widths.tolist(), flags)


def _forward(
    cost: Floats, widths: Sequence[int], flags: Sequence[int], total: int, states: int
) -> tuple[Floats, npt.NDArray[np.int16]]:
    """Return the least cost by bits spent and widths present, and each expert's step to it.

    float64[L,total+1,S] and int16[E,L,total+1,S]; a step is the state before times the number of
    widths plus the column.
    """
    layers, experts, _ = cost.shape
    value = np.full((layers, max(total, 0) + 1, states), np.inf)
    value[:, 0, 0] = 0
    steps = np.zeros((experts, *value.shape), dtype=np.int16)
    for expert in range(experts):
        after = np.full(value.shape, np.inf)
        for column, width in enumerate(widths):
            if width > total:
                continue
            for state in range(states):
                reached = value[:, : value.shape[1] - width, state] + cost[:, expert, column, None]
                target = after[:, width:, state | flags[column]]
                better = reached < target
                target[better] = reached[better]
                step = steps[expert, :, width:, state | flags[column]]
                step[better] = state * len(widths) + column
        value = after
    return value, steps


def _traced(
    steps: npt.NDArray[np.int16],
    spent: npt.NDArray[np.intp],
    widths: Sequence[int],
    flags: Sequence[int],
) -> Ints:
    layers = np.arange(len(spent))
    state = np.full(len(spent), steps.shape[-1] - 1)
    result = np.zeros((len(spent), len(steps)), dtype=np.int32)
    for expert in range(len(steps) - 1, -1, -1):
        state, column = np.divmod(steps[expert, layers, spent, state], len(widths))
        result[:, expert] = np.asarray(widths)[column]
        spent = spent - result[:, expert]
    return result


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
        experts: of one layer.
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


def gemq_problem(table: CostTable, average: float, *, floors: bool = True) -> Problem:
    """Return GEMQ's program over all layers at once, for any solver that takes several limits.

    Bits are counted, not bytes: every unit counts the same, a large shared expert too. Without
    the floors a layer may end at the lowest width altogether; with them, at least one routed
    expert of each layer has the most bits and one the second most.

    Args:
        table: units by widths; tie it with `profile("expert")` for one width an expert, as theirs.
        average: bits a unit.
        floors: ask for the top two widths in every layer.

    Raises:
        InputError: the formats have no bits, or floors need two widths.

    Source: GEMQ, arXiv 2605.23078, and its code.
    """
    bits = np.array([item.bits for item in table.formats])
    if not (bits > 0).all():
        raise InputError("gemq: made-up formats have no bits; give the table real formats")
    if not (math.isfinite(average) and average > 0):
        raise InputError(f"gemq: an average of {average} bits; it must be above 0")
    # An average such as 2.1 times a count must not lose its last bit to rounding.
    total = math.floor(round(average * len(table.units), 6))
    limits = [Limit("bits", bits[None, :], total)]
    if floors:
        widths = sorted(set(bits.tolist()), reverse=True)[:2]
        if len(widths) < 2:
            raise InputError("gemq: floors need two widths; add formats or set floors=False")
        routed = table.units.role == ROLES.index("routed")
        for layer in np.unique(table.units.layer[routed]).tolist():
            here = routed & (table.units.layer == layer)
            for width in widths:
                weight = np.where(here[:, None] & (bits == width), -1.0, 0.0)
                limits.append(Limit(f"layer {layer} at {width} bits", weight, -1, floor=True))
    return Problem(table, limits)
