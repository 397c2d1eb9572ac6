"""The public verbs that need torch: estimate, quantize, load, evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation import BitPlan
from bitknap.allocation.problem.format import GROUP_SIZES
from bitknap.api.calibration import (
    Calibration,
    evaluation_windows,
    gather,
    readings_about,
    too_few_tokens,
)
from bitknap.api.estimation import CALIBRATION_TOKENS, default_formats, estimate
from bitknap.disk.outputs import check_apart, check_output
from bitknap.errors import MismatchError
from bitknap.estimators.measuring.kl_replay import Losses, compare
from bitknap.estimators.measuring.readings import beside
from bitknap.estimators.measuring.text import BUILTIN
from bitknap.progress import Progress
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check, check_source
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.resume import Partial
from bitknap.quantization.packed.shards import MAX_SHARD_SIZE
from bitknap.quantization.rounding.methods import Gptq, planned
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.dequantized_cache import CACHE_BYTES
from bitknap.quantization.source.checkpoint import Checkpoint, places, resolve
from bitknap.quantization.stacks.row_blocks import inputs_of_blocks, layout_for
from bitknap.quantization.transforms import transformed_model

__all__ = [
    "CALIBRATION_TOKENS",
    "EVALUATION_TOKENS",
    "GROUP_SIZES",
    "default_formats",
    "estimate",
    "evaluate",
    "load",
    "quantize",
]

EVALUATION_TOKENS = 32_768


def quantize(
    model: str | Path,
    plan: BitPlan,
    out: str | Path,
    *,
    method: str | Rounding | None = None,
    force: bool = False,
    text: str = BUILTIN,
    tokens: int = CALIBRATION_TOKENS,
    max_memory: int | None = None,
    seed: int = 0,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    journal: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model quantized as the plan says, piece by piece, little of it in memory.

    What is done grows in a hidden folder beside `out`: after a kill or an error the same call
    goes on from there, and ends with the same bytes. A plan of a permuted or rotated model says
    how that is made: its weights are written to a second hidden folder first, which goes again.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        plan: made from a table of this model.
        out: folder to write; appears when all of it is there.
        method: how to round, "rtn", "hqq" or "gptq"; what the plan was made for when not given.
        force: round in another way than the plan's costs are of.
        text: text of methods that calibrate, a file or "builtin".
        tokens: how much of it to use.
        max_memory: bytes; when calibrating would take more, it goes layer by layer.
        seed: random seed of the calibration.
        max_shard_size: most bytes of a file, such as "5GB"; a larger tensor has its own.
        journal: file that keeps each layer that a calibration layer by layer has finished, such as
            the one that `estimate` was given; `journal.forget` it when `out` is there.
        overwrite: replace `out` if it exists, and what a run with other inputs left.
        progress: called with ("quantize", done, of).

    Returns:
        "predicted" and "written" bytes of the units, which are equal; those of the "checkpoint",
        every file counted; how many tensors beside the units were "decoded" from fewer bits than
        16, and their "decoded_bytes" and "stored_bytes"; the "method"; of methods that calibrate,
        "few_tokens": layer, expert, projection and tokens of matrices that saw too few to be
        rounded by them; and "left_out": why files of the model's folder were not copied, to their
        names.

    Raises:
        MismatchError: the plan is for another model or method, or an unfinished run had other
            inputs.
        ModelError: a weight is NaN or infinite, or transformers could not load what is written.
        InputError: `out` exists, the disk has no room for it, or `max_memory` does not suffice.
        BitknapError: the disk is full.
    """
    rounding = planned(plan, method, force=force)
    check_apart(Path(out), places(model))  # before anything is fetched
    inputs, about, few = None, {}, []
    origin = Checkpoint.open(resolve(model))
    check_output(
        Path(out),
        "folder",
        overwrite=overwrite,
        inputs=[origin.folder],
        copied_from=origin.folder,
    )
    left_out = {why: list(names) for why, names in origin.companions.left.items()}
    roles = roles_of(plan.units)
    check_source(origin, roles, reads_text=rounding.needs_inputs)
    with _planned(origin, plan, Path(out)) as source:
        if rounding.needs_inputs:
            writer.check_plan(source, plan)
            asked = Calibration(
                text=text,
                tokens=tokens,
                include=roles,
                seed=seed,
                rounding=rounding,
                max_memory=max_memory,
            )
            # In one piece the pass is quick, and nothing of it is kept.
            kept = journal if max_memory is not None else None
            about = {} if kept is None else _depends_on(origin, asked, plan)
            with beside(kept, about, overwrite=overwrite) as readings:
                evidence = gather(source, frozenset(), asked, readings=readings, progress=progress)
            cut = layout_for(plan.units, evidence.layout)
            inputs = inputs_of_blocks(cut.units, evidence.units, evidence.inputs)
            about = {name: evidence.provenance[name] for name in ("text", "tokens", "seed")}
            few = too_few_tokens(evidence, rounding) if isinstance(rounding, Gptq) else []
        sizes = writer.save(
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
    return {**sizes, "method": rounding.name, "few_tokens": few, "left_out": left_out}


def _depends_on(origin: Checkpoint, asked: Calibration, plan: BitPlan) -> dict[str, Any]:
    """Return what calibrating for a plan depends on, as `estimate` says it."""
    recipe = transformed_model.recipe_of(plan.header)
    blocks = None if recipe.order is None else recipe.order.blocks
    return readings_about(origin, [asked], rotation=recipe.rotation, blocks=blocks)


@contextlib.contextmanager
def _planned(origin: Checkpoint, plan: BitPlan, out: Path) -> Iterator[Checkpoint]:
    """Yield what a plan is for: the model, or the twin that the plan describes, made beside `out`.

    The twin goes again, unless pieces that were read from it are kept.
    """
    folder = transformed_model.beside(out)
    try:
        yield transformed_model.planned(origin, plan.header, plan.model, folder)
    finally:
        if not Partial(out=out, lines=()).folder.exists():
            transformed_model.forget(out)


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
        ModelError: a weight is NaN or infinite, or the model predicts no text.
    """
    folder = resolve(model)
    other = folder if reference is None else resolve(reference)
    # What cannot be read is refused before the work.
    source, _ = Checkpoint.open(folder), Checkpoint.open(other)
    for one in dict.fromkeys((folder, other)):
        check(one, reads_text=True)
    windows = evaluation_windows(folder, text, tokens)
    writer.check_finite(source)
    measured = loading.load(folder, torch.float32)
    if reference is None:
        return compare(measured, measured, windows)
    if not torch.equal(windows.ids, evaluation_windows(other, text, tokens).ids):
        raise MismatchError(
            f"{model} and {reference} split the text differently; compare models of one tokenizer"
        )
    return compare(measured, loading.load(other, torch.float32), windows)
