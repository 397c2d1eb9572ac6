"""The public verbs that need torch: estimate, quantize, load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation import BitPlan
from bitknap.allocation.problem.format import GROUP_SIZES
from bitknap.api.calibration import gather, readings_about, too_few_tokens
from bitknap.api.estimation import estimate
from bitknap.api.former_keywords import former_keywords, group
from bitknap.api.live import LiveModel, Model, check_named, on_disk
from bitknap.api.requests import (
    CALIBRATION_TOKENS,
    Calibration,
    Packing,
    Resume,
    default_formats,
)
from bitknap.disk.outputs import check_apart, check_output
from bitknap.estimators.measuring.readings import beside
from bitknap.progress import Progress
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.resume import Partial
from bitknap.quantization.rounding.methods import Gptq, planned
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.dequantized_cache import CACHE_BYTES
from bitknap.quantization.source.checkpoint import Checkpoint, places, resolve
from bitknap.quantization.stacks.row_blocks import inputs_of_blocks, layout_for
from bitknap.quantization.transforms import transformed_model

__all__ = [
    "CALIBRATION_TOKENS",
    "GROUP_SIZES",
    "default_formats",
    "estimate",
    "load",
    "quantize",
]


@former_keywords(
    packing=group(Packing, "force", "max_shard_size", method="rounding"),
    calibration=group(Calibration, "text", "tokens", "max_memory", "seed"),
    resume=group(Resume, "journal", "overwrite"),
)
def quantize(
    model: Model,
    plan: BitPlan,
    out: str | Path,
    *,
    packing: Packing | None = None,
    calibration: Calibration | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model quantized as the plan says, piece by piece, with little of it in memory.

    Finished pieces are kept in a hidden folder next to `out`: after a kill or an error the same
    call continues from there and writes the same bytes. If the plan is for a permuted or rotated
    model, the transformed weights are first written to a second, temporary hidden folder.

    Args:
        model: A folder, a hub id, "reference:NAME", or a `LiveModel`, which is saved to a temporary
            folder first.
        plan: A plan made from a table of this model.
        out: Folder to write; it appears once it is complete.
        packing: How to round, and the size of files; rounds as the plan says when not given.
        calibration: Text, tokens, seed and memory of rounding methods that calibrate. The roles
            come from the plan, the rounding from `packing`.
        resume: `journal` keeps each layer finished by a layer-by-layer calibration, and may be the
            one that `estimate` used; `overwrite` replaces an existing `out`, and the remains of
            a run with other inputs.
        progress: Called with ("quantize", done, of).

    Returns:
        "predicted" and "written" bytes of the units, which are equal; the bytes of the
        "checkpoint", all files counted; how many tensors besides the units were "decoded" from
        fewer than 16 bits, and their "decoded_bytes" and "stored_bytes"; the "method"; for methods
        that calibrate, "few_tokens": layer, expert, projection and tokens of matrices that saw too
        few tokens for the method; and "left_out", which maps each reason for not copying files of
        the model's folder to their names.

    Raises:
        MismatchError: The plan is for another model or method, or an unfinished run had other
            inputs.
        ModelError: A weight is NaN or infinite, or transformers could not load the output.
        InputError: `out` exists, the disk has no room for it, or `max_memory` is too low.
        BitknapError: The disk is full.
    """
    how, kept = packing or Packing(), resume or Resume()
    rounding = planned(plan, how.rounding, force=how.force)
    if not isinstance(model, LiveModel):
        check_named(model)
        check_apart(Path(out), places(model))  # check before fetching anything
    asked = replace(calibration or Calibration(), include=roles_of(plan.units), rounding=rounding)
    with on_disk(model) as place:
        origin = Checkpoint.open(resolve(place))
        return _written(origin, plan, Path(out), asked, how.max_shard_size, kept, progress)


def _written(
    origin: Checkpoint,
    plan: BitPlan,
    out: Path,
    asked: Calibration,
    max_shard_size: int | str,
    resume: Resume,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write a checkpoint quantized as the plan says; return the result of `quantize`."""
    check_output(
        out,
        "folder",
        overwrite=resume.overwrite,
        inputs=[origin.folder],
        copied_from=origin.folder,
    )
    left_out = {why: list(names) for why, names in origin.companions.left.items()}
    check_source(origin, asked.include, reads_text=asked.method.needs_inputs)
    with planned_source(origin, plan, out) as source:
        rounded, few = rounded_for(origin, source, plan, asked, resume, progress)
        sizes = writer.save(
            source,
            plan,
            out,
            rounded,
            max_shard_size=max_shard_size,
            overwrite=resume.overwrite,
            progress=progress,
        )
    return {**sizes, "method": asked.method.name, "few_tokens": few, "left_out": left_out}


def rounded_for(
    origin: Checkpoint,
    source: Checkpoint,
    plan: BitPlan,
    asked: Calibration,
    resume: Resume,
    progress: Progress | None,
) -> tuple[writer.Rounded, list[tuple[int, int, str, int]]]:
    """Return the rounding, the inputs if it needs them, and the units that saw too few tokens."""
    if not asked.method.needs_inputs:
        return writer.Rounded(rounding=asked.method, device=asked.on_device), []
    writer.check_plan(source, plan)
    # A pass in one piece is quick, and none of it is kept.
    journal = resume.journal if asked.memory is not None else None
    about = {} if journal is None else _depends_on(origin, asked, plan)
    with beside(journal, about, overwrite=resume.overwrite) as readings:
        evidence = gather(source, frozenset(), asked, readings=readings, progress=progress)
    cut = layout_for(plan.units, evidence.layout)
    rounding = asked.method
    rounded = writer.Rounded(
        rounding=rounding,
        inputs=inputs_of_blocks(cut.units, evidence.units, evidence.inputs),
        about={name: evidence.provenance[name] for name in ("text", "tokens", "seed")},
        device=asked.on_device,
    )
    return rounded, too_few_tokens(evidence, rounding) if isinstance(rounding, Gptq) else []


def _depends_on(origin: Checkpoint, asked: Calibration, plan: BitPlan) -> dict[str, Any]:
    """Return the inputs that calibration for a plan depends on, as `estimate` records them."""
    recipe = transformed_model.recipe_of(plan.header)
    blocks = None if recipe.order is None else recipe.order.blocks
    return readings_about(origin, [asked], rotation=recipe.rotation, blocks=blocks)


@contextlib.contextmanager
def planned_source(origin: Checkpoint, plan: BitPlan, out: Path) -> Iterator[Checkpoint]:
    """Yield the model that a plan is for, or the transformed copy that it describes, beside `out`.

    The copy is deleted afterwards, unless pieces read from it are kept.
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
        dtype: dtype of the model; "auto" is the checkpoint's own.
        device: device that the model is loaded on.
        packed: True keeps weights packed in memory: on a CUDA device, kernels run the experts;
            elsewhere, an expert is dequantized when it is used. False dequantizes all weights at
            once. When not given, weights stay packed on a CUDA device only.
        cache_bytes: bytes of dequantized weights to cache when packed.
    """
    return loading.load(
        resolve(model), dtype, device=device, packed=packed, cache_bytes=cache_bytes
    )
