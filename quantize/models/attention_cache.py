"""What each layer of a model keeps of the tokens it has seen, from its configuration.

Sizes are those of transformers' `DynamicCache`, which `generate` uses: grouped-query attention
keeps keys and values of each group of heads; multi-head latent attention keeps the latent and the
rotated part of the key; a sliding window of W keeps W - 1 tokens; linear attention, convolutions
and state spaces keep a state that does not grow; layers that share another's cache keep nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from bitknap.allocation.problem.serving import CacheLayers

_WINDOW = ("sliding_attention", "chunked_attention")
_NOTHING = ("moe", "mlp", "dummy")
_LINEAR = ("linear_attention", "conv", "mamba")


class UnknownCache(Exception):
    """The size of a model's cache is not known; the message says why."""


def cache_layers(config: Any) -> tuple[CacheLayers, ...]:
    """Return the layers of a model's cache, alike ones together.

    Args:
        config: transformers' configuration of the language model.

    Raises:
        UnknownCache: the family keeps something that is not known here.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnknownCache("it has an encoder")
    shared = getattr(config, "kv_sharing_modes", None) or ()
    if not shared and getattr(config, "num_kv_shared_layers", None):
        raise UnknownCache("its layers share their caches in a way that is not known")
    counted: Counter[CacheLayers] = Counter()
    for index, name in enumerate(_layer_types(config)):
        reused = index < len(shared) and shared[index] == "reuse"
        if name not in _NOTHING and not reused:
            counted[_layer(config, name)] += 1
    return tuple(replace(layer, layers=count) for layer, count in counted.items())


def head_sizes(config: Any) -> tuple[int, int, int]:
    """Return the numbers of heads, of a key of one head, and of a value of one head."""
    heads = int(config.num_attention_heads)
    if _latent(config):
        key = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return heads, key, int(config.v_head_dim)
    size = _head_size(config)
    return heads, size, size


def _layer_types(config: Any) -> list[str]:
    """Return the type of each layer, in transformers' names."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return [str(name) for name in given]
    if getattr(config, "sliding_window", None) is not None:
        name = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        name = "chunked_attention"
    else:
        name = "full_attention"
    return [name] * int(config.num_hidden_layers)


def _layer(config: Any, name: str) -> CacheLayers:
    if name in _LINEAR:
        return _state(config, name)
    if name == "full_attention":
        if _latent(config):
            numbers = int(config.kv_lora_rank) + int(config.qk_rope_head_dim)
            return CacheLayers(kind="latent", layers=1, per_token=numbers)
        return CacheLayers(kind="grouped", layers=1, per_token=_keys_and_values(config))
    if name in _WINDOW and not _latent(config):
        sliding = name == "sliding_attention"
        window = config.sliding_window if sliding else config.attention_chunk_size
        return CacheLayers(
            kind="window", layers=1, per_token=_keys_and_values(config), window=int(window) - 1
        )
    raise UnknownCache(f"layers of type {name!r}")


def _latent(config: Any) -> bool:
    return bool(getattr(config, "kv_lora_rank", None))


def _keys_and_values(config: Any) -> int:
    groups = getattr(config, "num_key_value_heads", None)
    own = getattr(config, "attn_config", None)  # DBRX
    groups = getattr(own, "kv_n_heads", groups) or config.num_attention_heads
    return 2 * int(groups) * _head_size(config)


def _head_size(config: Any) -> int:
    size = getattr(config, "kv_channels", None) or getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _state(config: Any, name: str) -> CacheLayers:
    """Return a layer with a state that does not grow; its sizes have other names in each family."""

    def have(*names: str) -> bool:
        return all(isinstance(getattr(config, one, None), int) for one in names)

    if name == "conv" and have("conv_L_cache", "hidden_size"):  # LFM2
        return CacheLayers(kind="state", layers=1, state=config.hidden_size * config.conv_L_cache)
    if have("linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads"):  # Qwen3-Next
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        conv = (2 * keys + values) * config.linear_conv_kernel_dim
        return _recurrent(conv, values * config.linear_key_head_dim)
    if have("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):  # Kimi-Linear
        inner = config.linear_num_heads * config.linear_head_dim
        return _recurrent(3 * inner * config.linear_conv_kernel_dim, inner * config.linear_head_dim)
    if have("mamba_num_heads", "mamba_head_dim", "ssm_state_size"):  # Nemotron-H
        inner = config.mamba_num_heads * config.mamba_head_dim
        conv = (inner + 2 * config.n_groups * config.ssm_state_size) * config.conv_kernel
        return _recurrent(conv, inner * config.ssm_state_size)
    if have("mamba_d_state", "mamba_d_conv", "mamba_expand"):  # Jamba
        inner = config.mamba_expand * config.hidden_size
        return _recurrent(inner * config.mamba_d_conv, inner * config.mamba_d_state)
    if config.model_type == "minimax":
        return _recurrent(config.num_attention_heads * _head_size(config) ** 2, 0)
    raise UnknownCache(f"layers of type {name!r}")


def _recurrent(conv: int, recurrent: int) -> CacheLayers:
    return CacheLayers(kind="state", layers=1, state=conv, state32=recurrent)
