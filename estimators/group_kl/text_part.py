"""Evidence that measures KL on a part of its text, which is enough for many readings."""

from __future__ import annotations

from dataclasses import replace

from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.windows import part_of
from bitknap.estimators.sweep.in_memory import digest_of


def on_part(evidence: Evidence, tokens: int) -> Evidence:
    """Return evidence with the same statistics that measures KL on a part of the text.

    The live model must be unchanged. Readings on a part have names of their own in the journal.

    Args:
        evidence: what a calibration pass recorded.
        tokens: about how many tokens to measure on; all if the text has no more.
    """
    sweep, replay = evidence.sweep, evidence.replay
    if sweep is not None:
        text = sweep.text_windows
    elif replay is not None:
        text = replay.text
    else:
        return evidence
    part = part_of(*text.shape, tokens)
    if part is None:
        return evidence
    windows = text.part(part)
    return replace(
        evidence,
        sweep=None if sweep is None else sweep.on_part(part),
        replay=None if replay is None else Replay(replay.model, evidence.layout, windows),
        provenance={**evidence.provenance, "text": digest_of(windows.ids)},
    )
