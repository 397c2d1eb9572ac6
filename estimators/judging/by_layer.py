"""A text in a checkpoint, plain or packed, with one decoder layer in memory at a time.

Each model passes the text through its own layers; what is left of it is the last layer's output, in
a file. Losses come from those, a window at a time: `losses_between`. Variants of the model, such as
uniform recipes, start from the outputs of earlier layers where these are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bitknap.errors import ModelError
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.text_stream import Stream, Streamed, passed
from bitknap.estimators.sweep.variant_streams import VariantStreams
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.devices import HERE, Computing
from bitknap.quantization.source.source import Source, Stored

# Roles whose matrices say where the layers of a model without routed experts are.
_DENSE = ("attention", "dense")


def through(
    source: Stored,
    windows: Windows,
    include: Collection[str] | None = None,
    *,
    varied: bool = False,
    where: Computing = HERE,
    progress: Progress | None = None,
) -> VariantStreams:
    """Return a text that has passed a checkpoint's layers.

    Args:
        source: the checkpoint.
        windows: the text.
        include: roles that are units in addition to the routed experts; when not given, those that
            are needed to find the layers.
        varied: keep what variants start from: the output of the layer before the first that holds
            units.
        where: where layers are loaded and computed, and how.
        progress: called with ("evaluate", done, of).

    Raises:
        ModelError: the model cannot be run layer by layer.
        FileError: a tensor is missing or damaged.
        BitknapError: the disk has no room for the activations.
    """
    texts = [windows]
    return all_through(source, texts, include, varied=varied, where=where, progress=progress)[0]


def all_through(
    source: Stored,
    texts: Sequence[Windows],
    include: Collection[str] | None = None,
    *,
    varied: bool = False,
    where: Computing = HERE,
    progress: Progress | None = None,
) -> list[VariantStreams]:
    """Return several texts that have passed a checkpoint's layers together; see `through`."""
    roles = units_of(source) if include is None else include
    skeleton = Skeleton(source, roles, "raise `max_memory`", where)
    run, last = Streamed(skeleton), len(skeleton.layers) - 1
    batches = [text.batches(BATCH_TOKENS) for text in texts]
    whole, kept = Stream([one for text in batches for one in text]), {last}
    if varied:
        kept.add(min(skeleton.place_of(view.tensor) for view in skeleton.layout.views) - 1)
    outputs = passed(run, whole, kept, progress)
    parts, start = [], 0
    for text in batches:
        here = slice(start, start := start + len(text))
        some = {place: stream.some(here) for place, stream in outputs.items()}
        parts.append(VariantStreams(run=run, text=whole.some(here), end=some[last], outputs=some))
    return parts


def units_of(source: Source) -> Collection[str]:
    """Return roles besides routed experts by which a model's decoder layers are found."""
    try:
        walk_headers(source.config, source.shapes)
    except ModelError:
        return _DENSE
    return ()
