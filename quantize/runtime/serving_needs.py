"""What a model needs in memory beside its weights while it generates, from config and headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitknap.allocation.problem.format import Format, menu
from bitknap.allocation.problem.serving import Serving
from bitknap.allocation.problem.units import Units
from bitknap.errors import ModelError
from bitknap.kernels.launch import DENSE_PAIRS
from bitknap.quantization.models.attention_cache import UnknownCache, cache_layers, head_sizes
from bitknap.quantization.models.headers_only import experts_per_token, text_config
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.tiled_bytes import tiled_bytes
from bitknap.quantization.source.architecture import architecture_of, config_of, text_config_of
from bitknap.quantization.source.checkpoint import Checkpoint

# Keys of configurations for the inner width of what every token goes through.
_MIDDLES = (
    *("intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    *("intermediate_size_mlp", "moe_shared_expert_intermediate_size", "ffn_hidden_size"),
)


def serving_of(
    source: Checkpoint, layout: Layout, formats: Sequence[Format] | None = None
) -> Serving:
    """Return what a model needs beside its weights.

    Args:
        source: the model; its weights are not read.
        layout: its units.
        formats: formats that units may have; the usual ones when not given.
    """
    family = str(text_config(source.config).get("model_type", "unknown"))
    try:
        config = config_of(source.folder)
        text = text_config_of(config)
        cache = cache_layers(text)
        heads, key, value = head_sizes(text)
        eager = not getattr(architecture_of(source.folder, config), "_supports_sdpa", True)
    except UnknownCache as error:
        return Serving(family=family, unknown=str(error))
    except (ModelError, AttributeError, TypeError) as error:
        return Serving(family=family, unknown=f"transformers cannot say: {error}")
    layers = layout.layers
    topk = max(experts_per_token(text_config(source.config)) or [1])
    middle = max((x.intermediate for x in layers), default=0)
    return Serving(
        family=family,
        itemsize=getattr(config.dtype, "itemsize", 2),
        longest=_longest(text),
        cache=cache,
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        heads=heads * key,
        expanded=heads * (key + value),
        scores=heads if eager else 0,
        middle=max(value for name in _MIDDLES if isinstance(value := getattr(text, name, 0), int)),
        routed=topk * middle,
        topk=topk,
        experts=max((x.experts for x in layers), default=0),
        expert_weights=max(
            ((2 if x.gated else 1) * x.experts * x.hidden * x.intermediate for x in layers),
            default=0,
        ),
        dense_from=DENSE_PAIRS * max((x.experts for x in layers), default=0),
        tiles=_tiles(layout.units, menu() if formats is None else formats),
    )


def _longest(text: Any) -> int | None:
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return longest if isinstance(longest, int) else None


def _tiles(units: Units, formats: Sequence[Format]) -> dict[str, dict[str, int]]:
    """Return how many bytes more matrices take in tiles, by shape and by format; 0 is left out."""
    more: dict[str, dict[str, int]] = {}
    for rows, cols in np.unique(np.stack([units.rows, units.cols], 1), axis=0).tolist():
        sizes = {
            item.name: int(tiled_bytes(item, rows, cols)) - int(item.nbytes(rows, cols))
            for item in formats
            if item.kind != "made-up" and not item.foreign
        }
        more[f"{rows}x{cols}"] = {name: size for name, size in sizes.items() if size}
    return more
