"""The statistics that one calibration pass recorded, from which estimators run.

Sums run over the tokens routed to an expert; a is the token's routing weight for that expert.
Divided by `tokens` they are per token of the whole text. The statistics of an expert with few
tokens are shrunk to its layer's mean, never to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.evidence.variants import TextSweep
from bitknap.estimators.measuring.expert_forward import Experts
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.noise_floor import USUAL
from bitknap.estimators.measuring.readings import Readings
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.rounding.methods import RTN, round_trip
from bitknap.quantization.rounding.rounding import Inputs, Rounding, takes_squares
from bitknap.quantization.source.devices import CPU

# Weight of the layer's mean in an expert's statistics, in tokens: at 16 tokens both count equally.
PRIOR_TOKENS = 16
# Only weights of another magnitude explain this ratio of an expert's squared inputs to its layer's.
_FAR = 2.0**24
# Below this many tokens an expert is listed in the coverage report.
FEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvidence:
    """Routing and second moments of one MoE layer; E experts, H hidden, I intermediate.

    Attributes:
        tokens: tokens of the text.
        count: tokens routed to each expert, int64 [E].
        gate_sum: sum of the routing weights a, float64 [E].
        gate_square: sum of a², float64 [E].
        input_square: sum of a² x², x the input of gate and up, float64 [E, H].
        middle_square: sum of a² h², h the input of down, float64 [E, I].
        slopes: for "gate" and "up", sum of a² (dh/dz)² over the projection's output z, [E, I].
        input_full: sum of a² x xᵀ, float32 [E, H, H]; None unless asked for.
        middle_full: sum of a² h hᵀ, float32 [E, I, I]; None unless asked for.
        curvature: for each projection the sum of (dL/dz)² x², squared gradients of each weight with
            labels drawn from the model, float32 [E, out, in]; empty unless asked for.
        output_square: mean squared norm of the layer's expert output per token.
        gain: nats per unit of squared output error per token, measured by adding noise.
        output_max: largest |a o| that each expert added to any coordinate of any token, where o is
            its output, float64 [E]; 0 without tokens, None if not recorded.
    """

    tokens: int
    count: Tensor
    gate_sum: Tensor
    gate_square: Tensor
    input_square: Tensor
    middle_square: Tensor
    slopes: Mapping[str, Tensor]
    input_full: Tensor | None
    middle_full: Tensor | None
    curvature: Mapping[str, Tensor]
    output_square: float
    gain: float
    output_max: Tensor | None = None

    def input_moments(self, down: bool, *, whole: bool) -> Tensor | None:
        """Return sums over the inputs of down, or of gate and up: whole moments or their diagonals.

        None if whole ones were not recorded.
        """
        if whole:
            return self.middle_full if down else self.input_full
        return self.middle_square if down else self.input_square

    def shrunk(self, total: Tensor) -> Tensor:
        """Return a sum over routed tokens [E, ...], per token of the text, shrunk by `shrink`.

        An expert whose weights, and so its sums, have another magnitude is shrunk to the layer's
        mean scaled to that magnitude.
        """
        units = self._units(total)
        if units is None:
            return shrink(total, self.count, self.tokens)
        return shrink(total.double() / units, self.count, self.tokens) * units

    def routed_mean(self, total: Tensor, experts: Tensor) -> Tensor:
        """Return a sum over routed tokens [E, ...], per token that each expert saw, shrunk.

        The mean moves towards the layer's by PRIOR_TOKENS, as in `shrink`; an expert without
        tokens gets the layer's mean.

        Args:
            total: sums over each expert's tokens, [E, ...].
            experts: the experts whose means are returned, int64 [n].
        """
        units = self._units(total)
        total = total if units is None else total.double() / units
        seen = self.count[experts].to(total.dtype).view(-1, *[1] * (total.ndim - 1))
        mean = total.sum(0) / max(1, int(self.count.sum()))
        means = (total[experts] + PRIOR_TOKENS * mean) / (seen + PRIOR_TOKENS)
        return means if units is None else means * units[experts]

    def _units(self, total: Tensor) -> Tensor | None:
        """Return the ratio of each expert's sums to its layer's, set to 1 unless far from 1.

        None if no expert is far from 1. Sums of one number per expert, [E], contain only routing.
        """
        if total.ndim == 1 or not total.numel():
            return None
        mass = self.gate_square.double()
        size = total.abs().double().flatten(1).mean(1) / mass.where(mass > 0, 1)
        known = (size > 0) & (mass > 0) & size.isfinite()
        if not bool(known.any()):
            return None
        ratio = size / size[known].median()
        far = known & ((ratio > _FAR) | (ratio < 1 / _FAR))
        if not bool(far.any()):
            return None
        return torch.where(far, ratio, 1.0).view(-1, *[1] * (total.ndim - 1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTrace:
    """Inputs and routing of one MoE layer's experts by token, so that the experts can run again.

    A layer takes 4 H bytes per token, twice that with gradients, and 12 k for the routing: 134 MB
    per layer for 8,192 tokens of a model with H = 4,096.

    Attributes:
        hidden: the experts' inputs, float32 [T, H].
        index: the experts each token was routed to, int64 [T, k].
        weights: the routing weights a, float32 [T, k].
        gradient: gradient of the summed loss at the experts' output, with labels drawn from the
            model, float32 [T, H]; None unless asked for.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gradient: Tensor | None

    def to(self, device: torch.device) -> LayerTrace:
        """Return the trace on a device."""
        parts = (self.hidden, self.index, self.weights, self.gradient)
        hidden, index, weights, gradient = (None if x is None else x.to(device) for x in parts)
        assert hidden is not None
        assert index is not None
        assert weights is not None
        return LayerTrace(hidden=hidden, index=index, weights=weights, gradient=gradient)

    def count(self, experts: int) -> Tensor:
        """Return how many tokens were routed to each expert, int64 [experts]."""
        routed = self.index[(self.index >= 0) & (self.index < experts)]
        return torch.bincount(routed, minlength=experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearEvidence:
    """Second moments at one ordinary linear projection (attention, shared, dense).

    Attributes:
        tokens: tokens of the text.
        input_square: sum of x², float64 [in].
        input_full: sum of x xᵀ, float32 [in, in]; None unless asked for.
    """

    tokens: int
    input_square: Tensor
    input_full: Tensor | None = None

    def input_moments(self, *, whole: bool) -> Tensor | None:
        """Return the whole moments, None if not recorded, or their diagonal."""
        return self.input_full if whole else self.input_square


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One calibration pass over one model.

    Attributes:
        layout: the live model's units.
        layers: statistics of the routed experts, by layer number.
        linears: statistics of the other projections, by unit; of all, if no model was run.
        weights: reads units' weights, float32 [n, rows, cols].
        replay: measures the live model's KL; None if there is no live model.
        sweep: measures variants of a model that is not in memory; None if it is.
        effort: how much estimators round and measure.
        experts: returns the experts of a layer, to run them again with weights of one's own; None
            if no model was run.
        span: tokens of a window of the text that each layer sees.
        provenance: text hash, tokens, seed, model fingerprint.
        traces: inputs and routing of the experts, by layer number; empty unless asked for.
        rounding: rounding method; costs are charged for this method.
        readings: the journal that keeps measurements.
        device: where weights are rounded, and experts run again; all tensors here are on the CPU.
        floor: KL below this is noise of arithmetic, nats per token, as measured on the text.
    """

    layout: Layout
    layers: Mapping[int, LayerEvidence]
    linears: Mapping[int, LinearEvidence]
    weights: Callable[[np.ndarray], Tensor]
    replay: Replay | None
    provenance: Mapping[str, Any]
    traces: Mapping[int, LayerTrace] = field(default_factory=dict)
    rounding: Rounding = RTN
    readings: Readings = field(default_factory=Readings)
    sweep: TextSweep | None = None
    effort: Effort = field(default_factory=Effort)
    experts: Callable[[ExpertLayer], Experts] | None = None
    span: int = 0
    device: torch.device = CPU
    floor: float = USUAL

    @property
    def mark(self) -> str:
        """The prefix that separates readings on this text from those on others in one journal."""
        return str(self.provenance.get("text", ""))[:12]

    @property
    def units(self) -> Units:
        """The units, in the order of the layout."""
        return self.layout.units

    def inputs(self, run: np.ndarray) -> Inputs:
        """Return the second moments of the inputs of a stack of units, or their diagonals.

        Second moments of routed experts are weighted by squared routing weights, so that
        ΔW S ΔWᵀ is the error of the layer's output, and shrunk to the layer's mean. Where float32
        cannot hold them they are multiplied by a power of two, which does not change the rounding.

        Raises:
            InputError: whole second moments were not recorded for these units.
        """
        units = self.units
        if ROLES[units.role[run[0]]] != "routed" or int(run[0]) in self.linears:
            return self._linear_inputs(run)
        layer = self.layers.get(int(units.layer[run[0]]))
        down = units.projections[units.projection[run[0]]] == "down"
        total = None if layer is None else layer.input_moments(down, whole=not self._by_squares)
        if layer is None or total is None:
            raise self._unrecorded(int(run[0]))
        experts = torch.from_numpy(units.expert[run].astype(np.int64))
        moments = _in_float32(layer.routed_mean(total, experts))
        return Inputs(moments=moments, tokens=layer.count[experts])

    @property
    def _by_squares(self) -> bool:
        return takes_squares(self.rounding)

    def _linear_inputs(self, run: np.ndarray) -> Inputs:
        """Return `inputs` of ordinary linear projections."""
        moments, tokens = [], []
        for unit in run.tolist():
            seen = self.linears.get(unit)
            total = None if seen is None else seen.input_moments(whole=not self._by_squares)
            if seen is None or total is None:
                raise self._unrecorded(unit)
            moments.append(total / max(1, seen.tokens))
            tokens.append(seen.tokens)
        return Inputs(moments=_in_float32(torch.stack(moments)), tokens=torch.tensor(tokens))

    def _unrecorded(self, unit: int) -> InputError:
        return InputError(
            f"{self.units.label(unit)}: second moments of its inputs were not recorded; "
            "calibrate with full moments"
        )

    def round_trip(
        self,
        run: np.ndarray,
        weights: Tensor,
        format: Format,
        exponents: Tensor | None = None,
    ) -> Tensor:
        """Return a stack's weights [n, rows, cols] after a round trip through `format`.

        Args:
            run: the units.
            weights: their weights, or some rows of them.
            format: the format.
            exponents: as in `Rounding.quantize`, if the weights are only some rows.
        """
        known = self.inputs(run) if self.rounding.needs_inputs else None
        return round_trip(weights, format, self.rounding, known, exponents)

    def coverage(self) -> list[tuple[int, int, int]]:
        """Return (layer, expert, tokens) of experts that saw fewer than FEW_TOKENS tokens."""
        return [
            (layer, expert, seen)
            for layer, evidence in sorted(self.layers.items())
            for expert, seen in enumerate(evidence.count.tolist())
            if seen < FEW_TOKENS
        ]


def _in_float32(moments: Tensor) -> Tensor:
    """Return moments [n, cols, cols] or [n, cols] in float32, scaled where they do not fit it."""
    if moments.dtype == torch.float32:
        return moments
    squares = moments if moments.ndim == 2 else moments.diagonal(dim1=1, dim2=2)
    exponent = torch.frexp(squares.amax(1)).exponent
    exponent = torch.where(exponent.abs() > 64, exponent, 0)
    return torch.ldexp(moments, -exponent.view(-1, *[1] * (moments.ndim - 1))).float()


def shrink(total: Tensor, count: Tensor, tokens: int) -> Tensor:
    """Return a sum over routed tokens, per token of the text, shrunk to the layer's mean.

    The mean over an expert's tokens moves towards the layer's mean by PRIOR_TOKENS, then is
    multiplied by the expert's share of tokens, which includes PRIOR_TOKENS / E pseudo-tokens.

    Args:
        total: sums over each expert's tokens, [E, ...].
        count: tokens routed to each expert, int64 [E].
        tokens: tokens of the text.
    """
    experts = len(count)
    shape = (experts,) + (1,) * (total.ndim - 1)
    routed = count.double()
    layer_mean = total.double().sum(0, keepdim=True) / routed.sum().clamp_min(1)
    seen = (routed + PRIOR_TOKENS).view(shape)
    mean = (total.double() + PRIOR_TOKENS * layer_mean) / seen
    share = (routed + PRIOR_TOKENS / experts) / (tokens + PRIOR_TOKENS)
    return mean * share.view(shape)


def zeros(*shape: int) -> Tensor:
    """Return a float64 accumulator."""
    return torch.zeros(*shape, dtype=torch.float64)
