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
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weighed_errors import format_bytes, plainest, token_share
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.evidence.variant_kl import check_measurable, kl_of, square_changes
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.measuring.layer_output import window_norms
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.sweep.expert_traces import Block, block_of, runs
from bitknap.names import check_name
from bitknap.progress import Progress
from bitknap.quantization.stacks.grouping import stacks

Kind = Literal["kl", "layer", "block"]
# Relative difference of one change that two ways of computing it may make by rounding alone.
_SAME = 1e-3


class _Part(NamedTuple):
    """A stack, or a layer's experts, in one format, and the columns that store as it does."""

    key: str
    layer: int
    run: np.ndarray
    format: Format
    columns: np.ndarray


# A part, the places of some of its units in it, int64 [n], and their measurements, float64 [n].
_Reading = tuple[_Part, Longs, Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measures every unit in every format: units × formats measurements.

    A unit whose measurement is not above 0 (its expert saw no token, or the KL is not above the
    noise of arithmetic) gets the smallest positive cost of its layer's projection in the same
    format; if there is none, the second moments' estimate. So only a kept precision costs zero.

    Attributes:
        kind: "kl", in nats per token; or "layer" or "block", norms of output changes, which only
            rank. "block" measures whole experts and divides the cost among the matrices by their
            weights:
                tie experts before solving.
        squared: square the norms and scale them by the layer's gain to nats per token. The gain was
            measured at the experts' output, so "layer" assumes that it is added to the residual
            stream unscaled.
        progress: called with (what, done, of).
        journal: file that keeps each measurement; resuming with the same inputs gives a
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
        """Moments, for units that cannot be measured; traces for blocks, else measured variants."""
        return frozenset({"moments", "traces" if self.kind == "block" else "kl"})

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format: nats per token, or a score.

        Raises:
            InputError: the evidence has no means to measure or no trace, or this kind cannot
                measure a unit.
            MismatchError: the journal belongs to other inputs.
            FileError: the journal is damaged.
        """
        _check(evidence, self.kind)
        parts = _parts(evidence.units, formats, whole=self.kind == "block")
        if self.journal is not None:
            readings = Readings.open(self.journal, self._about(evidence, formats))
            measured = replace(evidence, readings=readings)
        else:
            measured = evidence
        raw = self._raw(measured, formats, parts)
        scale = self._scale(evidence, squared=self.squared)
        cost, filled = self._filled(evidence, formats, raw * scale[:, None])
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

    def _raw(self, evidence: Evidence, formats: Sequence[Format], parts: Sequence[_Part]) -> Floats:
        """Return the measurements, float64 [U, F]; 0 for a kept precision."""
        raw = np.zeros((len(evidence.units), len(formats)))
        values = {"kl": self._variants, "layer": self._layers, "block": self._traced}
        for part, chosen, value in values[self.kind](evidence, parts):
            raw[np.ix_(part.run[chosen], part.columns)] = value[:, None]
        return raw

    def _variants(self, evidence: Evidence, parts: Sequence[_Part]) -> Iterator[_Reading]:
        """Yield the measurement of each unit in each part's format.

        An expert without tokens changes nothing, so it is not measured.
        """
        seen = token_share(evidence) > 0
        cells = [(part, i) for part in parts for i in np.flatnonzero(seen[part.run]).tolist()]
        variants = [Variant.group(part.run[i : i + 1], part.format) for part, i in cells]
        measure = kl_of if self.kind == "kl" else square_changes
        for done, (number, value) in enumerate(measure(evidence, variants), start=1):
            part, i = cells[number]
            if self.kind == "kl":
                value = value if value > evidence.floor else 0.0
            elif not self.squared:
                value = math.sqrt(value)
            yield part, np.array([i]), np.array([value])
            if self.progress:
                self.progress("measure units", done, len(cells))

    def _layers(self, evidence: Evidence, parts: Sequence[_Part]) -> Iterator[_Reading]:
        """Yield the change of the layer's output that each unit in each part's format makes.

        Most models add the experts' output to the rest as it is. There it is the change of that
        output, which a trace, if the pass kept one, gives for all experts of a layer at once.
        """
        numbers = sorted({part.layer for part in parts})
        added = {number for number in numbers if _adds(evidence, parts, number)}
        yield from self._traced(evidence, [part for part in parts if part.layer in added])
        yield from self._variants(evidence, [part for part in parts if part.layer not in added])

    def _traced(self, evidence: Evidence, parts: Sequence[_Part]) -> Iterator[_Reading]:
        """Yield the measurements of each part's units, read from the journal if it has them."""
        mark = f"{evidence.mark} {self.name}{' squared' if self.squared else ''} "
        block: Block | None = None
        for done, part in enumerate(parts, start=1):
            values = evidence.readings.known(mark + part.key, len(part.run))
            if values is None:
                if block is None or block.layer.layer != part.layer:
                    block = None  # one layer's outputs at a time
                    block = block_of(evidence, part.layer)
                if self.kind == "block":
                    values = _of_block(evidence, block, part, self.squared)
                else:
                    squares = _of_matrices(evidence, block, part)
                    values = squares if self.squared else np.sqrt(squares)
                evidence.readings.keep(mark + part.key, values)
            yield part, np.arange(len(part.run)), values
            if self.progress:
                self.progress("measure units", done, len(parts))

    def _unit(self) -> str:
        return "nats/token" if self.kind == "kl" or self.squared else "score"

    def _about(self, evidence: Evidence, formats: Sequence[Format]) -> dict[str, Any]:
        """Return everything that the journal's numbers depend on."""
        columns = b"".join(a.tobytes() for a in evidence.units.to_arrays().values())
        return {
            "kind": self.kind,
            "squared": self.squared,
            "model": _fingerprint(evidence),
            "text": evidence.provenance["text"],
            "units": hashlib.sha256(columns).hexdigest()[:32],
            "formats": [format.name for format in formats],
            "traced": [len(trace.hidden) for _, trace in sorted(evidence.traces.items())]
            if self.kind == "block"
            else [],
        }

    def _scale(self, evidence: Evidence, *, squared: bool) -> Floats:
        """Return nats per token per unit of squared norm, float64 [U]; 1 if not squared."""
        if not squared:
            return np.ones(len(evidence.units))
        tokens = {number: layer.tokens for number, layer in evidence.layers.items()}
        if self.kind == "block":
            tokens |= {number: len(trace.hidden) for number, trace in evidence.traces.items()}
        scale = {n: layer.gain / tokens[n] for n, layer in evidence.layers.items()}
        return np.array([scale[number] for number in evidence.units.layer.tolist()])

    def _filled(
        self, evidence: Evidence, formats: Sequence[Format], cost: Floats
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
                scale = self._scale(evidence, squared=True)
                moments = np.sqrt(moments / scale[:, None])
            filled[lost] = moments[lost]
        return filled, int(missing.sum())


def _check(evidence: Evidence, kind: str) -> None:
    """Raise InputError if a kind cannot be measured, or not on one of the units."""
    if kind != "block":
        check_measurable(evidence)
    units = evidence.units
    other = np.flatnonzero(units.role != ROLES.index("routed"))
    if kind != "kl" and len(other):
        raise InputError(
            f"{kind}: {units.label(int(other[0]))} does not belong to a routed expert; with "
            "`include`, measure kl"
        )


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


def _of_block(evidence: Evidence, block: Block, part: _Part, squared: bool) -> Floats:
    """Return each matrix's share of its whole expert's effect on the output, float64 [n]."""
    units = evidence.units
    changed = {
        name: evidence.round_trip(run, block.weights[name], part.format)
        for name, run in runs(units, block.layer.layer).items()
    }
    whole = np.zeros(block.layer.experts)
    for expert, token, change in block.changes(changed):
        norms = window_norms(change, token // evidence.span)
        whole[expert] = float((norms.square() if squared else norms).sum())
    weights = np.bincount(units.expert[part.run], units.numel[part.run])
    expert = units.expert[part.run]
    share: Floats = whole[expert] * units.numel[part.run] / weights[expert]
    return share


def _of_matrices(evidence: Evidence, block: Block, part: _Part) -> Floats:
    """Return the squared change of the experts' output that each matrix makes, float64 [n]."""
    units, squares = evidence.units, np.zeros(len(part.run))
    at = {int(expert): place for place, expert in enumerate(units.expert[part.run])}
    name = str(units.projections[units.projection[part.run[0]]])
    rounded = evidence.round_trip(part.run, evidence.weights(part.run), part.format)
    changed = block.weights[name].clone()
    changed[torch.tensor(list(at))] = rounded.to(changed.device)
    for expert, _, change in block.changes({name: changed}):
        if expert in at:
            squares[at[expert]] = float(change.double().square().sum())
    return squares


def _adds(evidence: Evidence, parts: Sequence[_Part], layer: int) -> bool:
    """Return whether a layer adds its experts' output to the rest as it is.

    One matrix tells: the expert with most tokens in the format that changes it most.
    """
    trace = evidence.traces.get(layer)
    whole = trace is not None and len(trace.hidden) == evidence.layers[layer].tokens
    if not whole or evidence.experts is None:
        return False
    part = min((part for part in parts if part.layer == layer), key=lambda part: part.format.bits)
    at = int(np.argmax(token_share(evidence)[part.run]))
    one = part._replace(run=part.run[at : at + 1])
    ((_, real),) = square_changes(evidence, [Variant.group(one.run, one.format)])
    alone = float(_of_matrices(evidence, block_of(evidence, layer), one)[0])
    return abs(alone - real) <= _SAME * real


def _fingerprint(evidence: Evidence) -> str:
    """Return a hash of a model: of every parameter of a live one, else its checkpoint's."""
    if evidence.replay is None:
        return str(evidence.provenance.get("model", ""))
    digest = hashlib.sha256()
    for name, parameter in evidence.replay.model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
