"""From a model to its cost table: gather evidence, estimate, and say what the costs are of."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np

from bitknap.allocation import CostTable, Format, Units
from bitknap.allocation import formats as make_formats
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.format import GROUP_SIZES
from bitknap.api.calibration import Calibration, gather, readings_about
from bitknap.errors import InputError
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.weighed_errors import plainest
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring.readings import Readings, beside
from bitknap.estimators.measuring.text import BUILTIN, read_text
from bitknap.estimators.signals import rows_of_matrices as blocks_of_rows
from bitknap.estimators.tables.monotone import isotonic
from bitknap.estimators.tables.several_texts import Rule, check_sets
from bitknap.estimators.tables.several_texts import robust as as_one
from bitknap.estimators.tables.super_expert_floor import FLOOR, protected
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.stacks.row_blocks import split_rows
from bitknap.quantization.transforms import transformed_model

CALIBRATION_TOKENS = 8_192
T = TypeVar("T", int, float)
# (layer, expert, tokens) of experts that saw few, (layer, expert, times) of those that stand out.
_Seen = tuple[list[tuple[int, int, int]], list[tuple[int, int, float]]]


def default_formats(units: Units | None = None) -> tuple[Format, ...]:
    """Return the options of the main job: widths × group sizes × zero point × metadata.

    Args:
        units: leave out formats that another one equals on every row of these units.
    """
    every = make_formats(range(1, 9), GROUP_SIZES, (False, True), ("fp16", "compact"))
    widths = () if units is None else np.unique(units.cols).tolist()
    return tuple(f for f in every if not widths or any(plainest(f, w) == f for w in widths))


def estimate(
    model: str | Path,
    estimator: Estimator | None = None,
    formats: Sequence[Format] | None = None,
    *,
    text: str | Sequence[str] = BUILTIN,
    robust: Rule | None = None,
    risk: float = 1.0,
    tokens: int = CALIBRATION_TOKENS,
    include: Collection[str] = (),
    protect: int = FLOOR,
    method: str | Rounding = RTN,
    row_blocks: int = 1,
    permute: bool = False,
    rotate: bool = False,
    max_memory: int | None = None,
    seed: int = 0,
    journal: Path | None = None,
    scratch: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """Return what every format would cost every unit of a model.

    Within a family of grids, costs that rise with the width are pooled; the provenance counts
    them as "repaired". Experts that saw few tokens, and those whose output is far above their
    layer's, are listed there too; the latter may use no narrow grid.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        estimator: `Calibrated()` when not given.
        formats: the options; `default_formats()` when not given.
        text: calibration text, a file or "builtin"; or several, each a calibration set.
        robust: what a cost becomes over several texts: "mean" when not given, "worst" or
            "mean+sd".
        risk: standard deviations that "mean+sd" adds.
        tokens: how much of each text to use.
        include: roles beside routed experts: "attention", "shared", "dense".
        protect: bits below which a super expert gets no grid; 0 protects none.
        method: how weights will be rounded, which is what costs are of: "rtn", "hqq", "gptq".
        row_blocks: runs of rows of each matrix that may have formats of their own.
        permute: sort the experts' neurons by sensitivity first, so that the blocks of gate and up
            differ; one more pass over the (first) text.
        rotate: turn the residual stream by random Hadamard transforms first.
        max_memory: bytes; when more is needed, gradients or the whole pass go layer by layer.
        seed: random seed.
        journal: file that keeps each measured KL and, where calibration goes layer by layer, each
            finished layer; after a kill the same call goes on from there. `journal.forget` it when
            the table is saved.
        scratch: folder where a permuted or rotated copy of the model is written, and left for
            `quantize` to find; a temporary one, deleted, when not given.
        overwrite: start a journal of other inputs anew.
        progress: called with (what, done, of).

    Raises:
        InputError: the text or a name cannot be used, or the memory does not suffice.
        ModelError: the model cannot be built, walked, calibrated, rotated or permuted.
        FileError: a file of the model is damaged.
        MismatchError: samples or a journal are of other inputs.
    """
    chosen = estimator or Calibrated(progress=progress)
    texts = [text] if isinstance(text, str) else list(text)
    _check_texts(texts, chosen, robust, risk)
    whole("protect", protect)
    blocks_of_rows.check(row_blocks, permute=permute)
    origin = Checkpoint.open(resolve(model))
    origin.check_companions()
    reads_text = bool(chosen.needs) or method_of(method).needs_inputs
    check_source(origin, include, known=False, reads_text=reads_text)
    asked = [
        Calibration(
            text=words,
            tokens=tokens,
            include=include,
            seed=seed,
            rounding=method_of(method),
            max_memory=max_memory,
        )
        for words in texts
    ]
    job = _Job(
        estimator=chosen, formats=formats, asked=asked, row_blocks=row_blocks, progress=progress
    )
    recipe = transformed_model.Recipe(rotation=seed if rotate else None)
    about = {}
    if journal is not None and job.keeps:
        sorted_into = row_blocks if permute else None
        about = readings_about(origin, asked, rotation=recipe.rotation, blocks=sorted_into)
    kept = beside(journal if job.keeps else None, about, overwrite=overwrite)
    with _folder(scratch) as folder, kept as readings:
        source = transformed_model.make(origin, recipe, folder)
        if permute:
            recipe = replace(recipe, order=job.sorting(source, readings))
            source = transformed_model.make(origin, recipe, folder)
        tables, passes = job.run(source, readings)
        table = as_one(tables, robust or "mean", risk) if len(tables) > 1 else tables[0]
        table, _ = isotonic(table)
        model_facts = _facts(origin, source, recipe, include, row_blocks)
    large = _union([found for _, found in passes], max)
    provenance = {
        **table.provenance,
        **model_facts,
        "coverage": _union([found for found, _ in passes], min),
        "super_experts": large,
    }
    return protected(replace(table, provenance=provenance), large, protect)


def _facts(
    origin: Checkpoint,
    source: Checkpoint,
    recipe: transformed_model.Recipe,
    include: Collection[str],
    row_blocks: int,
) -> dict[str, object]:
    """Return what a table says of the model that it is for, and of its bytes beside the units."""
    on_disk = walk_headers(source.config, source.shapes, include)
    layout = on_disk if row_blocks == 1 else split_rows(on_disk, row_blocks)
    fixed_bytes, rewritten = writer.fixed_bytes(source, layout), {}
    if source is not origin:
        rewritten = {transformed_model.KEY: recipe.to_dict(origin)}
        # The plan, which is part of the checkpoint, repeats it.
        fixed_bytes += 2 * len(json.dumps(rewritten[transformed_model.KEY]))
    return {
        "model": source.fingerprint,
        "fixed_bytes": fixed_bytes,
        "source_bytes": origin.folder_bytes,
        "include": sorted(include),
        **rewritten,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What `estimate` was asked for, to be done on one checkpoint and each of its texts."""

    estimator: Estimator
    formats: Sequence[Format] | None
    asked: Sequence[Calibration]
    row_blocks: int
    progress: Progress | None

    @property
    def keeps(self) -> bool:
        """Whether anything is measured that would be worth a journal."""
        needs, first = self.estimator.needs, self.asked[0]
        reads = bool(needs) or first.rounding.needs_inputs
        return "replay" in needs or (reads and first.max_memory is not None)

    def sorting(self, source: Checkpoint, readings: Readings) -> transformed_model.Sorting:
        """Return how neurons are sorted, by the first text if any is read."""
        needs = frozenset({"moments"}) if self.estimator.needs else frozenset()
        evidence = self._gather(source, needs, self.asked[0], readings)
        return blocks_of_rows.sorting(evidence, self.row_blocks)

    def run(self, source: Checkpoint, readings: Readings) -> tuple[list[CostTable], list[_Seen]]:
        """Return a table for each text, and which experts saw little or stand out in it."""
        tables, passes = [], []
        for asked in self.asked:
            evidence = self._gather(source, self.estimator.needs, asked, readings)
            formats = self.formats or default_formats(evidence.units)
            table = self.estimator.estimate(evidence, formats)
            if self.row_blocks > 1:
                table = blocks_of_rows.by_rows(table, evidence, self.row_blocks)
            tables.append(table)
            passes.append((evidence.coverage(), _standing_out(evidence)))
            del evidence  # one model and its memory at a time
        return tables, passes

    def _gather(
        self, source: Checkpoint, needs: frozenset[str], asked: Calibration, readings: Readings
    ) -> Evidence:
        if needs and self.row_blocks > 1:
            needs = needs | {"moments"}
        return gather(source, needs, asked, readings=readings, progress=self.progress)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Yield a folder for twins; a temporary one goes again."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="bitknap-", ignore_cleanup_errors=True) as found:
        yield Path(found)


