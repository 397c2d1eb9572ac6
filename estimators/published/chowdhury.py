"""Chowdhury et al.: experts whose router row grew little in training get more bits.

    signal     Λ = ‖w_T‖ − ‖w_0‖ of an expert's router row, not the norm of the difference;
               small is sensitive
    second     MaxVar, the largest variance of a row of its first matrix: a row whose weights vary
               much has a wide range, and one grid step of it is large
    ties       all matrices of an expert
    allocator  the same average in every layer, widths assigned by rank

The paper's claim: experts with a small Λ learned rare but decisive features, their activations are
weak, and rounding noise drowns them first. That gives rare experts more bits, where most other
methods give frequent ones more (methods.md#pitfalls, pitfall 1), so the sign should be tested:
`Scored(RouterNorm(...), exponent=-1)` is the opposite claim. Where no initial checkpoint is known
the final norm stands alone, as in the paper for Mixtral. Order and counts are in
`bitknap.allocation.published.chowdhury`.

Not reproduced: the paper leaves open which pair of experts is exchanged first; both the code's
single pass and a fixed point are implemented here.

Source: Chowdhury et al., ICLR 2026, arXiv 2604.06515, and its code where it says so. Section 4 has
the theorem; equation numbers are not given: the paper was read through its code and a note of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitknap.allocation import BitPlan, Format
from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.published.chowdhury import (
    ZETA,
    chowdhury_bits,
    chowdhury_order,
    norm_changes,
)
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    LEVELS,
    Material,
    Offer,
    Rule,
    largest,
    named,
)
from bitknap.estimators.signals.scored import centred
from bitknap.estimators.signals.unit_statistics import by_matrix, positive, routed
from bitknap.progress import Progress
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.source.source import Source


def router_norms(source: Source | Mapping[str, Tensor], layout: Layout) -> dict[int, Floats]:
    """Return the L2 norm of every expert's router row by layer, float64[E] each.

    Router rows beyond the layer's experts score experts that compute nothing; they are left out.

    Args:
        source: a checkpoint, or a live model's parameters by name.
        layout: walked on the same source: `walk_headers` for a checkpoint, `walk` for a model.

    Raises:
        InputError: a layer has no router, or the source has no tensor of its name.
        MismatchError: a router's shape is not [experts, hidden].
    """
    return {layer.layer: _norms(source, layer) for layer in layout.layers}


def _norms(source: Source | Mapping[str, Tensor], layer: ExpertLayer) -> Floats:
    if layer.router is None:
        raise InputError(
            f"layer {layer.layer} ({layer.module}): no router was found; use another signal"
        )
    if isinstance(source, Mapping):
        router = source.get(layer.router)
    else:
        router = source.read(layer.router) if layer.router in source.shapes else None
    if router is None:
        raise InputError(
            f"layer {layer.layer}: the source has no tensor {layer.router!r}; pass the layout of "
            "this source"
        )
    if router.ndim != 2 or router.shape[0] < layer.experts or router.shape[1] != layer.hidden:
        raise MismatchError(
            f"{layer.router}: shape {list(router.shape)}, expected [{layer.experts}, "
            f"{layer.hidden}]; pass the layout of this source"
        )
    rows = router[: layer.experts].detach().double()
    if not torch.isfinite(rows).all():
        raise InputError(f"{layer.router}: NaN or infinite weight; repair the checkpoint")
    norms: Floats = torch.linalg.vector_norm(rows, dim=1).cpu().numpy()
    return norms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterNorm:
    """Score exp(−z), where z is Λ standardised within its layer: small norms are sensitive.

    The paper orders experts within a layer and compares no layers, so neither does z. All
    experts of a layer with equal norms score 1, and so do units that are not routed experts.

    Attributes:
        final: norms by layer, as `router_norms` reads them.
        initial: norms at the start of training; None for the final norm alone.
    """

    final: Mapping[int, npt.ArrayLike]
    initial: Mapping[int, npt.ArrayLike] | None = None
    name = "router-norm"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            MismatchError: the norms belong to another model.
        """
        units = evidence.units
        changes = _of_layout(norm_changes(self.final, self.initial), evidence.layout)
        score = np.ones(len(units))
        for layer, change in changes.items():
            here = np.flatnonzero(routed(units) & (units.layer == layer))
            z, _ = centred(change, np.zeros(len(change), dtype=np.int64))
            score[here] = np.exp(-z)[units.expert[here]]
        return score


