"""Turn a model into its cost table: gather evidence, estimate, and record how it was measured."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.serving import KEY
from bitknap.api.calibration import gather, readings_about
from bitknap.api.forecasts.room import check_table_room
from bitknap.api.former_keywords import former_keywords, group
from bitknap.api.live import Model, on_disk
from bitknap.api.requests import Calibration, Formats, Resume, TextSets, default_formats
from bitknap.deprecation import warn_renamed
from bitknap.errors import InputError
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring.documents import TextLike, text_of
from bitknap.estimators.measuring.readings import Readings, beside
from bitknap.estimators.measuring.text import BUILTIN, document_of
from bitknap.estimators.signals import rows_of_matrices as blocks_of_rows
from bitknap.estimators.tables.monotone import isotonic
from bitknap.estimators.tables.several_texts import check_sets
from bitknap.estimators.tables.several_texts import robust as as_one
from bitknap.estimators.tables.super_expert_floor import protected
from bitknap.progress import Progress
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.runtime.serving_needs import serving_of
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.targets.requirements import restricted
from bitknap.quantization.targets.target import Target
from bitknap.quantization.transforms import transformed_model

T = TypeVar("T", int, float)
# (layer, expert, tokens) for experts that saw few, (layer, expert, times) for outlying experts.
_Seen = tuple[list[tuple[int, int, int]], list[tuple[int, int, float]]]


@former_keywords(
    calibration=group(
        Calibration,
        *("tokens", "include", "seed", "max_memory", "robust", "risk"),
        method="rounding",
    ),
    formats=group(Formats, "protect", "row_blocks", "permute", "rotate"),
    resume=group(Resume, "journal", "scratch", "overwrite"),
)
def estimate(
    model: Model,
    estimator: Estimator | None = None,
    formats: Sequence[Format] | Formats | None = None,
    *,
    text: TextLike | TextSets | None = None,
    calibration: Calibration | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> CostTable:
    """Return the cost of every format for every unit of a model.

    Within a family of grids, costs that rise with the width are pooled; the provenance counts
    them as "repaired". Experts that saw few tokens, and those whose output is far above their
    layer's, are listed there too; the latter may not use narrow grids.

    Args:
        model: A folder, a hub id, "reference:NAME", or a `LiveModel`.
        estimator: `Calibrated()` when not given.
        formats: Formats that units may have: a list, or `Formats` with further options;
            `default_formats()` when not given.
        text: Shorthand for `calibration=Calibration(text=…)`; the bundled text when not given.
        calibration: The text that the model is run on, and how weights will be rounded.
        resume: Files kept on disk so that a killed run can continue.
        progress: Called with (what, done, of).

    Raises:
        InputError: The text or a name cannot be used, or `max_memory` is too low.
        ModelError: The model cannot be built, walked, calibrated, rotated or permuted.
        FileError: A file of the model is damaged.
        MismatchError: Samples or a journal belong to other inputs.
    """
    asked = (calibration or Calibration()).on(_sets_of(text))
    offered = Formats.of(formats)
    job = _Job(
        estimator=estimator or Calibrated(progress=progress),
        formats=offered,
        asked=as_rounded_by(offered.runtime, asked).each,
        progress=progress,
    )
    _check_texts(job)
    with on_disk(model) as place:
        origin = Checkpoint.open(resolve(place))
        origin.check_companions()
        check_source(origin, asked.include, known=False, reads_text=job.reads)
        if resume is not None and resume.journal is not None:
            check_table_room(origin, job.formats, asked.include, resume.journal)
        return job.table(origin, resume or Resume())


def as_rounded_by(target: Target | None, asked: Calibration) -> Calibration:
    """Return the calibration with the rounding that a target's files have.

    Raises:
        InputError: another rounding is asked for.
    """
    if target is None or target.rounding in ("", asked.method.name):
        return asked
    if asked.method.name != RTN.name:
        raise InputError(
            f"`rounding={asked.method.name}`: {target.name} rounds by {target.rounding}; leave it "
            "out"
        )
    return replace(asked, rounding=target.rounding)


def _sets_of(text: TextLike | TextSets | None) -> TextLike | TextSets | None:
    """Return the text; a list of files, formerly the way to pass several sets, as `TextSets`."""
    if not isinstance(text, list | tuple) or not all(map(_is_file, text)):
        return text
    warn_renamed("estimate(text=[several files])", "text=TextSets([…])", stacklevel=4)
    return TextSets(text)


def _is_file(text: object) -> bool:
    try:
        return isinstance(text, str | Path) and (text == BUILTIN or Path(text).is_file())
    except (OSError, ValueError):  # too long, or with characters not allowed in names
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A request to `estimate`, carried out on one checkpoint for each of its texts."""

    estimator: Estimator
    formats: Formats
    asked: Sequence[Calibration]
    progress: Progress | None

    @property
    def reads(self) -> bool:
        """Whether the model is run on a text."""
        return bool(self.estimator.needs) or self.asked[0].method.needs_inputs

    @property
    def keeps(self) -> bool:
        """Whether the measurements are worth keeping in a journal."""
        return "kl" in self.estimator.needs or (self.reads and self.asked[0].memory is not None)

    def table(self, origin: Checkpoint, resume: Resume) -> CostTable:
        """Return the table of a model, which is first transformed if requested."""
        first, about = self.asked[0], {}
        options = self.formats.listed(origin, first.include)
        recipe = transformed_model.Recipe(rotation=first.seed if self.formats.rotate else None)
        if resume.journal is not None and self.keeps:
            blocks = self.formats.row_blocks if self.formats.permute else None
            about = readings_about(origin, self.asked, rotation=recipe.rotation, blocks=blocks)
        journal = resume.journal if self.keeps else None
        kept = beside(journal, about, overwrite=resume.overwrite)
        with _folder(resume.scratch) as folder, kept as readings:
            source = transformed_model.make(origin, recipe, folder)
            if self.formats.permute:
                recipe = replace(recipe, order=self._sorting(source, readings))
                source = transformed_model.make(origin, recipe, folder)
            tables, passes = self._run(source, options, readings)
            rule = first.robust or "mean"
            table = as_one(tables, rule, first.risk) if len(tables) > 1 else tables[0]
            table, _ = isotonic(table)
            if self.formats.runtime is not None:
                table = restricted(table, self.formats.runtime)
            model_facts = self._facts(origin, source, recipe, table.formats)
        large = _union([seen for _, seen in passes], max)
        provenance = {
            **table.provenance,
            **model_facts,
            "coverage": _union([seen for seen, _ in passes], min),
            "super_experts": large,
        }
        return protected(replace(table, provenance=provenance), large, self.formats.protect)

    def _facts(
        self,
        origin: Checkpoint,
        source: Checkpoint,
        recipe: transformed_model.Recipe,
        formats: Sequence[Format],
    ) -> dict[str, object]:
        """Return the facts that a table records about the model and its bytes besides the units."""
        include = self.asked[0].include
        layout = self.formats.layout(source, include)
        fixed_bytes = writer.fixed_bytes(source, layout)
        rewritten = {}
        if source is not origin:
            rewritten = {transformed_model.KEY: recipe.to_dict(origin)}
            # The plan is part of the checkpoint and repeats this.
            fixed_bytes += 2 * len(json.dumps(rewritten[transformed_model.KEY]))
        return {
            "model": source.fingerprint,
            "fixed_bytes": fixed_bytes,
            "source_bytes": origin.folder_bytes,
            "include": sorted(include),
            KEY: serving_of(source, layout, formats).to_dict(),
            **rewritten,
        }

    def _sorting(self, source: Checkpoint, readings: Readings) -> transformed_model.Sorting:
        """Return the order of the neurons, taken from the first text if one is read."""
        needs = frozenset({"moments"}) if self.estimator.needs else frozenset()
        evidence = self._gather(source, needs, self.asked[0], readings)
        return blocks_of_rows.sorting(evidence, self.formats.row_blocks)

    def _run(
        self, source: Checkpoint, options: Sequence[Format] | None, readings: Readings
    ) -> tuple[list[CostTable], list[_Seen]]:
        """Return a table for each text, and the experts with few tokens or outlying outputs."""
        tables, passes = [], []
        for asked in self.asked:
            evidence = self._gather(source, self.estimator.needs, asked, readings)
            table = self.estimator.estimate(evidence, options or default_formats(evidence.units))
            if self.formats.row_blocks > 1:
                table = blocks_of_rows.by_rows(table, evidence, self.formats.row_blocks)
            tables.append(table)
            passes.append((evidence.coverage(), _standing_out(evidence)))
            del evidence  # keep only one model in memory at a time
        return tables, passes

    def _gather(
        self, source: Checkpoint, needs: frozenset[str], asked: Calibration, readings: Readings
    ) -> Evidence:
        if needs and self.formats.row_blocks > 1:
            needs = needs | {"moments"}
        return gather(source, needs, asked, readings=readings, progress=self.progress)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Yield a folder for transformed copies; a temporary one is deleted afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="bitknap-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def _check_texts(job: _Job) -> None:
    """Refuse texts that are not separate sets, before spending minutes on calibration."""
    if len(job.asked) == 1 and job.asked[0].robust is None:
        return
    if not job.estimator.needs:
        name = job.estimator.name
        raise InputError(f"{name} reads no text, so several texts change nothing; give one")
    texts = [document_of(text_of(one.only_text), "calibration") for one in job.asked]
    check_sets([{"text": text} for text in texts])


def _union(
    lists: Sequence[Sequence[tuple[int, int, T]]], pick: Callable[[T, T], T]
) -> list[tuple[int, int, T]]:
    """Merge (layer, expert, value) lists of several passes into a sorted list, each expert once."""
    merged: dict[tuple[int, int], T] = {}
    for layer, expert, value in chain.from_iterable(lists):
        merged[layer, expert] = pick(merged.get((layer, expert), value), value)
    return [(layer, expert, value) for (layer, expert), value in sorted(merged.items())]


def _standing_out(evidence: Evidence) -> list[tuple[int, int, float]]:
    """Return the experts with outputs far above their layer's median; empty without a text."""
    known = all(layer.output_max is not None for layer in evidence.layers.values())
    outliers = super_experts(evidence) if known else []
    return [(layer, expert, round(times, 1)) for layer, expert, times in outliers]
