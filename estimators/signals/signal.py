"""The protocol `Signal`, and how to write your own.

A signal gives every unit (one matrix of one expert) one number that says how sensitive the unit
is. It does not depend on formats, and its scale has no meaning: it only ranks units.

    class LargestWeight:
        name = "largest-weight"
        needs = frozenset()                     # weights alone: no text is read

        def score(self, evidence):              # float64 [U], every number above 0
            return by_matrix(evidence, lambda weights: weights.abs().amax((1, 2)))

* `needs` says what the calibration pass must record; `FromEvidence` lists the words.
* `estimators/signals/unit_statistics.py` has the loops that most signals consist of: a statistic
  for each matrix (`by_matrix`) or for each expert (`by_expert`), and the inputs of a unit
  (`input_square`).

`Scored(LargestWeight())` is an estimator: its costs are the data-free costs times the score. Pass
it to `bitknap.estimate(model, estimator=…)`, or let `Calibrated(base, signals=(LargestWeight(),))`
fit how far the score is followed. Offer it to the command line, where it becomes
`--estimator largest-weight`, with an entry point in your package's `pyproject.toml`; signals and
estimators share one group, and the class is called without arguments:

    [project.entry-points."bitknap.estimators"]
    largest-weight = "your_package:LargestWeight"

`examples/own_signal.py` is a whole signal that runs.
"""

from __future__ import annotations

from typing import Protocol

from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.from_evidence import FromEvidence


class Signal(FromEvidence, Protocol):
    """Anything that scores units."""

    def score(self, evidence: Evidence) -> Floats:
        """Return a score above 0 for every unit, larger is more sensitive, float64[U].

        Args:
            evidence: the recorded statistics; at least those that `needs` names.
        """
        ...