def _of_layout(values: dict[int, Floats], layout: Layout) -> dict[int, Floats]:
    """Return the values of the layout's layers, after checking that they are for it."""
    for layer in layout.layers:
        given = len(values.get(layer.layer, ()))
        if given != layer.experts:
            raise MismatchError(
                f"layer {layer.layer}: {given} router norms or variances for {layer.experts} "
                "experts; read them from this model"
            )
    return {layer.layer: values[layer.layer] for layer in layout.layers}


def max_variance(weights: Tensor, largest_norm: bool = False) -> Tensor:
    """Return MaxVar of each matrix: the largest population variance of its rows, float64 [n].

    Args:
        weights: [n, rows, cols].
        largest_norm: instead the unbiased variance of the row with the largest L2 norm, as the
            authors' Mixtral code computes it; nearly the same where row means are near 0.

    Source: Chowdhury et al., arXiv 2604.06515, and its code.
    """
    rows = weights.double()
    if not largest_norm:
        return rows.var(2, correction=0).amax(1)
    longest = torch.linalg.vector_norm(rows, dim=2).argmax(1)
    chosen = rows[torch.arange(len(rows)), longest]
    return chosen.var(1, correction=1 if rows.shape[2] > 1 else 0)


@dataclass(frozen=True, slots=True)
class MaxVar:
    """The largest row variance of the expert's first FFN matrix, as the score of all its matrices.

    The first matrix is gate, or up if there is no gate. Units that are not routed experts use
    their own matrix. The base of `Scored` already contains the mean variance.

    Attributes:
        first_only: False uses each matrix's own variance, which the paper does not do.
        largest_norm: see `max_variance`.

    Source: Chowdhury et al., arXiv 2604.06515.
    """

    first_only: bool = True
    largest_norm: bool = False
    name = "max-var"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U], in squared weights."""
        own = by_matrix(evidence, lambda weights: max_variance(weights, self.largest_norm))
        return positive(_of_first(evidence, own) if self.first_only else own)


def _of_first(evidence: Evidence, own: Floats) -> Floats:
    """Return the values, with each expert's first matrix's value for all of its matrices."""
    units, values = evidence.units, own.copy()
    experts = routed(units)
    for layer in evidence.layout.layers:
        here = np.flatnonzero(experts & (units.layer == layer.layer))
        first = units.projections.index("gate" if layer.gated else "up")
        source = here[units.projection[here] == first]
        of_expert = np.zeros(layer.experts)
        of_expert[units.expert[source]] = own[source]
        values[here] = of_expert[units.expert[here]]
    return values


def max_variances(evidence: Evidence, *, largest_norm: bool = False) -> dict[int, Floats]:
    """Return MaxVar of every expert's first FFN matrix by layer, float64[E] each."""
    units = evidence.units
    variances = {}
    for layer in evidence.layout.layers:
        first = units.projections.index("gate" if layer.gated else "up")
        here = routed(units) & (units.layer == layer.layer) & (units.projection == first)
        run = np.flatnonzero(here)
        run = run[np.argsort(units.expert[run])]
        weights = evidence.weights(run).split(1)  # one at a time: rows are read in float64
        variances[layer.layer] = torch.cat([max_variance(w, largest_norm) for w in weights]).numpy()
    return variances


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """The quantities that order the experts of each layer; see `chowdhury_order`.

    Attributes:
        norms: Λ by layer (`norm_changes`), or final norms (`router_norms`), float64[E] each.
        variances: MaxVar by layer (`max_variances`), float64[E] each; None orders by norms alone.
        zeta: ratio of MaxVar at which experts are exchanged, above 1.
        one_pass: exchange in one pass, as the authors' code does.
    """

    norms: Mapping[int, npt.ArrayLike]
    variances: Mapping[int, npt.ArrayLike] | None = None
    zeta: float = ZETA
    one_pass: bool = False

    def orders(self, layout: Layout) -> Iterator[tuple[int, Ints, int]]:
        """Yield each layer, its experts by sensitivity, int32[E], and how many MaxVar moved.

        Raises:
            MismatchError: norms or variances are of another model.
        """
        norms = _numbers(self.norms, layout)
        wide: Mapping[int, Floats | None] = dict.fromkeys(norms)
        if self.variances is not None:
            wide = _numbers(self.variances, layout)
        for layer, change in norms.items():
            order = chowdhury_order(change, wide[layer], self.zeta, one_pass=self.one_pass)
            yield layer, order, int((order != chowdhury_order(change)).sum())


