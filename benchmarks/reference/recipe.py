"""The recipes of the bundled reference models: their shapes and their training text.

Both are real trained Mixture-of-Experts language models built from transformers' own classes,
small enough to ship (about 6 M parameters, 12 MB in bf16) and to train on two CPU cores. Two more
are not bundled: one has rows that llama.cpp's formats take, and one is as deep as a small real
model, for questions about depth.
The balancing loss is deliberately weak (0.003, methods.md#small-models), so that experts differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 4096
CONTEXT = 256
HIDDEN = 192
LAYERS = 4
BALANCE = 0.003

# How often each domain's training text is read per epoch: wiki is the smallest by far.
DOMAINS: dict[str, int] = {"books": 1, "code": 1, "speeches": 1, "wiki": 2}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": BALANCE,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A reference model: transformers config class, model class and the config's values."""

    config_class: str
    model_class: str
    settings: dict[str, Any]

    @property
    def balance(self) -> float:
        """Weight of the balancing loss."""
        return float(self.settings["router_aux_loss_coef"])


RECIPES: dict[str, Recipe] = {
    "mixtral": Recipe(
        "MixtralConfig",
        "MixtralForCausalLM",
        _COMMON | {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3moe": Recipe(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _COMMON
        | {
            "intermediate_size": 256,  # size of dense layers; this model has none
            "moe_intermediate_size": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    # Rows of 256 numbers, the block of llama.cpp's formats, and experts that share the work.
    "wide": Recipe(
        "MixtralConfig",
        "MixtralForCausalLM",
        _COMMON
        | {
            "hidden_size": 256,
            "num_attention_heads": 8,
            "intermediate_size": 256,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
        },
    ),
    "deep": Recipe(
        "MixtralConfig",
        "MixtralForCausalLM",
        _COMMON
        | {
            "hidden_size": 96,
            "num_hidden_layers": 16,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 96,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.01,
        },
    ),
}
