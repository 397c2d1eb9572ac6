"""The quantization settings in a source's `config.json`, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bitknap.errors import FileError

# The method that Bitknap's packed checkpoints name.
METHOD = "bitknap"
# The second key is from early versions of compressed-tensors.
KEYS = ("quantization_config", "compression_config")
_DTYPES = ("dtype", "torch_dtype")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization settings of a parsed `config.json`, {} if it has none.

    Those of the language model inside a multimodal one count as well.

    Raises:
        FileError: they are not a JSON object.
    """
    for key in KEYS:
        if settings := config.get(key):
            if not isinstance(settings, Mapping):
                raise FileError(f"config.json: {key}: {settings!r} is not a JSON object")
            return settings
    parts = (part for part in config.values() if isinstance(part, Mapping))
    return next(filter(None, map(quantization_of, parts)), {})


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parsed `config.json` without its quantization settings.

    A dtype that no model computes in, such as float8, becomes the one that weights are decoded to.
    """
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = unquantized(value)
        elif key in _DTYPES and not computes(value):
            value = "bfloat16"
        plain[key] = value
    return {key: value for key, value in plain.items() if key not in KEYS}


def computes(dtype: Any) -> bool:
    """Return whether a model can compute in the dtype that its configuration names, if any."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype):
        return True  # none, "auto", or a mistake that transformers explains
    return resolved.is_floating_point and resolved.itemsize > 1


def forget_quantization(config: Any) -> None:
    """Do what `unquantized` does, but to a transformers configuration and in place."""
    for name, value in list(vars(config).items()):
        if name in KEYS:
            delattr(config, name)
        elif hasattr(value, "to_dict"):
            forget_quantization(value)
        elif name.lstrip("_") in _DTYPES and not computes(value):
            setattr(config, name, torch.bfloat16)


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale by `weight_block_size`, if that is set.

    Raises:
        FileError: it is not two sizes.
    """
    return _pair("weight_block_size", quantization_of(config).get("weight_block_size"))


def group_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the blocks that the groups of a compressed-tensors configuration name.

    Raises:
        FileError: one of them is not two sizes.
    """
    groups = quantization_of(config).get("config_groups")
    blocks = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        size = weights.get("group_size")
        wide = [1, size] if weights.get("strategy") == "group" else None
        blocks.append(_pair("block_structure", weights.get("block_structure") or wide))
    return [block for block in blocks if block is not None]


def _pair(key: str, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = isinstance(size, list | tuple) and len(size) == 2
    if not pair or any(type(n) is not int or n < 1 for n in size):
        raise FileError(
            f"config.json: {key}: {size!r} is not two whole numbers above 0, such as [128, 128]"
        )
    return size[0], size[1]
