"""The closed loop on a model, and the gate that keeps its plan no worse than a uniform recipe.

Plans are measured on calibration text. At the end, the best plan and the best uniform recipe of at
most its bytes are measured on calibration text that neither calibration nor the loop has read. If
the recipe loses no more than the plan there, the recipe is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import BitPlan, Budget, CostTable, Limit, Problem
from bitknap.allocation.refinement.loop import Refine, Refined
from bitknap.allocation.solvers.solving import within
from bitknap.allocation.tradeoffs.uniform_recipes import uniform_plans_within
from bitknap.api.calibration import encoded, gather, longest_of
from bitknap.api.evaluation import name_of
from bitknap.api.former_keywords import former_keywords, group
from bitknap.api.live import Model, on_disk
from bitknap.api.plan_measures import Loop, Sample, losses_of, measures
from bitknap.api.requests import Calibration, Refinement, Resume
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.judging.by_layer import all_through
from bitknap.estimators.judging.memory import way_to_measure_plans
from bitknap.estimators.measuring.documents import TokenWindows, text_of
from bitknap.estimators.measuring.kl_replay import Losses, Replay, standard_error
from bitknap.estimators.measuring.readings import Readings, beside
from bitknap.estimators.measuring.text import Encoded, document_of
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.in_memory import digest_of
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.rounding.memo import Remembered
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.rounding.rounding import recorded_for
from bitknap.quantization.source.architecture import config_of
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.source.devices import dtype_name

# Tokens of the calibration text that the gate judges on.
GATE_TOKENS = 8_192
# A plan is measured on one part of the text after another, while it can still be the best.
PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """The plan to write, and why.

    Attributes:
        plan: the plan that the gate lets through.
        refined: the result of the loop.
        recipe: the best uniform recipe's formats; "" if none is within the limits.
        ours: losses of the loop's plan on the gate's text.
        uniform: losses of the recipe on the same text; None without a recipe.
        passed: whether the loop's plan is the better one.
    """

    plan: BitPlan
    refined: Refined
    recipe: str
    ours: Losses
    uniform: Losses | None
    passed: bool

    def facts(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        first, best = self.refined.steps[0], self.refined.best
        row: dict[str, Any] = {
            "evaluations": len(self.refined.steps),
            "accepted": sum(step.accepted for step in self.refined.steps) - 1,
            "kl_before": float(first.losses.mean()),
            "kl_after": float(best.losses.mean()),
            "gate_passed": self.passed,
            "gate_kl": float(self.ours.kl.mean()),
        }
        if self.uniform is not None:
            paired = self.uniform.kl - self.ours.kl
            row |= {
                "gate_uniform": self.recipe,
                "gate_uniform_kl": float(self.uniform.kl.mean()),
                "gate_gain": float(paired.mean()),
                "gate_gain_se": standard_error(paired),
            }
        return row


def loop_windows(
    document: Encoded | TokenWindows, taken: Tensor, tokens: int
) -> tuple[Windows, Windows]:
    """Return the windows of a text that plans are measured on, and the windows of the gate.

    All lie on the grid of `taken`; the gate's windows are in neither `taken` nor the loop's.

    Args:
        document: the calibration text.
        taken: windows that calibration read, int64 [windows, length].
        tokens: number of tokens to measure plans on.

    Raises:
        InputError: the text is too short for both.
    """
    length = taken.shape[1]
    loop, every = document.windows(max(tokens, length), length), document.every(length)
    read = {bytes(window.numpy()) for window in (*taken, *loop.ids)}
    rest = [window for window in every.ids if bytes(window.numpy()) not in read]
    count = min(len(rest), max(1, GATE_TOKENS // length))
    if count < 2:
        raise InputError(
            f"`refine`: calibration and the loop read all but {len(rest)} of the text's "
            f"{len(every)} windows of {length} tokens, and the gate needs 2; lower "
            "`calibration.tokens` or `refinement.tokens`, or add text"
        )
    picked = np.arange(count) * len(rest) // count
    return loop, replace(every, ids=torch.stack([rest[at] for at in picked.tolist()]))


def open_loop(
    source: Checkpoint,
    evidence: Evidence,
    asked: Calibration,
    tokens: int,
    *,
    judged: Windows | None = None,
    progress: Progress | None = None,
) -> Loop:
    """Return a loop on the model of a calibration pass, or layer by layer if it is not in memory.

    Args:
        source: the model.
        evidence: its calibration pass.
        asked: the calibration request, with one text.
        tokens: number of tokens to measure plans on.
        judged: a text of the caller's, to measure whole plans on.
        progress: called with (what, done, of).

    Raises:
        InputError: the text is too short.
    """
    text = document_of(text_of(asked.only_text), "calibration")
    document = encoded(source.folder, text, config_of(source.folder))
    taken = document.windows(asked.tokens, longest_of(config_of(source.folder))).ids
    windows, gate = loop_windows(document, taken, tokens)
    parts, others = _parts(windows), [gate, *([] if judged is None else [judged])]
    samples: list[Sample] = []
    if evidence.replay is not None:
        model, layout = evidence.replay.model, evidence.layout
        samples += [Replay(model, layout, part) for part in parts]
        samples += [Replay(model, layout, other, cache=False) for other in others]
    else:
        streams = all_through(
            source,
            [*parts, *others],
            asked.include,
            varied=True,
            where=asked.computing,
            progress=progress,
        )
        evidence = replace(evidence, layout=streams[0].run.skeleton.layout)
        samples += streams
    return Loop(
        evidence=evidence,
        parts=tuple(samples[: len(parts)]),
        gate=samples[len(parts)],
        judged=samples[-1] if judged is not None else None,
    )


def run_loop(
    loop: Loop,
    table: CostTable,
    limits: Sequence[Limit | Budget],
    refinement: Refinement | None = None,
    *,
    others: tuple[CostTable, ...] = (),
    readings: Readings | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Refine a table's plan by measuring, and let the gate judge it.

    Args:
        loop: the model and the texts.
        table: the costs, tied as plans must be.
        limits: limits on the plans.
        refinement: how many plans are measured, and how they are proposed.
        others: tables whose plans are measured as well.
        readings: earlier measurements, and where to keep new ones.
        progress: called with (what, done, of).

    Raises:
        InfeasibleError: no plan is within the limits.
    """
    problem, how = Problem(table, limits), refinement or Refinement()
    refine = Refine(
        parts=measures(loop, table, readings or Readings()),
        evaluations=how.evaluations,
        others=others,
        driver=how.driver,
        seed=how.seed,
        progress=progress,
    )
    refined = refine.run(problem)
    plan = refined.solution.plan
    ours, recipe, other, uniform = _gate(loop, problem, plan, progress)
    passed = uniform is None or float(ours.kl.mean()) < float(uniform.kl.mean())
    return Outcome(
        plan=plan if passed or other is None else other,
        refined=refined,
        recipe=recipe,
        ours=ours,
        uniform=uniform,
        passed=passed,
    )


