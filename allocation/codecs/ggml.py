"""The block types of ggml, the library under llama.cpp: widths, blocks and exact bytes.

A row is cut into blocks of 256 or 32 weights, and must be a multiple of the block. Where it is not,
llama.cpp stores a type with smaller blocks instead, and so does Bitknap: `stored_as` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        bits: the width in its name, which orders types from narrow to wide.
        block: weights of a block.
        nbytes: bytes of a block.
        fallback: the type of rows that are no multiple of the block.
    """

    bits: int
    block: int
    nbytes: int
    fallback: str = "f16"


# From wide to narrow; types of one width by bytes per weight.
TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "f16": BlockType(16, 1, 2),
        "q8_0": BlockType(8, 32, 34),
        "q6_k": BlockType(6, 256, 210, "q8_0"),
        "q5_1": BlockType(5, 32, 24),
        "q5_k": BlockType(5, 256, 176, "q5_1"),
        "q5_0": BlockType(5, 32, 22),
        "q4_1": BlockType(4, 32, 20),
        "q4_k": BlockType(4, 256, 144, "q5_0"),
        "q4_0": BlockType(4, 32, 18),
        "iq4_nl": BlockType(4, 32, 18),
        "iq4_xs": BlockType(4, 256, 136, "iq4_nl"),
        "mxfp4": BlockType(4, 32, 17),
        "q3_k": BlockType(3, 256, 110, "iq4_nl"),
        "iq3_s": BlockType(3, 256, 110, "iq4_nl"),
        "iq3_xxs": BlockType(3, 256, 98, "iq4_nl"),
        "q2_k": BlockType(2, 256, 84, "iq4_nl"),
        "iq2_s": BlockType(2, 256, 82, "iq4_nl"),
        "iq2_xs": BlockType(2, 256, 74, "iq4_nl"),
        "iq2_xxs": BlockType(2, 256, 66, "iq4_nl"),
        "iq1_m": BlockType(1, 256, 56, "iq4_nl"),
        "iq1_s": BlockType(1, 256, 50, "iq4_nl"),
    }
)


def stored_as(name: str, cols: int) -> str:
    """Return the type that rows of `cols` weights have in a file that asks for type `name`."""
    while cols % TYPES[name].block:
        name = TYPES[name].fallback
    return name


def row_bytes(name: str, cols: int) -> int:
    """Return the bytes of a row of `cols` weights, in the type that it is stored as."""
    kind = TYPES[stored_as(name, cols)]
    return cols // kind.block * kind.nbytes
