"""A dry run from `config.json` and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, formats
from bitknap.allocation.table import storage
from bitknap.quantize.checkpoint import fixed_bytes
from bitknap.quantize.names import walk_headers
from bitknap.quantize.source import Checkpoint, resolve

# What the table of uniform sizes shows: every width, in a usual and in the smallest form.
_SHOWN = formats(range(1, 9), (64, "row"), True, "fp16")
# Bytes of bf16 weights a second that rounding to one format takes, clipping search and all, on two
# CPU cores: measured on the bundled models (benchmarks/results/uniform.md).
_RTN_RATE = 2e7


def inspect(model: str | Path, include: Collection[str] = ()) -> dict[str, Any]:
    """Return what a plan for `model` could be, without reading weights.

    Args:
        model: a folder, a hub id, or "reference:NAME".
        include: roles beside routed experts.

    Returns:
        Counts, the feasible range in bits per weight and in bytes of the whole checkpoint, the
        weights by which last groups of rows are short, memory and time estimates, and the bytes
        of all units in each of some formats.
    """
    source = Checkpoint.open(resolve(model))
    layout = walk_headers(source.config, source.shapes, include)
    units = layout.units
    every = formats(range(1, 9), (32, 64, 128, 256, "row"), (False, True), ("fp16", "compact"))
    sizes = storage(units, every)
    least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    weights = int(units.numel.sum())
    fixed = fixed_bytes(source, layout)
    largest = max(info.stop - info.start for info in source.headers.values())
    roles = {ROLES[r]: int((units.role == r).sum()) for r in np.unique(units.role)}
    padded = {f"g{g}": _short(units.rows, units.cols, g) for g in (32, 64, 128, 256)}
    return {
        "architecture": ", ".join(source.config.get("architectures") or ["unknown"]),
        "moe_layers": len(layout.layers),
        "experts_per_layer": max((x.experts for x in layout.layers), default=0),
        "units": len(units),
        "units_by_role": ", ".join(f"{n} {r}" for r, n in roles.items()),
        "weights_in_units": weights,
        "source_bytes": source.nbytes,
        "kept_bytes_at_most": fixed,
        "least_bpw": round(8 * least / weights, 4),
        "most_bpw": round(8 * most / weights, 4),
        "smallest_checkpoint_bytes": least + fixed,
        "short_of_a_whole_last_group": ", ".join(f"{k}: {v:,}" for k, v in padded.items()),
        "memory_bytes_to_quantize": 2 * source.nbytes + 8 * largest,
        "memory_bytes_to_calibrate": 3 * source.nbytes,
        "seconds_to_quantize_about": round(source.nbytes / _RTN_RATE + 5),
        "uniform_bytes": {
            f.name: int(size) for f, size in zip(_SHOWN, storage(units, _SHOWN).sum(0), strict=True)
        },
    }


def _short(rows: np.ndarray, cols: np.ndarray, group: int) -> int:
    """Return by how many weights the last groups of all rows fall short of `group`."""
    return int((rows * (-cols % group)).sum())
