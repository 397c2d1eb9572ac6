"""Packed experts on a CPU against the plain transformers module: layer times and tokens per second.

The experts of one layer, all in one format with made-up weights, run as packed experts
(`quantize/layers`), with the whole layer or nothing in the cache, and as the transformers module
with the same weights dequantized. The ways alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.allocation import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.api.quantizing import quantize
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.packed.dequantize import dequantize_into
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.tiled_bytes import to_tiles
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.runtime.dequantized_cache import Cache
from bitknap.quantization.runtime.layers import pack, unpack
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.runtime.packed_weight import PackedWeight, Piece
from bitknap.quantization.source.checkpoint import Checkpoint, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The experts of one layer.

    Attributes:
        experts: E.
        top_k: number of experts of a token.
        hidden: H.
        intermediate: I.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int


LAYERS: Mapping[str, Layer] = {
    "OLMoE": Layer(experts=64, top_k=8, hidden=2048, intermediate=1024),
    "Mixtral 8x7B": Layer(experts=8, top_k=2, hidden=4096, intermediate=14336),
}
TOY: Mapping[str, Layer] = {"toy": Layer(experts=4, top_k=2, hidden=64, intermediate=96)}
FORMATS = ("int2-g64-asym", "int3-g64-asym", "int4-g64-asym")
LAYOUTS = ("plain", "tiles")
MODEL = "reference:mixtral"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LARGE = 1 << 28  # weights of a projection; all in float32, twice, would exceed 16 GB
# Number of tokens in a step.
DECODE, PREFILL = 1, 512


def experts_of(layer: Layer, format: Format, layout: str, dtype: torch.dtype, cache: Cache) -> Any:
    """Return a packed experts module of transformers' Mixtral; all experts have the same weights.

    Experts differ in their addresses, which time can depend on.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=layer.hidden,
        intermediate_size=layer.intermediate,
        num_local_experts=layer.experts,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: Any = MixtralExperts(config).to(dtype)
    shapes = {
        "gate": (layer.intermediate, layer.hidden),
        "up": (layer.intermediate, layer.hidden),
        "down": (layer.hidden, layer.intermediate),
    }
    pieces: dict[str, list[Piece]] = {"gate_up_proj": [], "down_proj": []}
    for at, (projection, (rows, cols)) in enumerate(shapes.items()):
        stream = _stream(format, rows, cols, layout, seed=at)
        module.register_buffer(projection, stream.repeat(layer.experts))
        name, start = ("down_proj", 0) if projection == "down" else ("gate_up_proj", at * rows)
        for e in range(layer.experts):
            view = View(tensor=name, index=e, start=start, stop=start + rows)
            place = (e * len(stream), (e + 1) * len(stream))
            pieces[name].append(Piece(projection, *place, format, rows, cols, view))
    weights = {
        name: PackedWeight(
            {piece.buffer: module for piece in some},
            getattr(module, name),
            dtype,
            some,
            layout,
            cache,
        )
        for name, some in pieces.items()
    }
    for weight in weights.values():
        weight.filled = True
    pack(module, weights)
    return module.eval()


def _stream(format: Format, rows: int, cols: int, layout: str, seed: int) -> Tensor:
    """Return the bytes of made-up weights."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(1, rows, cols, generator=random) / cols**0.5
    stream = encode(RTN.quantize(weights, format))
    return to_tiles(stream, format, rows, cols) if layout == "tiles" else stream


def routed(layer: Layer, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Return activations, experts drawn uniformly, and their weights."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, generator=random).to(dtype)
    index = torch.rand(tokens, layer.experts, generator=random).topk(layer.top_k).indices
    weights = torch.rand(tokens, layer.top_k, generator=random).softmax(1).to(dtype)
    return x, index, weights


def rates(shapes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Return how fast one thread dequantizes matrices, in GB of bf16 per second."""
    measured_rates = []
    for rows, cols in shapes:
        for name in FORMATS:
            for layout in LAYOUTS:
                format, out = Format.parse(name), torch.empty(rows, cols, dtype=torch.bfloat16)
                stream = _stream(format, rows, cols, layout, seed=0)
                run = lambda o=out, s=stream, f=format, w=layout: dequantize_into(o, s, f, w)  # noqa: E731
                seconds = turn_about({"": run}, rounds)[""]
                rate = out.nbytes / statistics.median(seconds) / 1e9
                measured_rates.append(
                    {"shape": [rows, cols], "format": name, "layout": layout, "gb_per_second": rate}
                )
    return measured_rates


