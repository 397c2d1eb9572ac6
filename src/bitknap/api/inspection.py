"""A dry run that reads only `config.json` and safetensors headers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, Budget, formats
from bitknap.allocation.problem.device_memory import Device
from bitknap.allocation.problem.serving import Serving
from bitknap.allocation.problem.table import storage
from bitknap.api.forecasts.forecasting import LIBRARIES, Forecast, estimating, forecast
from bitknap.api.forecasts.machine import TYPICAL, Machine, probe
from bitknap.api.requests import CALIBRATION_TOKENS
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.packed.config import architectures
from bitknap.quantization.packed.writer import fixed_bytes
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.runtime.serving_needs import serving_of
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.targets.catalog import fits
from bitknap.quantization.targets.target import Fit

# Formats in the table of uniform sizes: every width, in a common and in the smallest form.
_SHOWN = formats(range(1, 9), (64, "row"), True, "fp16")
# Formats that bound the feasible range.
_EVERY = formats(range(1, 9), (32, 64, 128, 256, "row"), (False, True), ("fp16", "compact"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The resources that one command needs.

    Attributes:
        name: the command with its options.
        memory_bytes: peak resident memory.
        seconds: time, accurate to about a factor of two.
    """

    name: str
    memory_bytes: int
    seconds: int


def inspect(
    model: str | Path,
    include: Collection[str] = (),
    *,
    budget: Budget | None = None,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Return which plans are possible for `model`, without reading weights.

    For a model on the hub, only `config.json` and headers are fetched.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        include: roles to quantize besides routed experts.
        budget: of `Budget.device`, to add "device": what it holds, and what it leaves for units.
        machine: the machine that "steps" and "forecast" are for; a typical one of two cores when
            not given. `probe_of` measures this one.

    Returns:
        The result of `report`.

    Raises:
        InputError: the size of the model's cache is not known, or the context is too long.
        ModelError: the model is already packed, has no units, or transformers could not load it.
    """
    source = Checkpoint.look(model)
    check_source(source, include)
    found = report(source, include, machine or TYPICAL)
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


def probe_of(model: str | Path) -> Machine:
    """Measure this machine at a model's shapes, for about 20 seconds.

    Args:
        model: a folder, a hub id, or "reference:NAME".
    """
    source = Checkpoint.look(model)
    return probe(source, walk_headers(source.config, source.shapes))


def report(
    source: Checkpoint, include: Collection[str] = (), machine: Machine = TYPICAL
) -> dict[str, Any]:
    """Return which plans are possible for an opened checkpoint.

    Returns:
        Counts, the feasible range in bits per weight and in bytes of the whole checkpoint, the
        weights missing from the last groups of rows, "uniform_bytes" of all units in some
        formats, the "steps" with their memory and time, a "forecast" of the parts of the main job
        in each residency, the rates of the "machine", and which "exports" the shapes allow, with
        the seconds of an estimate layer by layer and of writing, where weights are written.
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
        "steps": [asdict(step) for step in steps(source, layout, machine)],
        "forecast": [
            {**asdict(one), "seconds": round(one.seconds), "fits": _fits(one, machine)}
            for one in forecast(source, layout, machine)
        ],
        "machine": asdict(machine),
        "exports": {
            fit.target.name: {
                "possible": fit.possible,
                "bits": list(fit.bits),
                "groups": list(fit.groups),
                "profile": fit.target.profile,
                "reason": fit.reason,
                **_times(source, layout, machine, fit),
            }
            for fit in fits(units)
        },
    }


def steps(source: Checkpoint, layout: Layout, machine: Machine = TYPICAL) -> list[Step]:
    """Return the least that estimating and quantizing need, for each method, layer by layer.

    Besides the weights being rounded, the writer holds 1.5 times the largest tensor (measured).

    Args:
        source: the model.
        layout: its units.
        machine: rates of the machine.
    """
    parts = forecast(source, layout, machine)
    weights = int(layout.units.numel.sum())
    reading = 2 * weights / machine.reads
    (packing,) = {one.memory_bytes for one in parts if one.step == "pack"}
    memory, seconds = estimating(parts, "by layer")
    needed = [
        _step("estimate --estimator data-free", packing, reading),
        _step("estimate, with a text", memory, seconds),
    ]
    inputs = layer_bytes(source, layout, CALIBRATION_TOKENS, {"full"}) + LIBRARIES
    passes = sum(x.seconds for x in parts if x.residency == "by layer" and x.step == "calibrate")
    for method in ("rtn", "hqq", "gptq"):
        asks = method == "gptq"
        rounding = weights / getattr(machine, method)
        needed.append(
            _step(
                f"quantize --method {method}",
                max(packing, inputs if asks else 0),
                rounding + reading + (passes if asks else 0),
            )
        )
    return needed


def _times(source: Checkpoint, layout: Layout, machine: Machine, fit: Fit) -> dict[str, int | None]:
    """Return the seconds of estimating layer by layer for a target, and of writing its weights."""
    target, needed = fit.target, ("estimate_seconds", "write_seconds")
    if not (fit.possible and target.reads_weights):
        return dict.fromkeys(needed)
    method = target.rounding or RTN.name
    menu = target.menu(layout.units)
    parts = forecast(source, layout, machine, options=menu, method=method)
    (writing,) = {one.seconds for one in parts if one.step == "pack"}
    _, estimate = estimating(parts, "by layer")
    return dict(zip(needed, (round(estimate), round(writing)), strict=True))


def _step(name: str, memory: int, seconds: float) -> Step:
    return Step(name=name, memory_bytes=memory, seconds=round(seconds) + 5)  # to load libraries


def _fits(one: Forecast, machine: Machine) -> bool | None:
    return None if machine.memory is None else one.memory_bytes <= machine.memory


def _short(rows: np.ndarray, cols: np.ndarray, group: int) -> int:
    """Return how many weights the last groups of all rows lack to fill `group`."""
    return int((rows * (-cols % group)).sum())