def _check_texts(
    texts: Sequence[str], estimator: Estimator, rule: Rule | None, risk: float
) -> None:
    """Refuse texts that are not several sets, before minutes go into calibrating on them."""
    number("risk", risk)
    if rule is not None and rule not in get_args(Rule):
        raise InputError(f"robust: {rule!r} is not one of {', '.join(get_args(Rule))}")
    if len(texts) == 1 and rule is None:
        return
    if not estimator.needs:
        raise InputError(f"{estimator.name} reads no text, so several say nothing more; give one")
    check_sets([{"text": read_text(text, "calibration")} for text in texts])


def _union(
    lists: Sequence[Sequence[tuple[int, int, T]]], pick: Callable[[T, T], T]
) -> list[tuple[int, int, T]]:
    """Return (layer, expert, value) of several passes as one list in order, each expert once."""
    found: dict[tuple[int, int], T] = {}
    for layer, expert, value in chain.from_iterable(lists):
        found[layer, expert] = pick(found.get((layer, expert), value), value)
    return [(layer, expert, value) for (layer, expert), value in sorted(found.items())]


def _standing_out(evidence: Evidence) -> list[tuple[int, int, float]]:
    """Return the experts whose output is far above their layer's median; none without a text."""
    known = all(layer.output_max is not None for layer in evidence.layers.values())
    found = super_experts(evidence) if known else []
    return [(layer, expert, round(times, 1)) for layer, expert, times in found]
