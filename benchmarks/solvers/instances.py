"""Cost tables shaped like real models, to time solvers on: made up, seeded, with exact bytes.

Shapes are those of published configurations. Costs follow theory: the distortion of
each grid on random weights, times a sensitivity that varies over layers, experts and matrices.
The hard random instances of the knapsack literature are included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.format import Format, formats
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.allocation.solvers.solving import solve
from bitknap.errors import InputError
from bitknap.names import check_name, unknown

FORMATS = (
    *formats(bits=1, group_size=128, symmetric=True),
    *formats(bits=(2, 3, 4), group_size=(32, 128)),
    *formats(bits=8, group_size=128),
)
# E(dw^2)/Var of round to nearest with the best clipping in each group (1 bit: sign x mean),
# in the order of FORMATS, for Gaussian weights and for Student-t with 5 degrees of freedom.
# The latter at group size 32 is scaled from 128 as the Gaussian one is.
_GAUSS = np.array([0.360, 0.112, 0.136, 0.0260, 0.0348, 0.00610, 0.0090, 3.5e-5])
_TAILED = np.array([0.452, 0.152, 0.184, 0.0438, 0.0586, 0.0107, 0.0158, 6.1e-5])
# The same without clipping: 2 bits then lie above the line from 1 to 3 bits.
_UNCLIPPED = np.array([0.360, 0.166, 0.253, 0.0300, 0.0465, 0.00653, 0.0101, 3.5e-5])
_BUDGET = 2.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """A table and the limits that a solver must keep."""

    table: CostTable
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The routed experts of one model.

    Attributes:
        layers: number of decoder layers.
        dense: number of first layers, which have no experts.
        experts: number of routed experts per layer.
        active: number of experts per token.
        hidden: width of the residual stream.
        inner: inner width of an expert.
        cut: output rows of one unit, (gate and up, down); 0 for whole matrices.
    """

    layers: int
    dense: int
    experts: int
    active: int
    hidden: int
    inner: int
    cut: tuple[int, int] = (0, 0)


MIXTRAL = Shape(layers=32, dense=0, experts=8, active=2, hidden=4096, inner=14336)
QWEN3_30B = Shape(layers=48, dense=0, experts=128, active=8, hidden=2048, inner=768)
QWEN3_235B = Shape(layers=94, dense=0, experts=128, active=8, hidden=4096, inner=1536)
DEEPSEEK_V3 = Shape(layers=61, dense=3, experts=256, active=8, hidden=7168, inner=2048)
KIMI_K2 = Shape(layers=61, dense=1, experts=384, active=8, hidden=7168, inner=2048)
# As many experts as Kimi-K3; widths are from K2, since those of K3 are not known here.
KIMI_K3 = Shape(layers=95, dense=1, experts=896, active=16, hidden=7168, inner=2048)
CHANNELS = Shape(layers=61, dense=1, experts=384, active=8, hidden=7168, inner=2048, cut=(128, 512))
TINY = Shape(layers=3, dense=1, experts=8, active=2, hidden=256, inner=128)


