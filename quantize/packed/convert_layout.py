"""Convert a packed checkpoint to the other layout: the plain one, or the one for kernels.

`config.json` says which it is, in `quantization_config`: `layout`, "plain" or "tiles", and
`layout_version`. Streams keep their names and files, everything else its bytes, and nothing is
rounded: converting there and back gives the same folder. The plan counts bytes of the plain layout;
tiles take more if matrices are padded (`tiled_bytes`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.disk.atomic import check_space, folder_bytes, write_whole
from bitknap.disk.manifest import MANIFEST, sign
from bitknap.disk.outputs import check_output, whole_folder
from bitknap.errors import FileError
from bitknap.names import check_name
from bitknap.quantization.packed.config import LAYOUTS, layout_of, lies
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.packed.outline import PREFIX, streams
from bitknap.quantization.packed.tiled_bytes import tiled_bytes, to_plain, to_tiles
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.safetensors_header import TensorInfo, read_header

_COPY = 1 << 24  # bytes copied at a time


def unit_bytes(plan: BitPlan, layout: str) -> np.ndarray:
    """Return the bytes of each unit in a layout, int64 [U]."""
    if layout == "plain":
        return plan.nbytes
    sizes = np.zeros(len(plan.units), dtype=np.int64)
    for choice, format in enumerate(plan.formats):
        which = np.flatnonzero(plan.choice == choice)
        sizes[which] = tiled_bytes(format, plan.units.rows[which], plan.units.cols[which])
    return sizes


def convert(folder: Path, layout: str, out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write a packed checkpoint in another layout, whole or not at all.

    One stream is in memory at a time.

    Args:
        folder: a packed checkpoint in any layout.
        layout: "plain" or "tiles".
        out: the folder to write.
        overwrite: replace `out` if it exists.

    Returns:
        plan: bytes of the units as the plan counts them; written: the bytes they take now;
        checkpoint: bytes of the whole folder.

    Raises:
        InputError: there is no such layout, or `out` exists and `overwrite` is false.
        FileError: the checkpoint is damaged, or does not fit its plan.
    """
    check_name("layout", layout, LAYOUTS)
    check_output(out, "folder", overwrite=overwrite, inputs=[folder])
    source = Checkpoint.open(folder)
    before, plan = layout_of(source.config, folder), BitPlan.load(folder / PLAN)
    job = _Job(
        source=source,
        plan=plan,
        streams=streams(plan.units),
        before=before,
        after=layout,
        now=unit_bytes(plan, before),
        then=unit_bytes(plan, layout),
    )
    sizes, written = job.sizes(), int(job.then.sum())
    shards = sorted({info.file for info in source.headers.values()})
    check_space(out, folder_bytes(folder) + max(0, written - int(job.now.sum())))
    with whole_folder(out, overwrite=overwrite, inputs=[folder]) as part:
        for file in sorted(f for f in folder.rglob("*") if f.is_file() and f not in shards):
            name = file.relative_to(folder)
            if name.name != MANIFEST and not any(a.startswith(".") for a in name.parts[:-1]):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, part / name)
        for shard in shards:
            _rewrite(job, shard, sizes, part / shard.name)
        _write_texts(layout, written - int(job.now.sum()), part)
        sign(part)
        total = folder_bytes(part)
    return {"plan": plan.total_bytes, "written": written, "checkpoint": total}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: Checkpoint
    plan: BitPlan
    streams: Mapping[str, np.ndarray]  # units of each stream, in the order of their bytes
    before: str
    after: str
    now: np.ndarray  # bytes of each unit
    then: np.ndarray

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every stream in the new layout; old sizes must match the plan."""
        headers, folder = self.source.headers, self.source.folder
        sizes = {}
        for name, run in self.streams.items():
            if name not in headers:
                raise FileError(f"{folder}: tensor {name} is missing; write the checkpoint again")
            info, total = headers[name], int(self.now[run].sum())
            if (info.dtype, info.shape) != ("U8", (total,)):
                raise FileError(
                    f"{folder}: tensor {name}: {info.dtype} {list(info.shape)}, the plan says U8 "
                    f"[{total}]; write the checkpoint again"
                )
            sizes[name] = int(self.then[run].sum())
        if extra := {name for name in headers if name.startswith(PREFIX)} - sizes.keys():
            raise FileError(f"{folder}: tensor {min(extra)} is not in the plan")
        return sizes

    def converted(self, name: str) -> Iterator[Tensor]:
        """Yield the bytes of each unit of a stream in the new layout."""
        stream, at, plan = self.source.read(name), 0, self.plan
        for unit in self.streams[name].tolist():
            piece = stream[at : at + int(self.now[unit])]
            at += len(piece)
            shape = int(plan.units.rows[unit]), int(plan.units.cols[unit])
            if self.before != "plain":
                piece = to_plain(piece, plan.format_of(unit), *shape)
            yield to_tiles(piece, plan.format_of(unit), *shape) if self.after == "tiles" else piece


def _rewrite(job: _Job, shard: Path, sizes: Mapping[str, int], out: Path) -> None:
    """Write one file with its tensors in the order they had."""
    # Not the checkpoint's own headers: those show low-bit tensors as 16-bit ones.
    stored = read_header(shard)
    with shard.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    entries, at = json.loads(text), 0
    names = sorted(stored, key=lambda name: stored[name][3:])
    for name in names:
        size = sizes.get(name, stored[name].stop - stored[name].start)
        entries[name]["data_offsets"] = [at, at + size]
        at += size
        if name in sizes:
            entries[name]["shape"] = [size]
    # Format headers as the safetensors library and `shards` do: a round trip changes no byte.
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=text.isascii()).encode()
    header += b" " * (-len(header) % 8)
    with out.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            if name not in sizes:
                _copy(stored[name], file)
                continue
            for piece in job.converted(name):
                file.write(piece.contiguous().numpy().tobytes())


def _copy(info: TensorInfo, out: BinaryIO) -> None:
    with info.file.open("rb") as file:
        file.seek(info.start)
        for start in range(info.start, info.stop, _COPY):
            out.write(file.read(min(_COPY, info.stop - start)))


def _write_texts(layout: str, more: int, folder: Path) -> None:
    """Update the layout in `config.json`, and the bytes of all tensors in an index."""
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    config, indent = json.loads(text), re.match(r"\{\n( *)", text)
    ours = config["quantization_config"]
    ours |= lies(layout, ours.get("exponents") is True)
    config["quantization_config"] = dict(sorted(ours.items()))
    content = json.dumps(config, indent=len(indent[1]) if indent else None) + "\n"
    write_whole(path, content.encode())

    def grown(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) + more}"

    for index in folder.glob("*.safetensors.index.json"):
        text = index.read_text(encoding="utf-8")
        write_whole(index, re.sub(r'("total_size":\s*)(\d+)', grown, text).encode())
