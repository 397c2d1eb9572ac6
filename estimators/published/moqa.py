"""MoQa: significance over several calibration sets, clustered into bit widths.

MoQa (later DynaMo, arXiv 2503.21135) scores experts on several calibration sets, joins the scores,
and clusters them into bit widths; it counts no bytes. The accessible sources do not
define how a channel is scored, the fuzzifier, or what "near a boundary" means; each is defined here
and marked OURS.

    significance  an expert's share of its layer's, on each calibration set
    ties          all matrices of an expert
    allocator     fuzzy c-means, one width a cluster; the clusters decide the size

`bitknap.estimators.tables.several_texts` keeps the useful half: one cost table from several sets.

Not reproduced: what is marked OURS, and the channels that MoQa keeps in 16 bits to switch between
data sets; a plan here serves all data.

Source: Zheng et al., MoQa, arXiv 2503.21135; its abstracts, and an account. Equation numbers are
not given: the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitknap.allocation import BitPlan, Format
from bitknap.allocation.problem.arrays import Floats, Ints, frozen
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.table import widths
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Offer,
    Rule,
    named,
)
from bitknap.estimators.tables.several_texts import check_sets
from bitknap.names import check_name
from bitknap.progress import Progress

# OURS: an expert whose two largest memberships differ by less than this is near a boundary.
MARGIN = 0.1


# Fuzzy c-means finds local optima; the best of this many starts is kept.
_STARTS = 8


_ERROR, _ROUNDS = 1e-8, 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Significance:
    """Significance of one layer's experts over several calibration sets, each float64[E].

    Attributes:
        mean: mean share of the layer's total; sums to 1.
        worst: largest share over the sets.
        sd: standard deviation of the share over the sets (n − 1): its dependence on data.
    """

    mean: Floats
    worst: Floats
    sd: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FuzzyClusters:
    """Fuzzy c-means of N values into C widths.

    Attributes:
        bits: width of each value, int32[N].
        membership: membership of each value in each cluster, float64[C,N]; columns sum to 1, and
            the clusters are in the order of `centres`.
        centres: cluster centres, descending, float64[C].
        lowered: which values were near a boundary and took the lower width, bool[N].
    """

    bits: Ints
    membership: Floats
    centres: Floats
    lowered: npt.NDArray[np.bool_]


def expert_significance(evidence: Evidence) -> Mapping[int, Floats]:
    """Return each expert's share of its layer's total significance, by layer float64[E].

    S_exp = Σ over its channels of S_ch / the same over all experts. OURS, since the accessible
    sources do not define S_ch: channel k is a middle neuron, and S_ch = sqrt(mean a²h_k²) ×
    ‖W_down[:, k]‖, the root mean square of the channel's output per token of the text. Experts
    with few tokens are shrunk to their layer's mean, so none is 0.

    Raises:
        InputError: no calibration pass saw a layer of routed experts.
    """
    if not evidence.layers:
        raise InputError("significance: no layer of experts was seen; calibrate the model first")
    units = evidence.units
    down = (units.role == ROLES.index("routed")) & (
        units.projection == units.projections.index("down")
    )
    shares: dict[int, Floats] = {}
    for number_, layer in sorted(evidence.layers.items()):
        run = np.flatnonzero(down & (units.layer == number_))
        column = evidence.weights(run).double().square().sum(1).numpy()
        middle = layer.shrunk(layer.middle_square).numpy()[units.expert[run]]
        total = np.zeros(len(layer.count))
        np.add.at(total, units.expert[run], np.sqrt(middle * column).sum(axis=1))
        if not total.sum() > 0:
            raise InputError(
                f"layer {number_}: all outputs of its experts are 0; repair the checkpoint"
            )
        shares[number_] = frozen("significance", total / total.sum(), np.float64)
    return MappingProxyType(shares)


def joint_significance(evidences: Sequence[Evidence]) -> Mapping[int, Significance]:
    """Return the significance of experts over several calibration sets, by layer.

    MoQa's joint distribution is reduced to three numbers per expert (OURS): the mean is common to
    all sets, the deviation measures the dependence on data.

    Raises:
        InputError: fewer than two sets.
        MismatchError: the sets went through different models.
    """
    check_sets([dict(x.provenance) for x in evidences])
    for index, evidence in enumerate(evidences[1:], 1):
        if not evidences[0].units.same_as(evidence.units):
            raise MismatchError(
                f"evidence {index}: its {len(evidence.units)} units differ from the "
                f"{len(evidences[0].units)} of the first; calibrate one model on all sets"
            )
    each = [expert_significance(evidence) for evidence in evidences]
    joint = {}
    for layer in each[0]:
        shares = np.stack([x[layer] for x in each])
        joint[layer] = Significance(
            mean=shares.mean(axis=0), worst=shares.max(axis=0), sd=shares.std(axis=0, ddof=1)
        )
    return MappingProxyType(joint)


def fuzzy_clusters(
    values: npt.ArrayLike,
    precisions: Sequence[int] = (8, 6, 4, 2),
    m: float = 2.0,
    seed: int = 0,
    *,
    margin: float = MARGIN,
) -> FuzzyClusters:
    """Cluster significances by fuzzy c-means, one cluster for each width.

    The cluster with the largest centre takes the widest precision. A value whose two largest
    memberships differ by less than `margin` is near a boundary and takes the lower of the two
    precisions: the paper says "lower first" but gives no threshold, so 0.1 is OURS, as is m = 2,
    the usual fuzzifier.

    Args:
        values: float64[N], with at least as many different values as precisions.
        precisions: bits, all different.
        m: fuzzifier, above 1; clusters become sharp as it approaches 1.
        seed: random seed of the starts; the best of 8 by the objective is kept.
        margin: boundary threshold, from 0 (nothing is near a boundary) to 1.

    Raises:
        InputError: an argument is out of range, or there are fewer different values than
            precisions.

    Source: MoQa, arXiv 2503.21135; fuzzy c-means of Bezdek (1981), as in scikit-fuzzy.
    """
    given = np.asarray(values, dtype=np.float64)
    widest = sorted({whole("precisions", bits, 1) for bits in precisions}, reverse=True)
    if len(widest) != len(precisions) or len(widest) < 2:
        raise InputError(f"precisions: {tuple(precisions)} must be at least two different widths")
    if given.ndim != 1 or not np.isfinite(given).all():
        raise InputError(f"values: shape {given.shape}, expected [N], all finite")
    if not (np.isfinite(m) and m > 1):
        raise InputError(f"m: {m} must be above 1")
    number("margin", margin, 0, 1)
    count = len(np.unique(given))
    if count < len(widest):
        raise InputError(
            f"values: {count} different values cannot form {len(widest)} clusters, one for each "
            "precision; give fewer precisions"
        )
    centres, membership = _clustered(given, len(widest), float(m), seed)
    first, second = np.argsort(-membership, axis=0, kind="stable")[:2]
    each = np.arange(len(given))
    near = membership[first, each] - membership[second, each] < margin
    chosen = np.where(near, np.maximum(first, second), first)
    return FuzzyClusters(
        bits=np.array(widest, dtype=np.int32)[chosen],
        membership=membership,
        centres=centres,
        lowered=chosen != first,
    )


def _clustered(values: Floats, count: int, m: float, seed: int) -> tuple[Floats, Floats]:
    """Return descending centres [C] and memberships [C,N] of the best start."""
    from skfuzzy.cluster import cmeans

    middle = values.mean()
    # scikit-fuzzy's floors are absolute, so values are scaled to deviation 1 first.
    scale = values.std() or 1.0
    data = ((values - middle) / scale)[None]
    # Starts are passed in, since with a seed scikit-fuzzy would reset NumPy's global generator.
    generator = np.random.default_rng(seed)
    starts: list[tuple[float, Floats, Floats]] = []
    for _ in range(_STARTS):
        start = generator.random((count, len(values)))
        start /= start.sum(axis=0)
        centre, membership, _, _, objective, _, _ = cmeans(
            data, count, m, error=_ERROR, maxiter=_ROUNDS, init=start
        )
        starts.append((float(objective[-1]), centre[:, 0], membership))
    _, centres, best = min(starts, key=lambda item: item[0])
    order = np.argsort(-centres, kind="stable")
    return centres[order] * scale + middle, best[order]


def moqa_plan(
    evidences: Sequence[Evidence],
    formats: Sequence[Format],
    *,
    precisions: Sequence[int] = (8, 6, 4, 2),
    rule: Literal["mean", "worst"] = "mean",
    m: float = 2.0,
    seed: int = 0,
    margin: float = MARGIN,
) -> BitPlan:
    """Return MoQa's plan: whole experts get the width of their cluster; no budget is met.

    OURS: experts of all layers are clustered together, on share × experts of the layer, which is
    1 for the average expert anywhere. All projections of an expert share its width. Units that
    are not routed experts stay unquantized if `formats` has a kept precision, else get the widest
    format.

    Args:
        evidences: one calibration pass per set, at least two.
        formats: one grid for each precision, and optionally a kept precision.
        precisions: bits of the clusters.
        rule: which share is used: the mean over sets, or the worst (largest).
        m: fuzzifier of the clustering.
        seed: random seed of the clustering.
        margin: threshold of the boundary rule.

    Raises:
        InputError: fewer than two sets, a precision without exactly one grid, or an unknown rule.
        MismatchError: the sets went through different models.
    """
    check_name("rule", rule, ("mean", "worst"))
    grid = {bits: _only(formats, bits) for bits in precisions}
    joint = joint_significance(evidences)
    value = {n: (x.mean if rule == "mean" else x.worst) * len(x.mean) for n, x in joint.items()}
    clusters = fuzzy_clusters(
        np.concatenate(list(value.values())), precisions, m, seed, margin=margin
    )
    sizes = np.cumsum([len(x) for x in value.values()])
    bits = dict(zip(value, np.split(clusters.bits, sizes[:-1]), strict=True))
    units = evidences[0].units
    choice = np.full(len(units), int(widths(formats).argmax()), dtype=np.int32)
    for layer, of_experts in bits.items():
        run = np.flatnonzero((units.role == ROLES.index("routed")) & (units.layer == layer))
        choice[run] = [grid[width] for width in of_experts[units.expert[run]].tolist()]
    provenance = evidences[0].provenance
    header = {"solver": "moqa", "seed": seed, "rule": rule, "texts": _texts(evidences)}
    model = str(provenance.get("model", ""))
    return BitPlan.from_choice(units, formats, choice, model=model, header=header)


def _only(formats: Sequence[Format], bits: int) -> int:
    columns = [i for i, f in enumerate(formats) if f.kind == "grid" and f.bits == bits]
    if len(columns) != 1:
        raise InputError(f"formats: {len(columns)} of {bits} bits; the rule needs exactly one")
    return columns[0]


def _texts(evidences: Sequence[Evidence]) -> list[str]:
    return [str(evidence.provenance.get("text", "")) for evidence in evidences]


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; its knob is a choice of two to four widths and one of three fuzzifiers.

    Nothing else changes a plan's size.
    """
    bits = [item.bits for item in FORMATS]
    plans = []
    for count in range(4, 1, -1):
        for precisions in combinations(bits, count):
            for fuzzifier in (2.0, 1.5, 3.0):
                plan = moqa_plan(material.sets, FORMATS, precisions=precisions, m=fuzzifier)
                text = f"{'/'.join(map(str, precisions))} bits, m = {fuzzifier:g}"
                plans.append(Offer(plan, text))
    plans.sort(key=lambda offer: offer.plan.total_bytes)

    def offers(nbytes: int) -> list[Offer]:
        fitting = [offer for offer in plans if offer.plan.total_bytes <= nbytes]
        return fitting[-1:]

    return named("moqa", offers, knob="the clusters' widths and the fuzzifier")
