"""Losses of a checkpoint, its original and the best uniform recipe, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitknap.allocation import BitPlan, uniform_plans
from bitknap.api.calibration import evaluation_windows, saying_what_fits
from bitknap.api.former_keywords import former_keywords, group
from bitknap.api.live import LiveModel, Model, opened
from bitknap.api.requests import default_formats
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.variant_kl import Replayed
from bitknap.estimators.evidence.variants import Changing, Variant, VariantSweep
from bitknap.estimators.judging.by_layer import through
from bitknap.estimators.judging.memory import judging_layer_bytes, way_to_judge
from bitknap.estimators.measuring.documents import TextLike, text_of
from bitknap.estimators.measuring.kl_replay import Losses, Replay, compare, standard_error
from bitknap.estimators.measuring.language_model import loaded
from bitknap.estimators.measuring.text import BUILTIN
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.peak_memory import Way
from bitknap.estimators.sweep.text_stream import losses_between
from bitknap.progress import Progress
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check
from bitknap.quantization.packed.folder import PLAN, roles_of
from bitknap.quantization.packed.opened import open_weights
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.source.devices import (
    AUTO,
    HERE,
    Computing,
    device_of,
    dtype_of,
    memory_limit,
)
from bitknap.quantization.source.source import Stored

EVALUATION_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What models are measured on, and where.

    Attributes:
        text: Evaluation text: a path, "builtin", a list of strings, or token windows.
        tokens: Number of tokens of it to use.
        device: Where models in folders run: "auto" (a GPU if there is one), "cpu", "cuda" or
            "cuda:N". A live model runs where it is.
        dtype: Dtype of matrix products in models in folders: "auto" (bfloat16 on a GPU, float32 on
            the CPU), "float32" or "bfloat16". All else is computed in float32.
        max_memory: Maximum bytes; models that would take more are run one decoder layer at a time,
            with the same losses. None sets no bound. It holds for the CPU.
        device_memory: Maximum bytes on a GPU; what is free there when not given.
    """

    text: TextLike = BUILTIN
    tokens: int = EVALUATION_TOKENS
    device: str | torch.device = AUTO
    dtype: str | torch.dtype = AUTO
    max_memory: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Losses on one text, against one reference.

    Attributes:
        ours: those of the model that is measured.
        original: those of the reference.
        uniform: the best uniform recipe of the reference: its name, plan and losses, if requested.
    """

    ours: Losses
    original: Losses
    uniform: tuple[str, BitPlan, Losses] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Models that can be read, and a text for both.

    Attributes:
        model: the model to measure.
        reference: the model that it is compared with; the same one if there is none.
        windows: the text.
        where: where and how models in folders compute.
        most: maximum bytes of the CPU; None sets no bound.
        own: maximum bytes of another device; None stands for what is free there.
    """

    model: Path | LiveModel
    reference: Path | LiveModel
    windows: Windows
    where: Computing
    most: int | None
    own: int | None

    @classmethod
    def of(cls, model: Model, reference: Model | None, on: Evaluation) -> _Asked:
        """Return what was asked for, after all checks that need no run of a model.

        Raises:
            MismatchError: the two have different tokenizers.
            ModelError: a weight is NaN or infinite, or the model predicts no text.
            InputError: the device is not there, or the dtype is none.
        """
        device = device_of(on.device)
        dtype = dtype_of(on.dtype, device)
        asked, given = opened(model), text_of(on.text)
        other = asked if reference is None else opened(reference)
        folders = [one for one in dict.fromkeys((asked, other)) if isinstance(one, Path)]
        sources = {folder: Checkpoint.open(folder) for folder in folders}
        for folder in folders:
            check(folder, reads_text=True)
        windows = evaluation_windows(asked, given, on.tokens)
        if isinstance(asked, Path):
            writer.check_finite(sources[asked])
        if reference is not None and not torch.equal(
            windows.ids, evaluation_windows(other, given, on.tokens).ids
        ):
            raise MismatchError(
                f"{_named(model)} and {_named(reference)} split the text differently; compare "
                "models with the same tokenizer"
            )
        return cls(
            model=asked,
            reference=other,
            windows=windows,
            where=Computing(device=device, dtype=dtype, host=on.max_memory),
            most=on.max_memory,
            own=on.device_memory,
        )

    def way(self, needs: Collection[str] = ()) -> Way:
        """Return whether the models are run whole or layer by layer.

        Raises:
            InputError: neither is within `max_memory`.
        """
        limit = memory_limit(self.where.device, self.most, self.own)
        live = isinstance(self.model, LiveModel) or isinstance(self.reference, LiveModel)
        if live and self.most is not None:
            raise InputError(
                "`max_memory`: a live model is in memory already; leave it out, or pass folders"
            )
        if live or limit is None:
            return "whole"
        return way_to_judge(self._sources(), self.windows.ids.numel(), limit, needs)

    def least(self) -> int:
        """Return about how many bytes the models in folders take one decoder layer at a time."""
        return judging_layer_bytes(self._sources(), self.windows.ids.numel())

    def _sources(self) -> list[Stored]:
        folders = dict.fromkeys((self.model, self.reference))
        return [open_weights(folder) for folder in folders if isinstance(folder, Path)]


