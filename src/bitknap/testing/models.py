"""Tiny random models and their packed checkpoints, for tests.

The models use the real transformers classes and take milliseconds to build once transformers
is imported. They hold every layout of experts that transformers has: gated or not, transposed,
interleaved, biased, one module per expert.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from bitknap.allocation import Format
from bitknap.names import check_name
from bitknap.testing.tables import mixed_plan

__all__ = [
    "FAMILIES",
    "SIZES",
    "filled",
    "packed_checkpoint",
    "tiny_model",
    "write_tensors",
]

# Sizes differ wherever possible, so that a transposed or swapped matrix cannot fit by chance.
SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
_ONE_DENSE = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
_LINEAR = {
    "shared_expert_intermediate_size": 20,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ENCODER_DECODER = {
    "vocab_size": 64,
    "d_model": 16,
    "num_experts": 4,
}

# Family to (model class, config class, values of its config in addition to the sizes).
_FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {}),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {"block_size": 8, "layer_types": ["full_attention", "linear_attention"]},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"shared_expert_intermediate_size": 20},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", _LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", _LINEAR),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _LATENT | _ONE_DENSE),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT | _ONE_DENSE),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _ONE_DENSE),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "aria_text": (
        "AriaTextForCausalLM",
        "AriaTextConfig",
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 20,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 20},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {}),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {"shared_intermediate_size": 20},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "first_k_dense_replace": 1,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v4": ("DeepseekV4ForCausalLM", "DeepseekV4Config", {}),
    "hy_v3": ("HYV3ForCausalLM", "HYV3Config", {}),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        _LATENT
        | {
            "expert_ffn_hidden_size": 12,
            "ffn_hidden_size": 24,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "num_layers": 2,
        },
    ),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "ffn_config": {
                "hidden_size": 16,
                "ffn_hidden_size": 12,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        },
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        _ENCODER_DECODER
        | {
            "d_kv": 8,
            "d_ff": 24,
            "num_heads": 2,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        _ENCODER_DECODER
        | {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "max_position_embeddings": 32,
        },
    ),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {"kv_channels": 8}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
}

# Encoder-decoders name all their sizes themselves.
_OWN_SIZES = ("switch_transformers", "nllb_moe")

FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a model of `family` with random float32 weights, in eval mode.

    Args:
        family: one of `FAMILIES`; "llama" has no experts, and Bitknap does not know those of
            "jetmoe".
        seed: random seed of the weights; leaves the global generators as they were.
        changes: config values to replace.

    Raises:
        InputError: no such family.
    """
    check_name("family", family, _FAMILIES)
    import transformers

    model_class, config_class, extra = _FAMILIES[family]
    sizes = {} if family in _OWN_SIZES else SIZES
    config = getattr(transformers, config_class)(**{**sizes, **extra, **changes})
    return filled(getattr(transformers, model_class), config, seed)


def filled(model_class: Any, config: Any, seed: int = 0) -> Any:
    """Return a model with random float32 weights, large enough to leave a signal, in eval mode.

    Args:
        model_class: model class of transformers.
        config: its configuration.
        seed: random seed of the weights; leaves the global generators as they were.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # norms stay at one; the default 0.02 leaves no signal
                    parameter.normal_(std=0.2)
    return model


def packed_checkpoint(
    root: Path,
    family: str = "mixtral",
    include: Collection[str] = (),
    *,
    group_sizes: Collection[int | Literal["row"]] = (8, 32, "row"),
    row_blocks: int = 1,
    **changes: Any,
) -> Path:
    """Write a tiny model and its packed checkpoint with mixed formats; return the checkpoint.

    Args:
        root: the model goes to root/source, the checkpoint to root/packed.
        family: one of `FAMILIES`.
        include: roles in addition to routed experts.
        group_sizes: group sizes of the formats.
        row_blocks: number of row blocks per matrix.
        changes: config values to replace; "dtype" is the dtype of stored weights.
    """
    import torch

    from bitknap.allocation import formats
    from bitknap.api.quantizing import quantize
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint
    from bitknap.quantization.stacks.row_blocks import block_units

    dtype = changes.pop("dtype", torch.float32)
    source, out = root / "source", root / "packed"
    tiny_model(family, **changes).to(dtype).save_pretrained(source)
    checkpoint = Checkpoint.open(source)
    units, _ = block_units(
        walk_headers(checkpoint.config, checkpoint.shapes, include).units, row_blocks
    )
    grids = formats(range(1, 9), tuple(group_sizes), (False, True), ("fp16", "compact"))
    options = (*grids, Format.keep({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]))
    quantize(source, mixed_plan(units, options, model=checkpoint.fingerprint), out)
    return out


def write_tensors(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write a checkpoint of one file with any tensors; return the folder."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True, parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
