"""The transformers class of a model's folder, and an instance of it without weights."""

from __future__ import annotations

import contextlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from bitknap.errors import ModelError
from bitknap.quantization.source.source_config import forget_quantization
from bitknap.quantization.source.transformers_calls import calling_transformers

# torch multiplies grouped matrices only if each row starts at a multiple of this many bytes.
_ALIGNED = 16


def config_of(folder: Path) -> Any:
    """Return a folder's transformers configuration.

    Raises:
        ModelError: transformers does not know the architecture, or refuses a value.
    """
    import transformers

    with calling_transformers(f"{folder}: transformers cannot read its config.json"):
        return transformers.AutoConfig.from_pretrained(folder)


def text_config_of(config: Any) -> Any:
    """Return the part of a transformers configuration that describes the language model.

    Raises:
        ModelError: transformers does not know which part that is.
    """
    what = f"{type(config).__name__}: transformers knows no one language model in it"
    with calling_transformers(what, "save that part as a model of its own and pass it"):
        return config.get_text_config()


def architecture_of(folder: Path, config: Any) -> Any:
    """Return the transformers class of a configuration.

    Where config.json does not name one, it is that of a causal language model.

    Raises:
        ModelError: transformers has no such class.
    """
    import transformers

    names = config.architectures
    if not names:
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in known:
            raise ModelError(
                f"{folder}: config.json: architectures: missing, and transformers has no causal "
                f"language model of type {config.model_type!r}; name the model's class there"
            )
        return known[type(config)]
    if not isinstance(names, list | tuple) or not isinstance(names[0], str):
        raise ModelError(f"{folder}: config.json: architectures: {names!r} is not a list of names")
    model_class = getattr(transformers, names[0], None)
    if packages := getattr(model_class, "_backends", None):
        raise ModelError(
            f"{folder}: {names[0]} needs {', '.join(map(str, packages))}; install it first"
        )
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise ModelError(
            f"{folder}: config.json: architectures: unknown architecture {names[0]!r}; "
            "transformers has no such model class"
        )
    return model_class


def hollow(folder: Path, config: Any) -> Any:
    """Return the model of a configuration with its parameters on the meta device, float32.

    Raises:
        ModelError: transformers has no such class, or cannot build it.
    """
    from transformers import initialization

    architecture = architecture_of(folder, config)
    # transformers 5.17 has no such context.
    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    what = f"{folder}: transformers cannot build {architecture.__name__} as config.json says"
    with (
        calling_transformers(what),
        torch.device("meta"),
        safe(),
        initialization.no_init_weights(),
    ):
        plain = deepcopy(config)
        forget_quantization(plain)
        return architecture._from_config(plain, dtype=torch.float32)


def align_experts(model: Any) -> None:
    """Run experts one by one if torch cannot multiply them as a group.

    Args:
        model: with its weights or without; in the dtype that it will run in.
    """
    for module in model.modules():
        if not isinstance(getattr(module, "is_transposed", None), bool):
            continue
        stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if any(n * p.element_size() % _ALIGNED for p in stacks for n in p.shape[1:]):
            model.set_experts_implementation("eager")
            return
