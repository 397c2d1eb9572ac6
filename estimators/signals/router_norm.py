"""Router norms: experts whose router row grew little in training get more bits.

Λ = ‖w_T‖ − ‖w_0‖ of an expert's router row, a difference of norms and not the norm of the
difference. The paper's claim: experts with a small Λ learned rare but decisive features, their
activations are weak, and rounding noise drowns them first. That gives rare experts more bits where
most others give frequent ones more (methods.md#pitfalls, pitfall 1), so the sign is to be tested:
`Scored(RouterNorm(...), exponent=-1)` is the opposite claim.

Where no initial checkpoint is known the final norm stands alone, as in the paper for Mixtral.

Source: Chowdhury et al., ICLR 2026, arXiv 2604.06515, and its code where it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Floats, Ints, frozen
from bitknap.allocation.problem.format import Format
from bitknap.allocation.published import chowdhury_bits
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.scored import centred
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.source.source import Source

# A bounded distribution varies at most 3 times as much as a uniform one on the same support, so
# more than that means a wider range (the paper's argument for its ζ).
ZETA = 3.0


def router_norms(source: Source | Mapping[str, Tensor], layout: Layout) -> dict[int, Floats]:
    """Return the L2 norm of every expert's router row by layer, float64[E] each.

    Rows of a router past the layer's experts score experts that compute nothing; they are left
    out.

    Args:
        source: a checkpoint, or a live model's parameters by name.
        layout: walked on the same source: `walk_headers` for a checkpoint, `walk` for a model.

    Raises:
        InputError: a layer has no router, or the source has no tensor of its name.
        MismatchError: a router has another shape than [experts, hidden].
    """
    return {layer.layer: _norms(source, layer) for layer in layout.layers}


def _norms(source: Source | Mapping[str, Tensor], layer: ExpertLayer) -> Floats:
    if layer.router is None:
        raise InputError(
            f"layer {layer.layer} ({layer.module}): no router was found; use another signal"
        )
    if isinstance(source, Mapping):
        found = source.get(layer.router)
    else:
        found = source.read(layer.router) if layer.router in source.shapes else None
    if found is None:
        raise InputError(
            f"layer {layer.layer}: the source has no tensor {layer.router!r}; "
            "pass the layout that was walked on this source"
        )
    if found.ndim != 2 or found.shape[0] < layer.experts or found.shape[1] != layer.hidden:
        raise MismatchError(
            f"{layer.router}: shape {list(found.shape)}, expected [{layer.experts}, "
            f"{layer.hidden}]; pass the layout that was walked on this source"
        )
    rows = found[: layer.experts].detach().double()
    if not torch.isfinite(rows).all():
        raise InputError(f"{layer.router}: NaN or infinite weight; repair the checkpoint")
    norms: Floats = torch.linalg.vector_norm(rows, dim=1).numpy()
    return norms


def norm_changes(
    final: Mapping[int, npt.ArrayLike], initial: Mapping[int, npt.ArrayLike] | None = None
) -> dict[int, Floats]:
    """Return Λ of every expert by layer, float64[E] each: final minus initial norm.

    Args:
        final: norms at the end of training, by layer.
        initial: norms at its start; None takes them as equal, so that the final norm remains.

    Raises:
        MismatchError: the two have other layers or other numbers of experts.
        InputError: a norm is not a number from 0.
    """
    last = {layer: _checked(f"final[{layer}]", norms) for layer, norms in final.items()}
    if initial is None:
        return last
    first = {layer: _checked(f"initial[{layer}]", norms) for layer, norms in initial.items()}
    if first.keys() != last.keys():
        raise MismatchError(
            f"router norms: final of layers {sorted(last)}, initial of {sorted(first)}; "
            "read both from one architecture"
        )
    for layer, norms in last.items():
        if norms.shape != first[layer].shape:
            raise MismatchError(
                f"router norms: layer {layer} has {len(norms)} final and {len(first[layer])} "
                "initial ones; read both from one architecture"
            )
    return {layer: norms - first[layer] for layer, norms in last.items()}


def _checked(name: str, values: npt.ArrayLike) -> Floats:
    norms = frozen(name, values, np.float64)
    if norms.ndim != 1 or not norms.size or not (np.isfinite(norms) & (norms >= 0)).all():
        raise InputError(f"{name}: norms are one finite number from 0 for each expert")
    return norms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterNorm:
    """Score exp(−z), z being Λ standardised within its layer: small norms are sensitive.

    The paper orders experts within a layer and compares no layers, so neither does z. A layer
    whose norms are all alike scores 1, and so does whatever is no routed expert.

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
            MismatchError: the norms are of another model.
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


