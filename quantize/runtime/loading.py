"""Back from a checkpoint, packed or plain, to a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.disk.atomic import check_version, read_json
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.buildable import check_head, check_loadable, check_tensors
from bitknap.quantization.packed.config import check_config, layout_of, plain_config
from bitknap.quantization.packed.convert_layout import unit_bytes
from bitknap.quantization.packed.dequantize import MOST_HALF, dequantize_into
from bitknap.quantization.packed.outline import PREFIX, streams
from bitknap.quantization.packed.writer import (
    PLAN,
    SOURCE,
    VERSION,
    digest,
    is_packed,
    roles_of,
)
from bitknap.quantization.runtime.dequantized_cache import CACHE_BYTES
from bitknap.quantization.source.architecture import (
    align_experts,
    architecture_of,
    config_of,
    hollow,
)
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint
from bitknap.quantization.source.source_config import computes, forget_quantization
from bitknap.quantization.source.transformers_calls import calling_transformers
from bitknap.quantization.source.weight_files import has_metadata
from bitknap.quantization.stacks.apply import aligned
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
        kind: how streams lie, "plain" or "tiles".
        nbytes: what each unit has in them, int64[U].
    """

    checkpoint: Checkpoint
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    whole: Layout
    layout: Layout
    plan: BitPlan
    kind: str
    nbytes: Longs


def open_packed(folder: Path) -> PackedFolder:
    """Read all of a packed checkpoint but its tensors.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    plan = BitPlan.load(folder / PLAN)
    shapes = _source_shapes(folder)
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
    """Refuse to have transformers read kept tensors in fewer than 16 bits: it would not decode.

    Raises:
        ModelError: there are some, as Bitknap wrote them before it decoded them.
    """
    if low := list(packed.checkpoint.low_bit):
        raise ModelError(
            f"{packed.checkpoint.folder}: {len(low)} tensors such as {low[0]} are in fewer than 16 "
            "bits outside of units, so they cannot stay packed; load with "
            "bitknap.load(folder, packed=False), or quantize the source again"
        )


def read_packed(folder: Path) -> tuple[BitPlan, dict[str, Tensor]]:
    """Return the plan of a packed checkpoint and its tensors under the source's names.

    Quantized tensors come dequantized, float32 rounded to the source's dtype only by the caller.

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
            if packed.shapes[view.tensor][0] == "F16":  # rounding may pass the largest
                out.clamp_(-MOST_HALF, MOST_HALF)
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
    tensors = header.get("tensors")
    if not isinstance(tensors, dict) or not all(fits(x, [str, [int]]) for x in tensors.values()):
        raise FileError(f"{path}: tensors: not names with dtype and shape")
    shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    if unknown := {dtype for dtype, _ in shapes.values()} - set(DTYPES):
        raise FileError(f"{path}: tensors: dtype {min(unknown)!r} is not known")
    return shapes


def load(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: torch.device | str = "cpu",
    packed: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Any:
    """Return the transformers model of a packed or of a plain checkpoint, in evaluation mode.

    An adapter beside plain weights is not loaded, as it is not quantized either.

    Args:
        folder: the checkpoint.
        dtype: "auto" is what config.json says; quantized weights are rounded to it once.
        device: where it goes.
        packed: keep the weights of a packed checkpoint packed in memory, in about the bytes that
            they have on disk. On a CUDA device, where this is what happens when nothing is said,
            kernels run its experts; elsewhere a matrix is dequantized when it is used, which is
            slower than an ordinary model unless it is in the cache. Its `save_pretrained` writes a
            packed checkpoint; otherwise it is an ordinary model.
        cache_bytes: how much of it may be held dequantized as well, when packed.

    Raises:
        FileError: a file is damaged, or the model needs tensors that are not there.
        ModelError: transformers does not know the architecture, or cannot keep it packed.
    """
    check(folder)
    config = config_of(folder)
    architecture = architecture_of(folder, config)
    generation = _generation(folder)
    where_to = torch.device(device)
    wanted = where_to.type == "cuda" if packed is None else packed
    packed = wanted and is_packed(folder)
    where: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if is_packed(folder) and dtype == "auto":
        dtype = _own_dtype(folder, config)
    if packed:
        from bitknap.quantization.runtime.transformers_plugin import register

        register()
        check_decoded(open_packed(folder))
    elif is_packed(folder):
        where = {"pretrained_model_name_or_path": None, "config": to_plain(config)}
        where["state_dict"] = read_packed(folder)[1]
    elif not _reads_alike(source := Checkpoint.open(folder)):  # opened, and so checked, either way
        forget_quantization(config)
        tensors = {name: source.read(name).contiguous() for name in source.headers}
        where = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    with calling_transformers(f"{folder}: transformers cannot load the model"):
        model, report = architecture.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    if generation and where["pretrained_model_name_or_path"] is None and model.can_generate():
        model.generation_config = generation
    if missing := sorted(report["missing_keys"]):
        raise FileError(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}")
    if packed:
        model.hf_quantizer.cache.limit = cache_bytes
    align_experts(model)
    return model.eval().to(where_to)


def _reads_alike(source: Checkpoint) -> bool:
    """Return whether transformers, given the folder, loads what `Checkpoint.read` reads.

    It does not decode all low-bit weights, adds an adapter that it finds, and refuses an index
    without metadata and a dtype that nothing is computed in.
    """
    adapter = (source.folder / "adapter_config.json").is_file()
    bare = source.index and not has_metadata(source.folder / source.index)
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    return computes(dtype) and not (source.low_bit or adapter or bare)


def _generation(folder: Path) -> Any:
    """Return a folder's settings for generating, None where transformers passes over them.

    Raises:
        FileError: transformers refuses them.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
    except (TypeError, ValueError) as error:
        path, reason = folder / "generation_config.json", next(iter(str(error).splitlines()), "")
        raise FileError(f"{path}: transformers cannot read it ({reason})") from None


def check(folder: Path, *, reads_text: bool = False) -> None:
    """Refuse a checkpoint, packed or plain, that could not be loaded; reads headers alone.

    Args:
        folder: the checkpoint.
        reads_text: the model has to predict text.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
        ModelError: transformers does not know the architecture, or the tensors are not those of
            the model that config.json describes.
    """
    if not is_packed(folder):
        check_loadable(Checkpoint.open(folder), reads_text=reads_text)
        return
    packed = open_packed(folder)
    shapes = {n: x for n, x in packed.checkpoint.shapes.items() if not n.startswith(PREFIX)}
    model = hollow(folder, to_plain(config_of(folder)))
    roles = roles_of(packed.plan.units)
    check_tensors(folder, model, {**shapes, **packed.shapes}, packed.whole, roles)
    if reads_text:
        check_head(folder, model)


def to_plain(config: Any) -> Any:
    """Take what a packed checkpoint says of itself out of its configuration, in place."""
    plain = plain_config(vars(config))
    for name in set(vars(config)) - set(plain):
        delattr(config, name)
    if "auto_map" in plain:
        config.auto_map = plain["auto_map"]
    return config


def _own_dtype(folder: Path, config: Any) -> torch.dtype:
    """Return the dtype that config.json names, or else the one of the replaced tensors."""
    if config.dtype is not None:
        found: torch.dtype = config.dtype
        return found
    return DTYPES[next(iter(_source_shapes(folder).values()))[0]]