def layers(
    which: Mapping[str, Layer], *, rounds: int, prefill: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return one row per layer, format and dtype: medians in seconds, and whether outputs agree.

    Args:
        which: the layers.
        rounds: number of measurements of each.
        prefill: number of tokens in a prefill step.
        say: called with a message for every row.
    """
    rows = []
    for shape, layer in which.items():
        large = layer.experts * layer.hidden * layer.intermediate > _LARGE
        for dtype in ("bf16",) if large else DTYPES:
            # Dequantized weights take the same time for all widths.
            for name in FORMATS if dtype == "bf16" and not large else FORMATS[-1:]:
                row = _layer(layer, Format.parse(name), DTYPES[dtype], rounds, prefill)
                rows.append({"layer": shape, "format": name, "dtype": dtype, **row})
                say(f"{shape} {name} {dtype}")
    return rows


@torch.inference_mode()
def _layer(
    layer: Layer, format: Format, dtype: torch.dtype, rounds: int, prefill: int
) -> dict[str, Any]:
    packed = experts_of(layer, format, "plain", dtype, Cache(0))
    cache = next(iter(packed.packed.values())).cache
    plain = experts_of(layer, format, "plain", dtype, Cache(0))
    unpack(plain)
    row: dict[str, Any] = {}
    for step, tokens in (("decode", DECODE), ("prefill", prefill)):
        inputs = [routed(layer, tokens, dtype, seed) for seed in range(8)]
        seconds: dict[str, list[float]] = {}
        for name, limit in (("nothing cached", 0), ("all cached", 1 << 62)):
            cache.clear()
            cache.limit = limit
            packed(*routed(layer, 8 * layer.experts, dtype, 99))  # hits all experts
            few = rounds if step == "decode" else max(1, rounds // 4)
            turns = turn_about({name: _next(packed, inputs), "plain": _next(plain, inputs)}, few)
            for key, values in turns.items():
                seconds.setdefault(key, []).extend(values)
        row[step] = {key: statistics.median(values) for key, values in seconds.items()}
        row[step]["tokens"] = tokens
        row[f"{step} equal"] = all(torch.equal(packed(*x), plain(*x)) for x in inputs[:2])
    return row


def _next(module: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> Callable[[], object]:
    """Return a call that takes other inputs each time."""
    turn = iter(range(1 << 30))
    return lambda: module(*inputs[next(turn) % len(inputs)])


def turn_about(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of every call; each round runs all ways in turn."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return spent


def models(folder: Path, *, tokens: int, prefill: int) -> list[dict[str, Any]]:
    """Return tokens per second of a bundled model, packed and dequantized.

    Args:
        folder: folder for its packed checkpoint.
        tokens: number of tokens to generate, one at a time.
        prefill: number of prompt tokens read at once.
    """
    folder = _packed_reference(folder / "packed")
    options: Mapping[str, Mapping[str, Any]] = {
        "plain": {"packed": False},
        "all cached": {"packed": True, "cache_bytes": 1 << 30},
        "nothing cached": {"packed": True, "cache_bytes": 0},
    }
    rows: list[dict[str, Any]] = []
    for dtype, kind in DTYPES.items():
        loaded = {name: load(folder, kind, **how) for name, how in options.items()}
        ids = torch.arange(prefill).view(1, -1) % 512 + 3
        ways: dict[str, Callable[[], object]] = {}
        for name, model in loaded.items():
            how = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
            ways[f"decode {name}"] = partial(model.generate, ids[:, :1], **how)
            ways[f"prefill {name}"] = partial(_forward, model, ids)
        seconds = turn_about(ways, 3)
        made = [ways[f"decode {name}"]() for name in options]
        row: dict[str, Any] = {"model": MODEL, "dtype": dtype, "prompt": prefill}
        row["equal"] = all(torch.equal(made[0], one) for one in made)  # type: ignore[arg-type]
        for name, values in seconds.items():
            count = tokens if name.startswith("decode") else prefill
            row[name] = count / statistics.median(values)
        rows.append(row)
    return rows


def _packed_reference(out: Path) -> Path:
    """Write the bundled model with experts of 2, 3 and 4 bits in turn."""
    source = Checkpoint.open(resolve(MODEL))
    units = walk_headers(source.config, source.shapes).units
    grids = [Format.parse(name) for name in FORMATS]
    plan = BitPlan.from_choice(units, grids, units.expert % 3, model=source.fingerprint)
    quantize(MODEL, plan, out)
    return out


@torch.inference_mode()
def _forward(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits
