"""Costs from sparse samples: a few cells measured, the others read off what is known of them.

The antecedents follow FRI-MxMoE (ACL 2026, 2026.acl-long.982): width, activation statistics,
scale, shape, projection and place. They are logarithms, turned so that larger means more loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bitknap.allocation.format import Format
from bitknap.allocation.table import CostTable
from bitknap.allocation.units import Units
from bitknap.errors import InputError
from bitknap.estimators.antecedents import Antecedents, Predictor
from bitknap.estimators.calibrated import Estimator, group_kl
from bitknap.estimators.costs import (
    experts_of,
    format_bytes,
    plainest,
    projection_of,
    role_of,
    token_share,
)
from bitknap.estimators.data_free import distortion
from bitknap.estimators.evidence import Evidence
from bitknap.estimators.fuzzy_rules import FuzzyRules
from bitknap.estimators.predictors import Residual
from bitknap.estimators.samples import LossSamples
from bitknap.quantize.apply import stacks

# Values below this are taken for this before their logarithm.
_LEAST = 1e-12
_NAMES = (
    "distortion",
    "activation",
    "routing",
    "scale",
    "gain",
    "rows",
    "cols",
    "depth",
    "projection",
)


@dataclass(frozen=True, slots=True)
class Fuzzy:
    """Fuzzy rules from measured samples, interpolated to every unit and format.

    Attributes:
        samples: measured on this model with this quantizer.
        kind: "tfri", or "idw" as FRI-MxMoE published it.
        residual: interpolate only what the log-linear model leaves.
        neighbours: rules that answer together.
        base: interpolate the ratio of the measured loss to this estimator's cost, so that rules
            speak of what it gets wrong; the loss itself when not given.
    """

    samples: LossSamples
    kind: Literal["tfri", "idw"] = "tfri"
    residual: bool = True
    neighbours: int = 8
    base: Estimator | None = None

    name = "fuzzy"

    @property
    def needs(self) -> frozenset[str]:
        """Moments, and what the base needs."""
        return frozenset({"moments"}) | (self.base.needs if self.base else frozenset())

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format with their spread, nats per token.

        Raises:
            MismatchError: the samples are of another model, quantizer, or other formats.
        """
        samples = self.samples
        origin = {"method": evidence.rounding.name, **evidence.provenance}
        samples.check(evidence.units, formats, origin)
        rules = FuzzyRules(kind=self.kind, neighbours=self.neighbours)
        predictor: Predictor = Residual(inner=rules) if self.residual else rules
        antecedents = features(evidence, samples.formats)
        scale = np.ones((len(samples.units), len(samples.formats)))
        if self.base is not None:
            scale = np.maximum(self.base.estimate(evidence, samples.formats).cost, _LEAST)
            known = scale[samples.unit, samples.column]
            error = None if samples.error is None else samples.error / known
            samples = replace(samples, loss=samples.loss / known, error=error)
        fitted = predictor.fit(samples, antecedents)
        mean, spread = (part * scale for part in fitted.predict(antecedents))
        cost = np.zeros((len(evidence.units), len(formats)))
        unsure = np.zeros_like(cost)
        for column, format in enumerate(formats):
            if format.kind != "keep":
                there = samples.formats.index(format)
                cost[:, column], unsure[:, column] = mean[:, there], spread[:, there]
        kind = f"{self.kind} on log-linear" if self.residual else self.kind
        kind += f" over {self.base.name}" if self.base else ""
        return CostTable.from_arrays(
            cost,
            format_bytes(evidence.units, formats),
            units=evidence.units,
            formats=tuple(formats),
            spread=unsure,
            frequency=token_share(evidence),
            provenance={
                **evidence.provenance,
                "method": evidence.rounding.name,
                "unit": "nats/token",
                "estimator": self.name,
                "rules": kind,
                "samples": dict(samples.provenance),
                "measurements": len(samples),
                "note": getattr(fitted, "note", ""),
            },
        )


def features(evidence: Evidence, formats: Sequence[Format]) -> Antecedents:
    """Return the antecedents of every unit in every format.

    distortion: of the format's grid on Gaussian weights. activation: second moment of the
    projection's input, a routed token, weighted by a². routing: share of tokens, shrunk. scale:
    root mean square of the weights. gain: the layer's nats per squared output error. rows, cols:
    sizes. All are log2. depth: layer over layers, of no known direction; projection: a category
    of role and name.
    """
    units = evidence.units
    values = np.zeros((len(units), len(formats), len(_NAMES)))
    at = {name: values[:, :, place] for place, name in enumerate(_NAMES)}
    known: dict[tuple[Format, int], float] = {}
    for run in stacks(units):
        cols = int(units.cols[run[0]])
        for column, format in enumerate(formats):
            same = plainest(format, cols)
            if (same, cols) not in known:
                known[same, cols] = distortion(same, cols)
            at["distortion"][run, column] = known[same, cols]
        activation, routing, gain = _seen(evidence, run)
        at["activation"][run] = activation[:, None]
        at["routing"][run] = routing[:, None]
        at["gain"][run] = gain
        square = evidence.weights(run).double().square().mean((1, 2)).numpy()
        at["scale"][run] = np.sqrt(square)[:, None]
    at["rows"][:], at["cols"][:] = units.rows[:, None], units.cols[:, None]
    values[:, :, :7] = np.log2(np.maximum(values[:, :, :7], _LEAST))
    at["depth"][:] = ((units.layer + 1) / max(1, int(units.layer.max()) + 1))[:, None]
    at["projection"][:] = _sorts(units)[:, None]
    return Antecedents(
        names=_NAMES,
        values=values,
        discrete=frozenset({"projection"}),
        free=frozenset({"depth"}),
    )


def unit_losses(evidence: Evidence, formats: Sequence[Format]) -> Callable[[int, int], float]:
    """Return what measures one unit in one format, nats per token, for `anchors.grow`.

    Raises:
        InputError: the evidence has no live model to measure.
    """
    replay = evidence.replay
    if replay is None:
        raise InputError("samples need the live model; calibrate it in this process")

    def measure(unit: int, column: int) -> float:
        return group_kl(evidence, np.array([unit]), formats[column])

    return measure


def _seen(evidence: Evidence, run: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the input's second moment, share of tokens, and gain of a stack of units."""
    if role_of(evidence.units, run) == "routed":
        layer, experts = experts_of(evidence, run)
        down = projection_of(evidence.units, run) == "down"
        moments = layer.shrunk(layer.middle_square if down else layer.input_square)
        mass = layer.shrunk(layer.gate_square).clamp_min(1e-30)
        activation = (moments.mean(1) / mass)[experts].numpy()
        share = layer.shrunk(layer.count)[experts].numpy()
        return activation, share, layer.gain
    found = [evidence.linears[int(unit)] for unit in run]
    activation = np.array([float(x.input_square.mean()) / max(1, x.tokens) for x in found])
    gains = [layer.gain for layer in evidence.layers.values()]
    return activation, np.ones(len(run)), float(np.mean(gains)) if gains else 1.0


def _sorts(units: Units) -> np.ndarray:
    """Return a number for each role and projection."""
    return units.role.astype(np.int64) * len(units.projections) + units.projection
