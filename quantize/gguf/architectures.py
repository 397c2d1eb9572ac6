"""The architectures of llama.cpp that files can be written for, and what their heads must say.

One row a `model_type` of transformers. llama.cpp computes some things in one way for an
architecture whatever the configuration says, so each row also says what must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitknap.errors import ModelError
from bitknap.quantization.ggml.container import Value

_SOFTMAX, _SIGMOID = 1, 2
# llama.cpp knows by its number of layers that a DeepSeek has no low-rank query.
_LITE = (26, 27)


class Unwritable(ModelError):
    """llama.cpp has no such architecture, tensor or tokenizer, though the model is sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: its name there.
        permuted: whether rows of q and k are stored in pairs for its rotary embedding.
        values: its own values beside the usual ones, from a transformers configuration.
        must: configuration keys that llama.cpp has built in, and the values that they must have.
        latent: whether attention goes through a low-rank key-value state (MLA).
        ffn_norm: its name for the norm before the MLP.
        shares_head: whether it takes the embedding for the head where a file has no head.
    """

    name: str
    permuted: bool = False
    values: Callable[[Any], dict[str, Value]] = lambda config: {}
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    latent: bool = False
    ffn_norm: str = "ffn_norm"
    shares_head: bool = True


def _experts(config: Any) -> dict[str, Value]:
    """Return the number of experts, how many a token uses, and their inner width."""
    count = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    return {
        "expert_count": count,
        "expert_used_count": int(config.num_experts_per_tok),
        "expert_feed_forward_length": width,
    }


def _wide_experts(config: Any) -> dict[str, Value]:
    """Return `_experts` of families whose experts are as wide as `intermediate_size` says."""
    return _experts(config) | {"expert_feed_forward_length": int(config.intermediate_size)}


def _qwen2_moe(config: Any) -> dict[str, Value]:
    shared = int(config.shared_expert_intermediate_size)
    return _experts(config) | {"expert_shared_feed_forward_length": shared}


def _gpt_oss(config: Any) -> dict[str, Value]:
    return _wide_experts(config) | {"attention.sliding_window": int(config.sliding_window)}


def _deepseek(config: Any) -> dict[str, Value]:
    rope, rank = int(config.qk_rope_head_dim), int(config.kv_lora_rank)
    sigmoid = config.model_type != "deepseek_v2"
    values: dict[str, Value] = {
        "leading_dense_block_count": int(config.first_k_dense_replace),
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": int(config.qk_nope_head_dim) + rope,
        "attention.value_length_mla": int(config.v_head_dim),
        "rope.dimension_count": rope,
        "expert_shared_count": int(config.n_shared_experts or 0),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(getattr(config, "norm_topk_prob", False)),
        "expert_gating_func": _SIGMOID if sigmoid else _SOFTMAX,
    }
    if config.q_lora_rank:
        values["attention.q_lora_rank"] = int(config.q_lora_rank)
    if sigmoid:
        values["expert_group_count"] = int(config.n_group)
        values["expert_group_used_count"] = int(config.topk_group)
    return _experts(config) | values | {"attention.head_count_kv": 1}


_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_EVERY_LAYER: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", permuted=True, must=_SILU),
    "mixtral": Architecture(name="llama", permuted=True, values=_wide_experts, must=_SILU),
    "qwen2": Architecture(name="qwen2", must=_SILU),
    "qwen3": Architecture(name="qwen3", must=_SILU),
    "qwen2_moe": Architecture(
        name="qwen2moe",
        values=_qwen2_moe,
        must={**_SILU, **_EVERY_LAYER, "norm_topk_prob": (False,)},
        shares_head=False,
    ),
    "qwen3_moe": Architecture(
        name="qwen3moe",
        values=_experts,
        must={**_SILU, **_EVERY_LAYER, "norm_topk_prob": (True,)},
    ),
    "olmoe": Architecture(
        name="olmoe",
        values=_wide_experts,
        must={**_SILU, "norm_topk_prob": (False,), "clip_qkv": (None,)},
        shares_head=False,
    ),
    "deepseek_v2": Architecture(
        name="deepseek2",
        values=_deepseek,
        must={**_SILU, "topk_method": ("greedy",)},
        latent=True,
    ),
    "deepseek_v3": Architecture(name="deepseek2", values=_deepseek, must=_SILU, latent=True),
    "gpt_oss": Architecture(
        name="gpt-oss", values=_gpt_oss, ffn_norm="post_attention_norm", shares_head=False
    ),
}


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a transformers configuration.

    Raises:
        Unwritable: llama.cpp's files are not known for it, or it computes something that llama.cpp
            does not.
    """
    kind = str(config.model_type)
    found = ARCHITECTURES.get(kind)
    if found is None:
        raise Unwritable(
            f"model_type {kind}: GGUF files are written for {', '.join(ARCHITECTURES)}; for others "
            "name an output without .gguf: a folder with the types and the importance matrix that "
            "llama-quantize reads"
        )
    for key, allowed in found.must.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise Unwritable(
                f"config.json: {key}: {value!r}; llama.cpp computes {found.name} with "
                f"{allowed[0]!r} alone, so its file would be another model"
            )
    if kind == "gpt_oss":
        _check_alternating(config)
    if kind == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise Unwritable(
            "config.json: num_key_value_heads: llama.cpp computes olmoe with as many key as query "
            "heads alone, so its file would be another model"
        )
    if found.latent and not config.q_lora_rank and config.num_hidden_layers not in _LITE:
        raise Unwritable(
            "config.json: q_lora_rank: llama.cpp loads deepseek2 without it with 26 or 27 layers "
            f"alone, this model has {config.num_hidden_layers}"
        )
    return found


