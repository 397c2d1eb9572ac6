"""The protocol `Rounding`, and how to write your own.

A way of rounding turns equally shaped matrices into codes and a grid (a scale, and a zero point
where the format has one, for each group of weights).

    class Plain:
        name = "plain"
        needs_inputs = False                    # True: refuses to work without `Inputs`

        def quantize(self, weights, format, inputs=None, exponents=None):
            return in_range(weights, lambda w: _plain(w.flatten(0, 1), format), exponents)

* `weights` is [n, rows, cols] of any magnitude. `in_range` (`quantize/rounding/magnitude.py`)
  scales each matrix by a power of two so that fp16 can hold its scales, and passes the result to
  your function.
* `format` is a grid: 1 to 8 bits, a group size (0 is the whole row), with or without a zero point.
* `Grid.stored(format, cols, scale, zero)` rounds scales and zeros as they are stored; choose the
  codes on that grid, so that costs are charged for the error that the checkpoint will have.
* `inputs` holds second moments of the matrices' inputs, if the calibration pass recorded them. A
  method that works with their diagonal alone has `diagonal = True`, and takes far less memory.
* What comes back can be any `Coded`: rows that `dequantize` to weights.

Pass an instance as `method=` to `bitknap.estimate` and `bitknap.quantize`; its `name` becomes the
"method" of the table and of the plan, so that a plan made for one method is not written with
another by mistake. `examples/own_rounding.py` is a whole method that runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bitknap.allocation.problem.format import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Statistics of the inputs of n matrices of one shape.

    Attributes:
        moments: mean of x xᵀ over the tokens that each matrix saw, float32 [n, cols, cols]; for
            methods with `diagonal`, the mean of x² alone, [n, cols].
        tokens: number of those tokens, int64 [n].
    """

    moments: Tensor
    tokens: Tensor

    @property
    def squares(self) -> Tensor:
        """Mean of x², the diagonal of the moments, float32 [n, cols]."""
        return self.moments if self.moments.ndim == 2 else self.moments.diagonal(dim1=1, dim2=2)


class Coded(Protocol):
    """Rounded rows, as they are stored."""

    @property
    def format(self) -> Format:
        """The storage format."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def dequantize(self) -> Tensor:
        """Return the weights that the codes stand for, float32 [rows, cols]."""
        ...

    def rows(self, start: int, stop: int) -> Coded:
        """Return the part that holds rows start .. stop - 1."""
        ...

    @staticmethod
    def stack(parts: Any) -> Any:
        """Return a list of parts of one kind, format and width as one."""
        ...


class Rounding(Protocol):
    """A way to round.

    Attributes:
        name: its name in `--method`.
        needs_inputs: whether it refuses to work without `Inputs`.
    """

    @property
    def name(self) -> str:
        """Its name in `--method`."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Whether it refuses to work without `Inputs`."""
        ...

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Coded:
        """Return n matrices [n, rows, cols] as n × rows quantized rows.

        Args:
            weights: what to round, of any magnitude.
            format: a grid.
            inputs: statistics of their inputs, if recorded.
            exponents: exponents of the matrices' powers of two (`magnitude`), int32 [n], if
                `weights` are only some of their rows.
        """
        ...


def takes_squares(rounding: Rounding) -> bool:
    """Return whether a method that needs inputs works with mean squares alone (`diagonal`)."""
    return bool(getattr(rounding, "diagonal", False))


def recorded_for(rounding: Rounding) -> frozenset[str]:
    """Return what a calibration pass must record for a method, as estimators name their needs."""
    if not rounding.needs_inputs:
        return frozenset()
    return frozenset({"moments" if takes_squares(rounding) else "full"})
