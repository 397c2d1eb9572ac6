"""What each step of the work takes in memory and time, from headers and a machine's rates.

Counts of readings, of anchors and of rows come from the estimators' own functions. Steps are those
of the main job: the default estimator, rounding to nearest, and an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import storage
from bitknap.api.evaluation import EVALUATION_TOKENS
from bitknap.api.forecasts.machine import Machine
from bitknap.api.requests import CALIBRATION_TOKENS, default_formats
from bitknap.estimators.costs.sampled_rows import ROWS
from bitknap.estimators.costs.weighed_errors import plainest, stored_alike
from bitknap.estimators.group_kl.calibrated import READ_TOKENS, Calibrated, anchors
from bitknap.estimators.group_kl.chosen_readings import Groups, by_worth
from bitknap.estimators.sweep.layer_gains import GAIN_TOKENS
from bitknap.estimators.sweep.peak_memory import layer_bytes, peak_bytes, vocabulary_of
from bitknap.estimators.sweep.variant_streams import TOGETHER
from bitknap.quantization.models.headers_only import count_of, experts_per_token, text_config
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.safetensors_header import DTYPES
from bitknap.quantization.stacks.grouping import stacks

# Memory of the interpreter with torch and transformers, and seconds to load them.
LIBRARIES, _START = 1 << 29, 5
# Times that rounding the first sample of rows is counted: charging errors and telling formats apart
# take about as long as rounding, where no larger sample is needed (benchmarks/results/forecast.md).
_SAMPLES = 2

Residency = Literal["whole", "by layer"]
STEPS = ("load", "calibrate", "gains", "group readings", "round rows", "pack", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one step takes.

    Attributes:
        step: its name, one of `STEPS`.
        residency: whether the model is in memory whole, or one decoder layer at a time.
        memory_bytes: peak resident memory.
        seconds: time.
    """

    step: str
    residency: Residency
    memory_bytes: int
    seconds: float


def forecast(
    source: Checkpoint,
    layout: Layout,
    machine: Machine,
    tokens: int = CALIBRATION_TOKENS,
    judged: int = EVALUATION_TOKENS,
    options: Sequence[Format] | None = None,
    method: str = RTN.name,
) -> list[Forecast]:
    """Return what each step takes, first with the whole model in memory, then by layer.

    Args:
        source: the model, of which only headers are read.
        layout: its units.
        machine: rates of the machine.
        tokens: number of tokens of the calibration text.
        judged: number of tokens of the evaluation text.
        options: formats that units may have; the default ones when not given.
        method: name of the rounding method.
    """
    ways: tuple[Residency, ...] = ("whole", "by layer")
    chosen = tuple(default_formats(layout.units) if options is None else options)
    job = _Job(source, layout, machine, tokens, judged, chosen, method)
    return [one for way in ways for one in job.steps(way)]


