"""A dry run that reads only `config.json` and safetensors headers."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, Budget, formats
from bitknap.allocation.problem.device_memory import Device
from bitknap.allocation.problem.serving import Serving
from bitknap.allocation.problem.table import storage
from bitknap.api.quantizing import CALIBRATION_TOKENS, default_formats
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.quantization.models.headers_only import experts_per_token, text_config, walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.packed.config import architectures
from bitknap.quantization.packed.writer import fixed_bytes
from bitknap.quantization.runtime.serving_needs import serving_of
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.safetensors_header import DTYPES
from bitknap.quantization.targets.shape_rules import fits

# Formats in the table of uniform sizes: every width, in a common and in the smallest form.
_SHOWN = formats(range(1, 9), (64, "row"), True, "fp16")
# Formats that bound the feasible range.
_EVERY = formats(range(1, 9), (32, 64, 128, 256, "row"), (False, True), ("fp16", "compact"))
# Bytes of bf16 weights per second rounded to one format and packed on one CPU core: the middle of
# the range measured in benchmarks/results/quantize.md.
_RATES = {"rtn": 4e7, "hqq": 2e6, "gptq": 4e6}
# Bytes per second when reading and summing weights, as data-free estimators do.
_READ_RATE = 2e8
# Float32 matrix operations (products and sums) per second on two cores.
_FLOPS = 1e11
# Cost of calibrating on a text, in forward passes: one pass and its gradients.
_PASSES = 3
# Memory of the interpreter with torch and transformers.
_LIBRARIES = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The resources that one command needs.

    Attributes:
        name: the command with its options.
        memory_bytes: peak resident memory.
        seconds: time on two CPU cores, accurate to about a factor of two.
    """

    name: str
    memory_bytes: int
    seconds: int


def inspect(
    model: str | Path, include: Collection[str] = (), *, budget: Budget | None = None
) -> dict[str, Any]:
    """Return which plans are possible for `model`, without reading weights.

    For a model on the hub, only `config.json` and headers are fetched.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        include: roles to quantize besides routed experts.
        budget: of `Budget.device`, to add "device": what it holds, and what it leaves for units.

    Returns:
        The result of `report`.

    Raises:
        InputError: the size of the model's cache is not known, or the context is too long.
        ModelError: the model is already packed, has no units, or transformers could not load it.
    """
    source = Checkpoint.look(model)
    check_source(source, include)
    found = report(source, include)
    if budget is not None and budget.serves is not None:
        found["device"] = room_on(source, include, budget.serves)
    return found


def serving(model: str | Path, include: Collection[str] = ()) -> Serving:
    """Return what a model needs in memory beside its weights, for `Budget.device(needs=…)`.

    Args:
        model: a folder, a hub id, or "reference:NAME"; its weights are not read.
        include: roles that are quantized besides routed experts.
    """
    source = Checkpoint.look(model)
    return serving_of(source, walk_headers(source.config, source.shapes, include))


def room_on(source: Checkpoint, include: Collection[str], device: Device) -> dict[str, int]:
    """Return what a device holds beside units, what it leaves for them, and its size, in bytes."""
    layout = walk_headers(source.config, source.shapes, include)
    kept = fixed_bytes(source, layout) + source.elsewhere
    needs = serving_of(source, layout)
    left = device.room(needs, kept, layout.units, int(storage(layout.units, _EVERY).min(1).sum()))
    entries = device.entries(needs, kept, layout.units)
    return {**entries, "left for units": left, "device": device.size}


