"""Let layers of a model return known outputs without computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def answering(layers: Iterable[nn.Module], answers: Iterable[Any]) -> Iterator[None]:
    """While the block runs, let each layer return its answer, whatever it is called with."""
    skipped = []
    try:
        for layer, answer in zip(layers, answers, strict=True):
            layer.forward = lambda *args, _answer=answer, **kwargs: _answer
            skipped.append(layer)
        yield
    finally:
        for layer in skipped:
            del layer.forward
