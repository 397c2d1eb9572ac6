"""Write a model whole into one GGUF file, tensor after tensor, with little of it in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitknap.allocation.plans.plan import BitPlan
from bitknap.disk.atomic import check_space, whole_file
from bitknap.disk.manifest import GGUF_MARK
from bitknap.errors import MismatchError
from bitknap.progress import Progress
from bitknap.quantization.ggml import container
from bitknap.quantization.ggml.container import Entry, Value
from bitknap.quantization.gguf import tokenizer
from bitknap.quantization.gguf.architectures import architecture_of, values_of, warnings_of
from bitknap.quantization.gguf.tensors import Model, Piece
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


def save(model: Model, out: Path, name: str, progress: Progress | None = None) -> Written:
    """Write a model; `out` appears when it is complete.

    Args:
        model: the model.
        out: the file.
        name: the model's name, for people.
        progress: called with ("export", done, total) after each tensor.

    Raises:
        ModelError: a weight is NaN or infinite, or llama.cpp has no such tensor or tokenizer.
        MismatchError: what was written is not what the plan says.
        InputError: the disk has no room.
    """
    pieces = model.pieces()
    values, warnings = _values(model, pieces, name)
    head = container.head(values, [piece.entry for piece in pieces])
    total = len(head) + sum(_padded(piece.entry) for piece in pieces)
    check_space(out, total)
    with whole_file(out) as file:
        file.write(head)
        for done, piece in enumerate(pieces):
            if progress is not None:
                progress("export", done, len(pieces))
            begin = file.tell()
            for part in piece.parts():
                file.write(part.tobytes())
            size = file.tell() - begin
            if size != piece.entry.nbytes:
                raise MismatchError(
                    f"{out}: {piece.entry.name} has {size:,} bytes, its type and shape say "
                    f"{piece.entry.nbytes:,}"
                )
            file.write(container.padding(size))
        file.flush()
        _read_back(Path(file.name), values, pieces)
    planned = sum(piece.entry.nbytes for piece in pieces if piece.units)
    if planned != model.plan.total_bytes:
        raise MismatchError(
            f"{out}: {planned:,} bytes of units, the plan says {model.plan.total_bytes:,}"
        )
    return Written(nbytes=total, unit_bytes=planned, tensors=len(pieces), warnings=tuple(warnings))


def digest(plan: BitPlan) -> str:
    """Return what tells a plan from others, which its files carry."""
    names = ",".join(plan.format_of(unit).name for unit in range(len(plan.units)))
    return hashlib.sha256(f"{plan.model} {names}".encode()).hexdigest()[:16]


def _padded(entry: Entry) -> int:
    return entry.nbytes + len(container.padding(entry.nbytes))


def _values(model: Model, pieces: Sequence[Piece], name: str) -> tuple[dict[str, Value], list[str]]:
    sizes: dict[str, int] = {}
    for piece in pieces:
        sizes[piece.entry.type] = sizes.get(piece.entry.type, 0) + piece.entry.nbytes
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


def _read_back(path: Path, values: Mapping[str, Value], pieces: Sequence[Piece]) -> None:
    """Check that the head of a file says what was to be written."""
    held = container.read(path)
    wrong = [
        piece.entry.name for piece in pieces if held.entries.get(piece.entry.name) != piece.entry
    ]
    if wrong or len(held.entries) != len(pieces) or held.values.keys() != values.keys():
        raise MismatchError(f"{path}: {wrong[:1] or 'the head'} is not as it was written")