@dataclass(frozen=True, slots=True)
class _Job:
    source: Checkpoint
    layout: Layout
    machine: Machine
    tokens: int
    judged: int
    options: tuple[Format, ...]
    method: str

    def steps(self, way: Residency) -> Iterator[Forecast]:
        """Yield the steps in one residency."""
        whole, needs = way == "whole", Calibrated().needs
        size = (peak_bytes if whole else layer_bytes)(self.source, self.layout, self.tokens, needs)
        calibrating = size + LIBRARIES
        packing = 3 * largest_tensor(self.source) // 2 + LIBRARIES
        weights = 4 * sum(math.prod(shape) for _, shape in self.source.shapes.values())
        judging = weights * 2 + LIBRARIES if whole else calibrating
        memory = {"pack": packing, "evaluate": judging}
        seconds = {
            "load": _START + (self._read(2) if whole else 0),
            "calibrate": self._calibrate(whole),
            "gains": self._gains(whole),
            "group readings": self._readings(whole),
            "round rows": self._rows(),
            "pack": _START + self._packed(),
            "evaluate": 2 * (_START + self._read(1) + self._pass(self.judged, 1.0)),
        }
        for name in STEPS:
            yield Forecast(
                step=name,
                residency=way,
                memory_bytes=memory.get(name, calibrating),
                seconds=seconds[name],
            )

    def _read(self, times: float) -> float:
        return times * self.source.nbytes / self.machine.reads

    def _pass(self, tokens: int, part: float) -> float:
        """Return the seconds of a pass over the last `part` of the layers, and the head."""
        config = text_config(self.source.config)
        hidden = max((x.hidden for x in self.layout.layers), default=0)
        head = vocabulary_of(self.source) * hidden
        tied = 1 if config.get("tie_word_embeddings") else 2
        inner = max(0, active_weights(self.source, self.layout) - tied * head)
        return 2 * tokens * (part * inner + head) / self.machine.flops

    def _stream(self, layers: float) -> float:
        """Return the seconds of writing and reading a text's stream at some layers."""
        hidden = max((x.hidden for x in self.layout.layers), default=0)
        return 2 * 4 * self.tokens * hidden * layers / self.machine.streams

    @property
    def _depth(self) -> int:
        config = text_config(self.source.config)
        return count_of(config, "num_hidden_layers", "n_layers", "num_layers") or 1

    def _left(self, layer: int) -> float:
        """Return the share of the layers from one on."""
        return max(0.0, 1 - max(layer, 0) / max(self._depth, 1))

    def _calibrate(self, whole: bool) -> float:
        if whole:  # recorded, and once more for the reference that readings are compared with
            return 2 * self._pass(self.tokens, 1.0)
        return self._pass(self.tokens, 1.0) + self._read(1) + self._stream(self._depth)

    def _gains(self, whole: bool) -> float:
        parts = [self._left(layer.layer) for layer in self.layout.layers]
        parts += parts[:1]  # the noise floor of KL, from the first layer on
        seconds = sum(self._pass(min(self.tokens, GAIN_TOKENS), part) for part in parts)
        if whole:
            return seconds
        return seconds + self._read(1) + sum(self._stream(part * self._depth) for part in parts)

    def _readings(self, whole: bool) -> float:
        """Return the seconds of all readings of groups, with rounding and putting back."""
        units, tokens = self.layout.units, min(self.tokens, READ_TOKENS)
        groups = Groups.of(units, stacks(units))
        read = [self.options[i] for i in anchors(self.options, storage(units, self.options))]
        wanted = by_worth(groups, [one.bits for one in read], thorough=False)
        first = [min(groups.layer[group] for group in one.groups) for one in wanted]
        parts = sorted(map(self._left, first), reverse=True)
        seconds = sum(self._pass(tokens, part) for part in parts)
        sizes = [int(units.numel[run].sum()) for run in groups.runs]
        each = list(map(self._each, read))
        seconds += sum(each[one.width] * sizes[g] for one in wanted for g in one.groups)
        if whole:  # the part of the text that is read has a reference of its own
            return seconds + self._pass(tokens, 1.0)
        sweeps = sum(parts[start] for start in range(0, len(parts), TOGETHER))
        streams = sum(self._stream(part * self._depth) for part in parts) * tokens / self.tokens
        return seconds + self._read(sweeps) + streams

    def _rows(self) -> float:
        """Return the seconds of rounding rows to all formats, and of reading all weights once."""
        units, nearest = self.layout.units, 1 / self.machine.rtn
        lengths = np.unique(units.cols).tolist()
        grids = {cols: [*stored_alike(self.options, cols)] for cols in lengths}
        # Charging errors takes as long however rows are rounded.
        charged = {cols: nearest * len(some) for cols, some in grids.items()}
        more = {cols: sum(map(self._each, some)) - charged[cols] for cols, some in grids.items()}
        one, other = (
            float((np.minimum(units.rows, rows) * units.cols * _of(known, units.cols)).sum())
            for rows, known in ((ROWS * _SAMPLES, charged), (ROWS, more))
        )
        return one + other + self._read(1)

    def _each(self, format: Format) -> float:
        """Return the seconds of rounding a weight to a format."""
        return self.machine.rounding(self.method, format)

    def _packed(self) -> float:
        """Return the seconds of rounding all weights once, to the formats in equal parts."""
        units, seconds = self.layout.units, 0.0
        for cols in np.unique(units.cols).tolist():
            stored = [plainest(format, cols) for format in self.options]
            weights = int(units.numel[units.cols == cols].sum())
            seconds += weights * sum(map(self._each, stored)) / len(stored)
        return seconds + self._read(1)


def _of(known: dict[int, float], cols: np.ndarray) -> np.ndarray:
    return np.array([known[size] for size in cols.tolist()])


def active_weights(source: Checkpoint, layout: Layout) -> int:
    """Return the number of weights that process one token."""
    config = text_config(source.config)
    top_k = experts_per_token(config) or [0]
    every = sum(math.prod(info.shape) for info in source.headers.values())
    routed = [(3 if x.gated else 2) * x.hidden * x.intermediate for x in layout.layers]
    met = [top_k[x.layer if x.layer < len(top_k) else -1] or x.experts for x in layout.layers]
    idle = [x.experts - min(n, x.experts) for n, x in zip(met, layout.layers, strict=True)]
    return every - sum(size * count for size, count in zip(routed, idle, strict=True))


def largest_tensor(source: Checkpoint) -> int:
    """Return the bytes of the largest tensor in memory."""
    return max(
        math.prod(info.shape) * (DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 1)
        for info in source.headers.values()
    )


def estimating(steps: Sequence[Forecast], way: Residency) -> tuple[int, float]:
    """Return the peak memory and the seconds of an estimate: all but packing and evaluating."""
    mine = [x for x in steps if x.residency == way and x.step not in ("pack", "evaluate")]
    return max(x.memory_bytes for x in mine), sum(x.seconds for x in mine)
