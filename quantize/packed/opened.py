"""Open a packed checkpoint: check its files against each other, and read its streams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.disk.atomic import check_version, read_json
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.config import check_config, layout_of, plain_config
from bitknap.quantization.packed.convert_layout import unit_bytes
from bitknap.quantization.packed.dequantize import MOST_HALF, dequantize_into
from bitknap.quantization.packed.folder import PLAN, SOURCE, VERSION, digest, roles_of
from bitknap.quantization.packed.outline import PREFIX, streams
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.row_blocks import layout_for


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFolder:
    """A packed checkpoint whose headers, plan and source agree with each other.

    Attributes:
        checkpoint: its tensors.
        shapes: dtype and shape of the tensors that streams replace.
        whole: the matrices in those tensors.
        layout: the units in those tensors; blocks of matrices where the plan cuts them.
        plan: the plan, with its units in the layout's order.
        kind: byte layout of the streams, "plain" or "tiles".
        nbytes: bytes of each unit in them, int64[U].
    """

    checkpoint: Checkpoint
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    whole: Layout
    layout: Layout
    plan: BitPlan
    kind: str
    nbytes: Longs


def open_packed(folder: Path) -> PackedFolder:
    """Read everything in a packed checkpoint except its tensors.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    plan = BitPlan.load(folder / PLAN)
    shapes = source_shapes(folder)
    packed = Checkpoint.open(folder)
    check_config(packed.config, folder)
    kind = layout_of(packed.config, folder)
    whole = walk_headers(plain_config(packed.config), shapes, include=roles_of(plan.units))
    layout = layout_for(plan.units, whole)
    plan = aligned(plan, layout)
    nbytes = unit_bytes(plan, kind)
    for name, run in streams(plan.units).items():
        if name not in packed.headers:
            raise FileError(f"{folder}: tensor {name} is missing; write the checkpoint again")
        info, total = packed.headers[name], int(nbytes[run].sum())
        if (info.dtype, info.shape) != ("U8", (total,)):
            raise FileError(
                f"{folder}: tensor {name}: {info.dtype} {list(info.shape)}, the plan says U8 "
                f"[{total}]; write the checkpoint again"
            )
    return PackedFolder(
        checkpoint=packed,
        shapes=shapes,
        whole=whole,
        layout=layout,
        plan=plan,
        kind=kind,
        nbytes=nbytes,
    )


def check_decoded(packed: PackedFolder) -> None:
    """Refuse kept tensors in fewer than 16 bits, which transformers would not decode.

    Raises:
        ModelError: there are some, as early versions of Bitknap wrote them.
    """
    if low := list(packed.checkpoint.low_bit):
        raise ModelError(
            f"{packed.checkpoint.folder}: {len(low)} tensors outside the planned matrices, such "
            f"as {low[0]}, have fewer than 16 bits, so they cannot stay packed; load with "
            "bitknap.load(folder, packed=False), or quantize the source again"
        )


def read_packed(folder: Path) -> tuple[BitPlan, dict[str, Tensor]]:
    """Return the plan of a packed checkpoint and its tensors under the source's names.

    Quantized tensors are dequantized to float32; the caller rounds them to the source's dtype.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    packed = open_packed(folder)
    plan, headers = packed.plan, packed.checkpoint.headers
    tensors = {n: packed.checkpoint.read(n) for n in headers if not n.startswith(PREFIX)}
    tensors |= {n: torch.empty(shape) for n, (_, shape) in packed.shapes.items()}
    for name, run in streams(plan.units).items():
        stream, at = packed.checkpoint.read(name), 0
        for unit, size in zip(run.tolist(), packed.nbytes[run].tolist(), strict=True):
            view, piece = packed.layout.views[unit], stream[at : at + size]
            out = view.of(tensors[view.tensor])
            dequantize_into(out, piece, plan.format_of(unit), packed.kind)
            if packed.shapes[view.tensor][0] == "F16":  # rounding may exceed the largest value
                out.clamp_(-MOST_HALF, MOST_HALF)
            at += size
    return plan, tensors


def source_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that streams replace; the plan must be as written."""
    path = folder / SOURCE
    header = read_json(path)
    if not isinstance(header, dict):
        raise FileError(f"{path}: not a JSON object; write the checkpoint again")
    check_version(header, "bitknap.source", VERSION, path)
    if header.get("plan") != digest(folder / PLAN):
        raise FileError(
            f"{folder / PLAN}: changed since the checkpoint was written; a plan cannot be edited "
            "there, quantize the source with the other plan"
        )
    tensors = header.get("tensors")
    if not isinstance(tensors, dict) or not all(fits(x, [str, [int]]) for x in tensors.values()):
        raise FileError(f"{path}: tensors: must give the dtype and shape of each name")
    shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    if unknown := {dtype for dtype, _ in shapes.values()} - set(DTYPES):
        raise FileError(f"{path}: tensors: dtype {min(unknown)!r} is not known")
    return shapes
