"""The common part of estimators and signals: a name, and the evidence they need."""

from __future__ import annotations

from typing import Protocol

# The kinds of statistics that a calibration pass can record.
NEEDS = ("moments", "full", "curvature", "gradients", "traces", "kl")


class FromEvidence(Protocol):
    """Anything that reads `Evidence`; `Estimator` and `Signal` each add one method.

    `needs` holds words from `NEEDS`; it is empty if weights are enough:

    * "moments": mean squares of inputs, routing weights and token counts;
    * "full": whole second moments of inputs;
    * "curvature": squared gradients of each weight;
    * "gradients": gradients at the experts' outputs;
    * "traces": inputs and routing of the experts, token by token;
    * "kl": the means to measure variants of the model (`evidence.variant_kl.kl_of`).
    """

    @property
    def name(self) -> str:
        """The name shown in tables and messages."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the calibration pass must record."""
        ...
