"""What a packed checkpoint will hold and where, known before any of it is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import FileError, ModelError
from bitknap.kernels.layout.exponents import ROWS
from bitknap.kernels.layout.plain_codes import packed_bytes
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.shards import Entry, Place, Shards, lay_out
from bitknap.quantization.source.checkpoint import DTYPES, PACKED, Checkpoint, TensorInfo
from bitknap.quantization.source.safetensors_header import read_header

PREFIX = "bitknap."


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The files of a packed checkpoint and what goes where.

    Attributes:
        kept: tensors that keep their precision, or become bfloat16 if that is less.
        shards: the files.
        unit_places: where each unit's bytes begin.
    """

    kept: Mapping[str, TensorInfo]
    shards: Shards
    unit_places: tuple[Place, ...]


def stream_name(units: Units, unit: int) -> str:
    """Return the name of the tensor that holds this unit's bytes."""
    projection = units.projections[units.projection[unit]]
    return f"{PREFIX}{units.layer[unit]}.{ROLES[units.role[unit]]}.{projection}"


def streams(units: Units) -> dict[str, np.ndarray]:
    """Return the units of each stream, in the order of their bytes, int64 [n]."""
    keys = np.stack([units.layer, units.role, units.projection])
    _, of = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(of, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)
    return {stream_name(units, int(run[0])): run for run in sorted(runs, key=lambda r: int(r[0]))}


def kept_tensors(source: Checkpoint, layout: Layout) -> list[str]:
    """Return the tensors that keep their precision.

    Raises:
        ModelError: a tensor holds units and something else; it can be neither kept nor replaced.
    """
    covered: defaultdict[str, int] = defaultdict(int)
    sizes = layout.units.rows * layout.units.cols
    for view, size in zip(layout.views, sizes.tolist(), strict=True):
        covered[view.tensor] += size
    for name, size in covered.items():
        if size != int(np.prod(source.headers[name].shape)):
            raise ModelError(
                f"{name}: only {size} of its weights belong to units; cannot replace it"
            )
    return [name for name in source.headers if name not in covered]


def outline(source: Checkpoint, layout: Layout, plan: BitPlan, limit: int) -> Outline:
    """Return where every byte will go.

    Args:
        source: the checkpoint that is read.
        layout: its units.
        plan: the format of each unit, in the layout's order.
        limit: most bytes of the tensors in a file.

    Raises:
        ModelError: a tensor holds units and something else.
        FileError: torch lacks the dtype of a kept tensor.
    """
    kept = {name: source.headers[name] for name in kept_tensors(source, layout)}
    for name, info in kept.items():
        if info.dtype not in DTYPES:
            raise FileError(f"{info.file}: {name}: torch cannot hold dtype {info.dtype}")
    entries = {n: Entry(i.dtype, i.shape, source.written_bytes(n)) for n, i in kept.items()}
    runs = streams(plan.units)
    for name, run in runs.items():
        total = int(plan.nbytes[run].sum())
        entries[name] = Entry("U8", (total,), total)
    shards = lay_out(entries, PACKED, limit)
    places = [Place("", 0)] * len(plan.units)
    for name, run in runs.items():
        file, start = shards.places[name]
        begin = start + np.cumsum(plan.nbytes[run]) - plan.nbytes[run]
        for unit, at in zip(run, begin.tolist(), strict=True):
            places[unit] = Place(file, at)
    return Outline(kept=kept, shards=shards, unit_places=tuple(places))


def has_exponents(folder: Path, plan: BitPlan) -> bool:
    """Return whether a matrix in the streams of a plain layout has an exponent.

    Args:
        folder: the folder of the streams' files.
        plan: the plan of the streams' units.
    """
    headers: dict[str, TensorInfo] = {}
    for file in folder.glob(f"{PACKED}*.safetensors"):
        headers |= read_header(file)
    for name, run in streams(plan.units).items():
        bytes_of = np.memmap(headers[name].file, np.uint8, "r")
        begins = headers[name].start + np.cumsum(plan.nbytes[run]) - plan.nbytes[run]
        for unit, begin in zip(run.tolist(), begins.tolist(), strict=True):
            format = plan.format_of(unit)
            if format.kind == "keep":
                continue
            rows, cols = int(plan.units.rows[unit]), int(plan.units.cols[unit])
            across = 1 if format.compact else int(format.groups(cols))
            at = begin + packed_bytes(rows * cols, format.bits) + 1
            if (bytes_of[at : at + 2 * across * min(rows, ROWS) : 2 * across] >> 7).any():
                return True
    return False
