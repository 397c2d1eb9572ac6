"""Dense profiling: round one unit at a time and measure the effect.

Three published quantities can be measured. "kl" is the model's KL itself. "layer" is MxMoE's (arXiv
2505.05799): the Frobenius norm of the change of the decoder layer's output over the whole text.
"block" is MC-MoE's (arXiv 2410.06270): a whole expert at a time, the norm of the change of the
experts' output in each window, summed over windows. The norms are not squared, as published;
`squared` converts them to nats with the layer's measured gain (methods.md#conversions). The
quantizer is the one that is deployed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weighed_errors import format_bytes, plainest, token_share
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.layer_output import LayerOutput, window_norms
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.sweep.expert_traces import Block, block_of, runs
from bitknap.names import check_name
from bitknap.progress import Progress
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks

Kind = Literal["kl", "layer", "block"]


class _Part(NamedTuple):
    """One unit of measuring and journalling: a stack, or a layer's experts, in one format."""

    key: str
    layer: int
    run: np.ndarray
    format: Format
    columns: np.ndarray


# Maps a part to the measurement of each of its units, float64 [n].
Measure = Callable[[_Part], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measures every unit in every format: units × formats measurements.

    A unit whose measurement is not above 0 (its expert saw no token, or rounding noise exceeds the
    KL) gets the smallest positive cost of its layer's projection in the same format; if there is
    none, the second moments' estimate. So only a kept precision costs zero.

    Attributes:
        kind: "kl", in nats per token; or "layer" or "block", norms of output changes, which only
            rank. "block" measures whole experts and divides the cost among the matrices by their
            weights:
                tie experts before solving.
        squared: square the norms and scale them by the layer's gain to nats per token. The gain was
            measured at the experts' output, so "layer" assumes that it is added to the residual
            stream unscaled.
        progress: called with (what, done, of).
        journal: file that keeps each finished stack × format; resuming with the same inputs gives a
            bit-identical table.
    """

    kind: Kind = "kl"
    squared: bool = False
    progress: Progress | None = None
    journal: Path | None = None

    def __post_init__(self) -> None:
        check_name("kind", self.kind, get_args(Kind))
        if self.squared and self.kind == "kl":
            raise InputError("squared: a KL is not a norm; leave it out, or measure layer or block")

    @property
    def name(self) -> str:
        """The name on the command line: "measured-kl", "measured-layer" or "measured-block"."""
        return f"measured-{self.kind}"

    @property
    def needs(self) -> frozenset[str]:
        """Moments, for units that cannot be measured, and the live model; traces for blocks."""
        return frozenset({"moments", "replay"} | ({"traces"} if self.kind == "block" else set()))

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format: nats per token, or a score.

        Raises:
            InputError: the evidence has no live model or no trace, or this kind cannot measure a
                unit.
            MismatchError: the journal belongs to other inputs.
            FileError: the journal is damaged.
        """
        replay = _checked(evidence, self.kind)
        parts = _parts(evidence.units, formats, whole=self.kind == "block")
        raw = self._raw(evidence, replay, formats, parts)
        scale = self._scale(evidence, replay, squared=self.squared)
        cost, filled = self._filled(evidence, replay, formats, raw * scale[:, None])
        seen = token_share(evidence) > 0
        hit = [part.run[seen[part.run]] for part in parts]
        table = CostTable.from_arrays(
            cost,
            format_bytes(evidence.units, formats),
            units=evidence.units,
            formats=tuple(formats),
            frequency=token_share(evidence),
            provenance={
                **evidence.provenance,
                "method": evidence.rounding.name,
                "unit": self._unit(),
                "estimator": self.name,
                "measurements": sum(len(np.unique(evidence.units.expert[run])) for run in hit),
                "filled": filled,
                **({"of": "whole experts"} if self.kind == "block" else {}),
            },
        )
        return replace(
            table, provenance={**table.provenance, "super_experts": super_experts(table)}
        )

    def _raw(
        self,
        evidence: Evidence,
        replay: Replay,
        formats: Sequence[Format],
        parts: Sequence[_Part],
    ) -> Floats:
        """Return the measurements, float64 [U, F]; 0 for a kept precision."""
        raw = np.zeros((len(evidence.units), len(formats)))
        squared = " squared" if self.squared else ""
        readings, mark = evidence.readings, f"{evidence.mark} {self.name}{squared} "
        if self.journal is not None:
            about, mark = self._about(evidence, replay, formats), ""
            readings = Readings.open(self.journal, about)
        measured = self._values(evidence, replay, parts, readings, mark)
        for number, (part, values) in enumerate(measured, start=1):
            if self.progress:
                self.progress("measure units", number, len(parts))
            raw[np.ix_(part.run, part.columns)] = values[:, None]
        return raw

    def _unit(self) -> str:
        return "nats/token" if self.kind == "kl" or self.squared else "score"

    def _about(
        self, evidence: Evidence, replay: Replay, formats: Sequence[Format]
    ) -> dict[str, Any]:
        """Return everything that the journal's numbers depend on."""
        columns = b"".join(a.tobytes() for a in evidence.units.to_arrays().values())
        return {
            "kind": self.kind,
            "squared": self.squared,
            "model": _fingerprint(replay.model),
            "text": hashlib.sha256(replay.windows.numpy().tobytes()).hexdigest()[:32],
            "units": hashlib.sha256(columns).hexdigest()[:32],
            "formats": [format.name for format in formats],
            "traced": [len(trace.hidden) for _, trace in sorted(evidence.traces.items())]
            if self.kind == "block"
            else [],
        }

    def _values(
        self,
        evidence: Evidence,
        replay: Replay,
        parts: Sequence[_Part],
        readings: Readings,
        mark: str,
    ) -> Iterator[tuple[_Part, Floats]]:
        """Yield each part with its units' measurements, read from the journal if it has them."""
        for layer, group in groupby(parts, key=lambda part: part.layer):
            measure: Measure | None = None
            for part in group:
                values = readings.known(mark + part.key, len(part.run))
                if values is None:
                    measure = measure or self._measure(evidence, replay, layer)
                    values = measure(part)
                    readings.keep(mark + part.key, values)
                yield part, values

    def _measure(self, evidence: Evidence, replay: Replay, layer: int) -> Measure:
        """Return the function that measures the parts of one layer."""
        if self.kind == "block":
            block, window = block_of(evidence, layer), replay.span
            return lambda part: _blocks(evidence, block, part, window, self.squared)
        if self.kind == "layer":
            output, power = LayerOutput(replay, evidence.layout, layer), 2 if self.squared else 1
            return lambda part: _each(evidence, replay, part, lambda: output.change() ** power)
        return lambda part: _each(evidence, replay, part, lambda: replay.kl(layer))

    def _scale(self, evidence: Evidence, replay: Replay, *, squared: bool) -> Floats:
        """Return nats per token per unit of squared norm, float64 [U]; 1 if not squared."""
        if not squared:
            return np.ones(len(evidence.units))
        tokens = dict.fromkeys(evidence.layers, len(replay.windows) * replay.span)
        if self.kind == "block":
            tokens |= {number: len(trace.hidden) for number, trace in evidence.traces.items()}
        scale = {n: layer.gain / tokens[n] for n, layer in evidence.layers.items()}
        return np.array([scale[number] for number in evidence.units.layer.tolist()])

    def _filled(
        self, evidence: Evidence, replay: Replay, formats: Sequence[Format], cost: Floats
    ) -> tuple[Floats, int]:
        """Return costs above 0 for all formats but kept precisions, and how many were filled in."""
        grids = np.array([format.kind != "keep" for format in formats])
        missing = ~(cost > 0) & grids
        filled = cost.copy()
        for run in stacks(evidence.units):
            least = np.where(cost[run] > 0, cost[run], np.inf).min(axis=0)
            filled[run] = np.where(missing[run], least, cost[run])
        lost = missing & ~np.isfinite(filled)
        if lost.any():
            moments = SecondMoments().estimate(evidence, formats).cost
            if self._unit() == "score":  # a norm over the text, like the measured ones
                scale = self._scale(evidence, replay, squared=True)
                moments = np.sqrt(moments / scale[:, None])
            filled[lost] = moments[lost]
        return filled, int(missing.sum())


def _checked(evidence: Evidence, kind: str) -> Replay:
    if evidence.replay is None:
        raise InputError(
            "dense profiling needs the live model, which loaded evidence lacks; calibrate in "
            "this process"
        )
    units = evidence.units
    other = np.flatnonzero(units.role != ROLES.index("routed"))
    if kind != "kl" and len(other):
        raise InputError(
            f"{kind}: {units.label(int(other[0]))} does not belong to a routed expert; with "
            "`include`, measure kl"
        )
    return evidence.replay


def _parts(units: Units, formats: Sequence[Format], *, whole: bool) -> list[_Part]:
    """Return the parts to measure: stacks, or whole layers, × formats that store differently."""
    runs = stacks(units)
    if whole:
        runs = [np.flatnonzero(units.layer == layer) for layer in np.unique(units.layer)]
    parts = []
    for number, run in enumerate(runs):
        columns: dict[tuple[Format, ...], list[int]] = {}
        for column, format in enumerate(formats):
            if format.kind != "keep":
                alike = tuple(plainest(format, int(c)) for c in np.unique(units.cols[run]))
                columns.setdefault(alike, []).append(column)
        parts += [
            _Part(
                f"{number} {formats[c[0]]}",
                int(units.layer[run[0]]),
                run,
                formats[c[0]],
                np.array(c),
            )
            for c in columns.values()
        ]
    return parts


def _each(evidence: Evidence, replay: Replay, part: _Part, measure: Callable[[], float]) -> Floats:
    """Measure each unit by itself in the part's format, float64 [n].

    An expert without tokens changes nothing, so it needs no run.
    """
    seen = token_share(evidence)[part.run] > 0
    rounded = evidence.round_trip(part.run, evidence.weights(part.run), part.format)
    values = np.zeros(len(part.run))
    for i in np.flatnonzero(seen):
        change = _constant(rounded[i : i + 1])
        with replaced(replay.model, evidence.layout, [int(part.run[i])], change):
            values[i] = measure()
    return values


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _blocks(evidence: Evidence, block: Block, part: _Part, window: int, squared: bool) -> Floats:
    """Return each matrix's share of its whole expert's effect on the output, float64 [n]."""
    units = evidence.units
    changed = {
        name: evidence.round_trip(run, block.weights[name], part.format)
        for name, run in runs(units, block.layer.layer).items()
    }
    whole = np.zeros(block.layer.experts)
    for expert, token, change in block.changes(changed):
        norms = window_norms(change, token // window)
        whole[expert] = float((norms.square() if squared else norms).sum())
    weights = np.bincount(units.expert[part.run], units.numel[part.run])
    expert = units.expert[part.run]
    share: Floats = whole[expert] * units.numel[part.run] / weights[expert]
    return share


def _fingerprint(model: Any) -> str:
    """Return a hash of every parameter of a live model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
