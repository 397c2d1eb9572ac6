"""Estimators by the names that the command line knows; everywhere else they are instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weight_error import WeightError
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.published import RULES
from bitknap.estimators.published.chowdhury import RouterNorm
from bitknap.estimators.published.rule import signal_of
from bitknap.estimators.signals.plain import Kurtosis, RandomScore, RowVariance, Uniform
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.signals.signal import Signal
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.progress import Progress

# Rungs of one ladder (methods.md#ladder): costs of every format, most of them in nats per token.
COSTS: Mapping[str, Callable[[], Estimator]] = MappingProxyType(
    {
        "moments": SecondMoments,
        "fisher": Fisher,
        "fisher-output": lambda: Fisher(space="output"),
        "weight-error": WeightError,
        "data-free": DataFree,
        "measured-kl": Measured,
        "measured-layer": lambda: Measured(kind="layer"),
        "measured-block": lambda: Measured(kind="block"),
    }
)
# Made from router weights, which evidence does not hold.
ROUTER = "router-norm"
# Plain signals and those of papers: one score a unit, times the data-free cost.
SIGNALS: Mapping[str, Callable[[], Signal]] = MappingProxyType(
    {
        "kurtosis": Kurtosis,
        "random": RandomScore,
        "row-variance": lambda: RowVariance("mean"),
        "uniform": Uniform,
        **{
            name: partial(signal_of, name)
            for entry in RULES.values()
            for name in entry.signals
            if name != ROUTER
        },
    }
)
CALIBRATED = "calibrated"
# Rules over a base.
FUZZY = "fuzzy"


def names() -> tuple[str, ...]:
    """Return every name of a base, sorted."""
    return tuple(sorted({*COSTS, *SIGNALS, ROUTER}))


def named(
    words: Sequence[str],
    *,
    routers: Callable[[], RouterNorm] | None = None,
    calibrate: int | None = None,
    check: int = 0,
    journal: Path | None = None,
    samples: Path | None = None,
    measurements: int | None = None,
    progress: Progress | None = None,
) -> Estimator:
    """Return the estimator of a name, its calibration, or fuzzy rules over either.

    Args:
        words: "calibrated", a base, and under calibration signals that it fits exponents of; or
            "fuzzy" and then any of these, or nothing for the usual base.
        routers: makes the router-norm signal when that is named.
        calibrate: at most so many group measurements; given, it asks for calibration.
        check: so many held-out plans are measured after calibration.
        journal: where dense profiling keeps what it measured, to continue there.
        samples: of fuzzy rules: the file of measured cells.
        measurements: of fuzzy rules: at most so many cells are measured.
        progress: of measurements.

    Raises:
        InputError: a name is unknown or there twice, or words do not go together.
    """
    settings: dict[str, Any] = {
        "routers": routers,
        "calibrate": calibrate,
        "check": check,
        "journal": journal,
        "progress": progress,
    }
    if words[:1] == [FUZZY]:
        alone = len(words) == 1
        if alone and (calibrate is not None or check or journal is not None):
            raise InputError(
                f"--estimator {FUZZY}: --calibrate, --check and --journal are of its base; "
                f"name one: {FUZZY},{CALIBRATED},fisher"
            )
        found = Sampled(file=samples, measurements=measurements, progress=progress)
        return found if alone else replace(found, base=_plain(words[1:], **settings))
    for flag, value in {"--samples": samples, "--measurements": measurements}.items():
        if value is not None:
            raise InputError(f"{flag}: only --estimator {FUZZY} takes it")
    return _plain(words, **settings)


def _plain(
    words: Sequence[str],
    *,
    routers: Callable[[], RouterNorm] | None,
    calibrate: int | None,
    check: int,
    journal: Path | None,
    progress: Progress | None,
) -> Estimator:
    """Return a base or its calibration."""
    plain = [word for word in words if word != CALIBRATED]
    unknown = [word for word in plain if word not in names()]
    asked = f"--estimator {','.join(words)!r}"
    if unknown or not words or len(set(words)) < len(words):
        raise InputError(
            f"{asked}: give one of {', '.join(names())}, {CALIBRATED} with a base and signals, "
            f"or {FUZZY} with a base"
        )
    calibrated = CALIBRATED in words or calibrate is not None
    wrong = [word for word in plain[1:] if word in COSTS]
    if wrong or (len(plain) > 1 and not calibrated):
        raise InputError(
            f"{asked}: one base, then signals whose exponents calibration fits: "
            f"{CALIBRATED},fisher,kurtosis; signals are {', '.join(sorted({*SIGNALS, ROUTER}))}"
        )
    base = _base(plain[0], routers) if plain else SecondMoments()
    if isinstance(base, Measured):
        base = replace(base, progress=progress, journal=journal)
    elif journal is not None:
        raise InputError("--journal: only measured-kl, measured-layer and measured-block keep one")
    if not calibrated:
        if check:
            raise InputError(
                f"--check: only calibrated tables are; write --estimator {CALIBRATED},{words[0]}"
            )
        return base
    signals = tuple(_signal(word, routers) for word in plain[1:])
    return Calibrated(
        base=base, measurements=calibrate, signals=signals, check=check, progress=progress
    )


def _base(name: str, routers: Callable[[], RouterNorm] | None) -> Any:
    return COSTS[name]() if name in COSTS else Scored(_signal(name, routers))


def _signal(name: str, routers: Callable[[], RouterNorm] | None) -> Signal:
    if name in SIGNALS:
        return SIGNALS[name]()
    if routers is None:
        raise InputError(f"{ROUTER}: needs a model's router weights")
    return routers()
