"""Folders of safetensors for other runtimes, laid out before any weight is read.

They are written piece by piece, with few of them in memory, and a run that was killed goes on from
the pieces that are finished (`packed/resume`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.budget import parse_size
from bitknap.allocation.problem.format import Format
from bitknap.disk.atomic import check_space, folder_bytes, write_whole
from bitknap.disk.manifest import names_in, sign
from bitknap.disk.outputs import check_output
from bitknap.errors import MismatchError, ModelError
from bitknap.kernels.layout.exponents import power
from bitknap.kernels.layout.plain_codes import unpack_bits
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.packed.pipeline import write_at
from bitknap.quantization.packed.resume import Task, digest_of, identity
from bitknap.quantization.packed.shards import Entry, Shards, lay_out
from bitknap.quantization.packed.work_pieces import Piece
from bitknap.quantization.packed.writer import BY_RTN
from bitknap.quantization.rounding.grid import Grid
from bitknap.quantization.source.checkpoint import PLAIN
from bitknap.quantization.source.partial_reads import read_bytes
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo, read_header
from bitknap.quantization.stacks.grouping import plan_pieces
from bitknap.quantization.stacks.reading import read_stored
from bitknap.quantization.targets.folders.folder_work import FolderWork, Form, Module
from bitknap.quantization.targets.target import Exported, ExportJob

# Weights that are not equal bit for bit have scales that 16 bits hold with fewer digits only; this
# much of the largest weight.
_CLOSE = 2.0**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What goes into a folder.

    Attributes:
        job: the model, the plan and the rounding.
        form: how units are stored.
        modules: where each unit goes, in the plan's order.
        kept: the source's name of each tensor that is copied, to its name in the folder.
        made: further tensors, by name.
    """

    job: ExportJob
    form: Form
    modules: Sequence[Module]
    kept: Mapping[str, str]
    made: Mapping[str, Tensor] = field(default_factory=dict)

    def export(
        self, texts: Mapping[str, Any], checks: Sequence[str], warnings: Sequence[str]
    ) -> Exported:
        """Write the folder whole: weights, configuration, tokenizer and plan.

        Args:
            texts: content of `config.json` and its like, by name.
            checks: what was verified before.
            warnings: what a user should know before serving it.

        Raises:
            ModelError: a weight is NaN, infinite, or beyond what the form's scales hold.
            MismatchError: what was written is not what the plan says.
            InputError: the output may not be written, or the disk has no room.
        """
        job = self.job
        check_output(job.out, "folder", overwrite=job.overwrite, inputs=[job.source.folder])
        unit_bytes = self._unit_bytes()
        shards = self._shards()
        work = FolderWork(
            job=job,
            form=self.form,
            modules=self.modules,
            kept=self.kept,
            places=shards.places,
        )
        task = self._task(work, shards, texts)
        check_space(job.out, sum(shards.sizes.values()) - task.partial.allocated())
        with task.made("export", overwrite=job.overwrite, progress=job.progress) as into:
            self._write_made(into, shards)
            job.source.copy_companions(into)
            for name, content in texts.items():
                write_whole(into / name, (json.dumps(content, indent=1) + "\n").encode())
            job.plan.save(into / PLAN)
            sign(into)
            found = self.read_back(work, into)
        return Exported(
            path=job.out,
            files=tuple(names_in(job.out)),
            nbytes=folder_bytes(job.out),
            unit_bytes=unit_bytes,
            checks=(f"the units take {unit_bytes:,} bytes, as the plan says", found, *checks),
            warnings=tuple(warnings),
        )

    def _unit_bytes(self) -> int:
        """Return the bytes of the units.

        Raises:
            MismatchError: they are not the plan's.
        """
        plan = self.job.plan
        total = 0
        for unit in range(len(self.modules)):
            shape = int(plan.units.rows[unit]), int(plan.units.cols[unit])
            for dtype, sizes in self.form.shapes(plan.format_of(unit), *shape).values():
                total += math.prod(sizes) * DTYPES[dtype].itemsize
        if total != plan.total_bytes:
            raise MismatchError(
                f"{self.job.out}: {total:,} bytes of units, the plan says {plan.total_bytes:,}; "
                "report this as a bug"
            )
        return total

    def _shards(self) -> Shards:
        limit = self.job.max_shard_size
        size = parse_size(limit) if isinstance(limit, str) else limit
        return lay_out(self._entries(), PLAIN, size)

    def _task(self, work: FolderWork, shards: Shards, texts: Mapping[str, Any]) -> Task[Piece]:
        job, pieces = self.job, work.pieces()
        how = job.rounded or BY_RTN
        layout = [*shards.headers.values(), *pieces]
        about = identity(job.source, job.plan, how.rounding, layout)
        return Task(
            out=job.out,
            kind="folder",
            maker=work,
            pieces=pieces,
            stamps=work.stamps(pieces),
            frame=shards,
            about=about | {"texts": digest_of(json.dumps(texts)), **how.about},
        )

    def _write_made(self, folder: Path, shards: Shards) -> None:
        """Write the further tensors, which are small and may depend on any of the files."""
        for name, tensor in self.made.items():
            file, begin = shards.places[name]
            handle = os.open(folder / file, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                write_at(handle, tensor.contiguous().view(torch.uint8).cpu(), begin)
            finally:
                os.close(handle)

    def read_back(self, work: FolderWork, folder: Path) -> str:
        """Compare one unit of each stack and format with its rounding; return what was verified.

        Raises:
            MismatchError: the folder holds other weights.
        """
        headers: dict[str, TensorInfo] = {}
        for file in folder.glob(f"{PLAIN}*.safetensors"):
            headers |= read_header(file)
        plan, apart = self.job.plan, []
        for which, format in _firsts(plan):
            unit = int(which[0])
            weights = read_stored(self.job.layout, which, self.job.source)
            known = work.rounded(which, format, weights)[0].dequantize()
            found = self.form.values(_stored(work, headers, unit), format)
            worst = float((known - found).abs().max() / known.abs().max().clamp_min(1e-30))
            if worst > _CLOSE:
                raise MismatchError(
                    f"{self.modules[unit].name}: the file's weights are up to {worst:.3g} of the "
                    "largest one from the plan's rounding; report this as a bug"
                )
            apart.append(worst)
        worst = max(apart)
        how = f"to within {worst:.1g} of the largest one" if worst else "bit for bit"
        return (
            f"{len(apart)} of {len(plan.units)} matrices, one of each stack and format, were read "
            f"back: their weights are those of the plan's rounding, {how}"
        )

    def _entries(self) -> dict[str, Entry]:
        source, units = self.job.source, self.job.plan.units
        entries = {}
        for stored, name in self.kept.items():
            info = source.headers[stored]
            entries[name] = Entry(info.dtype, info.shape, source.written_bytes(stored))
        names = {dtype: name for name, dtype in DTYPES.items()}
        for name, tensor in self.made.items():
            entries[name] = Entry(names[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        for unit, module in enumerate(self.modules):
            shape = int(units.rows[unit]), int(units.cols[unit])
            for end, (dtype, sizes) in self.form.shapes(
                self.job.plan.format_of(unit), *shape
            ).items():
                whole = (module.count, *sizes) if module.count else sizes
                nbytes = math.prod(whole) * DTYPES[dtype].itemsize
                entries[f"{module.name}.{end}"] = Entry(dtype, whole, nbytes)
        return entries


def _stored(work: FolderWork, headers: Mapping[str, TensorInfo], unit: int) -> dict[str, Tensor]:
    """Return the tensors of one unit as they are in the files."""
    parts = {}
    for end, name, dtype, sizes, start in work.parts_of(unit):
        stop = start + math.prod(sizes) * DTYPES[dtype].itemsize
        raw = read_bytes(name, headers[name], start, stop)
        parts[end] = raw.view(DTYPES[dtype]).view(sizes)
    return parts


def whole_module(job: ExportJob, unit: int, reader: str) -> Module:
    """Return the module of a unit that is a tensor of its own.

    Args:
        job: what is to be written.
        unit: the unit.
        reader: the runtime, or its format, for messages.

    Raises:
        MismatchError: the unit is a part of a tensor, which the runtime keeps whole.
    """
    view = job.layout.views[unit]
    if view.start is not None or view.index is not None or view.transposed:
        raise MismatchError(
            f"{reader}: {job.plan.units.label(unit)} is a part of {view.tensor}, which it keeps "
            "whole; leave its role out of `include`"
        )
    return Module(name=view.tensor.removesuffix(".weight"))


def whole_modules(job: ExportJob, reader: str) -> list[Module]:
    """Return the module of each unit of a model whose experts are modules of their own.

    Args:
        job: what is to be written.
        reader: the runtime, or its format, for messages.

    Raises:
        ModelError: experts are stacked in one tensor.
        MismatchError: a unit is a part of a tensor.
    """
    for layer in job.layout.layers:
        if layer.kind != "modules":
            raise ModelError(
                f"{reader}: {layer.module} stacks its experts in one tensor, and the format has "
                "one module an expert; choose another target"
            )
    return [whole_module(job, unit, reader) for unit in range(len(job.layout.views))]


def codes_of(words: Tensor, format: Format, scales: Tensor) -> Tensor:
    """Return the codes of a matrix, float32 [rows, groups, size], from words of dense codes.

    Args:
        words: codes from the lowest bit on, int32 or uint32 [rows, words].
        format: the grid.
        scales: one for each group, [rows, groups].
    """
    rows, groups = scales.shape
    stream = words.contiguous().view(torch.uint8).reshape(-1)
    codes = unpack_bits(stream, format.bits, rows * groups * format.group_size)
    return codes.view(rows, groups, -1).float()


def stored_scales(target: str, grid: Grid) -> Tensor:
    """Return the scales of a grid as a format without powers of two for whole matrices holds them.

    Raises:
        ModelError: as `times_power`.
    """
    if grid.exponent is None:
        return grid.scale
    return times_power(target, grid.scale, power(grid.exponent))


def times_power(target: str, values: Tensor, factor: Tensor) -> Tensor:
    """Return fp16 values times a power of two, as fp16 if that holds them well enough.

    Raises:
        ModelError: they overflow, or one of them loses more than 2^-9 of the largest.
    """
    exact = values.float() * factor
    stored = exact.half()
    most = float(exact.abs().max())
    if not float((stored.float() - exact).abs().max()) <= most * 2.0**-9:
        raise ModelError(
            f"{target}: scales of {most:.1g} are beyond what its 16 bits hold; leave the role of "
            "such a matrix out of `include`, or choose another target"
        )
    return stored


def _firsts(plan: BitPlan) -> Iterator[tuple[np.ndarray, Format]]:
    """Yield the first unit of each stack and format."""
    seen = set()
    for which, format in plan_pieces(plan):
        unit = plan.units.row(int(which[0]))
        key = unit.layer, unit.role, unit.projection, format
        if key not in seen:
            seen.add(key)
            yield which[:1], format
