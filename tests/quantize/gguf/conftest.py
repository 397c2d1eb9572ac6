"""Fixtures of the tests of GGUF files: tiny models that llama.cpp knows, and llama.cpp itself."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bitknap.allocation import BitPlan, Format
from bitknap.benchmarks.runtimes.scripts import llama_distributions
from bitknap.quantization.gguf import writer
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed.writer import Rounded
from bitknap.quantization.rounding.ggml import Ggml
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import SIZES, filled, tiny_model

ROOT = Path(__file__).parents[3]
VOCABULARY = 4096
KEPT = (Format.keep("fp32"),)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


_DENSE = ("qwen2", "qwen3")


def made_model(folder, family, **changes):
    """Write a tiny model with a tokenizer; no norm or bias is left at one or zero."""
    values = {**_SIZES, **_OWN.get(family, {}), **changes}
    if family in _DENSE:
        config = getattr(transformers, f"{family.title()}Config")(**{**SIZES, **values})
        model = filled(getattr(transformers, f"{family.title()}ForCausalLM"), config)
    else:
        model = tiny_model(family, **values)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                noise = torch.randn(parameter.shape, generator=generator) / 5
                parameter.copy_(noise + ("norm" in name))
    model.save_pretrained(folder)
    for file in (ROOT / "benchmarks" / "reference" / "mixtral").glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)
    return model


def written(folder, out, formats=KEPT, include=()):
    """Write the model of a folder as a file, its units in formats by layer and projection."""
    source = Checkpoint.open(folder)
    units = walk_headers(source.config, source.shapes, include).units
    choice = (units.layer + units.projection) % len(formats)
    plan = BitPlan.from_choice(
        units, formats, choice, model=source.fingerprint, header={"method": "ggml"}
    )
    rounded = Rounded(rounding=Ggml(), inputs=inputs_of(units))
    model = writer.model_of(source, plan, rounded)
    return SimpleNamespace(
        source=source,
        plan=plan,
        rounded=rounded,
        model=model,
        path=out,
        made=writer.save(model, out, "tiny"),
    )


def inputs_of(units):
    """Return made-up mean squares of units' inputs."""

    def inputs(which):
        cols = int(units.cols[which[0]])
        draws = [np.random.default_rng(int(one)).uniform(0.1, 2, cols) for one in which]
        return Inputs(
            moments=torch.tensor(np.stack(draws), dtype=torch.float32),
            tokens=torch.full((len(which),), 64),
        )

    return inputs


def log_probabilities(path, prompts, vocabulary=VOCABULARY):
    """Return llama.cpp's distribution of the token after each prompt, float64 [n, vocabulary].

    A row is NaN where llama.cpp's first choice ends the text, since it then returns none.
    """
    return llama_distributions(path, prompts, vocabulary)


def expected(model, prompts):
    """Return the same distributions by transformers."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1].double() for ids in prompts]
    return torch.log_softmax(torch.stack(logits), -1).numpy()


def prompts(seed=1):
    """Return three prompts of different lengths."""
    ids = [1, *np.random.default_rng(seed).integers(3, VOCABULARY, 60).tolist()]
    return [ids[:3], ids[:17], ids]


@pytest.fixture(scope="session")
def llama():
    """What the tests of whole files use."""
    return SimpleNamespace(
        root=ROOT,
        model=made_model,
        write=written,
        inputs_of=inputs_of,
        log_probabilities=log_probabilities,
        expected=expected,
        prompts=prompts,
        vocabulary=VOCABULARY,
    )
