"""Losses of a checkpoint, its original and the best uniform recipe, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bitknap.allocation import BitPlan, uniform_plans
from bitknap.api.calibration import evaluation_windows
from bitknap.api.quantizing import evaluate
from bitknap.api.requests import default_formats
from bitknap.errors import InputError
from bitknap.estimators.measuring.kl_replay import Losses, Replay, standard_error
from bitknap.estimators.measuring.windows import Windows
from bitknap.progress import Progress
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.folder import PLAN, roles_of
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.stacks.apply import applied


def rows_for(
    model: str,
    reference: str | None,
    text: str,
    tokens: int,
    *,
    uniform: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Return one row per model: the reference, the best uniform recipe if requested, and `model`.

    Raises:
        InputError: a uniform recipe is requested, but `model` is not a packed checkpoint.
    """
    ours = evaluate(model, reference, text=text, tokens=tokens)
    if reference is None:
        return {model: summary(ours)}
    folder = resolve(model)
    plan = BitPlan.load(folder / PLAN) if (folder / PLAN).is_file() else None
    original = evaluate(reference, text=text, tokens=tokens)
    rows = {"original": summary(original)}
    if uniform:
        if plan is None:
            raise InputError(
                f"{model}: not a packed checkpoint, and `uniform` needs one to compare at its bytes"
            )
        windows = evaluation_windows(resolve(reference), text, tokens)
        name, at, losses = best_uniform_of(reference, plan, windows, progress)
        rows[f"uniform {name}"] = summary(losses, at.total_bytes)
    rows["ours" if plan else model] = summary(ours, plan.total_bytes if plan else None)
    if uniform and plan is not None:
        paired = losses.kl - ours.kl
        rows["ours"] |= {"kl_gain": float(paired.mean()), "kl_gain_se": standard_error(paired)}
    return rows


def summary(losses: Losses, nbytes: int | None = None) -> dict[str, Any]:
    """Return losses as JSON values, with the `bytes` of the units if known."""
    row = {
        "perplexity": losses.perplexity,
        "kl": float(losses.kl.mean()),
        "kl_se": standard_error(losses.kl),
        "top1": float(losses.top1.mean()),
    }
    return row if nbytes is None else row | {"bytes": nbytes}


def best_uniform_of(
    reference: str, plan: BitPlan, windows: Windows, progress: Progress | None = None
) -> tuple[str, BitPlan, Losses]:
    """Return the best uniform recipe for a model at a plan's bytes: name, plan, losses."""
    live = load(resolve(reference), torch.float32)
    layout = walk(live, roles_of(plan.units))
    return best_uniform(
        Replay(live, layout, windows, cache=False), layout, plan.total_bytes, progress
    )


def best_uniform(
    replay: Replay, layout: Layout, nbytes: int, progress: Progress | None = None
) -> tuple[str, BitPlan, Losses]:
    """Return the uniform recipe with the lowest KL on the replayed text, at about `nbytes`.

    The recipe is chosen on the text that it is judged on, which favours the recipe.
    """
    plans = uniform_plans(layout.units, default_formats(layout.units), nbytes)
    if not plans:
        raise InputError(f"no uniform recipe fits in {nbytes:,} bytes; evaluate without `uniform`")
    divergence = []
    for done, plan in enumerate(plans):
        if progress:
            progress("uniform recipes", done, len(plans))
        with applied(replay.model, layout, plan):
            divergence.append(replay.kl())
    best = plans[int(np.argmin(np.nan_to_num(divergence, nan=np.inf)))]
    with applied(replay.model, layout, best):
        return name_of(best), best, replay.measure()


def name_of(plan: BitPlan) -> str:
    """Return the formats that a plan uses, joined by "+"."""
    return "+".join(plan.formats[c].name for c in sorted({int(c) for c in plan.choice}))