def _check_alternating(config: Any) -> None:
    """Refuse a gpt-oss whose layers do not slide in turn, the first of them sliding."""
    turns = ("sliding_attention", "full_attention")
    kinds = list(config.layer_types)
    if kinds != [turns[layer % 2] for layer in range(len(kinds))]:
        raise Unwritable(
            "config.json: layer_types: llama.cpp computes gpt-oss with sliding and full attention "
            "in turn, so its file would be another model"
        )


def warnings_of(config: Any) -> list[str]:
    """Return in what llama.cpp's results differ a little or far into a text, one sentence each."""
    said = []
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") == "yarn" and not rope.get("truncate", True):
        said.append(
            "llama.cpp rounds the range of yarn to whole dimensions, which config.json says not "
            "to: log-probabilities differ in the second decimal"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    slides = config.model_type != "gpt_oss" and "sliding_attention" in kinds
    if slides and window and window < config.max_position_embeddings:
        said.append(
            f"this model attends to the last {window:,} tokens alone, llama.cpp to all of them: "
            "results differ in longer texts"
        )
    return said


def values_of(config: Any, architecture: Architecture) -> dict[str, Value]:
    """Return what the head of a file says about a model, by full names, without its tokenizer."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    rope = dict(config.rope_parameters or {})
    values: dict[str, Value] = {
        "vocab_size": int(config.vocab_size),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    values |= _scaling(config, rope) | architecture.values(config)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def _scaling(config: Any, rope: Mapping[str, Any]) -> dict[str, Value]:
    """Return how positions beyond the trained ones are squeezed."""
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # the latter is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind != "yarn":
        raise Unwritable(f"config.json: rope_type: {kind!r} has no GGUF file here; export it else")
    values: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }
    if rope.get("beta_fast"):
        values["rope.scaling.yarn_beta_fast"] = float(rope["beta_fast"])
        values["rope.scaling.yarn_beta_slow"] = float(rope["beta_slow"])
    latent = "deepseek" in config.model_type
    same = rope.get("mscale") == rope.get("mscale_all_dim") if latent else not rope.get("mscale")
    if rope.get("attention_factor") or not same:
        raise Unwritable(
            "config.json: rope_parameters: attention_factor or mscale: llama.cpp scales attention "
            "under yarn by its own formula, so its file would be another model"
        )
    if latent and rope.get("mscale_all_dim"):
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return values


def _first(config: Any, *keys: str) -> int:
    """Return the first of several keys that a configuration has."""
    return next(int(found) for key in keys if (found := getattr(config, key, None)) is not None)
