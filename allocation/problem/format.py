"""Formats: how a matrix is stored, and exactly how many bytes that takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitknap.allocation.codecs import ggml
from bitknap.allocation.problem.arrays import Longs
from bitknap.errors import InputError
from bitknap.names import check_name, guess

# Weights that share a scale, in the formats that are offered where none are asked for.
GROUP_SIZES = (32, 64, 128, 256, "row")
_KEPT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp8": 8, "fp8-block": 8, "mxfp4": 4}
# Block sharing one scale (rows, weights along a row), and bytes per scale.
_KEPT_SCALES = {"fp8-block": (128, 128, 4), "mxfp4": (1, 32, 1)}
# Bits of a group's scale as a fraction of its row's scale; 0: the group has its own fp16 scale.
_SHARE_BITS = {"fp16": 0, "compact": 8, "compact6": 6, "gptq": 0}
_GRID = r"int(\d)-(?:g([1-9]\d{0,8})|row)-(a?)sym(?:-(compact6?|gptq))?"
_EXAMPLES = "int3-g64-sym, int4-row-asym-compact, int2-g32-asym-compact6, keep-bf16, ggml-q4_k"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a matrix: a grid, a type of ggml, the source precision, or a made-up option.

    Attributes:
        bits: bits of one code, 1 to 8 for grids; of a type of ggml, the width in its name.
        group_size: weights along a row that share a scale; 0 is the whole row.
        symmetric: whether there is no zero point (at 1 bit, no mean).
        metadata: "fp16": one fp16 scale (and zero) per group; "compact": one fp16 scale per row, an
            8-bit scale per group, and zeros as wide as the codes; "compact6": the same with 6-bit
            scales; "gptq": what files in the format of GPTQ hold, one fp16 scale and one zero as
            wide as the codes per group, and the group of each column in 32 bits.
        kind: "grid", "ggml" (a block type of GGUF files), "keep" (source precision) or "made-up"
            (no storage at all).
        source: the type of ggml ("q4_k", …), the kept precision ("bf16", …) or the number of the
            made-up option.
    """

    bits: int
    group_size: int = 64
    _: KW_ONLY
    symmetric: bool = False
    metadata: str = "fp16"
    kind: Literal["grid", "ggml", "keep", "made-up"] = "grid"
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind != "grid":
            return
        if not isinstance(self.bits, int) or self.bits not in range(1, 9):
            raise InputError(f"bits: {self.bits} is not a whole number from 1 to 8")
        size = self.group_size
        if not isinstance(size, int) or size < 0 or size % 8:
            raise InputError(
                f"group_size: {size} is not a multiple of 8 (32, 64, 128, ...) or 0 (row)"
            )
        check_name("metadata", self.metadata, _SHARE_BITS)
        if self.bits == 1 and not self.symmetric and self.compact:
            raise InputError(
                f"{self.name}: 1 bit is sign times scale, and its mean has no compact form; "
                "use symmetric or fp16 metadata"
            )
        if self.bits == 1 and self.metadata == "gptq":
            raise InputError(f"{self.name}: files of GPTQ hold 2 bits or more; use other metadata")

    @classmethod
    def keep(cls, source: str) -> Format:
        """Return the format that leaves a matrix in its source precision, such as "bf16".

        Bytes of "fp8-block" (128 × 128, fp32 scales) and "mxfp4" (32 along a row) include their
        scales; those of plain "fp8" do not, since one scale per tensor does not depend on the plan.

        Raises:
            InputError: the precision is unknown.
        """
        check_name("keep", source, _KEPT_BITS)
        return cls(_KEPT_BITS[source], 0, kind="keep", source=source)

    @classmethod
    def ggml(cls, type: str) -> Format:
        """Return the format of one of ggml's block types, such as "q4_k".

        Rows that are no multiple of its block are stored as llama.cpp stores them: in the type that
        `ggml.stored_as` names.

        Raises:
            InputError: the type is unknown.
        """
        check_name("ggml", type, ggml.TYPES)
        kind = ggml.TYPES[type]
        return cls(kind.bits, kind.block, kind="ggml", source=type)

    @classmethod
    def made_up(cls, number: int) -> Format:
        """Return a stand-in for column `number` of a table that came without formats."""
        return cls(0, 0, kind="made-up", source=str(number))

    @property
    def share_bits(self) -> int:
        """Bits of a group's scale as a fraction of its row's; 0 if it has its own fp16 scale."""
        return _SHARE_BITS[self.metadata]

    @property
    def compact(self) -> bool:
        """Whether scales are fractions of a row's scale and zeros are integers among the codes."""
        return self.share_bits > 0

    @property
    def integer_zero(self) -> bool:
        """Whether a grid's zero point, if it has one, is an integer as wide as the codes."""
        return self.metadata != "fp16"

    @property
    def middle(self) -> float:
        """The code that stands for 0 in a symmetric grid; between two codes, but for GPTQ's."""
        if self.metadata == "gptq":
            return float(1 << self.bits - 1)
        return ((1 << self.bits) - 1) / 2

    @property
    def foreign(self) -> bool:
        """Whether files of another runtime alone hold it, and packed checkpoints do not."""
        return self.kind == "ggml" or (self.kind == "grid" and self.metadata == "gptq")

    @property
    def name(self) -> str:
        """The text that `parse` reads back, such as "int3-g64-sym"."""
        if self.kind == "keep":
            return f"keep-{self.source}"
        if self.kind == "ggml":
            return f"ggml-{self.source}"
        if self.kind == "made-up":
            return f"option-{self.source}"
        group = f"g{self.group_size}" if self.group_size else "row"
        metadata = "" if self.metadata == "fp16" else f"-{self.metadata}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}{metadata}"

    def __str__(self) -> str:
        return self.name

    @property
    def about(self) -> str:
        """One sentence for lists."""
        if self.kind == "keep":
            return f"Left as it is stored, {self.source}."
        if self.kind == "made-up":
            return "A column of a table that came without formats."
        if self.kind == "ggml":
            return f"ggml's {self.source.upper()}, in blocks of {self.group_size}; for GGUF files."
        group = f"{self.group_size} weights" if self.group_size else "row"
        scale = f"{self.share_bits}-bit" if self.compact else "fp16"
        shift = "mean" if self.bits == 1 else "zero point"
        shift = f"no {shift}" if self.symmetric else f"a {shift}"
        if self.metadata == "gptq":
            shift = f"{'a fixed' if self.symmetric else 'an integer'} zero point; for files of GPTQ"
        return f"{self.bits}-bit codes, {scale} scale for each {group}, {shift}."

    @classmethod
    def parse(cls, name: str) -> Format:
        """Return the format with that name.

        Raises:
            InputError: the name is malformed.
        """
        if match := re.fullmatch(_GRID, name):
            return cls(
                int(match[1]),
                int(match[2] or 0),
                symmetric=not match[3],
                metadata=match[4] or "fp16",
            )
        if name.startswith("keep-"):
            return cls.keep(name.removeprefix("keep-"))
        if name.startswith("ggml-"):
            return cls.ggml(name.removeprefix("ggml-"))
        if match := re.fullmatch(r"option-(\d+)", name):
            return cls.made_up(int(match[1]))
        near = guess(name, [one.name for one in (*menu(), *gptq_grids(), *ggml_types())])
        raise InputError(f"format {name!r} is unknown; examples: {_EXAMPLES}{near}")

    def groups(self, cols: npt.ArrayLike) -> Longs:
        """Return the number of groups in a row of `cols` weights, int64; the last may be short."""
        width = np.asarray(cols, dtype=np.int64)
        return _ceil(width, self.group_size) if self.group_size else np.sign(width)

    def padding(self, cols: npt.ArrayLike) -> Longs:
        """Return how many weights the last group of a row lacks, int64 like `cols`."""
        width = np.asarray(cols, dtype=np.int64)
        return self.groups(width) * self.group_size - width if self.group_size else width * 0

    def nbytes(self, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Longs:
        """Return the exact bytes of stored matrices, int64, broadcast over `rows` and `cols`.

        Codes are one dense bit stream over the matrix, without padding of short groups.

        Raises:
            InputError: the format is made up and has no storage.
        """
        if self.kind == "made-up":
            raise InputError(f"{self.name}: a made-up format has no bytes; give nbytes")
        height, width = np.asarray(rows, dtype=np.int64), np.asarray(cols, dtype=np.int64)
        if self.kind == "ggml":
            widths, where = np.unique(width, return_inverse=True)
            lines = [ggml.row_bytes(self.source, size) for size in widths.tolist()]
            return height * np.array(lines, dtype=np.int64)[where].reshape(width.shape)
        codes = _ceil(height * width * self.bits, 8)
        if self.kind == "keep":
            tall, wide, size = _KEPT_SCALES.get(self.source, (1, 1, 0))
            return np.asarray(codes + size * _ceil(height, tall) * _ceil(width, wide))
        per_row = self.groups(width)
        if self.metadata == "gptq":  # words of 32 bits, each with codes or zeros of one group only
            words = height * _ceil(width * self.bits, 32) + per_row * _ceil(height * self.bits, 32)
            return np.asarray(4 * words + 2 * height * per_row + 4 * width, dtype=np.int64)
        if not self.compact:
            return codes + height * per_row * (2 if self.symmetric else 4)
        # With one group per row, the fp16 row scale is enough.
        shares = _ceil(height * np.where(per_row > 1, per_row, 0) * self.share_bits, 8)
        scales = height * 2 * np.sign(width) + shares
        zeros = 0 if self.symmetric else _ceil(height * per_row * self.bits, 8)
        return np.asarray(codes + scales + zeros, dtype=np.int64)


def formats(
    bits: int | Iterable[int] = (2, 3, 4, 8),
    group_size: int | str | Sequence[int | str] = 64,
    symmetric: bool | Sequence[bool] = False,
    metadata: str | Sequence[str] = "fp16",
    keep: str | None = None,
) -> tuple[Format, ...]:
    """Return all valid combinations, each once, sorted by bits, then group size (row last).

    Args:
        bits: code widths, 1 to 8.
        group_size: weights that share a scale; "row" or 0 is the whole row.
        symmetric: True (no zero point), False (a zero point), or both.
        metadata: "fp16", "compact", "compact6", "gptq", or several.
        keep: a source precision such as "bf16" to include; it comes last.

    Raises:
        InputError: a value is invalid, or no combination is valid.
    """
    sizes = [group_size] if isinstance(group_size, int | str) else list(group_size)
    combinations: set[Format] = set()
    for width, size, even, meta in product(
        [bits] if isinstance(bits, int) else list(bits),
        [_group(size) for size in sizes],
        [symmetric] if isinstance(symmetric, bool) else list(symmetric),
        [metadata] if isinstance(metadata, str) else list(metadata),
    ):
        # 1 bit with a mean has no compact form, and GPTQ has no 1 bit.
        if width != 1 or (meta != "gptq" and (even or not _SHARE_BITS.get(meta))):
            combinations.add(Format(width, size, symmetric=even, metadata=meta))
    if not combinations:
        raise InputError(
            "formats: no combination is valid: 1 bit with compact metadata must be symmetric, and "
            "gptq metadata need 2 bits"
        )
    grids = sorted(
        combinations, key=lambda f: (f.bits, f.group_size or 1 << 62, f.symmetric, f.metadata)
    )
    return (*grids, Format.keep(keep)) if keep else tuple(grids)


def menu() -> tuple[Format, ...]:
    """Return every usual format: 1 to 8 bits in the usual groups, and the kept precisions."""
    ours = ("fp16", "compact", "compact6")
    grids = formats(range(1, 9), GROUP_SIZES, (False, True), ours)
    return (*grids, *map(Format.keep, _KEPT_BITS))


def ggml_types() -> tuple[Format, ...]:
    """Return the formats of all block types of ggml, from wide to narrow."""
    return tuple(map(Format.ggml, ggml.TYPES))


def gptq_grids() -> tuple[Format, ...]:
    """Return the formats of GPTQ's files, in the widths and groups that GPTQModel packs."""
    return formats((2, 3, 4, 8), (32, 64, 128), (False, True), "gptq")


def _group(size: int | str) -> int:
    if isinstance(size, int):
        return size
    if size == "row":
        return 0
    if size.isdecimal():
        return int(size)
    raise InputError(f"group_size: {size!r} is not a number or 'row'")


def _ceil(total: Longs, size: int) -> Longs:
    return -(-total // size)
