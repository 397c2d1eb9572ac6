"""Write a model whole into one GGUF file, part by part of its tensors, with few in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.disk.atomic import check_space
from bitknap.disk.manifest import GGUF_MARK
from bitknap.disk.outputs import Kind
from bitknap.errors import MismatchError
from bitknap.progress import Progress
from bitknap.quantization.ggml import container
from bitknap.quantization.ggml.container import Entry, Value
from bitknap.quantization.gguf import tokenizer
from bitknap.quantization.gguf.architectures import architecture_of, values_of, warnings_of
from bitknap.quantization.gguf.tensors import Model, Stored
from bitknap.quantization.packed.resume import Task, identity
from bitknap.quantization.packed.shards import Place
from bitknap.quantization.packed.work_pieces import Span, stamps
from bitknap.quantization.packed.writer import Rounded
from bitknap.quantization.source.architecture import config_of, text_config_of
from bitknap.quantization.source.checkpoint import Checkpoint

# llama.cpp's numbers of file types, which its tools print: that of the type with the most bytes.
_FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq3_xxs": 23,
    "iq1_s": 24,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq2_s": 28,
    "iq4_xs": 30,
    "iq1_m": 31,
    "bf16": 32,
    "mxfp4": 38,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written.

    Attributes:
        nbytes: bytes of the file.
        unit_bytes: bytes of the planned units.
        tensors: number of tensors.
        warnings: what a user should know before serving it.
    """

    nbytes: int
    unit_bytes: int
    tensors: int
    warnings: tuple[str, ...]


def model_of(source: Checkpoint, plan: BitPlan, rounded: Rounded) -> Model:
    """Return a checkpoint on its way into a file.

    Raises:
        ModelError: llama.cpp has no such architecture.
    """
    config = text_config_of(config_of(source.folder))
    return Model(
        source=source,
        config=config,
        architecture=architecture_of(config),
        plan=plan,
        rounded=rounded,
    )


def check(source: Checkpoint) -> None:
    """Check from headers, configuration and tokenizer that a model can be written.

    Raises:
        ModelError: llama.cpp has no such architecture, tensor or tokenizer.
    """
    config = text_config_of(config_of(source.folder))
    architecture = architecture_of(config)
    values_of(config, architecture)
    tokenizer.values_of(source.folder, int(config.vocab_size))


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A file, laid out before any weight is read.

    Attributes:
        model: the model.
        file: the file's name.
        values: what its head says of the model.
        stored: its tensors, in order.
        warnings: what a user should know before serving it.
    """

    model: Model
    file: str
    values: Mapping[str, Value]
    stored: Sequence[Stored]
    warnings: Sequence[str]

    @cached_property
    def head(self) -> bytes:
        """The first bytes, up to the first tensor."""
        return container.head(self.values, [one.entry for one in self.stored])

    @cached_property
    def starts(self) -> list[int]:
        """Where each tensor begins, and where the file ends."""
        sizes = [_padded(one.entry) for one in self.stored]
        return [len(self.head), *(len(self.head) + total for total in accumulate(sizes))]

    def create(self, folder: Path) -> None:
        """Write the head, and holes for the tensors."""
        with (folder / self.file).open("wb") as file:
            file.write(self.head)
            file.truncate(self.starts[-1])

    def are_in(self, folder: Path) -> bool:
        """Return whether a folder has the file, with its head and size."""
        file = folder / self.file
        if file.is_symlink() or not file.is_file() or file.stat().st_size != self.starts[-1]:
            return False
        with file.open("rb") as opened:
            return opened.read(len(self.head)) == self.head

    def pieces(self) -> list[tuple[int, int]]:
        """Return each tensor's number with each of its parts'."""
        return [(n, i) for n, one in enumerate(self.stored) for i in range(len(one.parts))]

    def read(self, piece: tuple[int, int]) -> Tensor:
        """Return what a part is made of."""
        tensor, part = piece
        return self.stored[tensor].parts[part].read()

    def make(self, piece: tuple[int, int], given: Tensor) -> list[Span]:
        """Return a part's bytes, and where they go."""
        tensor, number = piece
        part, entry = self.stored[tensor].parts[number], self.stored[tensor].entry
        data = torch.from_numpy(np.ascontiguousarray(part.make(given)).reshape(-1))
        if len(data) != part.nbytes:
            raise MismatchError(
                f"{self.file}: {entry.name} has {len(data):,} bytes, its type and shape say "
                f"{part.nbytes:,}"
            )
        return [Span(Place(self.file, self.starts[tensor] + part.start), data)]

    def task(self, out: Path, kind: Kind) -> Task[tuple[int, int]]:
        """Return the task of writing it.

        Args:
            out: the file, or a folder that has it.
            kind: which of the two.
        """
        model, pieces = self.model, self.pieces()
        sizes = [(n, self.stored[n].parts[i].nbytes) for n, i in pieces]
        known = identity(model.source, model.plan, model.rounded.rounding, [self.head, *sizes])
        return Task(
            out=out,
            kind=kind,
            maker=self,
            pieces=pieces,
            stamps=stamps(model.source, [self.stored[n].tensors for n, _ in pieces]),
            frame=self,
            about=known | dict(model.rounded.about),
        )

    def checked(self, folder: Path) -> Written:
        """Return what was written.

        Raises:
            MismatchError: it is not what the plan says.
        """
        path = folder / self.file
        _read_back(path, self.values, self.stored)
        planned = sum(one.entry.nbytes for one in self.stored if one.units)
        if planned != self.model.plan.total_bytes:
            raise MismatchError(
                f"{path}: {planned:,} bytes of units, the plan says {self.model.plan.total_bytes:,}"
            )
        return Written(
            nbytes=self.starts[-1],
            unit_bytes=planned,
            tensors=len(self.stored),
            warnings=tuple(self.warnings),
        )


