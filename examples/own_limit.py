"""Write your own limit: anything that adds up over units can be bounded, beside the bytes.

Run it with `python examples/own_limit.py`. It needs no model and no torch.

A limit is a weight for each unit in each format, and a bound on the sum of the chosen weights.
`bitknap.allocation.limits` has ready-made ones; `custom` takes a function of a unit and a format.
"""

from itertools import product

import numpy as np

import bitknap
from bitknap.allocation import Units
from bitknap.allocation.limits import custom
from bitknap.allocation.problem.units import Unit

# Microseconds that a made-up decoder takes for a million weights, by width.
MICROSECONDS = {2: 9.0, 3: 14.0, 4: 7.0, 8: 12.0}


def decode_time(unit: Unit, format: bitknap.Format) -> float:
    """Return how long one matrix takes in a format."""
    return MICROSECONDS[format.bits] * unit.rows * unit.cols / 1e6


def main() -> tuple[bitknap.Solution, bitknap.Solution]:
    """Plan under a budget alone, then under a budget and a decode time."""
    # A made-up model: 2 layers, 8 experts, two matrices each. `bitknap.estimate` makes the table of
    # a real one.
    layer, expert, projection = zip(*product(range(2), range(8), ("gate", "down")), strict=True)
    count = len(layer)
    units = Units.build(
        layer=layer,
        role=["routed"] * count,
        expert=expert,
        projection=projection,
        rows=[512] * count,
        cols=[256] * count,
    )
    formats = bitknap.formats(bits=(2, 3, 4, 8), group_size=64)
    sensitivity = np.random.default_rng(0).lognormal(size=(len(units), 1))
    cost = sensitivity * np.array([[4.0**-one.bits for one in formats]])
    nbytes = np.stack([one.nbytes(units.rows, units.cols) for one in formats], axis=1)
    table = bitknap.CostTable(units=units, formats=formats, cost=cost, nbytes=nbytes)

    budget = bitknap.Budget.bits(3.5)
    free = bitknap.solve(bitknap.Problem(table, budget))
    # The limit asks for a tenth less than the plan without a limit takes.
    taken = sum(
        decode_time(units.row(unit), free.plan.format_of(unit)) for unit in range(len(units))
    )
    limit = custom(table, "decode time", decode_time, at_most=0.9 * taken)
    bound = bitknap.solve(bitknap.Problem(table, [budget, limit]))
    print(f"budget alone: cost {free.cost:.4f}, {taken:.1f} us")
    print(f"with a limit: cost {bound.cost:.4f}, {bound.used['decode time']:.1f} us")
    return free, bound


if __name__ == "__main__":
    main()
