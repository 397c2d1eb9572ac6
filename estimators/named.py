"""Makes estimators from command-line words; the rest of the code passes instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitknap.errors import InputError
from bitknap.estimators.catalog import (
    CALIBRATED,
    ESTIMATORS,
    FUZZY,
    ROUTER,
    SIGNAL,
    SIGNALS,
    kind_of,
    names,
)
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.published.chowdhury import RouterNorm
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.names import guess
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of estimators that are made by name.

    Attributes:
        routers: makes the router-norm signal if it is named.
        calibrate: maximum number of group measurements; giving it turns calibration on.
        check: number of held-out plans to measure after calibration.
        journal: file in which dense profiling keeps its measurements, so that it can resume.
        samples: the file of measured cells, for fuzzy rules.
        measurements: maximum number of cells to measure for fuzzy rules.
        progress: called with (what, done, of) while measuring.
    """

    routers: Callable[[], RouterNorm] | None = None
    calibrate: int | None = None
    check: int = 0
    journal: Path | None = None
    samples: Path | None = None
    measurements: int | None = None
    progress: Progress | None = None


def estimator_of(name: str) -> Estimator:
    """Return the base estimator of a name; a signal is wrapped in `Scored`.

    Raises:
        InputError: the name is unknown or offered twice, or does not name an estimator.
    """
    estimator: Estimator = _base(name, None)
    return estimator


def named(words: Sequence[str], settings: Settings | None = None) -> Estimator:
    """Return the named estimator, calibrated or corrected by fuzzy rules where asked for.

    Args:
        words: a base; or "calibrated", a base and the signals whose exponents calibration fits; or
            "fuzzy", followed by either of these or by nothing for the usual base.
        settings: the estimator's settings.

    Raises:
        InputError: a name is unknown or given twice, or the words cannot be combined.
    """
    settings = settings or Settings()
    if words[:1] == [FUZZY]:
        alone = len(words) == 1
        if alone and (
            settings.calibrate is not None or settings.check or settings.journal is not None
        ):
            raise InputError(
                f"`estimator={FUZZY}`: `calibrate`, `check` and `journal` belong to its base, and "
                f"none is named; write `estimator={FUZZY},{CALIBRATED},fisher`"
            )
        rules = Sampled(
            file=settings.samples,
            measurements=settings.measurements,
            progress=settings.progress,
        )
        return rules if alone else replace(rules, base=_plain(words[1:], settings))
    of_fuzzy = {"samples": settings.samples, "measurements": settings.measurements}
    for name, value in of_fuzzy.items():
        if value is not None:
            raise InputError(f"`{name}`: only `estimator={FUZZY}` takes it; leave it out")
    return _plain(words, settings)


def _plain(words: Sequence[str], settings: Settings) -> Estimator:
    """Return a base estimator, calibrated where asked for."""
    plain = [word for word in words if word != CALIBRATED]
    known = names()
    strange = [word for word in plain if word not in known]
    asked = f"`estimator` {','.join(words)!r}"
    if strange or not words or len(set(words)) < len(words):
        raise InputError(
            f"{asked}: give one of {', '.join(known)}, {CALIBRATED} with a base and signals, "
            f"or {FUZZY} with a base{guess(strange[0], known) if strange else ''}"
        )
    kinds = [kind_of(ESTIMATORS.find(word)) for word in plain]
    calibrated = CALIBRATED in words or settings.calibrate is not None
    wrong = any(kind != SIGNAL for kind in kinds[1:])
    if wrong or (len(plain) > 1 and not calibrated):
        raise InputError(
            f"{asked}: name one base, then the signals whose exponents calibration fits, such as "
            f"{CALIBRATED},fisher,kurtosis; signals are {', '.join(sorted({*SIGNALS, ROUTER}))}"
        )
    base = _base(plain[0], settings.routers) if plain else SecondMoments()
    if isinstance(base, Measured):
        base = replace(base, progress=settings.progress, journal=settings.journal)
    elif settings.journal is not None:
        raise InputError(
            "`journal`: only measured-kl, measured-layer and measured-block keep one; leave it out"
        )
    if not calibrated:
        if settings.check:
            raise InputError(
                "`check`: only calibrated tables can be checked; write "
                f"`estimator={CALIBRATED},{words[0]}`"
            )
        return base
    signals = tuple(_signal(word, settings.routers) for word in plain[1:])
    return Calibrated(
        base=base,
        measurements=settings.calibrate,
        signals=signals,
        check=settings.check,
        progress=settings.progress,
    )


def _base(name: str, routers: Callable[[], RouterNorm] | None) -> Any:
    entry = ESTIMATORS.find(name)
    return Scored(_signal(name, routers)) if kind_of(entry) == SIGNAL else entry()


def _signal(name: str, routers: Callable[[], RouterNorm] | None) -> Any:
    if name != ROUTER:
        return ESTIMATORS.find(name)()
    if routers is None:
        raise InputError(f"{ROUTER}: needs the model's router weights; pass `Settings(routers=…)`")
    return routers()
