"""Live transformers models, accepted in place of a folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitknap.errors import InputError, ModelError
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.source.transformers_calls import calling_transformers


@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """A transformers model in memory, with its tokenizer.

    `estimate`, `refine` and `quantize` read weights from files: they save the model to a temporary
    folder first, which takes as many bytes on disk as the model. `evaluate` runs the model itself.

    Attributes:
        model: A transformers language model.
        tokenizer: The model's own tokenizer.
    """

    model: Any
    tokenizer: Any

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Any]:
        """Yield the model in evaluation mode, and restore its mode afterwards.

        Raises:
            ModelError: A weight is NaN or infinite.
        """
        for name, weight in self.model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(f"{name}: a weight is NaN or infinite; repair the model")
        training = self.model.training
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train(training)

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer into a folder.

        Raises:
            ModelError: transformers cannot save one of them.
        """
        with calling_transformers("model: transformers cannot save the live model"):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


Model = str | Path | LiveModel


@contextlib.contextmanager
def on_disk(model: Model) -> Iterator[str | Path]:
    """Yield a model's name or folder; a live model is saved to a temporary folder.

    Raises:
        InputError: The live model has no tokenizer.
        ModelError: The live model cannot be saved.
    """
    if not isinstance(model, LiveModel):
        check_named(model)
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="bitknap-", ignore_cleanup_errors=True) as place:
        folder = Path(place) / "live-model"
        model.save(folder)
        yield folder


def opened(model: Model) -> Path | LiveModel:
    """Return the folder of a model, or the live model itself.

    Raises:
        InputError: There is no such model, or it is a live model without a tokenizer.
    """
    if isinstance(model, LiveModel):
        return model
    check_named(model)
    return resolve(model)


def check_named(model: object) -> None:
    """Raise InputError for a value that is neither a name nor a folder."""
    if not isinstance(model, str | Path):
        kind = type(model).__name__
        raise InputError(
            f"model: {kind} is neither a folder nor a hub id; pass LiveModel(model, tokenizer) "
            "for a model in memory"
        )
