"""The shapes of published Mixture-of-Experts models, and made-up models with these shapes.

`shapes.json` has one model per row: sizes from its published configuration, and the totals that
follow: billions of weights in total and in routed experts, millions per expert, units, GB of bf16
per layer of experts. Tensors have the names of the published checkpoints. If a row has no attention
sizes, its attention projections are made up and only the experts match the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitknap.names import check_name

_DATA = "shapes.json"
_BLOCK = 128

Shape = tuple[int, ...]
# Tensor name to (safetensors dtype, shape).
Headers = dict[str, tuple[str, Shape]]

# Names of the number and the inner size of experts in the configurations of these families.
_KEYS: Mapping[str, tuple[str, str]] = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "phimoe": ("num_local_experts", "intermediate_size"),
    "minimax": ("num_local_experts", "intermediate_size"),
    "minimax_m2": ("num_local_experts", "intermediate_size"),
    "gpt_oss": ("num_local_experts", "intermediate_size"),
    "llama4": ("num_local_experts", "intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_next": ("num_experts", "moe_intermediate_size"),
    "qwen3_5_moe": ("num_experts", "moe_intermediate_size"),
}
_OTHER_KEYS = ("n_routed_experts", "moe_intermediate_size")
_CLASSES = {"olmoe": "Olmoe", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe"} | {
    "qwen3_moe": "Qwen3Moe",
    "gpt_oss": "GptOss",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "phimoe": "Phimoe",
    "minimax_m2": "MiniMaxM2",
}
# Multimodal families keep their language model's configuration and tensors one level down.
_NESTED = ("llama4", "qwen3_5_moe")
# Families whose router adds a bias to its scores where it chooses experts.
_BIASED_SCORES = ("deepseek_v3", "glm4_moe", "glm_moe_dsa", "kimi_k2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one published model.

    Attributes:
        name: its common name.
        model_type: name of its family in transformers.
        style: how the checkpoint names and stacks its experts.
        layers: number of decoder layers.
        dense_layers: number of first layers, which have no experts.
        every: a later layer has experts if its number, counted from 1, is a multiple of this.
        experts: number of routed experts per layer.
        top_k: number of experts per token.
        hidden: width of the residual stream.
        size: inner width of an expert.
        dense_size: inner width of a layer without experts.
        shared: number of shared experts per layer.
        shared_size: inner width of a shared expert.
        vocabulary: number of tokens in the vocabulary.
        tied: whether embedding and head are one matrix.
        published: the precision of the checkpoint on the hub: "bf16", "fp8" or "mxfp4".
        attention: sizes of attention; None if not known here.
        figures: totals from instantiating the published configuration, for comparison.
    """

    name: str
    model_type: str
    style: str
    layers: int
    dense_layers: int
    every: int
    experts: int
    top_k: int
    hidden: int
    size: int
    dense_size: int
    shared: int
    shared_size: int
    vocabulary: int
    tied: bool
    published: str
    attention: Mapping[str, Any] | None
    figures: Mapping[str, Any]

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return layer >= self.dense_layers and (layer + 1) % self.every == 0


@cache
def shapes() -> tuple[ModelShape, ...]:
    """Return all models, in the order of the file."""
    rows = json.loads((files(__package__) / _DATA).read_text(encoding="utf-8"))
    return tuple(ModelShape(**row) for row in rows)


def shape_of(name: str) -> ModelShape:
    """Return one model by name.

    Raises:
        InputError: there is no such model.
    """
    known = {shape.name: shape for shape in shapes()}
    check_name("shape", name, known)
    return known[name]


def config(shape: ModelShape, layers: int | None = None) -> dict[str, Any]:
    """Return a `config.json` in the form of the family.

    Args:
        shape: the model.
        layers: number of decoder layers to keep; all when not given.
    """
    experts, size = _KEYS.get(shape.model_type, _OTHER_KEYS)
    inner: dict[str, Any] = {
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers if layers is None else layers,
        "vocab_size": shape.vocabulary,
        "num_experts_per_tok": shape.top_k,
        "tie_word_embeddings": shape.tied,
        "intermediate_size": shape.dense_size or shape.size,
        experts: shape.experts,
        size: shape.size,
        **_attention_config(shape.attention),
    }
    if experts == "n_routed_experts":
        inner |= {"n_shared_experts": shape.shared, "first_k_dense_replace": shape.dense_layers}
    elif shape.shared:
        inner["shared_expert_intermediate_size"] = shape.shared_size
    outer = inner
    if shape.model_type in _NESTED:
        text = {**inner, "model_type": f"{shape.model_type}_text"}
        outer = {"model_type": shape.model_type, "text_config": text}
    if shape.model_type in _CLASSES:
        outer["architectures"] = [f"{_CLASSES[shape.model_type]}ForCausalLM"]
    return {**outer, "dtype": "bfloat16"}


