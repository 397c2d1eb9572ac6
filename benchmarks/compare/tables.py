"""Cost tables of every estimator by name, each made once and kept beside the results."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitknap.allocation import CostTable, Format
from bitknap.benchmarks.compare.models import Setting
from bitknap.disk.atomic import read_json, write_whole
from bitknap.estimators.catalog import COSTS, ROUTER, SIGNALS
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.named import estimator_of
from bitknap.estimators.published.chowdhury import RouterNorm
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.estimators.tables.monotone import isotonic

# Our estimator; its base is the best one without measurements (benchmarks/results/profiling.md).
CALIBRATED = "calibrated"
_BASES = {
    CALIBRATED: "fisher-output",
    "calibrated-fisher": "fisher",
    "calibrated-moments": "moments",
}
FUZZY = "fuzzy"
# Number of cells that fuzzy rules measure, about the number of groups.
_CELLS = 48
# Estimators that measure each unit: only with whole-row formats, or it would take hours.
DENSE = ("measured-block", "measured-kl", "measured-layer")
# Costs of formats, and signals that score units only; dense profiling only on request.
UNMEASURED = tuple(name for name in sorted(COSTS) if name not in DENSE)
LADDER = (*_BASES, *UNMEASURED, FUZZY)
SCORES = (*sorted(SIGNALS), ROUTER)
ESTIMATORS = (*LADDER, *SCORES, *DENSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Tables by name.

    Attributes:
        setting: the inputs of the estimators.
        folder: folder that keeps tables; they are not kept when not given.
        known: tables that exist already.
        seconds: time that each table took, in this run or before it was killed.
    """

    setting: Setting
    folder: Path | None = None
    known: dict[str, CostTable] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._clock is not None and self._clock.is_file():
            self.seconds.update(read_json(self._clock))

    def of(self, name: str) -> CostTable:
        """Return the table of an estimator, with costs that rise with the width pooled."""
        if name not in self.known:
            self.known[name] = self._kept(name) or self._timed(name)
        return self.known[name]

    def measurements(self, name: str) -> int:
        """Return the number of KL readings that an estimator's table took."""
        return int(self.of(name).provenance.get("measurements", 0))

    @property
    def _clock(self) -> Path | None:
        return None if self.folder is None else self.folder / "seconds.json"

    def _timed(self, name: str) -> CostTable:
        """Return a new table, and keep it with the time that it took."""
        start = time.perf_counter()
        table = self._made(name)
        self.seconds[name] = time.perf_counter() - start
        if self.folder is not None and self._clock is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._clock, json.dumps(self.seconds).encode())
            table.save(self.folder / f"{name}.safetensors")
        return table

    def _kept(self, name: str) -> CostTable | None:
        """Return the table of an earlier run of the same comparison; its journal vouches for it."""
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        return CostTable.load(file) if file is not None and file.is_file() else None

    def _made(self, name: str) -> CostTable:
        evidence, formats = self.setting.evidence, self.setting.options.formats
        table = self._estimator(name).estimate(evidence, _formats_of(name, formats))
        said = {**table.provenance, "method": evidence.rounding.name}
        return isotonic(replace(table, provenance=said))[0]

    def _estimator(self, name: str) -> Estimator:
        progress = self.setting.progress
        if name in _BASES:
            return Calibrated(base=_Known(_BASES[name], self.of(_BASES[name])), progress=progress)
        if name == FUZZY:
            base = _Known(CALIBRATED, self.of(CALIBRATED))
            return Sampled(base=base, measurements=_CELLS, progress=progress)
        if name == ROUTER:
            return Scored(RouterNorm(final=self.setting.final, initial=self.setting.initial))
        return estimator_of(name)


@dataclass(frozen=True, slots=True)
class _Known:
    """An estimator whose table exists already."""

    name: str
    table: CostTable
    needs: frozenset[str] = frozenset()

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        return self.table


def _formats_of(name: str, formats: Sequence[Format]) -> tuple[Format, ...]:
    if name not in DENSE:
        return tuple(formats)
    rows = [item for item in formats if item.group_size == 0 and item.symmetric]
    return tuple(rows or formats)


def facts(tables: Tables) -> dict[str, Any]:
    """Return the time and measurements of each table as JSON values."""
    return {name: round(seconds, 3) for name, seconds in sorted(tables.seconds.items())}