@former_keywords(evaluation=group(Evaluation, "device", "max_memory"))
def evaluate(
    model: Model,
    reference: Model | None = None,
    *,
    text: TextLike | None = None,
    tokens: int | None = None,
    evaluation: Evaluation | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Measure a model on a text that calibration did not see, against a reference model.

    Args:
        model: The model to measure: a folder, a hub id, "reference:NAME", or a `LiveModel`, run
            as it is.
        reference: The model that KL and top-1 agreement refer to; `model` itself when not given.
        text: Shorthand for `evaluation=Evaluation(text=…)`; the bundled text when not given.
        tokens: Shorthand for `evaluation=Evaluation(tokens=…)`.
        evaluation: The text, and where models run.
        progress: Called with (what, done, of).

    Raises:
        MismatchError: The two have different tokenizers.
        ModelError: A weight is NaN or infinite, the model predicts no text, or it cannot be run
            layer by layer.
        InputError: `max_memory` is too low, or the device is not there.
        DeviceMemoryError: The device's memory does not hold one window of text.
        BitknapError: The disk has no room for the activations.
    """
    on = evaluation or Evaluation()
    if text is not None:
        on = replace(on, text=text)
    if tokens is not None:
        on = replace(on, tokens=tokens)
    return _measured(_Asked.of(model, reference, on), progress)


def _measured(asked: _Asked, progress: Progress | None) -> Losses:
    """Return the losses of the model, with the models in memory or layer by layer."""
    if asked.way() == "layers":
        return _by_layer(asked, None, progress).ours
    return _in_memory(asked)


def rows_for(
    model: str,
    reference: str | None,
    on: Evaluation,
    *,
    uniform: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Return one row per model: the reference, the best uniform recipe if requested, and `model`.

    Raises:
        InputError: a uniform recipe is requested, but `model` is not a packed checkpoint; or
            `max_memory` is too low.
    """
    if reference is None:
        return {model: summary(_measured(_Asked.of(model, None, on), progress))}
    folder = resolve(model)
    plan = BitPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    if uniform and plan is None:
        raise InputError(
            f"{model}: not a packed checkpoint, and `uniform` needs one to compare at its bytes"
        )
    asked, size = _Asked.of(model, reference, on), plan if uniform else None
    if asked.way({"kl"} if uniform else ()) == "layers":
        judged = _by_layer(asked, size, progress)
    else:
        judged = _all_in_memory(asked, size, progress)
    rows = {"original": summary(judged.original)}
    ours = summary(judged.ours, plan.total_bytes if plan else None)
    if judged.uniform is not None:
        name, at, losses = judged.uniform
        rows[f"uniform {name}"] = summary(losses, at.total_bytes)
        paired = losses.kl - judged.ours.kl
        ours |= {"kl_gain": float(paired.mean()), "kl_gain_se": standard_error(paired)}
    return rows | {"ours" if plan else model: ours}


def summary(losses: Losses, nbytes: int | None = None) -> dict[str, Any]:
    """Return losses as JSON values, with the `bytes` of the units if known."""
    row = {
        "perplexity": losses.perplexity,
        "kl": float(losses.kl.mean()),
        "kl_se": standard_error(losses.kl),
        "top1": float(losses.top1.mean()),
    }
    return row if nbytes is None else row | {"bytes": nbytes}


def _in_memory(asked: _Asked) -> Losses:
    """Return the losses of the model, with both models in memory."""
    with saying_what_fits(asked.least), _running(asked, asked.model) as measured:
        if asked.reference == asked.model:
            return compare(measured, measured, asked.windows)
        with _running(asked, asked.reference) as original:
            return compare(measured, original, asked.windows)


def _all_in_memory(asked: _Asked, size: BitPlan | None, progress: Progress | None) -> Judged:
    """Return all losses, with both models in memory; `size` asks for a recipe of its bytes."""
    ours = _in_memory(asked)
    original = replace(asked, model=asked.reference)
    uniform = None
    if size is not None:
        assert isinstance(asked.reference, Path)
        uniform = best_uniform_of(asked.reference, size, asked.windows, asked.where, progress)
    return Judged(ours=ours, original=_in_memory(original), uniform=uniform)


def _by_layer(asked: _Asked, size: BitPlan | None, progress: Progress | None) -> Judged:
    """Return all losses, with one layer in memory; `size` asks for a recipe of its bytes."""
    assert isinstance(asked.model, Path)
    assert isinstance(asked.reference, Path)
    original = through(
        open_weights(asked.reference),
        asked.windows,
        None if size is None else roles_of(size.units),
        varied=size is not None,
        where=asked.where,
        progress=progress,
    )
    ours = original
    if asked.model != asked.reference:
        ours = through(
            open_weights(asked.model), asked.windows, where=asked.where, progress=progress
        )
    known, measured = losses_between(original.reference, [original.reference, ours.reference])
    uniform = None
    if size is not None:
        layout = original.run.skeleton.layout
        uniform = best_uniform(original, layout, size.total_bytes, progress)
    return Judged(ours=measured, original=known, uniform=uniform)


def best_uniform_of(
    reference: str | Path,
    plan: BitPlan,
    windows: Windows,
    where: Computing = HERE,
    progress: Progress | None = None,
) -> tuple[str, BitPlan, Losses]:
    """Return the best uniform recipe for a model at a plan's bytes: name, plan, losses."""
    live = loaded(resolve(reference), where)
    layout = walk(live, roles_of(plan.units))
    replay = Replay(live, layout, windows, cache=False)
    return best_uniform(Replayed(replay), layout, plan.total_bytes, progress)


def best_uniform(
    sweep: VariantSweep, layout: Layout, nbytes: int, progress: Progress | None = None
) -> tuple[str, BitPlan, Losses]:
    """Return the uniform recipe with the lowest KL on a text, at about `nbytes`.

    The recipe is chosen on the text that it is judged on, which favours the recipe.

    Args:
        sweep: measures variants of the model on the text.
        layout: the model's units.
        nbytes: bytes that a recipe may take.
        progress: called with ("uniform recipes", done, of).

    Raises:
        InputError: no recipe is that small.
    """
    plans = uniform_plans(layout.units, default_formats(layout.units), nbytes)
    if not plans:
        raise InputError(f"no uniform recipe fits in {nbytes:,} bytes; evaluate without `uniform`")
    found: dict[int, Losses] = {}
    for number, losses in sweep.losses(list(map(Variant.plan, plans)), Changing(layout=layout)):
        found[number] = losses
        if progress:
            progress("uniform recipes", len(found), len(plans))
    divergence = np.array([found[number].kl.mean() for number in range(len(plans))])
    best = int(np.argmin(np.nan_to_num(divergence, nan=np.inf)))
    return name_of(plans[best]), plans[best], found[best]


def name_of(plan: BitPlan) -> str:
    """Return the formats that a plan uses, joined by "+"."""
    return "+".join(plan.formats[c].name for c in sorted({int(c) for c in plan.choice}))


def _running(asked: _Asked, model: Path | LiveModel) -> contextlib.AbstractContextManager[Any]:
    """Return a context that yields the model to run: loaded in float32, or live."""
    if isinstance(model, LiveModel):
        return model.evaluating()
    return contextlib.nullcontext(loaded(model, asked.where, packed=False))


def _named(model: Model) -> str:
    return "the live model" if isinstance(model, LiveModel) else str(model)
