"""A GGUF file of a model in 16 or 32 bits as a folder that transformers loads.

The folder is made once, in the user's cache, and found again by the file's size and time. Tensors
are copied as they are; experts become matrices of their own, and rows of q and k go back to where
transformers has them. A tokenizer is written where it is known how; without one the model reads no
text. Files whose weights are quantized already are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.disk.atomic import check_space, write_whole
from bitknap.disk.outputs import whole_folder
from bitknap.errors import FileError, ModelError
from bitknap.quantization.ggml import container, tokenizer_json
from bitknap.quantization.ggml.container import Container

_DTYPES = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2)}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")


@dataclass(frozen=True, slots=True)
class _Family:
    """A transformers family that one of llama.cpp's architectures is loaded as.

    Attributes:
        type: its `model_type`.
        model: its class.
        router: name of the router in a layer.
        experts: name of an expert's matrices in a layer.
        leaves: names of gate, up and down there.
        fixed: values of the configuration that llama.cpp has built in.
    """

    type: str
    model: str
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fixed: tuple[tuple[str, Any], ...] = ()


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM"),
    "llama with experts": _Family(
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe.gate",
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": _Family("qwen2_moe", "Qwen2MoeForCausalLM", fixed=(("norm_topk_prob", False),)),
    "qwen3moe": _Family("qwen3_moe", "Qwen3MoeForCausalLM", fixed=(("norm_topk_prob", True),)),
    "olmoe": _Family("olmoe", "OlmoeForCausalLM", fixed=(("norm_topk_prob", False),)),
}


def folder_of(path: Path) -> Path:
    """Return the folder of a GGUF file's model, which is made if it is not in the cache.

    Raises:
        FileError: the file is damaged or cut short.
        ModelError: its architecture is not known here, or its weights are quantized.
        InputError: the disk has no room.
    """
    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "bitknap" / "gguf" / name
    if not (folder / "config.json").is_file():
        held = container.read(path)
        family = _family_of(held)
        _check_types(held)
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder, state.st_size)
        with whole_folder(folder, overwrite=True, inputs=[path]) as part:
            _save_tensors(held, family, part / "model.safetensors")
            for file, content in (tokenizer_json.files_of(held.values) or {}).items():
                write_whole(part / file, json.dumps(content, ensure_ascii=False).encode())
            config = json.dumps(_config(held, family), indent=1, sort_keys=True)
            write_whole(part / "config.json", config.encode())
    return folder


def _family_of(held: Container) -> _Family:
    name = str(held.values.get("general.architecture"))
    known = {one.partition(" ")[0] for one in _FAMILIES}
    if name not in known:
        raise ModelError(
            f"{held.path}: architecture {name} is read from GGUF for {', '.join(sorted(known))} "
            "alone; pass the folder of the transformers model"
        )
    experts = held.values.get(f"{name}.expert_count", 0)
    if "rope_freqs.weight" in held.entries:
        raise ModelError(
            f"{held.path}: scales its rotary embedding by frequency, which config.json cannot say; "
            "pass the folder of the transformers model"
        )
    return _FAMILIES["llama with experts" if name == "llama" and experts else name]


def _check_types(held: Container) -> None:
    for name, entry in held.entries.items():
        if entry.type not in _DTYPES:
            raise ModelError(
                f"{held.path}: {name} is quantized already ({entry.type}); pass the file in 16 or "
                "32 bits"
            )


def _config(held: Container, family: _Family) -> dict[str, Any]:
    """Return the content of config.json."""
    values = held.values
    prefix = str(values["general.architecture"])

    def value(key: str, *instead: Any) -> Any:
        if f"{prefix}.{key}" in values:
            return values[f"{prefix}.{key}"]
        if instead:
            return instead[0]
        raise FileError(f"{held.path}: {prefix}.{key} is missing; convert the model again")

    heads, hidden = int(value("attention.head_count")), int(value("embedding_length"))
    vocabulary = held.entries["token_embd.weight"].shape[0]
    config: dict[str, Any] = {
        "model_type": family.type,
        "architectures": [family.model],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "head_dim": int(value("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in held.entries,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[_main_dtype(held)],
        "rope_parameters": _rope(value),
        **dict(family.fixed),
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = values.get(f"tokenizer.ggml.{name}_token_id")
    biased = "blk.0.attn_q.bias" in held.entries
    config |= {"qkv_bias" if family.type == "qwen2_moe" else "attention_bias": biased}
    if value("expert_count", 0):
        count, width = int(value("expert_count")), value("expert_feed_forward_length", None)
        config |= {
            "num_experts": count,
            "num_local_experts": count,
            "num_experts_per_tok": int(value("expert_used_count")),
            "moe_intermediate_size": int(width or config["intermediate_size"]),
        }
        if family.type in ("mixtral", "olmoe"):
            config["intermediate_size"] = config["moe_intermediate_size"]
        if family.type == "qwen2_moe":
            shared = value("expert_shared_feed_forward_length")
            config["shared_expert_intermediate_size"] = int(shared)
    return config


def _rope(value: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(value("rope.freq_base"))}
    kind = value("rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": float(value("rope.scaling.factor"))}
    if kind == "yarn":
        original = value("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = int(original)
    return rope


def _main_dtype(held: Container) -> str:
    """Return the dtype of most weights."""
    sizes: dict[str, int] = {}
    for entry in held.entries.values():
        name = _DTYPES[entry.type][0]
        sizes[name] = sizes.get(name, 0) + math.prod(entry.shape)
    return max(sizes, key=lambda name: sizes[name])


def _tensors(held: Container, family: _Family) -> Iterator[tuple[str, tuple[int, ...], str, Any]]:
    """Yield name, shape, safetensors dtype and bytes of each tensor."""
    for full, entry in held.entries.items():
        dtype, width = _DTYPES[entry.type]
        data = held.data(full).reshape(*entry.shape[:-1], entry.shape[-1] * width)
        match = _BLOCK.fullmatch(full)
        if match is None:
            name = _OUTSIDE.get(full.removesuffix(".weight"))
            if name is None:
                raise _nameless(held, full)
            yield f"{name}.weight", entry.shape, dtype, data
            continue
        base, leaf, end = f"model.layers.{match[1]}.", match[2], match[3]
        if experts := _EXPERTS.fullmatch(leaf):
            part = family.leaves[("gate", "up", "down").index(experts[1])]
            for number in range(entry.shape[0]):
                name = f"{base}{family.experts}.{number}.{part}.{end}"
                yield name, entry.shape[1:], dtype, data[number]
            continue
        name = family.router if leaf == "ffn_gate_inp" else _INSIDE.get(leaf)
        if name is None:
            raise _nameless(held, full)
        shape = (
            (1, *entry.shape)
            if leaf == "ffn_gate_inp_shexp" and len(entry.shape) == 1
            else entry.shape
        )
        yield f"{base}{name}.{end}", shape, dtype, _halves(held, family, leaf, data)


def _halves(held: Container, family: _Family, leaf: str, data: np.ndarray) -> np.ndarray:
    """Return rows of q and k with the two halves of each head one above the other."""
    if family.type not in ("llama", "mixtral") or leaf not in ("attn_q", "attn_k"):
        return data
    heads = int(held.values["llama.attention.head_count"])
    if leaf == "attn_k":
        heads = int(held.values.get("llama.attention.head_count_kv", heads))
    rows = data if data.ndim == 2 else data.reshape(-1, _DTYPES[_type(held, leaf)][1])
    turned: np.ndarray = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)
    return turned


def _type(held: Container, leaf: str) -> str:
    return held.entries[f"blk.0.{leaf}.bias"].type


def _nameless(held: Container, tensor: str) -> ModelError:
    return ModelError(
        f"{held.path}: {tensor}: transformers has no such tensor here; pass the folder of the "
        "transformers model"
    )


def _save_tensors(held: Container, family: _Family, path: Path) -> None:
    """Write safetensors, one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, data in _tensors(held, family):
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + data.nbytes],
        }
        at += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, data in _tensors(held, family):
            file.write(np.ascontiguousarray(data).data)
