"""Ways to round a matrix to a format, behind one signature.

A rounding method takes matrices of one shape, with statistics of their inputs if it needs them, and
returns codes. Costs are measured and checkpoints written with the same method, whose name is the
"method" of tables and plans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError, MismatchError
from bitknap.quantization.rounding import gptq, hqq, midtread, rtn
from bitknap.quantization.rounding.catalog import METHODS
from bitknap.quantization.rounding.ggml import Ggml
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.magnitude import in_range
from bitknap.quantization.rounding.rounding import Inputs, Rounding


class _RowByRow(ABC):
    """A method that rounds each row of weights by itself, and needs nothing else."""

    __slots__ = ()

    @property
    def needs_inputs(self) -> bool:
        """Weights are enough."""
        return False

    @abstractmethod
    def _rounded(self, rows: Tensor, format: Format) -> Quantized:
        """Return the rows of all matrices quantized."""

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""

        def rounded(ordinary: Tensor) -> Quantized:
            return self._rounded(ordinary.flatten(0, 1), format)

        return in_range(weights, rounded, exponents)


@dataclass(frozen=True, slots=True)
class Rtn(_RowByRow):
    """Round to nearest, each group by itself, with a clipping search; see `rtn`."""

    @property
    def name(self) -> str:
        """The name of the method."""
        return "rtn"

    def _rounded(self, rows: Tensor, format: Format) -> Quantized:
        return rtn.quantize(rows, format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq(_RowByRow):
    """Half-quadratic quantization: fit each group's grid to most of its weights; see `hqq`.

    Attributes:
        power: p of the norm of the error that is minimised, above 0 and at most 1.
    """

    power: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise InputError(f"power: {self.power} is not above 0 and at most 1; 0.7 is usual")

    @property
    def name(self) -> str:
        """The name of the method."""
        return "hqq"

    def _rounded(self, rows: Tensor, format: Format) -> Quantized:
        return hqq.quantize(rows, format, power=self.power)


@dataclass(frozen=True, slots=True)
class Midtread(_RowByRow):
    """Round to nearest on symmetric grids that have a code for zero; see `midtread`."""

    @property
    def name(self) -> str:
        """The name of the method."""
        return "midtread"

    def _rounded(self, rows: Tensor, format: Format) -> Quantized:
        return midtread.quantize(rows, format)


# Steps of GPTQ's grids relative to the best ones for rounding to nearest, by width: errors of
# earlier columns are added to later ones, which outgrow those grids. Of factors from 1 to 1.8, on
# both reference models in whole rows and groups of 64, these lose least: at 1 bit half the KL, at 2
# bits a fifth to a third less, at 3 bits a twentieth to a tenth; at 4 bits anything wider loses
# more.
_WIDER = {1: 1.5, 2: 1.2, 3: 1.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Round column after column, later ones making up for earlier ones' errors; see `gptq`.

    Second moments of few tokens are mostly noise, and plain GPTQ fits later columns to it: with
    1,024 calibration tokens its KL on both reference models at int2-g64-asym was above that of
    rounding to nearest. Noise grows with the ratio of columns to tokens, so that ratio is added to
    the diagonal: of factors from 0.1 to 3, `ridge` 1 was the best or within 1 % of it, and better
    than rounding to nearest from 64 calibration tokens on.

    Attributes:
        damping: term added to the diagonal of the second moments, relative to its mean.
        ridge: further term, relative to the mean times columns per token; 0 for plain GPTQ.
        act_order: take columns by decreasing second moment, not from left to right.
        widen: use wider grids than rounding to nearest would, up to 3 bits; not in published GPTQ.
    """

    damping: float = 0.01
    ridge: float = 1.0
    act_order: bool = True
    widen: bool = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping: {self.damping} is not above 0; 0.01 is usual")
        if not self.ridge >= 0:
            raise InputError(f"ridge: {self.ridge} is below 0; 1 is usual, 0 switches it off")

    @property
    def name(self) -> str:
        """The name of the method."""
        return "gptq"

    @property
    def needs_inputs(self) -> bool:
        """Second moments say how errors may make up for each other."""
        return True

    def fallbacks(self, inputs: Inputs) -> Tensor:
        """Return which matrices saw too few tokens, bool [n].

        They saw fewer than `ridge` × columns: more than its mean is added to the diagonal, and
        later columns make up for less. Without tokens they make up for almost nothing, and the
        result is that of rounding to nearest.
        """
        return inputs.tokens < self.ridge * inputs.moments.shape[-1]

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows.

        Raises:
            InputError: inputs are missing, or their second moments are not valid.
        """
        if inputs is None:
            raise InputError(
                "gptq: needs second moments of the units' inputs; calibrate with full moments, or "
                "use `rounding=Hqq()`"
            )
        noise = inputs.moments.shape[-1] / inputs.tokens.clamp_min(1).float()
        rounded = partial(
            gptq.quantize,
            format=format,
            moments=inputs.moments,
            damping=self.damping + self.ridge * noise,
            act_order=self.act_order,
            wider=_WIDER.get(format.bits, 1.0) if self.widen else 1.0,
        )
        return in_range(weights, rounded, exponents)


RTN = Rtn()


def method(way: str | Rounding) -> Rounding:
    """Return a rounding method, looked up by its name in `--method` if `way` is a string.

    Raises:
        InputError: no method has that name.
    """
    if not isinstance(way, str):
        return way
    rounding: Rounding = METHODS.find(way)()
    return rounding


def planned(plan: BitPlan, way: str | Rounding | None = None, *, force: bool = False) -> Rounding:
    """Return the rounding method that a plan was made for, or another one if it is forced.

    Raises:
        MismatchError: the plan's costs are for another method than the requested one.
    """
    known = str(plan.header.get("method", RTN.name))
    wanted = method(known if way is None else way)
    if wanted.name != known and not force:
        raise MismatchError(
            f"the plan is made for rounding by {known}, not by {wanted.name}; make a plan "
            f"from costs of {wanted.name} (estimate with `rounding={wanted.name}`), or force it"
        )
    return wanted


def round_trip(
    weights: Tensor,
    format: Format,
    rounding: Rounding | None = None,
    inputs: Inputs | None = None,
    exponents: Tensor | None = None,
) -> Tensor:
    """Return what `weights` [n, rows, cols] become when stored in `format`, float32.

    Args:
        weights: the weights.
        format: the format.
        rounding: how they are rounded; to nearest, or by ggml for its types, when not given.
        inputs: as in `Rounding.quantize`.
        exponents: as in `Rounding.quantize`, if the weights are only some rows of matrices.

    Raises:
        InputError: the method does not round to this format.
    """
    if format.kind == "keep":
        return weights
    own = Ggml() if format.kind == "ggml" else RTN
    way = own if rounding is None else rounding
    if format.kind == "ggml" and way.name != own.name:
        raise InputError(
            f"{format}: only ggml rounds to its own types, not {way.name}; use `rounding=ggml`, or "
            "formats of integer grids"
        )
    return way.quantize(weights, format, inputs, exponents).dequantize().view_as(weights)
