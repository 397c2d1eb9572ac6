"""The closed loop on a live model, and the gate that keeps its plan no worse than a uniform recipe.

Plans are measured on calibration text. At the end, the best plan and the best uniform recipe of at
most its bytes are measured on calibration text that neither calibration nor the loop has read. If
the recipe loses no more than the plan there, the recipe is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import ROLES, BitPlan, Budget, CostTable, Limit, Problem
from bitknap.allocation.problem.arrays import Floats, Ints
from bitknap.allocation.refinement.loop import Measure, Refine, Refined
from bitknap.allocation.solvers.solving import within
from bitknap.allocation.tradeoffs.uniform_recipes import uniform_plans_within
from bitknap.api.calibration import encoded, gather
from bitknap.api.evaluation import name_of
from bitknap.api.former_keywords import former_keywords, group
from bitknap.api.live import Model, on_disk
from bitknap.api.requests import Calibration, Refinement, Resume
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.documents import Documents, TokenWindows, text_of
from bitknap.estimators.measuring.kl_replay import Losses, Replay, standard_error
from bitknap.estimators.measuring.readings import Readings, beside, key_of
from bitknap.estimators.measuring.text import Encoded, document_of
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.in_memory import digest_of
from bitknap.progress import Progress
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.rounding.memo import Remembered
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.stacks.row_blocks import inputs_of_blocks, layout_for

# Tokens of the calibration text that the gate judges on.
GATE_TOKENS = 8_192
# A plan is measured on one part of the text after another, while it can still be the best.
PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A live model and the texts that plans are measured on.

    Attributes:
        evidence: how plans are rounded.
        parts: the parts of the text that plans are measured on.
        gate: text that nothing else has read.
    """

    evidence: Evidence
    parts: tuple[Replay, ...]
    gate: Replay


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
    model: Any,
    evidence: Evidence,
    text: str | Documents | TokenWindows,
    taken: Tensor,
    tokens: int,
    folder: Path,
) -> Loop:
    """Return a loop on a live model.

    Args:
        model: the model.
        evidence: its calibration pass.
        text: the calibration text.
        taken: windows of it that calibration read.
        tokens: number of tokens to measure plans on.
        folder: folder of the model, for its tokenizer.

    Raises:
        InputError: the text is too short.
    """
    windows, gate = loop_windows(encoded(folder, text, model.config), taken, tokens)
    # Every part has windows from the whole text.
    count = min(PARTS, len(windows))
    parts = [windows[part::count] for part in range(count)]
    layout = evidence.layout
    return Loop(
        evidence=evidence,
        parts=tuple(Replay(model, layout, part) for part in parts),
        gate=Replay(model, layout, gate, cache=False),
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
    ours = losses_of(loop, loop.gate, plan)
    recipe, other, uniform = _best_uniform(loop, problem, plan, progress)
    passed = uniform is None or float(ours.kl.mean()) < float(uniform.kl.mean())
    return Outcome(
        plan=plan if passed or other is None else other,
        refined=refined,
        recipe=recipe,
        ours=ours,
        uniform=uniform,
        passed=passed,
    )


def measures(loop: Loop, table: CostTable, readings: Readings) -> tuple[Measure, ...]:
    """Return functions that measure plans on each part of the text: KL per window, nats per token.

    Layers before the first layer in which a plan differs from the first plan measured are read
    from memory.
    """
    return tuple(
        _Part(loop=loop, table=table, readings=readings, replay=replay, number=part)
        for part, replay in enumerate(loop.parts)
    )


@dataclass(kw_only=True)
class _Part:
    """Measures plans on one part of the text.

    Attributes:
        loop: the model and the texts.
        table: the table whose units and formats choices refer to.
        readings: earlier measurements, and where to keep new ones.
        replay: replay of the part.
        number: number of the part.
        base: the plan that produced the layers in memory.
        name: name of the base in the replay.
    """

    loop: Loop
    table: CostTable
    readings: Readings
    replay: Replay
    number: int
    base: Ints | None = None
    name: str = "none"

    def __call__(self, choice: Ints) -> Floats:
        key = key_of([self.number, *choice.tolist()], ())
        known = self.readings.known(key, len(self.replay.windows))
        if known is None:
            plan = BitPlan.from_choice(self.table.units, self.table.formats, choice)
            with stored(self.replay, self.loop.evidence, plan):
                if self.replay.base != self.name:
                    # This is the first plan, or another caller has used the replay since.
                    self.base, self.name = choice, f"{id(self)} {key}"
                    self.replay.rebase(self.name)
                known = self.replay.measure(self._first(choice)).kl
            self.readings.keep(key, known)
        return known

    def _first(self, choice: Ints) -> int | None:
        """Return the first MoE layer in which a plan differs from the base; None for any."""
        units = self.table.units
        other = (choice != self.base) & (units.role == ROLES.index("routed"))
        elsewhere = (choice != self.base) & (units.role != ROLES.index("routed"))
        if elsewhere.any():
            return None
        return int(units.layer[other].min()) if other.any() else int(units.layer.max())


def losses_of(loop: Loop, replay: Replay, plan: BitPlan) -> Losses:
    """Return the losses of the model on a replayed text when it is stored as a plan says."""
    with stored(replay, loop.evidence, plan):
        return replay.measure()


def stored(
    replay: Replay, evidence: Evidence, plan: BitPlan
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a replayed model is stored as a plan says.

    Args:
        replay: replay of the model that the evidence describes.
        evidence: how it is rounded.
        plan: plan of its units, or of blocks of their rows.
    """
    layout = layout_for(plan.units, evidence.layout)
    inputs = None
    if evidence.rounding.needs_inputs:
        inputs = inputs_of_blocks(layout.units, evidence.units, evidence.inputs)
    return applied(replay.model, layout, plan, evidence.rounding, inputs)


def _best_uniform(
    loop: Loop, problem: Problem, plan: BitPlan, progress: Progress | None
) -> tuple[str, BitPlan | None, Losses | None]:
    """Return the recipe with the least KL on the gate's text, within the plan's bytes."""
    units = plan.units
    offered = uniform_plans_within(units, problem.table.formats, plan.total_bytes, plan.model)
    allowed = [one for one in offered if within(problem, one)]
    best: tuple[str, BitPlan | None, Losses | None] = ("", None, None)
    for done, one in enumerate(allowed):
        if progress:
            progress("gate", done, len(allowed))
        losses = losses_of(loop, loop.gate, one)
        if best[2] is None or losses.kl.mean() < best[2].kl.mean():
            best = name_of(one), one, losses
    return best


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
        calibration: Text, tokens and seed that the table was calibrated with; roles and rounding
            come from the table.
        resume: `journal` keeps measurements, so that a killed run can continue; `overwrite`
            replaces a journal that belongs to other inputs.
        progress: Called with (what, done, of).

    Raises:
        InfeasibleError: No plan is within the limits.
        MismatchError: The table belongs to another model, or the journal to other inputs.
        InputError: The text is too short.
    """
    how, kept = refinement or Refinement(), resume or Resume()
    with on_disk(model) as place:
        loop = _opened(place, table, calibration or Calibration(), how, progress)
        about = {
            "what": "refine, KL of windows in nats/token",
            "model": loop.evidence.provenance["model"],
            "method": loop.evidence.rounding.name,
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
    asked = replace(
        calibration, include=roles_of(table.units), rounding=Remembered(rounding=rounding)
    )
    evidence = gather(source, frozenset({"replay"}), asked, progress=progress)
    if evidence.replay is None:
        raise InputError(
            "`refine`: the model must fit in memory to be measured; leave out `max_memory`"
        )
    live, taken = evidence.replay.model, evidence.replay.windows
    text = document_of(text_of(asked.only_text), "calibration")
    return open_loop(live, evidence, text, taken, how.tokens, source.folder)