def report(source: Checkpoint, include: Collection[str] = ()) -> dict[str, Any]:
    """Return which plans are possible for an opened checkpoint.

    Returns:
        Counts, the feasible range in bits per weight and in bytes of the whole checkpoint, the
        weights missing from the last groups of rows, "uniform_bytes" of all units in some
        formats, the "steps" with their memory and time, and which "exports" the shapes allow.
    """
    layout = walk_headers(source.config, source.shapes, include)
    units = layout.units
    sizes = storage(units, _EVERY)
    least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    weights = int(units.numel.sum())
    fixed = fixed_bytes(source, layout) + source.elsewhere
    roles = {ROLES[r]: int((units.role == r).sum()) for r in np.unique(units.role)}
    padded = {f"g{g}": _short(units.rows, units.cols, g) for g in (32, 64, 128, 256)}
    stored = sorted({source.stored_as(view.tensor) for view in layout.views})
    return {
        "architecture": ", ".join(architectures(source.config) or ["unknown"]),
        "moe_layers": len(layout.layers),
        "experts_per_layer": max((x.experts for x in layout.layers), default=0),
        "units": len(units),
        "units_by_role": ", ".join(f"{n} {r}" for r, n in roles.items()),
        "weights_in_units": weights,
        "source_precision": ", ".join(stored),
        "source_bytes": source.nbytes,
        "kept_bytes_at_most": fixed,
        "least_bpw": round(8 * least / weights, 4),
        "most_bpw": round(8 * most / weights, 4),
        "smallest_checkpoint_bytes": least + fixed,
        "largest_checkpoint_bytes": most + fixed,
        "short_of_a_whole_last_group": ", ".join(f"{k}: {v:,}" for k, v in padded.items()),
        "uniform_bytes": {
            f.name: int(size) for f, size in zip(_SHOWN, storage(units, _SHOWN).sum(0), strict=True)
        },
        "steps": [asdict(step) for step in steps(source, layout)],
        "exports": {
            fit.target.name: {
                "possible": fit.possible,
                "bits": list(fit.bits),
                "groups": list(fit.groups),
                "profile": fit.target.profile,
                "reason": fit.reason,
            }
            for fit in fits(units)
        },
    }


def steps(source: Checkpoint, layout: Layout) -> list[Step]:
    """Return the resources that estimating and quantizing need, for each method.

    Besides the weights being rounded, the writer holds 1.5 times the largest tensor (measured).
    Rounding to all default formats takes most of the time of an estimate.
    """
    units = layout.units
    weights = int(units.numel.sum())
    streaming = 3 * _largest(source) // 2 + _LIBRARIES
    passes = 2 * _active(source, layout) * CALIBRATION_TOKENS * _PASSES / _FLOPS
    options = len(default_formats(units))

    def calibrating(needs: Collection[str]) -> int:
        return layer_bytes(source, layout, CALIBRATION_TOKENS, needs) + _LIBRARIES

    text = Calibrated().needs
    needed = [
        Step(
            name="estimate --estimator data-free",
            memory_bytes=streaming,
            seconds=_seconds(2 * weights / _READ_RATE),
        ),
        Step(
            name="estimate, with a text",
            memory_bytes=calibrating(text),
            seconds=_seconds(passes + options * 2 * weights / _RATES["rtn"]),
        ),
    ]
    for method, rate in _RATES.items():
        asks = method == "gptq"
        needed.append(
            Step(
                name=f"quantize --method {method}",
                memory_bytes=max(streaming, calibrating({"full"}) if asks else 0),
                seconds=_seconds(2 * weights / rate + (passes if asks else 0)),
            )
        )
    return needed


def _seconds(work: float) -> int:
    return round(work) + 5  # time to load libraries


def _active(source: Checkpoint, layout: Layout) -> int:
    """Return the number of weights that process one token."""
    config = text_config(source.config)
    top_k = experts_per_token(config) or [0]
    every = sum(math.prod(info.shape) for info in source.headers.values())
    routed = [(3 if x.gated else 2) * x.hidden * x.intermediate for x in layout.layers]
    met = [top_k[x.layer if x.layer < len(top_k) else -1] or x.experts for x in layout.layers]
    idle = [x.experts - min(n, x.experts) for n, x in zip(met, layout.layers, strict=True)]
    return every - sum(size * count for size, count in zip(routed, idle, strict=True))


def _largest(source: Checkpoint) -> int:
    """Return the bytes of the largest tensor in memory."""
    return max(
        math.prod(info.shape) * (DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 1)
        for info in source.headers.values()
    )


def _short(rows: np.ndarray, cols: np.ndarray, group: int) -> int:
    """Return how many weights the last groups of all rows lack to fill `group`."""
    return int((rows * (-cols % group)).sum())