def _numbers(values: Mapping[int, npt.ArrayLike], layout: Layout) -> dict[int, Floats]:
    return _of_layout({n: np.asarray(v, np.float64) for n, v in values.items()}, layout)


def chowdhury_plan(
    layout: Layout,
    formats: Sequence[Format],
    average: float,
    levels: Sequence[int],
    ranking: Ranking,
    *,
    model: str = "",
) -> BitPlan:
    """Return the published plan: whole experts, every layer at the same average.

    Args:
        layout: layout of routed experts only.
        formats: one grid for each level.
        average: average bits per expert.
        levels: two widths, or three equally spaced ones, as `chowdhury_counts` takes them.
        ranking: the quantities that order the experts.
        model: fingerprint of the model.

    Raises:
        InputError: a unit is not a routed expert's, or a level has no format or several.
        MismatchError: norms or variances are of another model.
    """
    units = layout.units
    if not routed(units).all():
        label = units.label(int((~routed(units)).argmax()))
        raise InputError(
            f"{label}: the rule gives bits to routed experts only; leave out `include`"
        )
    columns = {width: _column(formats, width) for width in levels}
    choice = np.zeros(len(units), dtype=np.int32)
    moved = 0
    for layer, order, displaced in ranking.orders(layout):
        moved += displaced
        of_expert = np.array([columns[b] for b in chowdhury_bits(order, average, levels)])
        here = np.flatnonzero(units.layer == layer)
        choice[here] = of_expert[units.expert[here]]
    header = {
        "solver": "chowdhury",
        "average": average,
        "levels": sorted(levels, reverse=True),
        "zeta": None if ranking.variances is None else ranking.zeta,
        "displaced": moved,
    }
    return BitPlan.from_choice(units, formats, choice, model=model, header=header)


def _column(formats: Sequence[Format], width: int) -> int:
    grids = [i for i, f in enumerate(formats) if f.kind == "grid" and f.bits == width]
    if len(grids) != 1:
        names = ", ".join(str(f) for f in formats)
        raise InputError(
            f"levels: {len(grids)} formats among {names} have {width} bits; give exactly one for "
            "each level"
        )
    return grids[0]


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule as published; its knob is the average bits of a layer."""
    widest = max_variances(material.evidence)
    norms = norm_changes(material.final, material.initial)
    return _rule(material, Ranking(norms=norms, variances=widest))


def variations(material: Material) -> Iterator[Rule]:
    """Yield the rule as published, then variations with one change each."""
    final, change = material.final, norm_changes(material.final, material.initial)
    widest = max_variances(material.evidence)
    longest = max_variances(material.evidence, largest_norm=True)
    yield _rule(material, Ranking(norms=change, variances=widest))
    for what, ranking in {
        "norms alone": Ranking(norms=change),
        "final norm": Ranking(norms=final, variances=widest),
        "final norm alone": Ranking(norms=final),
        "one pass": Ranking(norms=change, variances=widest, one_pass=True),
        "longest row": Ranking(norms=change, variances=longest),
    }.items():
        yield _rule(material, ranking, f"Chowdhury, {what}")


def _rule(material: Material, ranking: Ranking, title: str | None = None) -> Rule:
    layout = material.evidence.layout
    experts = layout.layers[0].experts
    averages = [total / experts for total in range(experts, 3 * experts + 1)]

    def plan_of(average: float) -> BitPlan:
        return chowdhury_plan(layout, FORMATS, average, LEVELS, ranking)

    def offers(nbytes: int) -> list[Offer]:
        return largest(plan_of, averages, nbytes, "{:.4g} bits")

    return named("chowdhury", offers, knob="average bits of a layer", title=title)
