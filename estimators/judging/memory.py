"""Estimates the memory of measuring whole models, from configurations and headers alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from bitknap.allocation.problem.budget import human
from bitknap.errors import InputError
from bitknap.estimators.judging.by_layer import units_of
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS
from bitknap.estimators.sweep.peak_memory import (
    LOGITS,
    Way,
    layer_bytes,
    peak_bytes,
    read_bytes,
    vocabulary_of,
)
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.opened import PackedFolder
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.source import Stored


def way_to_judge(
    sources: Sequence[Stored], tokens: int, limit: int | None, needs: Collection[str] = ()
) -> Way:
    """Return the quickest way to measure models within a limit.

    Args:
        sources: the models, each once: the one that is measured, and its reference if any.
        tokens: number of tokens of the text.
        limit: bytes; None for any number.
        needs: "kl" if variants of the reference are measured as well.

    Raises:
        InputError: no way is within the limit; the message names the least.
    """
    if limit is None:
        return "whole"
    whole = judging_bytes(sources, tokens, needs)
    return _within(limit, whole, judging_layer_bytes(sources, tokens, needs))


def way_to_measure_plans(
    source: Checkpoint, layout: Layout, tokens: int, limit: int | None, needs: Collection[str]
) -> Way:
    """Return the quickest way to measure plans of a model within a limit.

    Args:
        source: the model.
        layout: its units, from headers.
        tokens: number of tokens of all texts.
        limit: bytes; None for any number.
        needs: "kl", and "full" if rounding needs statistics of inputs.

    Raises:
        InputError: no way is within the limit; the message names the least.
    """
    if limit is None:
        return "whole"
    whole = peak_bytes(source, layout, tokens, needs)
    return _within(limit, whole, layer_bytes(source, layout, tokens, needs))


def _within(limit: int, whole: int, least: int) -> Way:
    if whole <= limit:
        return "whole"
    if least <= limit:
        return "layers"
    raise InputError(
        f"memory: measuring takes about {human(least)}, limit is {human(limit)}; raise "
        "`max_memory`, or take fewer `tokens`"
    )


def judging_bytes(sources: Sequence[Stored], tokens: int, needs: Collection[str] = ()) -> int:
    """Return about how many bytes measuring whole models takes at most.

    This counts the float32 models plus the larger of two parts: a model's tensors while it is
    loaded; or the log-probabilities of a batch in both. Where variants are measured, those of the
    whole text and a copy of the units are kept. It excludes the interpreter and its libraries.

    Args:
        sources: the models, each once.
        tokens: number of tokens of the text.
        needs: "kl" if variants of the reference are measured as well.
    """
    sizes = [sum(math.prod(shape) for _, shape in one.shapes.values()) for one in sources]
    vocabulary = max(map(vocabulary_of, sources))
    numbers = LOGITS * min(tokens, BATCH_TOKENS) * vocabulary
    if "kl" in needs:
        numbers += tokens * vocabulary + max(sizes)
    loading = max(map(_loading, sources))
    return 4 * sum(sizes) + max(loading, 4 * numbers)


def _loading(source: Stored) -> int:
    """Return the bytes of a checkpoint's tensors while a model is made of them."""
    sizes = read_bytes(source)
    packed = source.replaced if isinstance(source, PackedFolder) else {}
    decoded = {name: 4 * math.prod(shape) for name, (_, shape) in packed.items()}
    return sum((sizes | decoded).values())


def judging_layer_bytes(sources: Sequence[Stored], tokens: int, needs: Collection[str] = ()) -> int:
    """Return about how many bytes measuring models one layer at a time takes at most.

    Models pass the text one after another, so this is the most that one of them takes.

    Args:
        sources: the models.
        tokens: number of tokens of the text.
        needs: "kl" if variants of the reference are measured as well.
    """
    return max(
        layer_bytes(one, walk_headers(one.config, one.shapes, units_of(one)), tokens, needs)
        for one in sources
    )
