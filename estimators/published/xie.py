"""Channel scores: output rows of a matrix as separate units.

Xie et al. replace Fisher information and condition numbers by cheap statistics of channels,

    S_c = alpha K_c V_c + (1 − alpha) O_c,

with a condition number K, a variance ratio V and an outlier ratio O. Their abstract defines none of
the three, and the paper's text was not at hand, so the definition here is Bitknap's:

    channel   an output row of the matrix: errors add over rows, and rows are stored one by one
    K_c       peak ratio, max |w| over the root mean square of the row
    V_c       variance of the row over the mean of the matrix's row variances
    O_c       share of the row's weights more than k standard deviations from its mean, with half
              a weight added to the count and one to the row, so that no row scores 0

K V and O are each divided by their mean over the matrix before they are mixed; otherwise alpha
would have no meaning. So S_c has mean 1 in every matrix.

    ties       none: rows are units of their own
    allocator  the knapsack, as the authors' is not known

Not reproduced, for want of a definition: the three statistics, the axis of a channel, the widths
and the allocator; all are Bitknap's choices.

Source: Xie et al., Findings of ACL 2025 (2025.findings-acl.1386), abstract, and a third-party
note of the formula; definitions by Bitknap. Equation numbers are not given: the paper's text was
not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import Budget, CostTable, Format, Problem, solve
from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import distortion
from bitknap.estimators.costs.weighed_errors import (
    format_bytes,
    plainest,
    projection_of,
    stored_alike,
    token_share,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    solved,
)
from bitknap.estimators.signals.unit_statistics import by_matrix, curvature, routed
from bitknap.progress import Progress
from bitknap.quantization.stacks.grouping import stacks
from bitknap.quantization.stacks.row_blocks import block_units


def channel_scores(weights: Tensor, alpha: float = 0.5, k: float = 3.0) -> Tensor:
    """Return S_c of every output row, with mean 1 in each matrix, float64 [n, rows].

    Args:
        weights: [n, rows, cols].
        alpha: weight of K V against O, 0 to 1.
        k: standard deviations beyond which a weight is an outlier.

    Raises:
        InputError: alpha is not from 0 to 1, or k is not above 0.
    """
    _check(alpha, k)
    rows = weights.double()
    centre = rows - rows.mean(2, keepdim=True)
    variance = centre.square().mean(2)
    root = rows.square().mean(2).sqrt()
    peak = torch.where(root > 0, rows.abs().amax(2) / root.clamp_min(1e-300), 1.0)
    far = centre.abs() > k * variance.sqrt()[:, :, None]
    outliers = (far.sum(2) + 0.5) / (rows.shape[2] + 1)
    return alpha * _mean_one(peak * variance) + (1 - alpha) * _mean_one(outliers)


def _check(alpha: float, k: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: {alpha} is not from 0 to 1")
    if not k > 0:
        raise InputError(f"k: {k} must be above 0")


def _mean_one(term: Tensor) -> Tensor:
    """Divide by the mean over each matrix; 1 where all is 0, [n, rows]."""
    mean = term.mean(1, keepdim=True)
    return torch.where(mean > 0, term / mean.clamp_min(1e-300), 1.0)


@dataclass(frozen=True, slots=True)
class ChannelScore:
    """Root mean square of S_c over a matrix's rows, which measures how much its channels differ.

    The mean is 1 in every matrix and carries no information; the root mean square is 1 if all rows
    are equal and grows with a few bad ones. Which choice the paper makes is not known.

    Attributes:
        alpha: see `channel_scores`.
        k: see `channel_scores`.

    Source: Xie et al., Findings of ACL 2025; definitions by Bitknap.
    """

    alpha: float = 0.5
    k: float = 3.0
    name = "channel"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check(self.alpha, self.k)

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U], from 1."""

        def statistic(weights: Tensor) -> Tensor:
            return channel_scores(weights, self.alpha, self.k).square().mean(1).sqrt()

        return by_matrix(evidence, statistic)


