"""What estimators and signals have in common: a name, and the evidence they need."""

from __future__ import annotations

from typing import Protocol

# What a calibration pass can record.
NEEDS = ("moments", "full", "curvature", "gradients", "traces", "replay")


class FromEvidence(Protocol):
    """Anything that reads `Evidence`; `Estimator` and `Signal` each add one method.

    `needs` holds any of the words in `NEEDS`, and nothing for weights alone:

    * "moments": mean squares of inputs, routing weights and token counts;
    * "full": whole second moments of inputs;
    * "curvature": squared gradients of each weight;
    * "gradients": gradients at the experts' outputs;
    * "traces": what each expert was given, token by token;
    * "replay": the live model, to measure KL.
    """

    @property
    def name(self) -> str:
        """Shown in tables and messages."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What the calibration pass must record."""
        ...
