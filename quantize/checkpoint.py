"""The packed checkpoint: a transformers folder whose expert weights are streams of bits.

    config.json            the source's, with quantization_config.quant_method = "bitknap"
    bitknap*.safetensors   kept tensors under their own names; one uint8 tensor a stack of units,
                           named bitknap.<layer>.<role>.<projection>: their bytes, back to back
    bitknap_plan.json      the plan; with it every offset follows from `Format.nbytes`
    bitknap_source.json    name, dtype and shape of the tensors that the streams replace
    everything else        the tokenizer and its like, copied

`loading` reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plan import BitPlan
from bitknap.allocation.units import ROLES, Units
from bitknap.errors import BitknapError, MismatchError, ModelError
from bitknap.files import whole_folder, write_whole
from bitknap.quantize.apply import aligned, quantize_plan, read_stored, stacks
from bitknap.quantize.names import walk_headers
from bitknap.quantize.packed import encode
from bitknap.quantize.source import PACKED, Checkpoint
from bitknap.quantize.views import Layout

PLAN = "bitknap_plan.json"
SOURCE = "bitknap_source.json"
VERSION = "1.0"
PREFIX = "bitknap."
_KEPT = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def is_packed(folder: Path) -> bool:
    """Return whether `folder` holds a packed checkpoint, be it damaged."""
    return (folder / PLAN).is_file() or any(folder.glob(f"{PACKED}*.safetensors"))


def stream_name(units: Units, unit: int) -> str:
    """Return the name of the tensor that holds this unit's bytes."""
    projection = units.projections[units.projection[unit]]
    return f"{PREFIX}{units.layer[unit]}.{ROLES[units.role[unit]]}.{projection}"


def copied_files(source: Checkpoint) -> list[Path]:
    """Return the files that a packed checkpoint takes over unchanged."""
    return sorted(
        f
        for f in source.folder.iterdir()
        if f.is_file() and f.name != "config.json" and not f.name.endswith(_NOT_COPIED)
    )


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


def fixed_bytes(source: Checkpoint, layout: Layout) -> int:
    """Return what a packed checkpoint takes on disk beside its units' bytes, at most.

    Kept tensors and copied files are exact; for headers, config and the plan's text it is a bound.
    """
    kept = sum(
        source.headers[n].stop - source.headers[n].start for n in kept_tensors(source, layout)
    )
    copied = sum(f.stat().st_size for f in copied_files(source))
    # A plan's row takes about 140 bytes; a tensor's name stands in a header and maybe an index.
    text = 192 * len(layout.units) + sum(2 * len(name) + 160 for name in source.headers)
    return kept + copied + text + 2 * len(json.dumps(dict(source.config))) + 8192


def save(
    source: Checkpoint, plan: BitPlan, out: Path, *, overwrite: bool = False
) -> dict[str, int]:
    """Write `source` quantized as `plan` says, whole or not at all.

    Returns:
        predicted and written bytes of the units, and bytes of the whole folder.

    Raises:
        MismatchError: the plan was made for another model, or keeps a precision it does not have.
        ModelError: a weight is NaN or infinite.
        InputError: `out` exists and `overwrite` is false.
        BitknapError: the bytes on disk are not the plan's.
    """
    if plan.model != source.fingerprint:
        raise MismatchError(
            f"the plan is for model {plan.model or 'unknown'}, this one is {source.fingerprint}; "
            "make a plan from a table of this model"
        )
    layout = walk_headers(source.config, source.shapes, include=roles_of(plan.units))
    plan = aligned(plan, layout)
    _check_kept(source, layout, plan)
    with whole_folder(out, overwrite=overwrite) as part:
        kept = {name: _finite(source, name) for name in kept_tensors(source, layout)}
        streams = dict(_streams(source, layout, plan))
        _write_tensors(kept | streams, part)
        _write_texts(source, layout, plan, part)
        written = _stream_bytes(part)
        if written != plan.total_bytes:
            raise BitknapError(f"{out}: {written} bytes of units, the plan says {plan.total_bytes}")
        total = sum(f.stat().st_size for f in part.iterdir())
    return {"predicted": plan.total_bytes, "written": written, "checkpoint": total}


def roles_of(units: Units) -> tuple[str, ...]:
    """Return the roles beside routed experts that occur: what a walker must include."""
    return tuple(ROLES[r] for r in np.unique(units.role) if ROLES[r] != "routed")


def _check_kept(source: Checkpoint, layout: Layout, plan: BitPlan) -> None:
    """Refuse a plan that keeps units in a precision other than the one they are stored in."""
    for unit, view in enumerate(layout.views):
        format, stored = plan.format_of(unit), source.headers[view.tensor].dtype
        if format.kind == "keep" and stored != _KEPT.get(format.source):
            raise MismatchError(
                f"{plan.units.label(unit)}: the plan says {format.name}, but {view.tensor} is "
                f"stored as {stored}; keep that precision or quantize"
            )


def check_finite(source: Checkpoint) -> None:
    """Raise ModelError for the first tensor with a NaN or infinite weight; reads them all."""
    for name in source.headers:
        if not name.startswith(PREFIX):
            _finite(source, name)


def _finite(source: Checkpoint, name: str) -> Tensor:
    tensor = source.read(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise ModelError(
            f"{name}: NaN or infinite weight; repair the checkpoint before quantizing it"
        )
    return tensor


def _streams(source: Checkpoint, layout: Layout, plan: BitPlan) -> Iterator[tuple[str, Tensor]]:
    def read(which: np.ndarray) -> Tensor:
        return read_stored(layout, which, source)

    pieces: dict[int, Tensor] = {}
    for which, quantized in quantize_plan(plan, read):
        for place, unit in enumerate(which):
            if isinstance(quantized, Tensor):
                dtype = source.read(layout.views[unit].tensor).dtype
                pieces[unit] = quantized[place].to(dtype).contiguous().view(torch.uint8).reshape(-1)
            else:
                rows = int(plan.units.rows[unit])
                pieces[unit] = encode(quantized.rows(place * rows, (place + 1) * rows))
    for run in stacks(plan.units):
        yield stream_name(plan.units, int(run[0])), torch.cat([pieces[int(i)] for i in run])


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    pattern = f"{PACKED}{{suffix}}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, metadata={"format": "pt"})


def _write_texts(source: Checkpoint, layout: Layout, plan: BitPlan, folder: Path) -> None:
    for file in copied_files(source):
        shutil.copyfile(file, folder / file.name)
    ours = {"quant_method": "bitknap", "version": VERSION}
    write_whole(folder / "config.json", _json({**source.config, "quantization_config": ours}))
    plan.save(folder / PLAN)
    checksum = digest(folder / PLAN)
    replaced = sorted({view.tensor for view in layout.views})
    info = {
        name: [source.headers[name].dtype, list(source.headers[name].shape)] for name in replaced
    }
    header = {"format": "bitknap.source", "version": VERSION, "plan": checksum}
    write_whole(folder / SOURCE, _json(header | {"tensors": info}))


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _stream_bytes(folder: Path) -> int:
    headers = Checkpoint.open(folder).headers
    return sum(i.stop - i.start for name, i in headers.items() if name.startswith(PREFIX))
