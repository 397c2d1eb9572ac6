"""The protocol `Estimator`, and how to write your own.

An estimator gets `Evidence`, the record of one calibration pass, and a list of formats. It returns
a `CostTable`: the cost of storing each unit (one matrix of one expert) in each format, in nats per
token.

    class SquaredError:
        name = "squared-error"
        needs = frozenset()                     # weights alone: no text is read

        def estimate(self, evidence, formats):
            units = evidence.units
            cost = np.empty((len(units), len(formats)))
            for run in stacks(units):           # equally shaped units, read together
                weights = evidence.weights(run)             # float32 [n, rows, cols]
                for column, format in enumerate(formats):
                    error = evidence.round_trip(run, weights, format) - weights
                    cost[run, column] = error.double().square().sum((1, 2))
            return CostTable(
                units=units, formats=tuple(formats), cost=cost,
                nbytes=storage(units, formats),
                provenance={**evidence.provenance, "estimator": self.name, "unit": "error"},
            )

* `needs` says what the calibration pass must record; `FromEvidence` lists the words.
* Round with `evidence.round_trip`: it uses the method that the checkpoint will be written with.
* An estimator that charges rounding errors can pass a function from ΔW to costs to
  `weighed_table` (`estimators/costs/weighed_errors.py`) instead of writing this loop.
* A table whose costs are not nats per token says so in `provenance["unit"]`. Wrap the estimator in
  `Calibrated(base=…)` to scale its costs to measured KL.

Pass an instance to `bitknap.estimate(model, estimator=SquaredError())`. Offer it to the command
line, where it becomes `--estimator squared-error`, with an entry point in your package's
`pyproject.toml`; the class is called without arguments:

    [project.entry-points."bitknap.estimators"]
    squared-error = "your_package:SquaredError"

`examples/own_estimator.py` is a whole estimator that runs. If you have one number for each unit
and not one for each format, write a `Signal` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.from_evidence import FromEvidence


class Estimator(FromEvidence, Protocol):
    """Anything that fills a cost table from evidence."""

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format.

        Args:
            evidence: the recorded statistics; at least those that `needs` names.
            formats: the columns of the table.
        """
        ...
