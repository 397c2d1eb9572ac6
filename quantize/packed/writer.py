"""The packed checkpoint: a transformers folder whose expert weights are streams of bits.

    config.json            the source's, with quantization_config.quant_method = "bitknap"
    bitknap*.safetensors   kept tensors under their own names, decoded to bf16 where the source has
                           them in fewer bits; one uint8 tensor a stack of units,
                           named bitknap.<layer>.<role>.<projection>: their bytes, back to back
    bitknap_plan.json      the plan; with it every offset follows from `Format.nbytes`
    README.md              the model card, see `model_card`
    bitknap_files.json     names of all other files, which `--overwrite` may replace
    bitknap_source.json    name, dtype and shape of the tensors that the streams replace
    everything else        the tokenizer and similar files, copied; see `companions`

`loading` reads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.budget import parse_size
from bitknap.disk.atomic import check_space, folder_bytes, write_whole
from bitknap.disk.manifest import sign
from bitknap.disk.outputs import check_output
from bitknap.errors import BitknapError, InputError, MismatchError
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed import model_card
from bitknap.quantization.packed.buildable import check
from bitknap.quantization.packed.config import (
    LAYOUTS,
    STUB,
    WITH_EXPONENTS,
    lies,
    packed_config,
    stub,
)
from bitknap.quantization.packed.folder import PLAN, SOURCE, VERSION, digest, roles_of
from bitknap.quantization.packed.outline import (
    PREFIX,
    has_exponents,
    kept_tensors,
    outline,
    stream_name,
    streams,
)
from bitknap.quantization.packed.resume import Task, identity
from bitknap.quantization.packed.shards import MAX_SHARD_SIZE, Shards
from bitknap.quantization.packed.work_pieces import (
    COPY,
    Decoded,
    Piece,
    Work,
    decode_finite,
    read_finite,
    slabs,
)
from bitknap.quantization.rounding.methods import RTN, Midtread
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import PACKED, Checkpoint
from bitknap.quantization.source.devices import CPU
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.quantize_plan import Watched
from bitknap.quantization.stacks.row_blocks import layout_for

__all__ = [
    "PREFIX",
    "Rounded",
    "check_finite",
    "fixed_bytes",
    "save",
    "stream_name",
    "streams",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """How a plan's weights are rounded.

    Attributes:
        rounding: How to round.
        inputs: Statistics of units' inputs, for rounding methods that need them.
        device: Where units are rounded and their bits are packed.
        about: Origin of `inputs`, such as text, tokens and seed; JSON values.
    """

    rounding: Rounding = RTN
    inputs: Watched | None = None
    device: torch.device = CPU
    about: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


BY_RTN = Rounded()


def fixed_bytes(source: Checkpoint, layout: Layout) -> int:
    """Return the most that a packed checkpoint takes on disk beside its units' bytes.

    Kept tensors and copied files are exact; for headers, config and the plan's text it is a bound.
    """
    kept = sum(map(source.written_bytes, kept_tensors(source, layout)))
    copied = source.companion_bytes
    # A plan's row takes about 140 bytes; a tensor's name stands in a header and maybe an index.
    text = 192 * len(layout.units) + sum(2 * len(name) + 160 for name in source.headers)
    config = 2 * len(json.dumps(dict(source.config))) + 2048
    return kept + copied + text + config + model_card.MOST_BYTES + 8192


def save(
    source: Checkpoint,
    plan: BitPlan,
    out: Path,
    rounded: Rounded = BY_RTN,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write `source` quantized as `plan` says, piece by piece; `out` appears when it is complete.

    Little more than the largest matrix is in memory. Finished pieces are kept in a hidden folder
    beside `out` (see `resume`): after a kill or an error the same call continues from there, and
    ends with the same bytes.

    Args:
        source: the checkpoint.
        plan: the format of each of its units.
        out: the folder to write.
        rounded: how to round, and by what inputs.
        max_shard_size: maximum bytes of a file, such as "5GB"; a larger tensor has its own.
        overwrite: replace `out`, and unfinished files of a run with other inputs.
        progress: called with ("quantize", done, total) after each piece.

    Returns:
        "predicted" and "written" bytes of the units, and bytes of the whole "checkpoint"; how many
        tensors that the plan leaves out were "decoded" from fewer bits, their "decoded_bytes" in
        bfloat16, and the "stored_bytes" that they had.

    Raises:
        MismatchError: the plan was made for another model, or keeps a precision it does not have;
            or a run with other inputs was left unfinished.
        ModelError: a weight is NaN or infinite, or transformers could not load what was written.
        InputError: `out` exists and `overwrite` is false, or the disk has no room for it.
        BitknapError: the bytes on disk are not the plan's, or the disk is full.
        KeyboardInterrupt: stopped by hand; says what is kept.
    """
    check_plan(source, plan)
    _check_grids(rounded.rounding)
    check_output(
        out, "folder", overwrite=overwrite, inputs=[source.folder], copied_from=source.folder
    )
    limit = _limit(max_shard_size)
    work, shards = _work(source, plan, rounded, limit)
    task = _task(work, shards, out, {"max_shard_size": limit, **rounded.about})
    there = task.partial.allocated()
    check_space(out, fixed_bytes(source, work.layout) + plan.total_bytes - there)
    with task.made("quantize", overwrite=overwrite, progress=progress) as files:
        sizes = _finish(source, work.layout, work.plan, files, out)
    return sizes | _decoded(source, work.kept)