def _attention_config(sizes: Mapping[str, Any] | None) -> dict[str, Any]:
    if sizes is None:
        return {}
    if sizes["kind"] == "mla":
        return {
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["heads"],
            "q_lora_rank": sizes["q_rank"] or None,
            "kv_lora_rank": sizes["kv_rank"],
            "qk_nope_head_dim": sizes["nope"],
            "qk_rope_head_dim": sizes["rope"],
            "v_head_dim": sizes["value"],
        }
    return {
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_size"],
        "attention_bias": sizes.get("bias", False),
    }


def headers(shape: ModelShape, layers: int | None = None, *, published: bool = False) -> Headers:
    """Return name, dtype and shape of every tensor, in the order of the model.

    Args:
        shape: the model.
        layers: number of decoder layers to keep; all when not given.
        published: use the precision of the checkpoint on the hub, with scales; else "BF16".
    """
    plain = dict(_tensors(shape, shape.layers if layers is None else layers))
    if not published or shape.published == "bf16":
        return {name: ("BF16", size) for name, size in plain.items()}
    lower = _fp8 if shape.published == "fp8" else _mxfp4
    return {name: entry for item in plain.items() for name, entry in lower(*item)}


def _tensors(shape: ModelShape, layers: int) -> Iterator[tuple[str, Shape]]:
    before, model = "", "model"
    if shape.model_type == "llama4":
        before, model = "language_model.", "language_model.model"
    elif shape.model_type in _NESTED:
        model = "model.language_model"
    inside = f"{model}.layers" if shape.style != "deepseek_v4" else "layers"
    yield f"{model}.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(layers):
        prefix = f"{inside}.{layer}"
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        yield from _attention(shape, prefix)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
        yield from _experts(shape, prefix) if shape.is_moe(layer) else _dense(shape, prefix)
    yield f"{model}.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield f"{before}lm_head.weight", (shape.vocabulary, shape.hidden)


def _attention(shape: ModelShape, prefix: str) -> Iterator[tuple[str, Shape]]:
    at, hidden = f"{prefix}.self_attn", shape.hidden
    if shape.style == "deepseek_v4":
        at = f"{prefix}.attn"
    sizes = shape.attention or {"kind": "gqa", "heads": 1, "kv_heads": 1, "head_size": hidden}
    if sizes["kind"] == "mla":
        yield from _latent(at, hidden, sizes)
        return
    outputs = sizes["heads"] * sizes["head_size"]
    keys = sizes["kv_heads"] * sizes["head_size"]
    for name, rows in (("q", outputs), ("k", keys), ("v", keys)):
        yield f"{at}.{name}_proj.weight", (rows, hidden)
        if sizes.get("bias"):
            yield f"{at}.{name}_proj.bias", (rows,)
    yield f"{at}.o_proj.weight", (hidden, outputs)
    if norm := sizes.get("norm"):
        whole = norm == "whole"
        yield f"{at}.q_norm.weight", (outputs if whole else sizes["head_size"],)
        yield f"{at}.k_norm.weight", (keys if whole else sizes["head_size"],)
    if shape.style == "gpt_oss":
        yield f"{at}.o_proj.bias", (hidden,)
        yield f"{at}.sinks", (sizes["heads"],)