def channel_table(
    evidence: Evidence,
    formats: Sequence[Format],
    *,
    blocks: int = 4,
    alpha: float = 0.5,
    k: float = 3.0,
) -> CostTable:
    """Return costs of runs of output rows, each a separate unit (`Units.block`).

    With recorded gradients a row costs ½ Σ F ΔW², as in `Fisher`, in nats per token; without
    them S_c × its variance × its weights × the format's distortion, which only ranks. Both add
    up over rows, and groups lie within a row, so the blocks of a matrix together cost as much as
    the whole matrix in every format. Their bytes are each block's own, rounded up to whole bytes.

    A plan over blocks is applied and stored through `quantize.blocks.layout_for`.

    Args:
        evidence: gives the units and their weights.
        formats: the options; a kept precision costs nothing.
        blocks: number of blocks per matrix, equal to within one row; a matrix with fewer rows has
            one block per row.
        alpha: see `channel_scores`; unused with gradients.
        k: see `channel_scores`; unused with gradients.

    Raises:
        InputError: blocks is below 1, alpha or k is wrong, gradients were recorded and a unit is
            not a routed expert's, or the units are already blocks.
    """
    _check(alpha, k)
    whole = evidence.units
    units, source = block_units(whole, blocks)
    fisher = any(layer.curvature for layer in evidence.layers.values())
    grids = {} if fisher else {int(c): _distortions(formats, int(c)) for c in np.unique(whole.cols)}
    cost = np.zeros((len(units), len(formats)))
    first = np.concatenate([[0], np.cumsum(np.bincount(source))])
    for run in stacks(whole):
        weights = evidence.weights(run)
        if fisher:
            rows = _fisher_rows(evidence, run, weights, formats)
        else:
            rows = _score_rows(weights, grids[weights.shape[2]], alpha, k)
        cuts = np.concatenate([[0], np.cumsum(units.rows[first[run[0]] : first[run[0] + 1]])[:-1]])
        members = first[run][:, None] + np.arange(len(cuts))
        cost[members] = np.add.reduceat(rows.numpy(), cuts, axis=1)
    provenance = {
        **evidence.provenance,
        "method": evidence.rounding.name,
        "unit": "nats/token" if fisher else "score",
        "estimator": "channel-fisher" if fisher else "channel",
        "blocks": blocks,
    }
    return CostTable.from_arrays(
        cost,
        format_bytes(units, formats),
        units=units,
        formats=tuple(formats),
        frequency=token_share(evidence)[source] if evidence.layers else None,
        provenance=provenance,
    )


def neuron_scores(
    evidence: Evidence, format: Format, *, alpha: float = 0.5, k: float = 3.0
) -> dict[int, Floats]:
    """Return the cost of storing each neuron in a format, by layer, float64 [experts, neurons].

    A neuron is a row of gate and of up and a column of down; its cost is the sum of theirs, as
    `channel_table` charges rows. `quantize.permute` sorts neurons by it, so that neurons in a block
    have similar sensitivity.

    Args:
        evidence: gives the routed experts and their weights.
        format: a grid of about the width that plans will have.
        alpha: see `channel_scores`; unused with gradients.
        k: see `channel_scores`; unused with gradients.

    Raises:
        InputError: alpha or k is wrong, or the format is not a grid.
    """
    _check(alpha, k)
    if format.kind != "grid":
        raise InputError(f"format: {format} rounds nothing; give a grid, such as int2-g64-asym")
    units = evidence.units
    scores = {at.layer: np.zeros((at.experts, at.intermediate)) for at in evidence.layout.layers}
    fisher = any(layer.curvature for layer in evidence.layers.values())
    for run in stacks(units):
        if not routed(units)[run[0]]:
            continue
        weights = evidence.weights(run)
        is_down = projection_of(units, run) == "down"
        if fisher:
            same = plainest(format, weights.shape[2])
            error = (evidence.round_trip(run, weights, same) - weights).square()
            cost = (0.5 * curvature(evidence, run).float() * error).sum(1 if is_down else 2)
        else:
            neurons = weights.transpose(1, 2) if is_down else weights
            size = channel_scores(neurons, alpha, k) * neurons.double().var(2, correction=0)
            cost = size * neurons.shape[2] * _distortions([format], weights.shape[2])
        scores[int(units.layer[run[0]])][units.expert[run]] += cost.double().numpy()
    return scores


def _fisher_rows(
    evidence: Evidence, run: np.ndarray, weights: Tensor, formats: Sequence[Format]
) -> Tensor:
    """Return ½ Σ F ΔW² of each row in each format, float64 [n, rows, F]."""
    grid = 0.5 * curvature(evidence, run).float()
    costs = torch.zeros(*weights.shape[:2], len(formats), dtype=torch.float64)
    for format, columns in stored_alike(formats, weights.shape[2]).items():
        delta = evidence.round_trip(run, weights, format) - weights
        costs[:, :, columns] = (delta.square() * grid).sum(2).double()[:, :, None]
    return costs