def _gate(
    loop: Loop, problem: Problem, plan: BitPlan, progress: Progress | None
) -> tuple[Losses, str, BitPlan | None, Losses | None]:
    """Return what the plan loses on the gate's text, and the recipe that loses least there.

    Recipes take at most the plan's bytes; there may be none within the limits.
    """
    offered = uniform_plans_within(plan.units, problem.table.formats, plan.total_bytes, plan.model)
    recipes = [one for one in offered if within(problem, one)]
    if progress:
        progress("gate", 0, 1 + len(recipes))
    ours, *losses = losses_of(loop.evidence, loop.gate, [plan, *recipes])
    if not recipes:
        return ours, "", None, None
    best = min(range(len(recipes)), key=lambda number: float(losses[number].kl.mean()))
    return ours, name_of(recipes[best]), recipes[best], losses[best]


@former_keywords(
    refinement=group(Refinement, "evaluations", "driver", "seed", refine_tokens="tokens"),
    calibration=group(Calibration, "text", "tokens", "seed"),
    resume=group(Resume, "journal", "overwrite"),
)
def refine(
    model: Model,
    table: CostTable,
    limits: Sequence[Limit | Budget],
    *,
    refinement: Refinement | None = None,
    calibration: Calibration | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Measure plans for a model, and return the best one or the best uniform recipe.

    Args:
        model: A folder, a hub id, "reference:NAME", or a `LiveModel`.
        table: Costs of the model, tied as plans must be.
        limits: Limits on the plans.
        refinement: How many plans are measured, on how many tokens, and how they are proposed.
        calibration: Text, tokens and seed that the table was calibrated with, and the memory to
            use: a model that would take more is measured one decoder layer at a time. Roles and
            rounding come from the table.
        resume: `journal` keeps measurements, so that a killed run can continue; `overwrite`
            replaces a journal that belongs to other inputs.
        progress: Called with (what, done, of).

    Raises:
        InfeasibleError: No plan is within the limits.
        MismatchError: The table belongs to another model, or the journal to other inputs.
        InputError: The text is too short, or `calibration.max_memory` too low.
        ModelError: The model does not fit in memory and cannot be run layer by layer.
    """
    how, kept, asked = refinement or Refinement(), resume or Resume(), calibration or Calibration()
    with on_disk(model) as place:
        loop = _opened(place, table, asked, how, progress)
        about = {
            "what": "refine, KL of windows in nats/token",
            "model": loop.evidence.provenance["model"],
            "method": loop.evidence.rounding.name,
            "dtype": dtype_name(asked.products),
            "formats": [item.name for item in table.formats],
            "text": [digest_of(part.windows) for part in loop.parts],
        }
        with beside(kept.journal, about, overwrite=kept.overwrite) as readings:
            return run_loop(loop, table, limits, how, readings=readings, progress=progress)


def _opened(
    model: str | Path,
    table: CostTable,
    calibration: Calibration,
    how: Refinement,
    progress: Progress | None,
) -> Loop:
    """Return the loop for a model, calibrated as its table was."""
    source = Checkpoint.open(resolve(model))
    known = table.provenance.get("model", source.fingerprint)
    if known != source.fingerprint:
        raise MismatchError(f"{model}: the table belongs to another model; estimate it on this one")
    rounding = method_of(str(table.provenance.get("method", "rtn")))
    asked = replace(calibration, include=roles_of(table.units), rounding=rounding)
    layout = walk_headers(source.config, source.shapes, asked.include)
    tokens = asked.tokens + how.tokens + GATE_TOKENS
    needs = {"kl"} | recorded_for(rounding)
    way = way_to_measure_plans(source, layout, tokens, asked.memory, needs)
    read: frozenset[str] = frozenset()
    if way == "whole":
        asked, read = replace(asked, rounding=Remembered(rounding=rounding)), frozenset({"moments"})
    evidence = gather(source, read, asked, way=way, progress=progress)
    return open_loop(source, evidence, asked, how.tokens, progress=progress)


def _parts(windows: Windows) -> list[Windows]:
    """Return the parts that plans are measured on, each with windows from the whole text."""
    count = min(PARTS, len(windows))
    return [windows[part::count] for part in range(count)]
