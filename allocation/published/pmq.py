"""MC-MoE's PMQ program (pre-loading mixed-precision quantization): whole bits for experts.

Source: Huang et al., MC-MoE, arXiv 2410.06270, eq. 4 as reviews of the paper number it, and its
code. Quirks are kept, so that plans match those of the authors; bits are counted, not bytes. The
signals and the measured errors are computed in `bitknap.estimators.published.mc_moe`, which needs
torch; this file does not. It is named after the method, since `mc_moe` is its function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats, Ints, frozen
from bitknap.errors import InfeasibleError, InputError


def mc_moe_cost(
    error: npt.ArrayLike,
    frequency: npt.ArrayLike,
    weight: npt.ArrayLike,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
) -> Floats:
    """Return the objective of MC-MoE's program, phi^alpha * w^beta * eps^gamma, float64[L,E,F].

    phi and w are shares within their layer times 1000, as in the authors' code; the factor changes
    no plan. Frequency and routing weight already affect an output error, so they count twice; this
    choice of the authors is kept.

    The defaults are those of the code, whose command line also takes gamma = 2 but never uses it:
    gamma = 1 gives the plans that were published with the paper, 2 does not.

    Args:
        error: eps, change of the block's output with one expert at one width, [L,E,F], at least 0.
        frequency: tokens routed to each expert, [L,E].
        weight: summed routing weights of each expert before renormalisation, [L,E].
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
            raise InputError(f"{name}: some numbers are negative or not finite; measure again")
    for name, values in (("frequency", counts), ("weight", weights)):
        if not values.sum(axis=1).all():
            layer = int(np.argmin(values.sum(axis=1)))
            raise InputError(
                f"{name}: it is 0 for all experts of layer {layer}; calibrate on more text"
            )
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

    Each layer is solved separately: least cost, at most `total` bits, and at least one expert at
    each of the `required` widths. This is exact, by dynamic programming over the bits spent and the
    widths present, where the authors call a commercial solver. Under their errors, 2 bits rarely
    pay off; their plans use that width because it is required.

    Args:
        cost: cost of each expert at each width, [L,E,F], as `mc_moe_cost` gives it.
        total: bits of all experts of a layer together.
        bits: the widths, one per column.
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
        raise InputError("cost: some numbers are not finite, but every width must be possible")
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