def _score_rows(weights: Tensor, distortions: Tensor, alpha: float, k: float) -> Tensor:
    """Return S_c × variance × weights × distortion of each row in each format, [n, rows, F]."""
    size = channel_scores(weights, alpha, k) * weights.double().var(2, correction=0)
    return (size * weights.shape[2])[:, :, None] * distortions


def _distortions(formats: Sequence[Format], cols: int) -> Tensor:
    """Return the distortion of each format on rows of `cols` weights, float64 [F]."""
    plain = [plainest(f, cols) for f in formats]
    known = {f: distortion(f, cols) for f in dict.fromkeys(plain)}
    return torch.tensor([known[f] for f in plain], dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DownReport:
    """Whether down projections need more bits than up projections, according to a cost table.

    Attributes:
        format: the format at which sensitivities were compared.
        layers: layer numbers, int64[L].
        ratio: mean cost a weight of down over that of up in each layer, float64[L].
        bits: for "up" and "down", mean bits of a code in each layer of the plan, float64[L],
            without metadata, which is larger for the projection with shorter rows.
        budget: bits per weight of the plan, metadata included.
    """

    format: Format
    layers: Longs
    ratio: Floats
    bits: Mapping[str, Floats]
    budget: float

    @property
    def holds(self) -> bool:
        """Whether the plan gives down more bits than up on average over layers."""
        return bool(self.bits["down"].mean() > self.bits["up"].mean())

    @property
    def share(self) -> float:
        """Share of layers in which a weight of down is more sensitive than one of up."""
        return float((self.ratio > 1).mean())


def down_needs_more(table: CostTable, bits: float = 2.5) -> DownReport:
    """Check the claim of Xie et al. that down projections need more bits than up projections.

    Sensitivity is read at the grid whose total size is nearest to the budget; the plan is that of
    the table alone, without ties. The claim is about routed experts.

    Args:
        table: a cost table whose units are whole matrices or blocks.
        bits: budget in bits per weight, including metadata.

    Raises:
        InputError: a layer lacks the down or up projection of routed experts, or no grid is allowed
            for every unit.
        InfeasibleError: the budget is below the smallest plan.
    """
    units = table.units
    for name in ("up", "down"):
        if name not in units.projections:
            names = ", ".join(units.projections)
            raise InputError(f"projections: no {name!r} among {names}; the claim compares the two")
    column = _nearest(table, bits)
    solution = solve(Problem(table, [Budget.bits(bits)]), Knapsack(gap=1e-3))
    width = np.array([item.bits for item in table.formats])
    experts = routed(units)
    layers = np.unique(units.layer[experts]).astype(np.int64)
    cost, given = {}, {}
    for name in ("up", "down"):
        here = experts & (units.projection == units.projections.index(name))
        at = np.searchsorted(layers, units.layer[here])
        weights = np.bincount(at, units.numel[here], len(layers))
        if not len(layers) or not weights.all():
            raise InputError(f"units: a layer has no routed {name} projection; plan all of them")
        cost[name] = np.bincount(at, table.cost[here, column], len(layers)) / weights
        codes = width[solution.choice[here]] * units.numel[here]
        given[name] = np.bincount(at, codes, len(layers)) / weights
    return DownReport(
        format=table.formats[column],
        layers=layers,
        ratio=cost["down"] / np.maximum(cost["up"], 1e-300),
        bits=given,
        budget=bits,
    )


def _nearest(table: CostTable, bits: float) -> int:
    """Return the column of the grid whose total size is nearest to `bits` a weight."""
    free = [bool(np.isfinite(column).all()) for column in table.cost.T]
    grids = [i for i, f in enumerate(table.formats) if f.kind == "grid" and free[i]]
    if not grids:
        raise InputError("formats: no grid is allowed for every unit; add one or drop pins")
    sizes = 8 * table.nbytes.sum(axis=0)
    return min(grids, key=lambda i: abs(float(sizes[i]) - bits * table.weights))


def xie(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return S_c × Var × distortion of every output row, each a unit (after Xie et al.)."""
    bare = {number: replace(layer, curvature={}) for number, layer in evidence.layers.items()}
    rows = int(evidence.units.rows.max())
    return channel_table(replace(evidence, layers=bare), formats, blocks=rows)


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule over every output row; it takes a byte limit."""
    return solved("xie", xie(material.evidence, FORMATS))
