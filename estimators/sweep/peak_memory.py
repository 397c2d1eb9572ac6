"""Estimates the memory of a calibration pass from a configuration and headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from bitknap.allocation.problem.budget import human
from bitknap.errors import InputError
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS
from bitknap.quantization.models.headers_only import (
    count_of,
    experts_per_token,
    text_config,
)
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint
from bitknap.quantization.source.source import Source
from bitknap.quantization.stacks.grouping import stack_pieces, stacks

# Numbers of 4 bytes that the graph of one decoder layer takes for each token, in sizes of the
# residual stream and of the routed middle, and the copies of a batch's logits that live at once.
# Measured, the first on layers of 32 experts, the second on the bundled Mixtral.
_GRAPH = 12
LOGITS = 5
# Numbers of 4 bytes that one MoE layer keeps for each token while it runs alone: in sizes of the
# residual stream, and for each expert the token goes to in sizes of the middle and the stream.
_STREAM, _ROUTED = 8, 4
# Copies that live at once: of a piece of a stack of units while it is rounded, of a stack while
# experts run again with it, and while its squared gradients are averaged in float64.
_PIECE, _AGAIN, _FISHER = 4, 7, 8

# The whole model, or one decoder layer at a time.
Way = Literal["whole", "layers"]


def way_to_calibrate(
    source: Checkpoint, layout: Layout, tokens: int, needs: Collection[str], limit: int | None
) -> Way:
    """Return the quickest way to calibrate within a limit.

    Args:
        source: the checkpoint.
        layout: its units, from headers.
        tokens: number of tokens of the text.
        needs: what must be recorded.
        limit: bytes; None for any number.

    Raises:
        InputError: no way is within the limit.
    """
    if limit is None or peak_bytes(source, layout, tokens, needs) <= limit:
        return "whole"
    least = layer_bytes(source, layout, tokens, needs)
    if least <= limit:
        return "layers"
    raise InputError(
        f"memory: calibrating takes about {human(least)}, limit is {human(limit)}; raise the "
        "limit, take fewer tokens, or use an estimator of weights alone, such as data-free"
    )


def peak_bytes(source: Checkpoint, layout: Layout, tokens: int, needs: Collection[str]) -> int:
    """Return about how many bytes loading, calibrating and estimating take at most.

    This counts the float32 model plus the larger of two parts: the file while it is loaded; or the
    data that a pass keeps, which is the replay's stored layer outputs and distributions, moments,
    gradients and traces as asked for, the graph of one batch, and one layer's experts while they
    are rounded. It excludes the interpreter and its libraries, about 0.5 GiB.

    Args:
        source: the checkpoint.
        layout: its units, from headers.
        tokens: number of tokens of the text.
        needs: what the estimator needs.
    """
    config = text_config(source.config)
    layers, units = layout.layers, layout.units
    hidden, middle, routed = _widths(source, layout)
    depth = _size(config, len(layers), "num_hidden_layers", "n_layers", "num_layers")
    vocabulary = vocabulary_of(source)
    batch = min(tokens, BATCH_TOKENS)
    measured = "kl" in needs
    backward = bool({"curvature", "gradients"} & set(needs))
    numbers = {
        # Made by every pass in memory; readings of groups are on a part of the text.
        "replay": (tokens + measured * batch) * (depth * hidden + vocabulary),
        # One projection of all layers is put back after it was read.
        "put back": measured * int(np.bincount(units.projection, units.numel).max()),
        "logits": LOGITS * batch * vocabulary,
        "rounding": int(np.bincount(units.layer - units.layer.min(), units.numel).max()),
        "graph": backward * _GRAPH * (batch * depth * (hidden + routed * middle)),
        "full": ("full" in needs)
        * sum(x.experts * (x.hidden**2 + x.intermediate**2) for x in layers),
        "curvature": ("curvature" in needs) * int(units.numel.sum()),
        "traces": (("traces" in needs or "gradients" in needs) + ("gradients" in needs))
        * (tokens * hidden * len(layers)),
    }
    model = 4 * sum(math.prod(shape) for _, shape in source.shapes.values())
    return model + max(source.nbytes, 4 * sum(numbers.values()))


def layer_bytes(source: Source, layout: Layout, tokens: int, needs: Collection[str]) -> int:
    """Return about how many bytes `calibrate_by_layer` and estimating take at most.

    This is the largest of three parts: one decoder layer in float32 with what it takes at once
    (below); the logits of one window; one layer's experts while they are rounded, and run again if
    there are traces. One stored tensor while it is read and the sums of all layers are added. Files
    are not counted.

    A layer takes in turn: its recordings and a batch's activations; where KL is measured, a stack
    of its units as they were and a piece of it while it is rounded, with activations; where
    gradients are, those of the layer, with the graph of a batch.

    Args:
        source: the checkpoint.
        layout: its units, from headers.
        tokens: number of tokens of the text.
        needs: what the estimator needs.
    """
    layers, units = layout.layers, layout.units
    hidden, middle, routed = _widths(source, layout)
    config = text_config(source.config)
    vocabulary = vocabulary_of(source)
    batch = min(tokens, BATCH_TOKENS)
    window = min(batch, _size(config, batch, "max_position_embeddings"))
    routed_weights = int(np.bincount(units.layer - units.layer.min(), units.numel).max())
    recorded = ("full" in needs) * max(
        (x.experts * (x.hidden**2 + x.intermediate**2) for x in layers), default=0
    )
    traced = 2 * tokens * hidden
    running = batch * (_STREAM * hidden + _ROUTED * routed * (hidden + middle))
    stack = max((int(units.numel[run].sum()) for run in stacks(units)), default=0)
    piece = max((int(units.numel[run].sum()) for run in stack_pieces(units)), default=0)
    graph = _GRAPH * batch * (hidden + routed * middle)
    traces = bool({"traces", "gradients"} & set(needs))
    in_turn = (
        recorded + traces * traced + running,
        ("kl" in needs) * (stack + _PIECE * piece) + running,
        ("curvature" in needs) * (routed_weights + graph),
        ("gradients" in needs) * (traced + graph),
    )
    tokens_again = tokens * (hidden + routed * (hidden + middle))
    most = max(
        _largest_layer(source) + max(in_turn),
        LOGITS * window * vocabulary,
        routed_weights + traces * (_AGAIN * stack + tokens_again),
        ("curvature" in needs) * _FISHER * stack,
    )
    sums = 2 * sum(x.experts * (x.hidden + 3 * x.intermediate) for x in layers)
    largest = max(read_bytes(source).values(), default=0)
    return largest + 4 * (most + sums)


def _largest_layer(source: Source) -> int:
    """Return the elements of the largest decoder layer, grouping tensors by name prefix."""
    sizes: Counter[str] = Counter()
    for name, (_, shape) in source.shapes.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            sizes[".".join(parts[: number + 1])] += math.prod(shape)
    return max(sizes.values(), default=0)


def read_bytes(source: Source) -> dict[str, int]:
    """Return the bytes of each tensor where it is read."""
    return {
        name: math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
        for name, (dtype, shape) in source.shapes.items()
    }


def vocabulary_of(source: Source) -> int:
    """Return the number of tokens that a model knows; 0 if its configuration does not say."""
    return _size(text_config(source.config), 0, "vocab_size")


def _widths(source: Source, layout: Layout) -> tuple[int, int, int]:
    """Return the sizes of the residual stream and of an expert's middle, and experts a token."""
    config = text_config(source.config)
    of_experts = [x.hidden for x in layout.layers], [x.intermediate for x in layout.layers]
    hidden = max(of_experts[0], default=_size(config, 0, "hidden_size", "d_model"))
    middle = max(of_experts[1], default=_size(config, 0, "intermediate_size"))
    return hidden, middle, max(experts_per_token(config) or [0]) or 1


def _size(config: Mapping[str, Any], default: int, *names: str) -> int:
    """Return the first of the named sizes that a configuration has."""
    return count_of(config, *names) or default
