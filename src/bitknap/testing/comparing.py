"""For tests: what a model computes and what a packed checkpoint stores, to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["IDS", "change_quantization_config", "logits", "packed_tensors", "same_tensors"]

# Two sequences of eight tokens that any tiny model knows.
IDS = torch.arange(3, 19).view(2, 8) % 64


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Return a model's logits; an encoder-decoder reads the same tokens on both sides.

    Args:
        model: a model of transformers.
        ids: its input tokens.
        options: further arguments of its forward.
    """
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **options).logits
    return found


def packed_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a packed checkpoint, from all its shards."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("bitknap*.safetensors"):
        found |= load_file(file)
    return found


def same_tensors(folder: Path, other: Path) -> bool:
    """Return whether two packed checkpoints have equal tensors, whatever their shards."""
    ours, theirs = packed_tensors(folder), packed_tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def change_quantization_config(folder: Path, **values: Any) -> None:
    """Change what a packed checkpoint's config.json says of its quantization."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))
