"""Folders of safetensors for other runtimes: kept tensors, and units in a runtime's own form.

Everything is laid out before any weight is read, and written piece by piece: little more than one
stack of weights is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.budget import parse_size
from bitknap.allocation.problem.format import Format
from bitknap.disk.atomic import check_space, folder_bytes, write_whole
from bitknap.disk.manifest import names_in
from bitknap.disk.outputs import whole_folder
from bitknap.errors import MismatchError, ModelError
from bitknap.kernels.layout.plain_codes import unpack_bits
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.packed.pipeline import write_at
from bitknap.quantization.packed.shards import Entry, Shards, lay_out
from bitknap.quantization.packed.work_pieces import (
    COPY,
    Decoded,
    decode_finite,
    read_finite,
    slabs,
)
from bitknap.quantization.packed.writer import BY_RTN
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.source.checkpoint import PLAIN, Checkpoint
from bitknap.quantization.source.partial_reads import read_bytes
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo, read_header
from bitknap.quantization.stacks.grouping import plan_pieces
from bitknap.quantization.stacks.reading import read_stored
from bitknap.quantization.targets.target import Exported, ExportJob

# Weights that are not equal bit for bit have scales that 16 bits hold with fewer digits only; this
# much of the largest weight.
_CLOSE = 2.0**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Where one unit goes.

    Attributes:
        name: the runtime's name of the module whose weight it is.
        index: its place among the experts that the module stacks.
        count: number of these; 0 if the module holds one matrix.
    """

    name: str
    index: int = 0
    count: int = 0


class Form(Protocol):
    """How a runtime stores one matrix: some tensors, by the ends of their names."""

    def shapes(
        self, format: Format, rows: int, cols: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype (as safetensors spells it) and shape of each tensor of one matrix."""
        ...

    def parts(self, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix."""
        ...

    def values(self, parts: Mapping[str, Tensor], format: Format) -> Tensor:
        """Return the weights that the tensors stand for, float32 [rows, cols]."""
        ...


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
        with whole_folder(job.out, overwrite=job.overwrite, inputs=[job.source.folder]) as into:
            job.source.copy_companions(into)
            unit_bytes = self.write(into)
            for name, content in texts.items():
                write_whole(into / name, (json.dumps(content, indent=1) + "\n").encode())
            job.plan.save(into / PLAN)
            if unit_bytes != job.plan.total_bytes:
                raise MismatchError(
                    f"{job.out}: {unit_bytes:,} bytes of units, the plan says "
                    f"{job.plan.total_bytes:,}; report this as a bug"
                )
            found = self.read_back(into)
        return Exported(
            path=job.out,
            files=tuple(names_in(job.out)),
            nbytes=folder_bytes(job.out),
            unit_bytes=unit_bytes,
            checks=(f"the units take {unit_bytes:,} bytes, as the plan says", found, *checks),
            warnings=tuple(warnings),
        )

    def write(self, folder: Path) -> int:
        """Write the weights; return the bytes of the units.

        Raises:
            ModelError: a weight is NaN or infinite.
            InputError: the disk has no room.
        """
        limit = self.job.max_shard_size
        entries = self._entries()
        size = parse_size(limit) if isinstance(limit, str) else limit
        check_space(folder, sum(entry.nbytes for entry in entries.values()))
        shards = lay_out(entries, PLAIN, size)
        shards.create(folder)
        with _Files(folder, shards) as files:
            for source, name in self.kept.items():
                _copy(self.job.source, source, name, files)
            for name, tensor in self.made.items():
                files.write(name, 0, tensor)
            return sum(self._write_units(files))

    def read_back(self, folder: Path) -> str:
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
            known = self._rounded(which, format)[0].dequantize()
            found = self.form.values(self._stored(headers, unit), format)
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
            f"{len(apart)} of {len(plan.units)} matrices, one of each stack, were read back: their "
            f"weights are those of the plan's rounding, {how}"
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

    def _write_units(self, files: _Files) -> Iterator[int]:
        done, total = 0, len(self.modules)
        for which, format in plan_pieces(self.job.plan):
            for unit, matrix in zip(which.tolist(), self._rounded(which, format), strict=True):
                module = self.modules[unit]
                for end, tensor in self.form.parts(matrix).items():
                    files.write(f"{module.name}.{end}", module.index * tensor.nbytes, tensor)
                    yield tensor.nbytes
            done += len(which)
            if self.job.progress is not None:
                self.job.progress("export", done, total)

    def _rounded(self, which: np.ndarray, format: Format) -> list[Quantized]:
        """Return equally shaped units of one format, rounded."""
        job = self.job
        how = job.rounded or BY_RTN
        weights = read_stored(job.layout, which, job.source).to(how.device)
        known = how.inputs(which) if how.inputs and how.rounding.needs_inputs else None
        stack = how.rounding.quantize(weights, format, known)
        assert isinstance(stack, Quantized), format  # `check` lets grids alone through
        rows = weights.shape[1]
        return [stack.rows(n * rows, (n + 1) * rows) for n in range(len(which))]

    def _stored(self, headers: Mapping[str, TensorInfo], unit: int) -> dict[str, Tensor]:
        """Return the tensors of one unit as they are in the files."""
        module, units = self.modules[unit], self.job.plan.units
        shape = int(units.rows[unit]), int(units.cols[unit])
        parts = {}
        for end, (dtype, sizes) in self.form.shapes(self.job.plan.format_of(unit), *shape).items():
            name = f"{module.name}.{end}"
            nbytes = math.prod(sizes) * DTYPES[dtype].itemsize
            start = module.index * nbytes
            raw = read_bytes(name, headers[name], start, start + nbytes)
            parts[end] = raw.view(DTYPES[dtype]).view(sizes)
        return parts


class _Files:
    """The open files of a folder, written in place."""

    def __init__(self, folder: Path, shards: Shards) -> None:
        self._folder, self._places = folder, shards.places
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write a tensor's bytes from byte `start` of a named tensor on."""
        file, begin = self._places[name]
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_WRONLY | os.O_NOFOLLOW)
        write_at(self._open[file], tensor.contiguous().view(torch.uint8).cpu(), begin + start)


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


def _copy(source: Checkpoint, stored: str, name: str, files: _Files) -> None:
    """Copy a tensor's bytes, or decode those of one that is stored in fewer than 16 bits."""
    if stored in source.low_bit:
        at = 0
        for first, last in slabs(source, stored):
            data = decode_finite(source, Decoded(stored, first, last))
            files.write(name, at, data)
            at += len(data)
        return
    info = source.headers[stored]
    size = info.stop - info.start
    for start in range(0, size, COPY):
        files.write(name, start, read_finite(stored, info, start, min(size, start + COPY)))


def _firsts(plan: BitPlan) -> Iterator[tuple[np.ndarray, Format]]:
    """Yield the first unit of each stack and format."""
    seen = set()
    for which, format in plan_pieces(plan):
        unit = plan.units.row(int(which[0]))
        key = unit.layer, unit.role, unit.projection, format
        if key not in seen:
            seen.add(key)
            yield which[:1], format