def _work(source: Checkpoint, plan: BitPlan, rounded: Rounded, limit: int) -> tuple[Work, Shards]:
    """Return what is to be made of the plan's units, and the files that it goes to."""
    layout = walk_headers(source.config, source.shapes, include=roles_of(plan.units))
    layout = layout_for(plan.units, layout)
    plan = aligned(plan, layout)
    _check_kept(source, layout, plan)
    planned = outline(source, layout, plan, limit)
    work = Work(
        source=source,
        layout=layout,
        plan=plan,
        kept=planned.kept,
        places=planned.shards.places,
        unit_places=planned.unit_places,
        rounding=rounded.rounding,
        inputs=rounded.inputs,
        device=rounded.device,
    )
    return work, planned.shards


def _task(work: Work, shards: Shards, out: Path, about: Mapping[str, Any]) -> Task[Piece]:
    """Return the task of writing the pieces; `about` is what they depend on besides the work."""
    pieces = work.pieces()
    layout = [WITH_EXPONENTS, *shards.headers.values(), *pieces]
    return Task(
        out=out,
        kind="folder",
        maker=work,
        pieces=pieces,
        stamps=work.stamps(pieces),
        frame=shards,
        about={**identity(work.source, work.plan, work.rounding, layout), **about},
        copied_from=work.source.folder,
    )


def _limit(max_shard_size: int | str) -> int:
    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if limit < 1:
        raise InputError(
            f"max_shard_size: {max_shard_size!r} is not above 0; give a size such as 5GB"
        )
    return limit


def check_plan(source: Checkpoint, plan: BitPlan) -> None:
    """Raise MismatchError unless the plan was made for this model."""
    if plan.model != source.fingerprint:
        raise MismatchError(
            f"the plan is for model {plan.model or 'unknown'}, this one is {source.fingerprint}; "
            "make a plan from a table of this model"
        )


def _check_grids(rounding: Rounding) -> None:
    """Raise MismatchError for a rounding whose grids packed checkpoints do not have."""
    if rounding.name == Midtread().name:
        raise MismatchError(
            "packed checkpoints have no grids with a code for zero, which the plan's costs are of "
            "(method midtread); export the plan to compressed-tensors"
        )


def _finish(
    source: Checkpoint, layout: Layout, plan: BitPlan, folder: Path, out: Path
) -> dict[str, int]:
    _write_texts(source, layout, plan, folder)
    sign(folder)
    check(folder)
    written = _stream_bytes(folder)
    if written != plan.total_bytes:
        raise BitknapError(f"{out}: {written} bytes of units, the plan says {plan.total_bytes}")
    total = folder_bytes(folder)
    return {"predicted": plan.total_bytes, "written": written, "checkpoint": total}


def _decoded(source: Checkpoint, kept: Iterable[str]) -> dict[str, int]:
    """Return the number and sizes of kept tensors that are decoded from fewer than 16 bits."""
    names = [name for name in kept if name in source.low_bit]
    return {
        "decoded": len(names),
        "decoded_bytes": sum(map(source.written_bytes, names)),
        "stored_bytes": sum(source.low_bit[name].nbytes for name in names),
    }


def _check_kept(source: Checkpoint, layout: Layout, plan: BitPlan) -> None:
    """Refuse a plan that keeps units in another precision than the stored one, or of other files.

    Raises:
        MismatchError: it does; names the first unit.
    """
    for unit, view in enumerate(layout.views):
        format, stored = plan.format_of(unit), source.precision(view.tensor)
        if format.foreign:
            files, target = ("GGUF", "gguf") if format.kind == "ggml" else ("GPTQ's", "gptq")
            raise MismatchError(
                f"{plan.units.label(unit)}: the plan says {format.name}, which {files} files alone "
                f"hold; export the plan to {target}"
            )
        if format.kind == "keep" and stored != format.source:
            raise MismatchError(
                f"{plan.units.label(unit)}: the plan says {format.name}, but {view.tensor} is "
                f"stored as {source.stored_as(view.tensor)}; make a plan that keeps this "
                "precision, or quantizes the matrix"
            )


def check_finite(source: Checkpoint) -> None:
    """Raise ModelError for the first tensor with a NaN or infinite weight; reads them all."""
    names = [name for name in source.headers if not name.startswith(PREFIX)]
    for name in names:
        if name in source.low_bit:
            for first, last in slabs(source, name):
                decode_finite(source, Decoded(name, first, last))
            continue
        info = source.headers[name]
        size = info.stop - info.start
        for start in range(0, size, COPY):
            read_finite(name, info, start, min(size, start + COPY))


def _write_texts(source: Checkpoint, layout: Layout, plan: BitPlan, folder: Path) -> None:
    source.copy_companions(folder)
    single = f"{PACKED}.safetensors"
    weights = single if (folder / single).is_file() else f"{single}.index.json"
    exponents = has_exponents(folder, plan)
    config = packed_config(source.config, weights, **lies(LAYOUTS[0], exponents))
    write_whole(folder / "config.json", _json(config))
    if text := stub(source.config):
        write_whole(folder / STUB, text.encode())
    plan.save(folder / PLAN)
    sizes = {"quantized weights": plan.total_bytes, "source": source.nbytes}
    model_card.write(folder, plan, source=source.folder, sizes=sizes)
    checksum = digest(folder / PLAN)
    replaced = sorted({view.tensor for view in layout.views})
    info = {
        name: [source.headers[name].dtype, list(source.headers[name].shape)] for name in replaced
    }
    header = {"format": "bitknap.source", "version": VERSION, "plan": checksum}
    write_whole(folder / SOURCE, _json(header | {"tensors": info}))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _stream_bytes(folder: Path) -> int:
    headers = Checkpoint.open(folder).headers
    return sum(i.stop - i.start for name, i in headers.items() if name.startswith(PREFIX))
