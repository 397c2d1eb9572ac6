"""For tests: tiny image-text models whose language models have routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitknap.names import check_name
from bitknap.testing import SIZES, filled

__all__ = ["WRAPPED", "wrapped_model"]

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_TURNED = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
}

# Family to (model class, config class, text config, vision config, other values).
_WRAPPED: Mapping[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "llama4": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 20},
        {
            **_VISION,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        _TURNED,
        _TOWER,
        {
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "aria": (
        "AriaForConditionalGeneration",
        "AriaConfig",
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {**_VISION, "model_type": "idefics3_vision"},
        {"image_token_index": 5},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"model_type": "mixtral"},
        {**_VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2},
        {"image_token_index": 5},
    ),
}

WRAPPED = tuple(_WRAPPED)


def wrapped_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a model of `family` with random float32 weights, in eval mode.

    Args:
        family: one of `WRAPPED`.
        seed: random seed of the weights; leaves the global generators as they were.
        changes: values of the language model's config to replace.

    Raises:
        InputError: no such family.
    """
    check_name("family", family, _WRAPPED)
    import transformers

    model_class, config_class, text, vision, others = _WRAPPED[family]
    config = getattr(transformers, config_class)(
        text_config={**SIZES, **text, **changes}, vision_config=dict(vision), **others
    )
    return filled(getattr(transformers, model_class), config, seed)