def _latent(at: str, hidden: int, sizes: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    heads, rank, kv = sizes["heads"], sizes["q_rank"], sizes["kv_rank"]
    queries = heads * (sizes["nope"] + sizes["rope"])
    if rank:
        yield f"{at}.q_a_proj.weight", (rank, hidden)
        yield f"{at}.q_a_layernorm.weight", (rank,)
        yield f"{at}.q_b_proj.weight", (queries, rank)
    else:
        yield f"{at}.q_proj.weight", (queries, hidden)
    yield f"{at}.kv_a_proj_with_mqa.weight", (kv + sizes["rope"], hidden)
    yield f"{at}.kv_a_layernorm.weight", (kv,)
    yield f"{at}.kv_b_proj.weight", (heads * (sizes["nope"] + sizes["value"]), kv)
    yield f"{at}.o_proj.weight", (hidden, heads * sizes["value"])


def _dense(shape: ModelShape, prefix: str) -> Iterator[tuple[str, Shape]]:
    at = f"{prefix}.{'feed_forward' if shape.style == 'llama4' else 'mlp'}"
    yield from _gated(at, shape.hidden, shape.dense_size)


def _gated(
    at: str,
    hidden: int,
    size: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[tuple[str, Shape]]:
    for name, rows, cols in zip(names, (size, size, hidden), (hidden, hidden, size), strict=True):
        yield f"{at}.{name}.weight", (rows, cols)


def _experts(shape: ModelShape, prefix: str) -> Iterator[tuple[str, Shape]]:
    count, hidden, size = shape.experts, shape.hidden, shape.size
    old = ("w1", "w3", "w2")
    match shape.style:
        case "block_sparse_moe" | "deepseek_v4" as style:
            at = f"{prefix}.{'ffn' if style == 'deepseek_v4' else style}"
            yield f"{at}.gate.weight", (count, hidden)
            if shape.model_type == "minimax_m2":
                yield f"{at}.e_score_correction_bias", (count,)
            for expert in range(count):
                yield from _gated(f"{at}.experts.{expert}", hidden, size, old)
            if shape.shared:
                yield from _gated(f"{at}.shared_experts", hidden, size, old)
        case "stacked" | "mlp" as style:
            at = f"{prefix}.mlp"
            yield f"{at}.gate.weight", (count, hidden)
            if shape.model_type in _BIASED_SCORES:
                yield f"{at}.gate.e_score_correction_bias", (count,)
            if style == "stacked":
                yield f"{at}.experts.gate_up_proj", (count, 2 * size, hidden)
                yield f"{at}.experts.down_proj", (count, hidden, size)
            else:
                for expert in range(count):
                    yield from _gated(f"{at}.experts.{expert}", hidden, size)
            yield from _shared(shape, at)
        case "gpt_oss" | "llama4" as style:  # stored as [in, out]
            at = f"{prefix}.{'mlp' if style == 'gpt_oss' else 'feed_forward'}"
            yield f"{at}.router.weight", (count, hidden)
            yield f"{at}.experts.gate_up_proj", (count, hidden, 2 * size)
            yield f"{at}.experts.down_proj", (count, size, hidden)
            if style == "gpt_oss":
                yield f"{at}.router.bias", (count,)
                yield f"{at}.experts.gate_up_proj_bias", (count, 2 * size)
                yield f"{at}.experts.down_proj_bias", (count, hidden)
            else:
                yield from _gated(f"{at}.shared_expert", hidden, shape.shared_size)


def _shared(shape: ModelShape, at: str) -> Iterator[tuple[str, Shape]]:
    if not shape.shared:
        return
    if shape.model_type.startswith("qwen"):
        yield from _gated(f"{at}.shared_expert", shape.hidden, shape.shared_size)
        yield f"{at}.shared_expert_gate.weight", (1, shape.hidden)
    else:
        yield from _gated(f"{at}.shared_experts", shape.hidden, shape.shared * shape.shared_size)


def _fp8(name: str, size: Shape) -> Iterator[tuple[str, tuple[str, Shape]]]:
    inner = "_proj" in name or ".experts." in name
    if len(size) != 2 or not inner:
        yield name, ("BF16", size)
        return
    yield name, ("F8_E4M3", size)
    yield f"{name}_scale_inv", ("F32", tuple(-(-n // _BLOCK) for n in size))


def _mxfp4(name: str, size: Shape) -> Iterator[tuple[str, tuple[str, Shape]]]:
    if len(size) != 3:
        yield name, ("BF16", size)
        return
    experts, cols, rows = size
    yield f"{name}_blocks", ("U8", (experts, rows, cols // 32, 16))
    yield f"{name}_scales", ("U8", (experts, rows, cols // 32))
