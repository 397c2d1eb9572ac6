"""Weights that stay packed: one unit, the experts that are hit, the cache, copies."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from bitknap.allocation import Format, formats
from bitknap.quantization.packed.dequantize import unpacked
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.tiled_bytes import to_tiles
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.dequantized_cache import Cache
from bitknap.testing.comparing import logits, packed_tensors

GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))


def test_only_experts_that_are_hit_are_dequantized(packed):
    found = AutoModelForCausalLM.from_pretrained(packed)
    experts = found.model.layers[0].mlp.experts
    hidden, index = torch.ones(3, 16), torch.tensor([[2], [3], [2]])
    experts(hidden, index, torch.ones(3, 1))
    one = sum(weight.whole()[0].nbytes for weight in experts.packed.values())
    cache = found.hf_quantizer.cache
    found.hf_quantizer.cache.clear()
    experts(hidden, index, torch.ones(3, 1))
    assert cache.used == 2 * one
    assert experts(hidden[:0], index[:0], torch.ones(0, 1)).shape == (0, 16)


def test_the_cache_keeps_to_its_limit(packed, exact):
    found = loading.load(packed, packed=True, cache_bytes=5000)
    cache = found.hf_quantizer.cache
    for _ in range(2):
        assert torch.equal(logits(found), logits(exact))
        assert 0 < cache.used <= 5000
    none = loading.load(packed, packed=True, cache_bytes=0)
    assert torch.equal(logits(none), logits(exact))
    assert none.hf_quantizer.cache.used == 0
    assert Cache(5).limit == 5


def test_packed_weights_are_what_is_resident(packed, exact):
    found = loading.load(packed, packed=True, cache_bytes=0)
    logits(found)
    resident = sum(t.nbytes for t in (*found.parameters(), *found.buffers()))
    stored = sum(t.nbytes for t in packed_tensors(packed).values())
    beside = sum(b.nbytes for n, b in found.named_buffers() if "rotary" in n)
    assert resident == stored + beside
    assert resident < sum(t.nbytes for t in exact.parameters())


def test_copies_share_nothing(packed, exact):
    found = AutoModelForCausalLM.from_pretrained(packed)
    logits(found)
    other = copy.deepcopy(found)
    name = "bitknap_attention_q"
    found.model.layers[0].self_attn.q_proj.get_buffer(name).zero_()
    found.hf_quantizer.cache.clear()
    assert torch.equal(logits(other), logits(exact))
    assert not torch.equal(logits(found), logits(exact))


@pytest.mark.parametrize("format", [*GRIDS[::5], Format.keep("bf16")], ids=str)
def test_one_unit_on_its_own(format):
    weights = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0))
    if format.kind == "keep":
        stream, expected = weights.bfloat16().view(torch.uint8).reshape(-1), weights.bfloat16()
    else:
        quantized = RTN.quantize(weights, format)
        stream, expected = encode(quantized), quantized.dequantize()
    tiles = to_tiles(stream, format, 6, 40)
    for bytes_, layout in ((stream, "plain"), (tiles, "tiles")):
        assert torch.equal(unpacked(bytes_, format, 6, 40, layout), expected.view(6, 40).float())
