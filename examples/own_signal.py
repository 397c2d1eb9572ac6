"""Write your own signal: one number for each unit that says how sensitive it is.

Run it with `python examples/own_signal.py`. It reads a bundled model and takes seconds.

A signal knows nothing of formats: it only ranks units. `Scored` makes an estimator of it. The
guide is the docstring of `bitknap.estimators.signals.signal`.
"""

import numpy as np

import bitknap
from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.signals.unit_statistics import by_matrix


class LargestWeight:
    """The largest weight of a matrix over its root mean square: outliers need a wide grid."""

    name = "largest-weight"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return a score above 0 for every unit, float64 [U]."""
        # `by_matrix` reads the matrices, a few at a time; [n, rows, cols] come in, n scores go out.
        return by_matrix(
            evidence,
            lambda weights: weights.abs().amax((1, 2)) / weights.square().mean((1, 2)).sqrt(),
        )


def main() -> dict[int, float]:
    """Rank the units of a bundled model by the signal above, and plan by it."""
    table = bitknap.estimate(
        "reference:mixtral",
        estimator=Scored(LargestWeight()),
        formats=bitknap.formats(bits=(2, 3, 4), group_size=64),
    )
    plan = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(3))).plan
    bits = np.array([format.bits for format in plan.formats])[plan.choice]
    means = {
        int(layer): float(bits[plan.units.layer == layer].mean())
        for layer in np.unique(plan.units.layer)
    }
    for layer, mean in means.items():
        print(f"layer {layer}: {mean:.2f} bits on average")
    return means


if __name__ == "__main__":
    main()
