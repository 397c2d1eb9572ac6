"""Losses of plans on text that no strategy saw: by domain, paired, with a block bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import BitPlan
from bitknap.allocation.problem.arrays import Floats
from bitknap.api.plan_measures import Sample, losses_of, together
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.kl_replay import Losses, Replay
from bitknap.estimators.sweep.text_stream import losses_between

# Bootstrap resamples: the relative error of a standard error is then about 2 %.
_RESAMPLES = 1000
# Consecutive tokens that an evaluation text may share with a calibration text by chance.
_RUN = 32


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures plans on one text, each plan once.

    Attributes:
        sample: the whole text.
        evidence: how plans are rounded.
        domain: domain of each window, int64[W].
        names: names of the domains.
        known: losses of the plans measured so far.
    """

    sample: Sample
    evidence: Evidence
    domain: np.ndarray
    names: tuple[str, ...]
    known: dict[bytes, Losses] = field(default_factory=dict)

    @property
    def together(self) -> int:
        """Number of plans that are better measured together than one after another."""
        return together(self.sample)

    def original(self) -> Losses:
        """Return the losses of the model as it is."""
        if isinstance(self.sample, Replay):
            return self.sample.measure()
        return losses_between(self.sample.reference, [self.sample.reference])[0]

    def of(self, plan: BitPlan) -> Losses:
        """Return the losses of a plan, which may cover blocks of matrices."""
        self.read([plan])
        return self.known[_key(plan)]

    def read(self, plans: Sequence[BitPlan]) -> None:
        """Measure the plans that are not known yet, in as few sweeps as possible."""
        left = {key: plan for plan in plans if (key := _key(plan)) not in self.known}
        by_units: dict[int, dict[bytes, BitPlan]] = {}
        for key, plan in left.items():
            by_units.setdefault(len(plan.units), {})[key] = plan
        for some in by_units.values():
            losses = losses_of(self.evidence, self.sample, list(some.values()))
            self.known.update(zip(some, losses, strict=True))

    def by_domain(self, values: Floats) -> dict[str, float]:
        """Return the mean over the windows of each domain."""
        return {name: float(values[self.domain == at].mean()) for at, name in enumerate(self.names)}


def _key(plan: BitPlan) -> bytes:
    names = " ".join(format.name for format in plan.formats)
    return names.encode() + plan.choice.tobytes()


def bootstrap_error(values: Floats, seed: int = 0) -> float:
    """Return the standard error of the mean of values float64[W] by a moving-block bootstrap.

    Neighbouring windows may come from one document, so they are drawn in blocks of W^(1/3) in a
    ring (Politis and Romano, 1992).
    """
    count = len(values)
    if count < 2 or not values.any():
        return 0.0
    length = max(1, round(count ** (1 / 3)))
    blocks = -(-count // length)
    starts = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, blocks, 1))
    picked = ((starts + np.arange(length)) % count).reshape(_RESAMPLES, -1)[:, :count]
    return float(values[picked].mean(1).std(ddof=1))


def mean_ranks(domains: Sequence[Mapping[str, float]]) -> list[float]:
    """Return each strategy's rank by loss (1 is best), averaged over domains; ties share a rank."""
    if not domains:
        return []
    values = np.array([[one[name] for name in domains[0]] for one in domains])
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    ranks: list[float] = (below + (equal + 1) / 2).mean(1).tolist()
    return ranks


def check_apart(evaluation: Tensor, calibration: Tensor) -> None:
    """Refuse windows that share runs of tokens with windows that calibration may see.

    Args:
        evaluation: token ids, int64 [windows, length].
        calibration: token ids, int64 [windows, length].

    Raises:
        InputError: more than one window in a hundred shares a run.
    """
    length = min(_RUN, evaluation.shape[1], calibration.shape[1])
    known = {bytes(run) for run in _runs(calibration, length, 1)}
    shared = 0
    for window in evaluation:
        shared += any(bytes(run) in known for run in _runs(window[None], length, length))
    if shared > len(evaluation) / 100:
        raise InputError(
            f"--evaluation-text: {shared} of its {len(evaluation)} windows share {length} tokens "
            "in a row with the calibration text; judge plans on text that no strategy saw"
        )


def _runs(windows: Tensor, length: int, step: int) -> np.ndarray:
    runs = windows.to(torch.int32).unfold(1, length, step).flatten(0, 1)
    array: np.ndarray = runs.contiguous().numpy()
    return array
