"""Forecast sizes of caches against the tensors of real ones, in every family."""

import pytest
import torch

from bitknap.quantization.models.attention_cache import UnknownCache, cache_layers
from bitknap.quantization.source.architecture import align_experts
from bitknap.testing import FAMILIES, tiny_model

UNKNOWN = {"deepseek_v4": "heavily_compressed", "switch_transformers": "encoder"} | {
    "nllb_moe": "encoder"
}
KNOWN = [family for family in FAMILIES if family not in UNKNOWN]


def tensors(value, found):
    """Collect the tensors in a layer of a cache, counters left out."""
    if torch.is_tensor(value):
        if value.numel() > 1:
            found[id(value)] = value
    elif isinstance(value, dict):
        for one in value.values():
            tensors(one, found)
    elif isinstance(value, list):
        for one in value:
            tensors(one, found)


def real_bytes(cache):
    found: dict[int, torch.Tensor] = {}
    for layer in cache.layers:
        tensors(vars(layer), found)
    tensors(getattr(cache, "linear_cache", None), found)  # MiniMax
    return sum(one.nbytes for one in found.values())


def predicted(model, tokens, batch):
    layers = cache_layers(model.config.get_text_config())
    size = model.dtype.itemsize
    return batch * sum(one.layers * one.layer_bytes(tokens, size) for one in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_the_forecast_is_the_bytes_of_the_real_cache(family, dtype):
    model = tiny_model(family).to(dtype)
    align_experts(model)
    with torch.no_grad():
        out = model(input_ids=torch.randint(3, 60, (3, 40)), use_cache=True)
    assert real_bytes(out.past_key_values) == predicted(model, 40, 3)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next", "lfm2_moe"])
def test_the_cache_grows_as_forecast_while_tokens_are_generated(family):
    model = tiny_model(family)
    out = model.generate(
        torch.randint(3, 60, (2, 9)),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = out.past_key_values
    assert real_bytes(cache) == predicted(model, cache.get_seq_length(), 2)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {"sliding_window": 16}),
        ("mixtral", {"sliding_window": 8}),
        ("llama4_text", {"attention_chunk_size": 16}),
        ("mixtral", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ],
)
def test_windows_and_groups_of_heads_count(family, changes):
    model = tiny_model(family, **changes)
    with torch.no_grad():
        out = model(input_ids=torch.randint(3, 60, (1, 40)), use_cache=True)
    assert real_bytes(out.past_key_values) == predicted(model, 40, 1)


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_is_not_known_is_said(family):
    config = tiny_model(family).config
    with pytest.raises(UnknownCache, match=UNKNOWN[family]):
        cache_layers(config)
