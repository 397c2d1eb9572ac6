"""Sparse samples on demand: measure a few cells once, keep them, and fill the table by rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.weighed_errors import token_share
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.sparse.cell_choice import CellSpace, Growth, LeastSure, grow
from bitknap.estimators.sparse.fuzzy import Fuzzy, features, unit_losses
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.predictors import Residual
from bitknap.progress import Progress

# By default one in this many dense measurements is taken, close to the paper's best (FRI-MxMoE
# reports 15.7 times less time).
SPARSITY = 15
# Minimum number of measurements: 10 held out and 10 to learn from.
FEWEST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Fuzzy rules from samples in a file, which are measured first if there is no such file.

    Half of the budget is measured by depth, then the least certain cells a few at a time, until the
    ranking of held-out cells saturates (`bitknap.estimators.sparse.cell_choice.grow`).

    Attributes:
        file: the samples, .safetensors; measured samples are not saved when not given.
        measurements: maximum number of cells to measure, at least 20; one in fifteen, or 20, when
            not given. Ignored if the file exists.
        base: the estimator that the rules correct, or None. See `Fuzzy`.
        progress: called with (what, done, of).
    """

    file: Path | None = None
    measurements: int | None = None
    base: Estimator | None = field(default_factory=lambda: Fisher(space="output"))
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.measurements is not None and whole("measurements", self.measurements) < FEWEST:
            raise InputError(
                f"measurements: {self.measurements} is below {FEWEST}, of which half are held "
                "out; give more"
            )

    @property
    def name(self) -> str:
        """The base's name, marked as corrected by rules."""
        return f"fuzzy({self.base.name})" if self.base else "fuzzy"

    @property
    def needs(self) -> frozenset[str]:
        """Moments, all that the base needs, and measured variants if cells must be measured."""
        known = self.file is not None and self.file.exists()
        own = {"moments"} if known else {"moments", "kl"}
        return frozenset(own) | (self.base.needs if self.base else frozenset())

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format with their spread, nats per token.

        Raises:
            MismatchError: the samples belong to another model, quantizer or set of formats.
            FileError: the file cannot be read.
            InputError: there are no means to measure, or there are too few cells to measure.
        """
        if self.file is not None and self.file.exists():
            samples = _known(self.file, evidence, formats)
        else:
            samples = self._measured(evidence, formats)
            if self.file is not None:
                samples.save(self.file)
        return Fuzzy(samples, base=self.base).estimate(evidence, formats)

    def _measured(self, evidence: Evidence, formats: Sequence[Format]) -> LossSamples:
        """Measure cells, picked where rules are least certain."""
        # An expert that no token reaches changes nothing.
        reached = token_share(evidence) > 0
        cells = int(reached.sum()) * sum(f.kind != "keep" for f in formats)
        if cells < FEWEST:
            raise InputError(
                f"samples: {cells} cells can be measured, {FEWEST} are needed; "
                "add formats or measure all with measured-kl"
            )
        count = min(self.measurements or max(FEWEST, cells // SPARSITY), cells)
        origin = {"model": "", **evidence.provenance, "method": evidence.rounding.name}
        space = CellSpace(
            units=evidence.units,
            formats=formats,
            antecedents=features(evidence, formats),
            provenance=origin,
            measurable=reached,
        )
        growth = Growth(
            start=count // 2,
            step=max(1, count // 10),
            stop=count,
            anchors=LeastSure(),
            seed=int(evidence.provenance.get("seed", 0)),
        )
        grown = grow(
            unit_losses(evidence, formats),
            space,
            Residual(inner=FuzzyRules()),
            growth,
            progress=self.progress,
        )
        judged = {"held_out": len(grown.held_out), "spearman": list(grown.spearman)}
        said = {**grown.samples.provenance, **judged, "saturated": grown.saturated}
        return replace(grown.samples, provenance=said)


def _known(file: Path, evidence: Evidence, formats: Sequence[Format]) -> LossSamples:
    """Return the samples of a file after checking their model, quantizer and formats."""
    samples = LossSamples.load(file)
    try:
        origin = {"method": evidence.rounding.name, **evidence.provenance}
        samples.check(evidence.units, formats, origin)
    except MismatchError as error:
        raise MismatchError(f"{file}: {error}, or name another file") from None
    return samples