def lay_out(model: Model, name: str, file: str) -> Laid:
    """Return a model's file, laid out.

    Args:
        model: the model.
        name: the model's name, for people.
        file: the file's.

    Raises:
        ModelError: llama.cpp has no such tensor or tokenizer.
    """
    stored = model.stored()
    values, warnings = _values(model, stored, name)
    return Laid(model=model, file=file, values=values, stored=stored, warnings=warnings)


def save(
    model: Model, out: Path, name: str, *, overwrite: bool = False, progress: Progress | None = None
) -> Written:
    """Write a model; `out` appears when it is complete.

    A run that was stopped goes on from its finished parts (`packed/resume`).

    Args:
        model: the model.
        out: the file.
        name: the model's name, for people.
        overwrite: whether a file that this tool wrote is replaced.
        progress: called with ("export", done, total) after each part of a tensor.

    Raises:
        ModelError: a weight is NaN or infinite, or llama.cpp has no such tensor or tokenizer.
        MismatchError: what was written is not what the plan says.
        InputError: the disk has no room.
    """
    laid = lay_out(model, name, out.name)
    task = laid.task(out, "file")
    check_space(out, laid.starts[-1] - task.partial.allocated())
    with task.made("export", overwrite=overwrite, progress=progress) as files:
        return laid.checked(files)


def digest(plan: BitPlan) -> str:
    """Return what tells a plan from others, which its files carry."""
    names = ",".join(plan.format_of(unit).name for unit in range(len(plan.units)))
    return hashlib.sha256(f"{plan.model} {names}".encode()).hexdigest()[:16]


def _padded(entry: Entry) -> int:
    return entry.nbytes + len(container.padding(entry.nbytes))


def _values(
    model: Model, stored: Sequence[Stored], name: str
) -> tuple[dict[str, Value], list[str]]:
    sizes: dict[str, int] = {}
    for one in stored:
        sizes[one.entry.type] = sizes.get(one.entry.type, 0) + one.entry.nbytes
    values: dict[str, Value] = {
        GGUF_MARK: digest(model.plan),
        "general.architecture": model.architecture.name,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[max(sizes, key=lambda type: sizes[type])],
        "general.quantization_version": 2,
    }
    values |= values_of(model.config, model.architecture)
    if model.architecture.latent and not model.absorbed:
        values |= _not_absorbed(model)
    said, warnings = tokenizer.values_of(model.source.folder, int(model.config.vocab_size))
    return values | said, [*warnings_of(model.config), *warnings]


def _not_absorbed(model: Model) -> dict[str, Value]:
    """Return the values of MLA whose up-projection is one tensor: as many keys as queries."""
    config, prefix = model.config, model.architecture.name
    key = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
    return {
        f"{prefix}.attention.head_count_kv": int(config.num_attention_heads),
        f"{prefix}.attention.key_length": key,
        f"{prefix}.attention.value_length": int(config.v_head_dim),
        f"{prefix}.attention.key_length_mla": 0,
        f"{prefix}.attention.value_length_mla": 0,
    }


def _read_back(path: Path, values: Mapping[str, Value], stored: Sequence[Stored]) -> None:
    """Check that the head of a file says what was to be written."""
    held = container.read(path)
    wrong = [one.entry.name for one in stored if held.entries.get(one.entry.name) != one.entry]
    if wrong or len(held.entries) != len(stored) or held.values.keys() != values.keys():
        raise MismatchError(f"{path}: {wrong[:1] or 'the head'} is not as it was written")