def order(
    norms: npt.ArrayLike,
    variances: npt.ArrayLike | None = None,
    zeta: float = ZETA,
    *,
    one_pass: bool = False,
) -> Ints:
    """Return a layer's experts by sensitivity, most sensitive first, int32[E].

    Ascending by norm; then an expert whose MaxVar is at least ζ times that of one before it moves
    in front of the first such one, until no such pair is left. The paper leaves open which pair
    comes first. Here the highest ranked expert that has to move does, which keeps all before it
    in order, so that one pass down the ranking ends with none left.

    Args:
        norms: Λ of each expert, or its final norm, float64[E].
        variances: MaxVar of each expert, float64[E]; None orders by norms alone.
        zeta: above 1.
        one_pass: as the authors' code: once over the experts from the last rank to the first,
            each in front of the first whose MaxVar times ζ is below its own. No pair is left
            either, but those that move may end in another order.

    Raises:
        InputError: shapes differ, a number is not finite, or zeta is not above 1.
    """
    given = frozen("norms", norms, np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise InputError("norms: give one finite number for each expert")
    ranking: list[int] = np.argsort(given, kind="stable").tolist()
    if variances is None:
        return np.array(ranking, dtype=np.int32)
    spread = frozen("variances", variances, np.float64, given.shape)
    if not (np.isfinite(spread) & (spread >= 0)).all():
        raise InputError("variances: give one finite number from 0 for each expert")
    if not (np.isfinite(zeta) and zeta > 1):
        raise InputError(f"zeta: {zeta} must be above 1; the paper takes 3")
    for expert in reversed(ranking[:]) if one_pass else ranking[:]:
        place = ranking.index(expert)
        ahead, own = spread[ranking[:place]], spread[expert]
        # Two experts without any variance must not chase each other.
        wider = zeta * ahead < own if one_pass else (zeta * ahead <= own) & (ahead < own)
        if wider.any():
            ranking.insert(int(wider.argmax()), ranking.pop(place))
    return np.array(ranking, dtype=np.int32)


def chowdhury_plan(
    layout: Layout,
    formats: Sequence[Format],
    average: float,
    levels: Sequence[int],
    *,
    norms: Mapping[int, npt.ArrayLike],
    variances: Mapping[int, npt.ArrayLike] | None = None,
    zeta: float = ZETA,
    one_pass: bool = False,
    model: str = "",
) -> BitPlan:
    """Return the published plan: whole experts, every layer at the same average.

    Args:
        layout: of routed experts only.
        formats: one grid for each level.
        average: bits an expert.
        levels: two widths, or three equally spaced ones, as `chowdhury_counts` takes them.
        norms: Λ by layer (`norm_changes`), or final norms (`router_norms`).
        variances: MaxVar by layer (`max_variances`); None orders by norms alone.
        zeta: see `order`.
        one_pass: see `order`.
        model: fingerprint of the model.

    Raises:
        InputError: a unit is no routed expert's, or a level has no format or several.
        MismatchError: norms or variances are of another model.
    """
    units = layout.units
    if not routed(units).all():
        label = units.label(int((~routed(units)).argmax()))
        raise InputError(f"{label}: the rule gives bits to routed experts only; include no others")
    columns = {width: _column(formats, width) for width in levels}
    changes = _of_layout({n: np.asarray(v, np.float64) for n, v in norms.items()}, layout)
    wide: Mapping[int, Floats | None] = dict.fromkeys(changes)
    if variances is not None:
        wide = _of_layout({n: np.asarray(v, np.float64) for n, v in variances.items()}, layout)
    choice = np.zeros(len(units), dtype=np.int32)
    moved = 0
    for layer, change in changes.items():
        ranking = order(change, wide[layer], zeta, one_pass=one_pass)
        moved += int((ranking != order(change)).sum())
        of_expert = np.array([columns[b] for b in chowdhury_bits(ranking, average, levels)])
        here = np.flatnonzero(units.layer == layer)
        choice[here] = of_expert[units.expert[here]]
    header = {
        "solver": "chowdhury",
        "average": average,
        "levels": sorted(levels, reverse=True),
        "zeta": None if variances is None else zeta,
        "displaced": moved,
    }
    return BitPlan.from_choice(units, formats, choice, model=model, header=header)


def _column(formats: Sequence[Format], width: int) -> int:
    found = [i for i, f in enumerate(formats) if f.kind == "grid" and f.bits == width]
    if len(found) != 1:
        names = ", ".join(str(f) for f in formats)
        raise InputError(
            f"levels: {width} bits has {len(found)} formats among {names}; give one for each level"
        )
    return found[0]
