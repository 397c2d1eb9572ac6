"""The table of estimators and signals by their command-line names; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bitknap.errors import InputError
from bitknap.estimators.evidence.from_evidence import NEEDS
from bitknap.estimators.published import RULES
from bitknap.names import Catalog, Entry, unknown

if TYPE_CHECKING:
    from bitknap.estimators.costs.estimator import Estimator
    from bitknap.estimators.signals.signal import Signal

# This signal needs router weights, which the evidence does not hold.
ROUTER = "router-norm"
CALIBRATED = "calibrated"
# Fuzzy rules that correct a base estimator.
FUZZY = "fuzzy"
# Kinds of rows: costs for every format, one score per unit, or a wrapper of another estimator.
COST, SIGNAL, WRAPPER = "costs", "signal", "over a base"

_COSTS = "bitknap.estimators.costs"


def _cost(name: str, place: str, about: str, **settings: Any) -> Entry:
    place = f"{_COSTS}.{place}"
    return Entry(name=name, kind=COST, place=place, about=about, settings=settings)


def _plain_signal(name: str, attribute: str, **settings: Any) -> Entry:
    place = f"bitknap.estimators.signals.plain:{attribute}"
    return Entry(name=name, kind=SIGNAL, place=place, settings=settings)


def _published() -> tuple[Entry, ...]:
    """Return the published signals; their docstrings describe them."""
    return tuple(
        Entry(
            name=name,
            kind=SIGNAL,
            place=f"bitknap.estimators.published.{key.replace('-', '_')}:{attribute}",
            cites=rule.cites,
        )
        for key, rule in RULES.items()
        for name, attribute in rule.signals.items()
    )


ESTIMATORS = Catalog(
    what="estimator",
    group="bitknap.estimators",
    rows=(
        # Rungs of one ladder (methods.md#ladder): costs of every format, most in nats per token.
        _cost("moments", "moments:SecondMoments", "Output error from second moments of inputs."),
        _cost("fisher", "fisher:Fisher", "Squared gradients of each weight."),
        _cost(
            "fisher-output",
            "fisher:Fisher",
            "Squared gradients at the experts' outputs.",
            space="output",
        ),
        _cost("weight-error", "weight_error:WeightError", "Squared weight error by token share."),
        _cost("data-free", "data_free:DataFree", "Weights alone; reads no text."),
        _cost(
            "measured-kl",
            "dense_profiling:Measured",
            "Measured KL of the whole model, one unit in one format at a time.",
        ),
        _cost(
            "measured-layer",
            "dense_profiling:Measured",
            "Measured error of a decoder layer's output, one unit at a time.",
            kind="layer",
        ),
        _cost(
            "measured-block",
            "dense_profiling:Measured",
            "Measured error of an expert block's output, one unit at a time.",
            kind="block",
        ),
        # One score per unit, multiplied by the data-free cost.
        _plain_signal("kurtosis", "Kurtosis"),
        _plain_signal("random", "RandomScore"),
        _plain_signal("row-variance", "RowVariance", statistic="mean"),
        _plain_signal("uniform", "Uniform"),
        *_published(),
        Entry(
            name=CALIBRATED,
            kind=WRAPPER,
            place="bitknap.estimators.group_kl.calibrated:Calibrated",
            about="Scales a base's costs to measured KL of groups of units; the default.",
        ),
        Entry(
            name=FUZZY,
            kind=WRAPPER,
            place="bitknap.estimators.sparse.on_demand:Sampled",
            about="Fuzzy rules from a few measured cells, over a base.",
        ),
    ),
)
COSTS: Mapping[str, Callable[[], Estimator]] = MappingProxyType(
    {row.name: row for row in ESTIMATORS.rows if row.kind == COST}
)
SIGNALS: Mapping[str, Callable[[], Signal]] = MappingProxyType(
    {row.name: row for row in ESTIMATORS.rows if row.kind == SIGNAL and row.name != ROUTER}
)


def names() -> tuple[str, ...]:
    """Return every name that can serve as a base, sorted."""
    return tuple(sorted({*ESTIMATORS.names()} - {CALIBRATED, FUZZY}))


def rounds_to_nearest(name: str) -> bool:
    """Return whether a base charges rounding to nearest, whatever rounding method is asked for.

    Raises:
        InputError: several packages offer the name, or the package that does is broken.
    """
    if name not in ESTIMATORS.names():
        return False
    entry = ESTIMATORS.find(name)
    return name == "data-free" or kind_of(entry) == SIGNAL


def kind_of(entry: Entry) -> str:
    """Return the kind of a row; for another package's row, the kind of its instance.

    Raises:
        InputError: the instance is neither an estimator nor a signal.
    """
    if entry.own:
        return entry.kind
    made = entry()
    can = [kind for kind, verb in ((COST, "estimate"), (SIGNAL, "score")) if hasattr(made, verb)]
    if not can or not isinstance(getattr(made, "name", None), str) or not hasattr(made, "needs"):
        raise InputError(
            f"estimator {entry.name!r}: {entry.place} of {entry.package} must have name, "
            "needs, and estimate(evidence, formats) or score(evidence); see "
            "bitknap.estimators.costs.estimator"
        )
    for word in made.needs:
        if word not in NEEDS:
            raise unknown(f"estimator {entry.name!r} of {entry.package}: need", word, NEEDS)
    return can[0]
