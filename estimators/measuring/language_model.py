"""A model's logits on text alone, also if the language model is part of a larger model.

A model for images and text usually runs on text alone. Some do not: their forward requires an
image. For those the inner language model is called, which transformers builds as a separate model,
with its own head or that of the outer model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.estimators.measuring.products import Products
from bitknap.quantization.source.architecture import text_config_of
from bitknap.quantization.source.devices import HERE, Computing
from bitknap.quantization.source.transformers_calls import calling_transformers

# Set on a model whose own forward failed, so that it is not tried again for every batch.
_INSIDE = "_bitknap_calls_inside"
# Set on a model of which only the layer in use is on the device where it computes.
_DEVICE = "_bitknap_computes_on"
# Set on a model whose matrix products are computed in another dtype than its parameters'.
_PRODUCTS = "_bitknap_products"
# Settings by which a wrapper changes logits after its head; without them the logits are wrong.
_AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_PROBE_TOKENS = 8


def loaded(folder: Path, where: Computing = HERE, *, packed: bool | None = None) -> Any:
    """Return the model in a folder in float32, ready to compute.

    Args:
        folder: the checkpoint.
        where: where and how it computes.
        packed: keep the weights of a packed checkpoint packed; see `runtime.loading.load`.
    """
    from bitknap.quantization.runtime.loading import load

    model = load(folder, torch.float32, device=where.device, packed=packed)
    compute_on(model, where)
    return model


def compute_on(model: Any, where: Computing) -> None:
    """Say where and how a model computes; by default where its parameters are, in their dtype."""
    setattr(model, _DEVICE, where.device)
    setattr(model, _PRODUCTS, Products(model) if where.dtype == torch.bfloat16 else None)


def computing(model: Any) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a model's modules are called."""
    products: Products | None = getattr(model, _PRODUCTS, None)
    return contextlib.nullcontext() if products is None else products


def device_of(model: Any) -> torch.device:
    """Return the device on which a model computes."""
    device: torch.device | None = getattr(model, _DEVICE, None)
    return next(model.parameters()).device if device is None else device


def token_logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a model that is given text alone, [windows, tokens, vocabulary].

    Args:
        model: a transformers model.
        given: token ids under the names of `forward`, int64 [windows, tokens], on any device.

    Raises:
        ModelError: transformers cannot run it on text, or it does not predict tokens.
    """
    given = {name: ids.to(device_of(model)) for name, ids in given.items()}
    inside = getattr(model, _INSIDE, None)
    if inside is None:
        try:
            return _logits(model, model, given)
        except ModelError:
            if not _has_language_model(model):
                raise
    logits = _logits_inside(model, given)
    setattr(model, _INSIDE, True)
    return logits


def settle(model: Any, windows: Tensor) -> None:
    """Determine how to run a model on text, before any hooks are installed.

    Args:
        model: a transformers model.
        windows: token ids, int64 [windows, length]; a few of these tokens are tried.

    Raises:
        ModelError: as for `token_logits`.
    """
    if getattr(model, _INSIDE, None) is None and _has_language_model(model):
        token_logits(model, {"input_ids": windows[:1, :_PROBE_TOKENS]})


def _has_language_model(model: Any) -> bool:
    config = model.config
    return not config.is_encoder_decoder and text_config_of(config) is not config


def _logits_inside(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of the language model in a larger one."""
    kind = type(text_config_of(model.config))
    parts = [m for m in model.modules() if m is not model and _is_model_of(m, kind)]
    for part in parts:
        if part.get_output_embeddings() is not None:
            return _logits(model, part, given)
    head = model.get_output_embeddings()
    text = text_config_of(model.config)
    if not parts or head is None or any(getattr(text, name, None) for name in _AFTER_HEAD):
        raise ModelError(
            f"{type(model).__name__}: transformers cannot run it on text alone, and its language "
            "model cannot be called by itself; use `estimator=DataFree()`"
        )
    with _running(model):
        logits: Tensor = head(parts[0](**given, use_cache=False).last_hidden_state)
    return logits


def _is_model_of(module: nn.Module, kind: type) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and type(module.config) is kind


def _logits(whole: Any, model: Any, given: Mapping[str, Tensor]) -> Tensor:
    with _running(whole):
        output = model(**given, use_cache=False)
    logits = getattr(output, "logits", None)
    words = getattr(text_config_of(model.config), "vocab_size", 0) or 0
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[-1] < words:
        raise ModelError(
            f"{type(whole).__name__}: no language-model head, so no text can be predicted with "
            "it; use `estimator=DataFree()`, or the model with its head"
        )
    return logits


@contextlib.contextmanager
def _running(model: Any) -> Iterator[None]:
    what = f"{type(model).__name__}: transformers cannot run it on text alone"
    with calling_transformers(what, "use `estimator=DataFree()`"), computing(model):
        yield
