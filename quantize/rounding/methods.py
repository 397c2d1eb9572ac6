"""Ways to round a matrix to a format, behind one signature.

A way of rounding takes equally shaped matrices, and what is known of their inputs if it asks for
that, and returns codes. Costs are charged and checkpoints written by the same one: its name is the
"method" of tables and plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError, MismatchError
from bitknap.quantization.rounding import gptq, hqq, rtn
from bitknap.quantization.rounding.catalog import METHODS
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.magnitude import in_range
from bitknap.quantization.rounding.rounding import Inputs, Rounding


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

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""
        return in_range(weights, lambda w: rtn.quantize(w.flatten(0, 1), format), exponents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq:
    """Half-quadratic quantization, each group by itself, for most weights' sake; see `hqq`.

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

    @property
    def needs_inputs(self) -> bool:
        """Weights are enough."""
        return False

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Quantized:
        """Return n matrices [n, rows, cols] as n × rows quantized rows."""

        def rounded(ordinary: Tensor) -> Quantized:
            return hqq.quantize(ordinary.flatten(0, 1), format, power=self.power)

        return in_range(weights, rounded, exponents)


# Steps of GPTQ's grids over the best ones for rounding to nearest, by width: what earlier columns
# missed is added to later ones, which outgrow those. Of 1 to 1.8, on both reference models in whole
# rows and groups of 64, these lose least: at 1 bit half the KL, at 2 bits a fifth to a third less,
# at 3 bits a twentieth to a tenth; at 4 bits anything wider loses more.
_WIDER = {1: 1.5, 2: 1.2, 3: 1.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Round column after column, later ones making up for earlier ones' errors; see `gptq`.

    Second moments of few tokens are mostly noise, and plain GPTQ fits later columns to it: with
    1,024 calibration tokens its KL on both reference models at int2-g64-asym was above that of
    rounding to nearest. Noise goes with columns over tokens, so that much is added to the
    diagonal: of 0.1 to 3, `ridge` 1 was the best or within 1 % of it, and better than rounding to
    nearest from 64 calibration tokens on.

    Attributes:
        damping: what is added to the diagonal of the second moments, over its mean.
        ridge: what is added besides, over the mean and over columns a token; 0 for plain GPTQ.
        act_order: take columns by falling second moment, not from left to right.
        widen: use wider grids than rounding to nearest would, up to 3 bits; ours.
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

        Theirs are fewer than `ridge` × columns: the diagonal gets more than its mean on top, and
        what later columns make up for fades. Without tokens it is next to nothing, and the result
        that of rounding to nearest.
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
            InputError: no inputs, or second moments that are none.
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
    """Return a way of rounding, found by what `--method` calls it if it is a name.

    Raises:
        InputError: there is none of that name.
    """
    if not isinstance(way, str):
        return way
    found: Rounding = METHODS.find(way)()
    return found


def planned(plan: BitPlan, way: str | Rounding | None = None, *, force: bool = False) -> Rounding:
    """Return how a plan is to be rounded: as it was made for, unless another way is forced.

    Raises:
        MismatchError: another way was asked for than the plan's costs are of.
    """
    known = str(plan.header.get("method", RTN.name))
    found = method(known if way is None else way)
    if found.name != known and not force:
        raise MismatchError(
            f"the plan is made for rounding by {known}, not by {found.name}; make a plan "
            f"from costs of {found.name} (estimate with `rounding={found.name}`), or force it"
        )
    return found


def round_trip(
    weights: Tensor, format: Format, rounding: Rounding = RTN, inputs: Inputs | None = None
) -> Tensor:
    """Return what `weights` [n, rows, cols] become when stored in `format`, float32."""
    if format.kind == "keep":
        return weights
    return rounding.quantize(weights, format, inputs).dequantize().view_as(weights)
