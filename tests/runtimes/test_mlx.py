"""Folders written for MLX, run by mlx-lm: its logits are those of the decoded weights."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.runtimes.environments import ask

import bitknap
from bitknap.benchmarks.runtimes.scripts import LOGITS
from bitknap.testing import FAMILIES

pytestmark = pytest.mark.runtime

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32}
_LATENT = dict.fromkeys(
    ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32
)
_YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
_YARN |= {"original_max_position_embeddings": 64}
_TRUE = {"attention_bias": True, "lm_head_bias": True}
# Family, further settings, and roles besides routed experts.
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mixtral": ({}, ("attention",)),
    "qwen3_moe": ({}, ("attention",)),
    "qwen2_moe": ({"shared_expert_intermediate_size": 64}, ("attention", "shared")),
    "olmoe": ({}, ("attention",)),
    "phimoe": (_TRUE, ()),
    "glm4_moe": ({}, ("attention", "shared", "dense")),
    "deepseek_v2": (_LATENT, ("attention", "shared", "dense")),
    "deepseek_v3": (_LATENT, ("shared", "dense")),
    "gpt_oss": ({"rope_parameters": _YARN}, ()),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ({}, ("attention", "dense"))),
}


def dense(family, root):
    """Save a tiny model without experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {**_SIZES, **heads, "vocab_size": 128, "initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(root / family)
    return root / family


@pytest.fixture(scope="module")
def exports(tmp_path_factory, wide, mixed):
    """Each model's folder for MLX, and the logits of its decoded weights by transformers."""
    root = tmp_path_factory.mktemp("mlx")
    tokens = np.random.default_rng(0).integers(3, 120, 40).tolist()
    folders, known = {}, {}
    for family, (changes, include) in MODELS.items():
        model = wide(family, **changes) if family in FAMILIES else dense(family, root / "models")
        plan = mixed(model, "mlx", include)
        bitknap.export(plan, model, "mlx", root / family)
        bitknap.quantize(model, plan, root / f"{family}-packed")
        with torch.no_grad():
            run = bitknap.load(root / f"{family}-packed", "float32")
            known[family] = run(torch.tensor([tokens])).logits[0].numpy()
        folders[family] = str(root / family)
    # One process for all: importing mlx takes longer than they do.
    found = ask("mlx", LOGITS["mlx"], {"folders": folders, "tokens": tokens})
    return {family: (np.array(found[family]), known[family]) for family in MODELS}


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_decoded_weights(family, exports):
    found, known = exports[family]
    assert np.abs(known).max() > 1
    assert np.abs(found - known).max() < 1e-4
