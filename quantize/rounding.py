"""Ways to round a matrix to a format, behind one signature.

A way of rounding takes equally shaped matrices, and what is known of their inputs if it asks for
that, and returns codes. Costs are charged and checkpoints written by the same one: its name is the
"method" of tables and plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bitknap.allocation.format import Format
from bitknap.quantize import rtn
from bitknap.quantize.quantized import Quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the inputs of n equally shaped matrices were like.

    Attributes:
        moments: mean of x xᵀ over the tokens that each matrix saw, float32 [n, cols, cols].
        tokens: how many those were, int64 [n].
    """

    moments: Tensor
    tokens: Tensor


class Rounding(Protocol):
    """A way to round.

    Attributes:
        name: what `--method` calls it.
        needs_inputs: whether it refuses to work without `Inputs`.
    """

    @property
    def name(self) -> str:
        """What `--method` calls it."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Whether it refuses to work without `Inputs`."""
        ...

    def quantize(self, weights: Tensor, format: Format, inputs: Inputs | None = None) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""
        ...


@dataclass(frozen=True, slots=True)
class Rtn:
    """Round to nearest, each group by itself, with a clipping search; see `rtn`."""

    @property
    def name(self) -> str:
        """The name of the method."""
        return "rtn"

    @property
    def needs_inputs(self) -> bool:
        """Weights are enough."""
        return False

    def quantize(self, weights: Tensor, format: Format, inputs: Inputs | None = None) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""
        return rtn.quantize(weights.flatten(0, 1), format)


RTN = Rtn()


def round_trip(
    weights: Tensor, format: Format, rounding: Rounding = RTN, inputs: Inputs | None = None
) -> Tensor:
    """Return what `weights` [n, rows, cols] become when stored in `format`, float32."""
    if format.kind == "keep":
        return weights
    return rounding.quantize(weights, format, inputs).dequantize().view_as(weights)
