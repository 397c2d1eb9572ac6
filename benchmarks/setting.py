"""A reference model with its calibration evidence, and a judge of plans on unseen text.

Shared by the benchmarks of estimators and of published rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bitknap.allocation import BitPlan, Budget, CostTable, Problem, solve
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.calibration import evaluation_windows, longest_of, tokenizer_of
from bitknap.api.planning import DEFAULT_PROFILE
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.kl_replay import Losses, Replay
from bitknap.estimators.measuring.text import BUILTIN, read_text, token_windows
from bitknap.estimators.published import rule
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.stacks.row_blocks import layout_for

# Formats that published rules choose from.
FORMATS = rule.FORMATS
BUDGETS = (2.0, 2.25, 2.5, 3.0)
MODELS = ("mixtral", "qwen3moe")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Solves tables and measures their plans on held-out text, each plan once."""

    replay: Replay
    evidence: Evidence
    known: dict[bytes, Losses] = field(default_factory=dict)

    def losses(self, table: CostTable, bits: float) -> tuple[BitPlan, Losses]:
        """Return the table's plan at a budget, and its losses."""
        tied = under(table, profile(DEFAULT_PROFILE))
        plan = solve(Problem(tied, Budget.bits(bits))).plan
        return plan, self.of(plan)

    def of(self, plan: BitPlan) -> Losses:
        """Return the losses of a plan, which may cover blocks of matrices."""
        names = " ".join(format.name for format in plan.formats)
        key = names.encode() + plan.choice.tobytes()
        if key not in self.known:
            layout = layout_for(plan.units, self.evidence.layout)
            with applied(self.replay.model, layout, plan):
                self.known[key] = self.replay.measure()
        return self.known[key]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One reference model with its calibration pass and its judge."""

    name: str
    tokens: int
    judged: int
    model: Any
    evidence: Evidence
    judge: Judge


def plain(name: str, tokens: int, judged: int) -> tuple[Evidence, Judge]:
    """Calibrate a reference model as the default estimator needs it: moments alone.

    Args:
        name: name of a bundled model, or a folder.
        tokens: number of tokens of the bundled calibration text.
        judged: number of tokens of the bundled evaluation text.
    """
    return _calibrated(name, tokens, judged, Recorded())


def _calibrated(name: str, tokens: int, judged: int, recorded: Recorded) -> tuple[Evidence, Judge]:
    folder = resolve(name if "/" in name else f"reference:{name}")
    model = load(folder, torch.float32)
    layout = walk(model)
    text = read_text(BUILTIN, "calibration")
    windows = token_windows(tokenizer_of(folder), text, tokens, longest_of(model.config))
    evidence = calibrate(model, layout, windows, recorded)
    held_out = evaluation_windows(folder, BUILTIN, judged)
    judge = Judge(replay=Replay(model, layout, held_out, cache=False), evidence=evidence)
    return evidence, judge


def reference(name: str, tokens: int, judged: int) -> Reference:
    """Calibrate a reference model: moments, curvature, traces and gradients.

    Args:
        name: name of a bundled model.
        tokens: number of tokens of the bundled calibration text.
        judged: number of tokens of the bundled evaluation text.
    """
    recorded = Recorded(curvature=True, gradients=True)
    evidence, judge = _calibrated(name, tokens, judged, recorded)
    return Reference(
        name=name,
        tokens=tokens,
        judged=judged,
        model=judge.replay.model,
        evidence=evidence,
        judge=judge,
    )
