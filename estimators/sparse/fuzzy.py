"""Costs from sparse samples: a few cells are measured, the others predicted from their features.

The antecedents follow FRI-MxMoE (ACL 2026, 2026.acl-long.982): width, activation statistics,
scale, shape, projection and place. They are logarithms, with signs such that larger means more
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import Units
from bitknap.estimators.costs.data_free import distortion
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.weighed_errors import (
    experts_of,
    format_bytes,
    plainest,
    projection_of,
    role_of,
    token_share,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variant_kl import check_measurable
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.group_kl.calibrated import finite_kls
from bitknap.estimators.measuring.noise_floor import KEY
from bitknap.estimators.sparse.cell_choice import Measure
from bitknap.estimators.sparse.cell_features import Antecedents, Predictor
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.shrunk_predictor import Shrunk
from bitknap.progress import Progress
from bitknap.quantization.stacks.grouping import stacks

# Smaller values are raised to this before taking the logarithm.
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
    """Rules from measured samples that correct another estimator in every unit and format.

    Rules predict the ratio of the measured loss to the base's cost, that is, the base's error. They
    are followed as far as they predict left-out units (`shrunk`; Bitknap's addition: with the
    published plain losses and no base, plans lose several times the KL of dense profiling).

    Attributes:
        samples: measured on this model with this quantizer.
        predictor: learns from the samples; scale-and-move fuzzy rules, or another for comparison.
        base: the estimator to correct; None interpolates the loss itself, as published.
        shrink: follow the predictor as far as cross-validation supports; with a base only.
    """

    samples: LossSamples
    predictor: Predictor = field(default_factory=FuzzyRules)
    base: Estimator | None = field(default_factory=lambda: Fisher(space="output"))
    shrink: bool = True

    @property
    def name(self) -> str:
        """The base's name, marked as corrected by rules."""
        return f"fuzzy({self.base.name})" if self.base else "fuzzy"

    @property
    def needs(self) -> frozenset[str]:
        """Moments, and everything that the base needs."""
        return frozenset({"moments"}) | (self.base.needs if self.base else frozenset())

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format with their spread, nats per token.

        Raises:
            MismatchError: the samples belong to another model, quantizer or set of formats.
        """
        samples = self.samples
        origin = {"method": evidence.rounding.name, **evidence.provenance}
        samples.check(evidence.units, formats, origin)
        predictor = self.predictor
        antecedents = features(evidence, samples.formats)
        scale = np.ones((len(samples.units), len(samples.formats)))
        if self.base is not None:
            scale = np.maximum(self.base.estimate(evidence, samples.formats).cost, _LEAST)
            known = scale[samples.unit, samples.column]
            with np.errstate(over="ignore"):  # `LossSamples` refuses what is not finite
                relative = samples.believed / known
                error = None if samples.error is None else samples.error / known
            if self.shrink:
                predictor = Shrunk(inner=predictor, weight=np.sqrt(samples.believed))
            # No ratio is noise: losses that are were raised before.
            said = {**samples.provenance, KEY: float(relative.min())}
            samples = replace(samples, loss=relative, error=error, provenance=said)
        fitted = predictor.fit(samples, antecedents)
        mean, spread = (part * scale for part in fitted.predict(antecedents))
        cost = np.zeros((len(evidence.units), len(formats)))
        unsure = np.zeros_like(cost)
        for column, format in enumerate(formats):
            if format.kind != "keep":
                there = samples.formats.index(format)
                cost[:, column], unsure[:, column] = mean[:, there], spread[:, there]
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
                "predictor": repr(self.predictor),
                "samples": dict(self.samples.provenance),
                "measurements": len(samples),
                "note": getattr(fitted, "note", ""),
            },
        )


def features(evidence: Evidence, formats: Sequence[Format]) -> Antecedents:
    """Return the antecedents of every unit in every format.

    distortion: that of the format's grid on Gaussian weights. activation: second moment of the
    projection's input per routed token, weighted by a². routing: share of tokens, shrunk. scale:
    root mean square of the weights. gain: the layer's nats per squared output error. rows, cols:
    sizes. All are log2. depth: layer number over number of layers, without a known
    direction; projection: a category for role and name.
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


def unit_losses(evidence: Evidence, formats: Sequence[Format]) -> Measure:
    """Return what measures single units in formats, nats per token, for `grow`.

    Raises:
        InputError: the evidence has no means to measure.
    """
    check_measurable(evidence)
    used = token_share(evidence) > 0

    def measure(units: Longs, columns: Longs) -> Iterator[tuple[int, float]]:
        # What no token uses changes nothing, whatever its format.
        yield from ((int(place), 0.0) for place in np.flatnonzero(~used[units]))
        places = np.flatnonzero(used[units]).tolist()
        cells = [Variant.group(units[i : i + 1], formats[int(columns[i])]) for i in places]
        for number, kl in finite_kls(evidence, cells):
            yield places[number], kl

    return measure


def measured(
    evidence: Evidence,
    formats: Sequence[Format],
    cells: Longs,
    progress: Progress | None = None,
) -> Floats:
    """Return the losses of cells, unit × F + format, in nats per token, float64 [n].

    Raises:
        InputError: the evidence has no means to measure.
    """
    losses, measure = np.zeros(len(cells)), unit_losses(evidence, formats)
    found = measure(cells // len(formats), cells % len(formats))
    for done, (place, loss) in enumerate(found, start=1):
        losses[place] = loss
        if progress:
            progress("measure cells", done, len(cells))
    return losses


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
    statistics = [evidence.linears[int(unit)] for unit in run]
    activation = np.array([float(x.input_square.mean()) / max(1, x.tokens) for x in statistics])
    gains = [layer.gain for layer in evidence.layers.values()]
    return activation, np.ones(len(run)), float(np.mean(gains)) if gains else 1.0


def _sorts(units: Units) -> np.ndarray:
    """Return a number for each role and projection."""
    return units.role.astype(np.int64) * len(units.projections) + units.projection
