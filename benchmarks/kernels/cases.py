"""Cases of the kernel benchmark: layers of published models, mixes of widths, routings.

A case is one layer at one batch. Its ideal time is the greater of two: the bytes that it must read
over the device's bandwidth, and its FLOP over the device's matmul peak, both measured in the same
run. Bytes cover the experts that its routing hits, with scales and zeros, and its inputs
and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from bitknap.benchmarks.models.shapes import shape_of
from bitknap.kernels.experts import Experts
from bitknap.kernels.experts_table import ExpertsTable
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.random_experts import made_up_table

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
ROUTINGS = ("uniform", "zipf", "one expert")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Maps names of mixes to the widths that experts have in turn; 16 is unquantized.
MIXES: dict[str, tuple[int, ...]] = {
    "2": (2,),
    "3": (3,),
    "4": (4,),
    "8": (8,),
    "2+3+4": (2, 3, 4),
    "2+3+4+8": (2, 3, 3, 4, 4, 8),  # 4 on average
    "gate≠up": (2, 3, 3, 4, 4, 8),  # the same, but up takes the widths one expert later
    "bf16": (16,),
}
OTHER = "gate≠up"
KEPT = "bf16"
_COLUMNS_ABOVE_ALL = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The routed experts of one model's layer.

    Attributes:
        name: name of the model.
        experts: E.
        top_k: number of experts per token.
        hidden: H.
        intermediate: I.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, model: str) -> Layer:
        """Return the layer of a published model."""
        shape = shape_of(model)
        return cls(
            name=model,
            experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            intermediate=shape.size,
        )


MODELS = ("Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite")
TOY = Layer(name="toy", experts=6, top_k=2, hidden=64, intermediate=96)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer in one mix, at one batch.

    Attributes:
        layer: sizes of the layer.
        mix: name in `MIXES`.
        group: number of weights that share a scale.
        batch: number of tokens.
        routing: name in `ROUTINGS`.
        dtype: dtype of activations.
    """

    layer: Layer
    mix: str
    group: int = 128
    batch: int = 1
    routing: str = "uniform"
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """All fields in one line, for `--cases`."""
        size = f"g{self.group}"
        parts = (self.layer.name, self.mix, size, f"b{self.batch}", self.routing, self.dtype)
        return " ".join(parts)

    @property
    def weights_name(self) -> tuple[str, str, int]:
        """The key shared by cases with the same weights."""
        return self.layer.name, self.mix, self.group


def cases(*, quick: bool) -> list[Case]:
    """Return the cases of a run, grouped by their weights.

    Args:
        quick: only the few cases that the targets need.
    """
    chosen = []
    for model in MODELS:
        layer = Layer.of(model)
        if quick:
            for mix, batch in product(("4", "2+3+4+8", OTHER, KEPT), (1, 16, 512)):
                chosen.append(Case(layer=layer, mix=mix, batch=batch))
            continue
        for mix, batch in product(MIXES, BATCHES):
            chosen.append(Case(layer=layer, mix=mix, batch=batch))
        for mix, batch in product(("4", "2+3+4+8"), (1, 16, 64, 512)):
            base = Case(layer=layer, mix=mix, batch=batch)
            chosen += [replace(base, routing=routing) for routing in ROUTINGS[1:]]
            chosen += [replace(base, dtype="fp16"), replace(base, group=64)]
    chosen.sort(key=lambda case: (MODELS.index(case.layer.name), case.weights_name, case.dtype))
    return chosen


def toy_cases() -> list[Case]:
    """Return the case for a machine without a GPU, and the cases that it is compared with."""
    base = Case(layer=TOY, mix="2+3+4+8", group=32, batch=3, dtype="fp32")
    return [base, replace(base, mix="4"), replace(base, mix=OTHER), replace(base, mix=KEPT)]


def experts_of(case: Case, device: str) -> Experts:
    """Return random experts for a case; experts of one width have the same weights."""
    widths = MIXES[case.mix]
    kept = torch.float32 if case.dtype == "fp32" else torch.bfloat16
    layer = case.layer
    gate = [_recipe(widths[e % len(widths)], case.group) for e in range(layer.experts)]
    up = gate[1:] + gate[:1] if case.mix == OTHER else gate

    def table(recipes: Sequence[Recipe], rows: int, cols: int) -> ExpertsTable:
        random = torch.Generator().manual_seed(rows)
        single = {r: made_up_table([r], rows, cols, random, kept) for r in dict.fromkeys(recipes)}
        streams = [single[recipe].buffer.view(torch.uint8) for recipe in recipes]
        fitting = [single[recipe].recipes[0] for recipe in recipes]
        return ExpertsTable.of(
            torch.cat(streams).to(device), fitting, rows, cols, kept if case.mix == KEPT else None
        )

    return Experts(
        gate=table(gate, layer.intermediate, layer.hidden),
        up=table(up, layer.intermediate, layer.hidden),
        down=table(gate, layer.hidden, layer.intermediate),
        activation="silu",
    )


def _recipe(bits: int, group: int) -> Recipe:
    if bits == 16:
        return Recipe(bits=16, group=_COLUMNS_ABOVE_ALL, kept=1)
    return Recipe(bits=bits, group=group)


def elsewhere(experts: Experts) -> Experts:
    """Return a copy of the experts at other addresses, so that caches do not hold it."""

    def copied(table: ExpertsTable) -> ExpertsTable:
        return replace(table, buffer=table.buffer.clone())

    return Experts(
        gate=copied(experts.gate) if experts.gate else None,
        up=copied(experts.up),
        down=copied(experts.down),
        activation=experts.activation,
    )


def routed(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations, and experts and weights of each token, drawn for one seed."""
    random = torch.Generator().manual_seed(seed)
    layer, dtype = case.layer, DTYPES[case.dtype]
    x = torch.randn(case.batch, layer.hidden, generator=random).to(dtype)
    # The top k of logits plus Gumbel noise sample without replacement in these proportions.
    noise = torch.rand(case.batch, layer.experts, generator=random).log().neg().log().neg()
    rank = torch.arange(1, layer.experts + 1)
    logits = {
        "uniform": torch.zeros(layer.experts),
        "zipf": -rank.log(),
        "one expert": torch.where(rank <= layer.top_k, 1e6, 0.0),
    }[case.routing]
    index = (noise + logits[torch.randperm(layer.experts, generator=random)]).topk(layer.top_k)
    weights = torch.rand(case.batch, layer.top_k, generator=random).softmax(1)
    return x.to(device), index.indices.to(device), weights.to(device, dtype)


def bytes_of(experts: Experts, case: Case, index: Tensor, *, down: bool = True) -> int:
    """Return the bytes that one call must read and write, each once.

    Args:
        experts: experts of the layer.
        case: the case.
        index: experts of each token.
        down: count the whole layer; else only up to the activated intermediate.
    """
    hit, layer = index.unique().tolist(), case.layer
    total = 0
    for table in (experts.gate, experts.up, experts.down if down else None):
        if table is not None:
            total += sum(sum(table.recipes[e].part_bytes(table.rows, table.cols)) for e in hit)
    written = layer.hidden if down else layer.top_k * layer.intermediate
    return total + case.batch * (layer.hidden + written) * DTYPES[case.dtype].itemsize


def flops_of(case: Case, *, down: bool = True) -> int:
    """Return the multiplications and additions of one call; without `down`, of gate and up only."""
    layer = case.layer
    return (6 if down else 4) * case.batch * layer.top_k * layer.hidden * layer.intermediate