def model_units(shape: Shape, count: int | None = None) -> Units:
    """Return the units of a model, or the first `count` of them."""
    wide, narrow = shape.cut
    heights = [shape.inner, shape.inner, shape.hidden]
    cuts = [wide or shape.inner, wide or shape.inner, narrow or shape.hidden]
    blocks = [height // cut for height, cut in zip(heights, cuts, strict=True)]
    projection = np.repeat(np.arange(3), blocks)
    block = np.concatenate([np.arange(number) for number in blocks])
    widths = np.array([shape.hidden, shape.hidden, shape.inner])
    each = len(projection)
    layers = shape.layers - shape.dense
    total = layers * shape.experts * each
    if count is not None and count > total:
        raise InputError(f"count: {count} of {total} units")
    index = np.arange(total if count is None else count)
    expert, part = np.divmod(index, each)
    return Units(
        layer=(shape.dense + expert // shape.experts).astype(np.int32),
        role=np.full(len(index), ROLES.index("routed"), dtype=np.int8),
        expert=(expert % shape.experts).astype(np.int32),
        projection=projection[part].astype(np.int16),
        block=block[part].astype(np.int32),
        rows=np.array(cuts)[projection[part]],
        cols=widths[projection[part]],
        projections=("gate", "up", "down"),
    )


def frequencies(units: Units, active: int, generator: np.random.Generator) -> Floats:
    """Return how often a token reads each unit, float64[U], at most 1; heavy-tailed in a layer."""
    layers, experts = int(units.layer.max()) + 1, int(units.expert.max()) + 1
    share = generator.lognormal(0, 0.8, (layers, experts))
    share = np.minimum(active * share / share.sum(axis=1, keepdims=True), 1.0)
    by_unit: Floats = share[units.layer, units.expert]
    return by_unit


def costs(units: Units, frequency: Floats, generator: np.random.Generator) -> Floats:
    """Return made-up costs, float64[U,F], nats per token.

    Sensitivity is frequency x weights x log-normal factors of layer, expert and unit; distortion
    lies between that of Gaussian and that of heavy-tailed weights, every eighth unit unclipped,
    and each entry has an error of about 5 %, like a measured one.
    """
    count = len(units)
    layers, experts = int(units.layer.max()) + 1, int(units.expert.max()) + 1
    sensitivity = frequency * units.numel * generator.lognormal(0, 0.3, count)
    sensitivity *= generator.lognormal(0, 0.7, layers)[units.layer]
    sensitivity *= generator.lognormal(0, 0.9, (layers, experts))[units.layer, units.expert]
    sensitivity *= np.array([1.0, 1.0, 1.6])[units.projection]
    tail = generator.random((count, 1))
    distortion = _GAUSS ** (1 - tail) * _TAILED**tail
    distortion[::8] = _UNCLIPPED
    distortion *= generator.lognormal(0, 0.05, distortion.shape)
    made_up: Floats = sensitivity[:, None] / sensitivity.sum() * distortion
    return made_up


def model_instance(shape: Shape, count: int | None = None, *, seed: int = 0) -> Instance:
    """Return a made-up table of a model under 2.5 bits per weight."""
    generator = np.random.default_rng(seed)
    units = model_units(shape, count)
    cost = costs(units, frequencies(units, shape.active, generator), generator)
    table = CostTable.from_arrays(cost, units=units, formats=FORMATS)
    return Instance(table=table, limits=(Budget.bits(_BUDGET).limit(table),))


def with_limits(shape: Shape, count: int | None = None, *, ranks: int, seed: int = 0) -> Instance:
    """Return `model_instance` with five further limits, and with `ranks` devices even more.

    The five: bytes read per token under three kinds of text, a share of weights at 2 bits or
    less, and the bytes of the layers that share a device with the embedding. Each is a few
    percent below what the plan for bytes alone takes, so that it binds. With `ranks` there is
    one kind of text, no embedding, and no rank may hold 0.5 % more than its even share.
    """
    plain = model_instance(shape, count, seed=seed)
    table, units = plain.table, plain.table.units
    free = solve(Problem(table, plain.limits)).choice
    generator = np.random.default_rng(seed + 1)
    further = []

    def below(name: str, weight: Floats | Longs, share: float) -> None:
        used = float(weight[np.arange(len(units)), free].sum())
        further.append(Limit(name, weight, np.floor(share * used)))

    for number in range(1 if ranks else 3):
        share = frequencies(units, shape.active, generator)[:, None]
        below(f"bytes per token {number}", share * table.nbytes, 0.97)
    narrow = np.array([item.bits <= 2 for item in table.formats])
    below("weights at 2 bits or less", units.numel[:, None] * narrow, 0.95)
    if not ranks:
        first = units.layer <= np.quantile(units.layer, 0.2)
        below("first device bytes", table.nbytes * first[:, None], 0.97)
    rank = units.expert * ranks // (int(units.expert.max()) + 1)
    for number in range(ranks):
        held = table.nbytes * (rank == number)[:, None]
        even = np.floor(1.005 * plain.limits[0].bound * units.numel[rank == number].sum())
        further.append(Limit(f"rank {number} bytes", held, even // units.numel.sum()))
    return Instance(table=table, limits=(*plain.limits, *further))


def random_instance(
    kind: str, rows: int, width: int = 8, *, largest: int = 10_000, seed: int = 0
) -> Instance:
    """Return a random instance of Pisinger (1995), "A minimal algorithm for the MCKP".

    Args:
        kind: "uncorrelated": profits and weights uniform; "weak": profit within 10 of weight;
            "strong": the options of a row are running sums of items whose profit is weight + 10.
        rows: number of rows of the table.
        width: number of options per row.
        largest: largest weight; weights are drawn from 1 to this.
        seed: random seed of the numbers.

    The limit lies a quarter of the way from the lightest plan to the heaviest; at his half, the
    cheapest options of uncorrelated rows all fit.

    Raises:
        InputError: there is no such kind.
    """
    generator = np.random.default_rng(seed)
    weight = generator.integers(1, largest + 1, (rows, width))
    if kind == "uncorrelated":
        profit = generator.integers(1, largest + 1, (rows, width))
    elif kind == "weak":
        profit = np.maximum(weight + generator.integers(-10, 11, (rows, width)), 1)
    elif kind == "strong":
        weight = np.sort(weight, axis=1)
        profit = np.cumsum(weight + 10, axis=1)
        weight = np.cumsum(weight, axis=1)
    else:
        raise unknown("kind", kind, ("uncorrelated", "weak", "strong"))
    table = CostTable.from_arrays(profit.max(axis=1, keepdims=True) - profit, weight)
    quarter = int(3 * weight.min(axis=1).sum() + weight.max(axis=1).sum()) // 4
    return Instance(table=table, limits=(Budget.bytes(quarter).limit(table),))


def measured_instance() -> Instance:
    """Return the measured errors of Mixtral-8x7B's experts at 1, 2 and 3 bits under 2 bits.

    Costs are squared errors over those of the layer at 2 bits, since what an error in one layer
    does to the loss was not measured; so they are shares, not nats.
    """
    source = files("bitknap.benchmarks.solvers") / "mixtral_mc.json"
    document = json.loads(source.read_text())
    error = np.array(document["block_output_error"]) ** 2
    cost = (error / error[:, :, 1].sum(axis=1)[:, None, None]).reshape(-1, error.shape[2])
    experts = np.arange(len(cost))
    choices = [Format(bits, 128, symmetric=bits == 1) for bits in document["about"]["bits"]]
    units = Units.build(
        layer=experts // error.shape[1],
        role=["routed"] * len(cost),
        expert=experts % error.shape[1],
        projection=["all"] * len(cost),
        # Gate, up and down have the same number of weights in rows of 128 x n.
        rows=np.full(len(cost), 3 * MIXTRAL.inner),
        cols=np.full(len(cost), MIXTRAL.hidden),
    )
    table = CostTable.from_arrays(cost, units=units, formats=choices)
    return Instance(table=table, limits=(Budget.bits(2.25).limit(table),))


def _by_model(shape: Shape, count: int | None = None) -> Callable[[], Instance]:
    return lambda: model_instance(shape, count)


def _limited(ranks: int, shape: Shape, count: int | None = None) -> Callable[[], Instance]:
    return lambda: with_limits(shape, count, ranks=ranks)


def _random(kind: str, rows: int) -> Callable[[], Instance]:
    return lambda: random_instance(kind, rows)


INSTANCES: Mapping[str, Callable[[], Instance]] = MappingProxyType(
    {
        "tiny": _by_model(TINY),
        "tiny+5": _limited(0, TINY),
        "mixtral-measured": measured_instance,
        "mixtral": _by_model(MIXTRAL),
        "qwen3-30b": _by_model(QWEN3_30B),
        "36k": _by_model(QWEN3_235B, 36_000),
        "deepseek-v3": _by_model(DEEPSEEK_V3),
        "kimi-k2": _by_model(KIMI_K2),
        "250k": _by_model(KIMI_K3, 250_000),
        "channels": _by_model(CHANNELS, 1_000_000),
        "36k+5": _limited(0, QWEN3_235B, 36_000),
        "36k+10": _limited(8, QWEN3_235B, 36_000),
        "uncorrelated": _random("uncorrelated", 1000),
        "weak": _random("weak", 1000),
        "strong": _random("strong", 1000),
    }
)
QUICK: Sequence[str] = ("tiny", "tiny+5")


def instance(name: str) -> Instance:
    """Return the instance with a name, always the same one.

    Raises:
        InputError: there is no such instance.
    """
    check_name("instance", name, INSTANCES)
    return INSTANCES[name]()


__all__ = ["FORMATS", "INSTANCES", "QUICK", "Instance", "instance", "random_instance"]
