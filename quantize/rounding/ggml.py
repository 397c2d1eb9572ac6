"""Rounding by ggml itself, so that costs are those of the file that people run.

ggml chooses the codes of each block by weighted least squares. The weight of a column is the mean
square of the matrix's input there, the diagonal of its second moments: what llama.cpp calls an
importance matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.codecs.ggml import stored_as
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError, ModelError
from bitknap.quantization.ggml import library
from bitknap.quantization.rounding.rounding import Inputs

# The least importance of a column, as a share of the mean: a column of inputs that the calibration
# text never used is rounded like its neighbours, not given up.
_LEAST = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """Rows in the blocks of one of ggml's types.

    Attributes:
        format: the type.
        cols: weights in a row.
        blocks: uint8 [rows, bytes].
        device: where dequantized weights go.
    """

    format: Format
    cols: int
    blocks: Tensor
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.blocks.nbytes

    def dequantize(self) -> Tensor:
        """Return the weights that the blocks stand for, float32 [rows, cols]."""
        type = stored_as(self.format.source, self.cols)
        weights = library.dequantize(self.blocks.numpy(), type, self.cols)
        return torch.from_numpy(weights).to(self.device)

    def rows(self, start: int, stop: int) -> Blocks:
        """Return the part that holds rows start .. stop - 1."""
        return self._with(self.blocks[start:stop])

    @staticmethod
    def stack(parts: Sequence[Blocks]) -> Blocks:
        """Return parts of the same format and width as one, with their rows concatenated."""
        return parts[0]._with(torch.cat([part.blocks for part in parts]))

    def _with(self, blocks: Tensor) -> Blocks:
        return Blocks(format=self.format, cols=self.cols, blocks=blocks, device=self.device)


@dataclass(frozen=True, slots=True)
class Ggml:
    """ggml's own rounding, weighted by the mean squares of inputs; for its block types alone.

    Raises:
        InputError: the package that holds ggml is missing, or too old.
    """

    def __post_init__(self) -> None:
        library.check()

    @property
    def name(self) -> str:
        """The name of the method."""
        return "ggml"

    @property
    def needs_inputs(self) -> bool:
        """Mean squares of inputs say which columns matter."""
        return True

    @property
    def diagonal(self) -> bool:
        """Mean squares are enough; whole second moments are not needed."""
        return True

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Blocks:
        """Return n matrices [n, rows, cols] as n × rows rows of blocks.

        Args:
            weights: what to round.
            format: one of ggml's types.
            inputs: statistics of their inputs; all columns count alike when not given.
            exponents: not used: the blocks hold no power of two beside their scales.

        Raises:
            InputError: the format is none of ggml's types.
            ModelError: weights are too large for the type's 16-bit scales.
        """
        if format.kind != "ggml":
            raise InputError(
                f"{format}: ggml rounds to its own types alone, such as ggml-q4_k; choose formats "
                "of `target=gguf`, or another method"
            )
        count, _, cols = weights.shape
        type = stored_as(format.source, cols)
        known = None if inputs is None else importance(inputs.squares)
        given = weights.detach().float().cpu().numpy()
        parts = [
            library.quantize(given[at], type, None if known is None else known[at])
            for at in range(count)
        ]
        blocks = torch.from_numpy(np.concatenate(parts))
        made = Blocks(format=format, cols=cols, blocks=blocks, device=weights.device)
        _check_finite(made, given)
        return made


def importance(squares: Tensor) -> np.ndarray:
    """Return mean squares of inputs [n, cols] as importances of a mean about 1, float32 [n, cols].

    They are divided by a power of two, which leaves the codes as they are.
    """
    known = squares.double().cpu().numpy()
    mean = known.mean(axis=1, keepdims=True)
    alike = ~(np.isfinite(mean) & (mean > 0))
    scaled = np.ldexp(known, -np.frexp(np.where(alike, 1, mean))[1])
    floor = _LEAST * scaled.mean(axis=1, keepdims=True)
    raised: np.ndarray = np.where(alike, 1, np.maximum(scaled, floor)).astype(np.float32)
    return raised


def _check_finite(made: Blocks, given: np.ndarray) -> None:
    """Refuse blocks whose scales overflowed."""
    largest = float(np.abs(given).max(initial=0))
    # No type's scales overflow below this.
    if largest < 2.0**14 or bool(made.dequantize().isfinite().all()):
        return
    raise ModelError(
        f"{made.format}: weights of up to {largest:.3g} overflow its 16-bit scales; use wider "
        "formats that keep the stored precision, or leave the type out"
    )
