"""Loss of rounding in nats: our GPTQ and HQQ against others, in the same live model.

Every way gets the same weights and, if needed, the same second moments of each expert's inputs (one
calibration pass), and is judged on the same held-out text. Ours use stored fp16 scales and zeros;
those of others stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.api.calibration import evaluation_windows, longest_of, tokenizer_of
from bitknap.benchmarks.quantize import peers
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.kl_replay import Losses, Replay, standard_error
from bitknap.estimators.measuring.text import BUILTIN, read_text, token_windows
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import RTN, Gptq, Hqq, round_trip
from bitknap.quantization.rounding.rounding import Inputs, Rounding
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks

FORMATS = tuple(f"int{bits}-g64-{kind}" for bits in (4, 3, 2) for kind in ("asym", "sym"))
# Target: maximum ratio of our KL to the best of the others.
WITHIN = 1.03
_DAMPING = 0.01

Change = Callable[[Tensor, Format, Inputs], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to round in the comparison.

    Attributes:
        name: its name in the report.
        family: "rtn", "hqq" or "gptq"; ways of one family are compared.
        change: maps weights [n, rows, cols] to rounded weights.
        needs: package that it needs; "" for ours.
        fits: whether it supports a format.
    """

    name: str
    family: str
    change: Change
    needs: str = ""
    fits: Callable[[Format], bool] = lambda format: True


def _ours(rounding: Rounding, *, compact: bool = False) -> Change:
    def change(weights: Tensor, format: Format, inputs: Inputs) -> Tensor:
        if compact:
            format = _compact(format)
        return round_trip(weights, format, rounding, inputs)

    return change


def _compact(format: Format) -> Format:
    return Format(format.bits, format.group_size, symmetric=format.symmetric, metadata="compact")


def _kinds() -> Iterator[Kind]:
    yield Kind(name="ours: rtn", family="rtn", change=_ours(RTN))
    yield _hqq("hqq package, min-max", "rtn", optimize=False)
    yield Kind(name="ours: hqq", family="hqq", change=_ours(Hqq()), fits=peers.hqq_fits)
    yield _hqq("hqq package", "hqq", optimize=True)
    yield Kind(name="ours: gptq", family="gptq", change=_ours(Gptq()))
    yield Kind(name="ours: gptq, compact", family="gptq", change=_ours(Gptq(), compact=True))
    for act_order in (True, False):
        order = "act-order" if act_order else "no act-order"
        plain = Gptq(damping=_DAMPING, ridge=0, act_order=act_order)
        yield Kind(name=f"ours: gptq, ridge 0, {order}", family="gptq", change=_ours(plain))
        yield _llm(f"llm-compressor gptq, {order}", act_order, "min-max")
        yield _llm(f"llm-compressor gptq, {order}, mse scales", act_order, "mse")


def _hqq(name: str, family: str, *, optimize: bool) -> Kind:
    def change(weights: Tensor, format: Format, _: Inputs) -> Tensor:
        return peers.hqq_values(weights, format, optimize=optimize)

    return Kind(name=name, family=family, change=change, needs="hqq", fits=peers.hqq_fits)


def _llm(name: str, act_order: bool, scales: peers.Scales) -> Kind:
    def change(weights: Tensor, format: Format, inputs: Inputs) -> Tensor:
        return peers.llm_gptq(weights, format, inputs.moments, act_order=act_order, scales=scales)

    return Kind(
        name=name, family="gptq", change=change, needs="llmcompressor", fits=peers.tensors_fit
    )


KINDS = tuple(_kinds())
# The way of each family that others are compared with.
BASE = {"rtn": "ours: rtn", "hqq": "ours: hqq", "gptq": "ours: gptq"}


def measured(
    model: str,
    *,
    tokens: int,
    judged: int,
    formats: Sequence[str] = FORMATS,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the losses of every way in every format, as JSON values.

    Args:
        model: a bundled reference model.
        tokens: number of tokens of the calibration text.
        judged: number of held-out tokens.
        formats: names of formats.
        say: called with a message for every row.
    """
    folder = resolve(f"reference:{model}")
    live = load(folder, torch.float32)
    layout = walk(live)
    text = read_text(BUILTIN, "calibration")
    windows = token_windows(tokenizer_of(folder), text, tokens, longest_of(live.config))
    evidence = calibrate(live, layout, windows, Recorded(full=True))
    replay = Replay(live, layout, evaluation_windows(folder, BUILTIN, judged), cache=False)
    rows = []
    for name in formats:
        format = Format.parse(name)
        known = [kind for kind in KINDS if peers.installed(kind.needs) and kind.fits(format)]
        losses = {kind.name: _losses(kind, format, evidence, replay) for kind in known}
        rows += [_row(kind, format, losses) for kind in known]
        say(f"{model} {name}")
    return {"model": model, "tokens": tokens, "judged_on": judged, "rows": rows}


def _losses(kind: Kind, format: Format, evidence: Evidence, replay: Replay) -> Losses:
    def change_of(run: np.ndarray) -> Callable[[Tensor], Tensor]:
        return lambda weights: kind.change(weights, format, evidence.inputs(run))

    with ExitStack() as stack:
        for run in stacks(evidence.units):
            stack.enter_context(replaced(replay.model, evidence.layout, run, change_of(run)))
        return replay.measure()


def _row(kind: Kind, format: Format, losses: dict[str, Losses]) -> dict[str, Any]:
    mine, base = losses[kind.name].kl, losses[BASE[kind.family]].kl
    paired = mine - base
    return {
        "way": kind.name,
        "family": kind.family,
        "format": format.name,
        "kl": float(mine.mean()),
        "kl_se": standard_error(mine),
        "over_ours": float(paired.mean()),
        "over_ours_se": standard_error(paired) if paired.any() else 0.0,
    }
