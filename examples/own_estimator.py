"""Write your own estimator: what does each format cost each unit?

Run it with `python examples/own_estimator.py`. It reads a bundled model and takes seconds.

An estimator has a name, says what the calibration pass must record (`needs`), and returns a cost
table. The guide is the docstring of `bitknap.estimators.costs.estimator`.
"""

from collections.abc import Sequence

import numpy as np

import bitknap
from bitknap.allocation.problem.table import storage
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.quantization.stacks.grouping import stacks


class SquaredError:
    """The squared error of the weights, summed over each matrix."""

    name = "squared-error"
    # Weights are enough, so no text is read. With {"moments"} the evidence would also hold what
    # each expert's inputs were like.
    needs: frozenset[str] = frozenset()

    def estimate(self, evidence: Evidence, formats: Sequence[bitknap.Format]) -> bitknap.CostTable:
        """Return the cost of every unit in every format."""
        units = evidence.units
        cost = np.empty((len(units), len(formats)))
        # Equally shaped matrices are read and rounded together: all gates of a layer, say.
        for run in stacks(units):
            weights = evidence.weights(run)  # float32 [n, rows, cols]
            for column, format in enumerate(formats):
                # The method that the checkpoint will be written with.
                rounded = evidence.round_trip(run, weights, format)
                error = (rounded - weights).double().square().sum((1, 2))
                cost[run, column] = error.numpy()
        return bitknap.CostTable(
            units=units,
            formats=tuple(formats),
            cost=cost,
            nbytes=storage(units, formats),
            # Who made the table, from which model. The unit says that these are no nats a token.
            provenance={**evidence.provenance, "estimator": self.name, "unit": "error"},
        )


def main() -> bitknap.Solution:
    """Estimate with the estimator above, and solve."""
    table = bitknap.estimate(
        "reference:mixtral",
        estimator=SquaredError(),
        formats=bitknap.formats(bits=(2, 3, 4), group_size=64),
    )
    solution = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(3)))
    plan = solution.plan
    print(f"{len(plan.units)} units, {plan.bpw:.3f} bits a weight, error {solution.cost:.1f}")
    return solution


if __name__ == "__main__":
    main()
