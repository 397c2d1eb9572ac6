"""The table of targets: which other runtimes could hold a model, from its units' shapes alone.

Each runtime's format has its own rules: rows that divide into its blocks, widths it has kernels
for, matrices that must share a format. The table states the formats as of 2026; an exporter checks
them again against names and the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.units import Units
from bitknap.quantization.targets.target import Fit, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRule:
    """A target whose format requires matrix sizes that are multiples of its block sizes.

    Attributes:
        name: the runtime's name on the command line.
        about: one sentence for lists.
        bits: widths it stores.
        profile: units that must share a format.
        groups: group sizes it has; one of them must divide all rows.
        rows: output features must be a multiple of this.
        cols: input features must be a multiple of this.
        full_cols: input features must be a multiple of this for all its types; 1 for no such rule.
        fallback: what happens to matrices that do not fit `full_cols`.
        fallback_bits: widths that are left for them.
    """

    name: str
    about: str
    bits: tuple[int, ...]
    profile: str
    groups: tuple[int, ...]
    rows: int = 1
    cols: int = 1
    full_cols: int = 1
    fallback: str = ""
    fallback_bits: tuple[int, ...] = ()

    def fit(self, units: Units) -> Fit:
        """Return how the shapes of all units together fit."""
        groups = tuple(g for g in self.groups if not (units.cols % g).any())
        blocked = _not_multiple(units, "rows", self.rows) or _not_multiple(units, "cols", self.cols)
        if blocked:
            return Fit(target=self, possible=False, bits=(), groups=groups, reason=blocked)
        if lost := _not_multiple(units, "cols", self.full_cols):
            reason, bits = f"{lost}: {self.fallback}", self.fallback_bits
        else:
            reason = "" if groups else "no group size divides all rows; one scale a row only"
            bits = self.bits
        return Fit(target=self, possible=True, bits=bits, groups=groups, reason=reason)


# GPTQ packs 32 codes along the input, and zeros along the output, in 32-bit words.
_GPTQ = (2, 3, 4, 8)
TARGETS: tuple[Target, ...] = (
    ShapeRule(
        name="gptqmodel",
        about="GPTQModel: GPTQ codes in 32-bit words.",
        bits=_GPTQ,
        profile="gate_eq_up",
        groups=(32, 64, 128),
        rows=32,
        cols=32,
    ),
    ShapeRule(
        name="autoround",
        about="AutoRound: GPTQ codes in 32-bit words, one format a layer.",
        bits=_GPTQ,
        profile="layer",
        groups=(32, 64, 128),
        rows=32,
        cols=32,
    ),
    ShapeRule(
        name="compressed-tensors",
        about="compressed-tensors: what vLLM and llm-compressor read.",
        bits=tuple(range(1, 9)),
        profile="layer",
        groups=(32, 64, 128, 256),
    ),
    # Q8_0, Q4_0 and their like have blocks of 32; K-quants and IQ of 256.
    ShapeRule(
        name="llama.cpp",
        about="llama.cpp: GGUF with K-quants and blocks of 32.",
        bits=(1, 2, 3, 4, 5, 6, 8),
        profile="layer_proj",
        groups=(32,),
        cols=32,
        full_cols=256,
        fallback="K-quants and IQ types, which are all below 4 bits, fall back to blocks of 32",
        fallback_bits=(4, 5, 8),
    ),
    # W4A16 has groups of 128, NVFP4 blocks of 16; FP8 and INT8 a scale a row.
    ShapeRule(
        name="modelopt",
        about="NVIDIA ModelOpt: W4A16, NVFP4, FP8 and INT8.",
        bits=(4, 8),
        profile="layer",
        groups=(128,),
        cols=16,
        full_cols=128,
        fallback="no W4A16, whose groups are 128; NVFP4 and 8 bits remain",
        fallback_bits=(4, 8),
    ),
    ShapeRule(
        name="torchao",
        about="torchao: integer grids of PyTorch's own quantization.",
        bits=tuple(range(1, 9)),
        profile="layer_gateup_down",
        groups=(32, 64, 128, 256),
    ),
    ShapeRule(
        name="mlx",
        about="MLX: Apple's array framework, groups of 32 to 128.",
        bits=(2, 3, 4, 5, 6, 8),
        profile="layer_proj",
        groups=(32, 64, 128),
        cols=32,
    ),
)


def fits(units: Units, targets: Sequence[Target] = TARGETS) -> tuple[Fit, ...]:
    """Return how all units together fit each target, in the order of `targets`."""
    return tuple(target.fit(units) for target in targets)


def _not_multiple(units: Units, side: str, step: int) -> str:
    """Describe the first unit whose size is not a multiple of `step`; "" if there is none."""
    sizes = units.rows if side == "rows" else units.cols
    wrong = sizes % step != 0
    if not wrong.any():
        return ""
    unit = units.row(int(np.argmax(wrong)))
    what = "outputs" if side == "rows" else "inputs"
    size = unit.rows if side == "rows" else unit.cols
    return f"{unit.role} {unit.projection} has {size} {what}, not a multiple of {step}"
