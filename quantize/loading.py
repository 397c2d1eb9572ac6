"""Back from a checkpoint, packed or plain, to a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitknap.allocation.plan import BitPlan
from bitknap.errors import FileError, ModelError
from bitknap.files import check_version, read_json
from bitknap.quantize.apply import aligned, stacks
from bitknap.quantize.checkpoint import (
    PLAN,
    PREFIX,
    SOURCE,
    VERSION,
    digest,
    is_packed,
    roles_of,
    stream_name,
)
from bitknap.quantize.names import walk_headers
from bitknap.quantize.packed import decode
from bitknap.quantize.source import DTYPES, Checkpoint


def read_packed(folder: Path) -> tuple[BitPlan, dict[str, Tensor]]:
    """Return the plan of a packed checkpoint and its tensors under the source's names.

    Quantized tensors come dequantized, float32 rounded to the source's dtype only by the caller.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    plan = BitPlan.load(folder / PLAN)
    shapes = _source_shapes(folder)
    packed = Checkpoint.open(folder)
    plain = {k: v for k, v in packed.config.items() if k != "quantization_config"}
    layout = walk_headers(plain, shapes, include=roles_of(plan.units))
    plan = aligned(plan, layout)
    tensors = {n: packed.read(n) for n in packed.headers if not n.startswith(PREFIX)}
    tensors |= {n: torch.empty(shape) for n, (_, shape) in shapes.items()}
    for run in stacks(plan.units):
        name = stream_name(plan.units, int(run[0]))
        if name not in packed.headers:
            raise FileError(f"{folder}: tensor {name} is missing; write the checkpoint again")
        info, total = packed.headers[name], int(plan.nbytes[run].sum())
        if (info.dtype, info.shape) != ("U8", (total,)):
            raise FileError(
                f"{folder}: tensor {name}: {info.dtype} {list(info.shape)}, the plan says U8 "
                f"[{total}]; write the checkpoint again"
            )
        stream, at = packed.read(name), 0
        for unit, size in zip(run, plan.nbytes[run].tolist(), strict=True):
            view = layout.views[unit]
            matrix = _unit_weight(stream[at : at + size], plan, int(unit), shapes[view.tensor][0])
            view.of(tensors[view.tensor]).copy_(matrix)
            at += size
    return plan, tensors


def _source_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that streams replace; the plan must be as written."""
    path = folder / SOURCE
    header = read_json(path)
    if not isinstance(header, dict):
        raise FileError(f"{path}: not an object")
    check_version(header, "bitknap.source", VERSION, path)
    if header.get("plan") != digest(folder / PLAN):
        raise FileError(
            f"{folder / PLAN}: changed since the checkpoint was written; a plan cannot be edited "
            "there, quantize the source with the other plan"
        )
    try:
        tensors = header["tensors"].items()
        shapes = {n: (str(dtype), tuple(map(int, shape))) for n, (dtype, shape) in tensors}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FileError(f"{path}: tensors: not names with dtype and shape") from None
    if unknown := {dtype for dtype, _ in shapes.values()} - set(DTYPES):
        raise FileError(f"{path}: tensors: dtype {min(unknown)!r} is not known")
    return shapes


def _unit_weight(stream: Tensor, plan: BitPlan, unit: int, dtype: str) -> Tensor:
    rows, cols = int(plan.units.rows[unit]), int(plan.units.cols[unit])
    format = plan.format_of(unit)
    if format.kind == "keep":
        return stream.clone().view(DTYPES[dtype]).view(rows, cols).float()
    return decode(stream, format, rows, cols).dequantize()


def load(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Return the transformers model of a packed or of a plain checkpoint, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: "auto" is what config.json says; quantized weights are rounded to it once.

    Raises:
        FileError: a file is damaged, or the model needs tensors that are not there.
        ModelError: transformers does not know the architecture.
    """
    config, architecture = _architecture(folder)
    if is_packed(folder):
        _, tensors = read_packed(folder)
        del config.quantization_config
        wanted = _own_dtype(folder, config) if dtype == "auto" else dtype
        where = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    else:
        Checkpoint.open(folder)  # a damaged file is told in one line, before transformers reads it
        wanted, where = dtype, {"pretrained_model_name_or_path": folder}
    model, report = architecture.from_pretrained(**where, dtype=wanted, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise FileError(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}")
    return model.eval()


def _own_dtype(folder: Path, config: Any) -> torch.dtype:
    """Return the dtype that config.json names, or else the one of the replaced tensors."""
    if config.dtype is not None:
        found: torch.dtype = config.dtype
        return found
    return DTYPES[next(iter(_source_shapes(folder).values()))[0]]


def config_of(folder: Path) -> Any:
    """Return a folder's transformers configuration.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: transformers cannot read its config.json ({reason})") from None


def _architecture(folder: Path) -> tuple[Any, Any]:
    """Return a folder's transformers configuration and model class."""
    import transformers

    config = config_of(folder)
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise ModelError(f"{folder}: unknown architecture {names}; transformers has no such class")
    return config, getattr(transformers, names[0])
