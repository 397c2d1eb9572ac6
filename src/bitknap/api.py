"""The public verbs that need torch: estimate, quantize, load, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from bitknap import files
from bitknap.allocation import BitPlan, CostTable, Format, Units
from bitknap.allocation import formats as make_formats
from bitknap.allocation.checks import number, whole
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.calibrated import Calibrated, Estimator
from bitknap.estimators.costs import plainest
from bitknap.estimators.evidence import Evidence
from bitknap.estimators.monotone import isotonic
from bitknap.estimators.protect import FLOOR, protected
from bitknap.estimators.replay import Losses, compare
from bitknap.estimators.robust import Rule, check_sets
from bitknap.estimators.robust import robust as as_one
from bitknap.estimators.super_experts import super_experts
from bitknap.estimators.text import BUILTIN, read_text
from bitknap.gathering import evaluation_windows, gather, too_few_tokens
from bitknap.progress import Progress
from bitknap.quantize import checkpoint, loading
from bitknap.quantize.blocks import inputs_of_blocks, layout_for
from bitknap.quantize.cache import CACHE_BYTES
from bitknap.quantize.names import walk_headers
from bitknap.quantize.rounding import RTN, Gptq, Rounding, planned
from bitknap.quantize.rounding import method as method_of
from bitknap.quantize.shards import MAX_SHARD_SIZE
from bitknap.quantize.source import Checkpoint, resolve

CALIBRATION_TOKENS = 8_192
EVALUATION_TOKENS = 32_768
GROUP_SIZES = (32, 64, 128, 256, "row")
T = TypeVar("T", int, float)


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
    max_memory: int | None = None,
    seed: int = 0,
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
        max_memory: bytes; when more is needed, gradients or the whole pass go layer by layer.
        seed: of everything drawn at random.
        progress: called with (what, done, of).

    Raises:
        InputError: the text or a name cannot be used, or the memory does not suffice.
        ModelError: the model cannot be walked or calibrated.
        FileError: a file of the model is damaged.
        MismatchError: samples or a journal are of other inputs.
    """
    chosen = estimator or Calibrated(progress=progress)
    texts = [text] if isinstance(text, str) else list(text)
    _check_texts(texts, chosen, robust, risk)
    whole("protect", protect)
    rounding = method_of(method)
    source = Checkpoint.open(resolve(model))
    tables, passes = [], []
    for words in texts:
        evidence = gather(
            source, chosen.needs, words, tokens, include, seed, progress, max_memory, rounding
        )
        tables.append(chosen.estimate(evidence, formats or default_formats(evidence.units)))
        passes.append((evidence.coverage(), _standing_out(evidence)))
        del evidence  # one model and its memory at a time
    table = as_one(tables, robust or "mean", risk) if len(tables) > 1 else tables[0]
    table, _ = isotonic(table)
    on_disk = walk_headers(source.config, source.shapes, include)
    folder_bytes = sum(f.stat().st_size for f in source.folder.iterdir() if f.is_file())
    large = _union([found for _, found in passes], max)
    provenance = {
        **table.provenance,
        "model": source.fingerprint,
        "fixed_bytes": checkpoint.fixed_bytes(source, on_disk),
        "source_bytes": folder_bytes,
        "include": sorted(include),
        "coverage": _union([found for found, _ in passes], min),
        "super_experts": large,
    }
    return protected(replace(table, provenance=provenance), large, protect)


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


def quantize(
    model: str | Path,
    plan: BitPlan,
    out: str | Path,
    *,
    method: str | Rounding | None = None,
    force: bool = False,
    text: str = BUILTIN,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model quantized as the plan says, piece by piece, little of it in memory.

    What is done grows in a hidden folder beside `out`: after a kill or an error the same call
    goes on from there, and ends with the same bytes.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        plan: made from a table of this model.
        out: folder to write; appears when all of it is there.
        method: how to round, "rtn", "hqq" or "gptq"; what the plan was made for when not given.
        force: round in another way than the plan's costs are of.
        text: of methods that calibrate, a file or "builtin".
        tokens: how much of it to use.
        seed: of the calibration.
        max_shard_size: most bytes of a file, such as "5GB"; a larger tensor has its own.
        overwrite: replace `out` if it exists, and what a run with other inputs left.
        progress: called with ("quantize", done, of).

    Returns:
        "predicted" and "written" bytes of the units, which are equal; those of the "checkpoint",
        every file counted; the "method"; and, of methods that calibrate, "few_tokens": layer,
        expert, projection and tokens of matrices that saw too few to be rounded by them.

    Raises:
        MismatchError: the plan is for another model or method, or an unfinished run had other
            inputs.
        ModelError: a weight is NaN or infinite.
        InputError: `out` exists, or the disk has no room for it.
        BitknapError: the disk is full.
    """
    rounding = planned(plan, method, force=force)
    source = Checkpoint.open(resolve(model))
    inputs, about, few = None, {}, []
    if rounding.needs_inputs:
        files.check_free_name(Path(out), overwrite=overwrite)
        checkpoint.check_plan(source, plan)
        roles = checkpoint.roles_of(plan.units)
        evidence = gather(
            source, frozenset(), text, tokens, roles, seed, progress, rounding=rounding
        )
        cut = layout_for(plan.units, evidence.layout)
        inputs = inputs_of_blocks(cut.units, evidence.units, evidence.inputs)
        about = {name: evidence.provenance[name] for name in ("text", "tokens", "seed")}
        few = too_few_tokens(evidence, rounding) if isinstance(rounding, Gptq) else []
    sizes = checkpoint.save(
        source,
        plan,
        Path(out),
        rounding=rounding,
        inputs=inputs,
        about=about,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )
    return {**sizes, "method": rounding.name, "few_tokens": few}


def load(
    model: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: torch.device | str = "cpu",
    packed: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Any:
    """Return the transformers model of a packed or plain checkpoint.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        dtype: "auto" is the checkpoint's own.
        device: where it goes.
        packed: keep weights packed in memory: on a CUDA device kernels run the experts, elsewhere
            those of an expert are dequantized when it is used; otherwise all are dequantized at
            once. When not given, packed on a CUDA device and not elsewhere.
        cache_bytes: how much may be held dequantized as well, when packed.
    """
    return loading.load(
        resolve(model), dtype, device=device, packed=packed, cache_bytes=cache_bytes
    )


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    text: str = BUILTIN,
    tokens: int = EVALUATION_TOKENS,
) -> Losses:
    """Measure a model on a text that calibration did not see, against a reference model.

    Args:
        model: what to measure.
        reference: what KL and top-1 agreement refer to; the model itself when not given.
        text: evaluation text, a file or "builtin".
        tokens: how much of it to use.

    Raises:
        MismatchError: the two have different tokenizers.
        ModelError: a weight is NaN or infinite.
    """
    folder = resolve(model)
    windows = evaluation_windows(folder, text, tokens)
    checkpoint.check_finite(Checkpoint.open(folder))
    measured = loading.load(folder, torch.float32)
    if reference is None:
        return compare(measured, measured, windows)
    other = resolve(reference)
    if not torch.equal(windows, evaluation_windows(other, text, tokens)):
        raise MismatchError(
            f"{model} and {reference} split the text differently; compare models of one tokenizer"
        )
    return compare(measured, loading.load(other, torch.float32), windows)
