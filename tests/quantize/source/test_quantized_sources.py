"""Sources in float8 or MXFP4, in whole or in part: one value in every way of loading."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitknap
from bitknap.allocation import BitPlan, formats
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.packed.writer import check_finite
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.low_bit_codes import restore
from bitknap.testing import write_tensors
from bitknap.transformers_hook import install

QUERY = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FLOAT = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def blocks(high, wide):
    return FP8 | {"weight_block_size": [high, wide]}


def attention(name):
    return "self_attn" in name


def every(name):
    return "norm" not in name and not name.endswith("bias")


def lowered(weight, block, shape=None, codes=E4M3, scale=torch.float32):
    """Return codes and scales of a weight, and by the definition what they mean."""
    rows, cols = weight.shape[-2:]
    high, wide = block[0] or rows, block[1] or cols
    grid = (*weight.shape[:-2], math.ceil(rows / high), math.ceil(cols / wide))
    generator = torch.Generator().manual_seed(rows + cols)
    scales = torch.rand(grid, generator=generator) / 8 + 2**-9
    exponents = scale == torch.uint8
    scales = scales.to(torch.float8_e8m0fnu if exponents else scale)
    full = scales.float().repeat_interleave(high, -2)[..., :rows, :]
    full = full.repeat_interleave(wide, -1)[..., :cols]
    stored = (weight.float() / full).to(codes)
    scales = scales.view(torch.uint8) if exponents else scales
    meant = torch.empty(weight.shape)
    for place in np.ndindex(weight.shape):
        meant[place] = float(stored[place]) * float(full[place])
    return stored, scales if shape is None else scales.reshape(shape(scales)), meant.bfloat16()


def twice(plain, root, chosen, settings, suffix="_scale_inv", extra=None, fused=False, **how):
    """Write a model with some matrices in float8, and with what these mean in 16 bits."""
    config = json.loads((plain / "config.json").read_text())
    low, high = {}, {}
    for name, weight in stacked(load_file(plain / "model.safetensors"), fused).items():
        low[name] = high[name] = weight
        if not chosen(name) or weight.ndim < 2:
            continue
        stem = name.removesuffix(".weight") if suffix.startswith(".") else name
        low[name], low[f"{stem}{suffix}"], high[name] = lowered(weight, **how)
        if extra:
            low[f"{name.removesuffix('.weight')}{extra}"] = torch.tensor(3.0)
    marked = config if settings is None else config | {"quantization_config": settings}
    return write_tensors(root / "low", low, marked), write_tensors(root / "plain", high, config)


def stacked(tensors, fused):
    """Return tensors, those of experts in one for each layer and projection if `fused`."""
    if not fused:
        return tensors
    left = {name: t for name, t in tensors.items() if ".experts." not in name}
    prefix = "model.layers.0.mlp.experts."
    gate, up, down = (
        torch.stack([tensors[f"{prefix}{expert}.{leaf}_proj.weight"] for expert in range(4)])
        for leaf in ("gate", "up", "down")
    )
    return left | {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}


def quantized(folder, out):
    """Quantize a folder by a mixed plan; return what `quantize` does."""
    source = Checkpoint.open(folder)
    units = walk_headers(source.config, source.shapes).units
    choice = np.arange(len(units)) % 3
    plan = BitPlan.from_choice(units, formats((2, 4, 8), (8,)), choice, model=source.fingerprint)
    return bitknap.quantize(folder, plan, out)


def same(one, other):
    one, other = (x if isinstance(x, dict) else x.state_dict() for x in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def flat(scales):
    return scales.shape[:-1]


def lead(scales):
    return scales.shape[:-2]


def none(scales):
    return ()


def one(scales):
    return (1,)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "blocks": (every, blocks(16, 16), {"block": (16, 16)}),
    "uneven blocks": (every, blocks(7, 32), {"block": (7, 32)}),
    "blocks beside": (attention, None, {"block": (128, 128)}),
    "half scales": (attention, blocks(8, 8), {"block": (8, 8), "scale": torch.float16}),
    "brain scales": (attention, blocks(8, 8), {"block": (8, 8), "scale": torch.bfloat16}),
    "powers": (attention, blocks(8, 8), {"block": (8, 8), "scale": torch.float8_e8m0fnu}),
    "MXFP8": (every, blocks(1, 32), {"block": (1, 32), "scale": torch.uint8}),
    "wide exponents": (every, blocks(16, 16), {"block": (16, 16), "codes": E5M2}),
    "short names": (attention, blocks(16, 16), {"block": (16, 16), "suffix": ".scale"}),
    "channel": (every, FLOAT, {"block": (1, None), "suffix": "_scale"}),
    "flat channel": (every, FLOAT, {"block": (1, None), "suffix": "_scale", "shape": flat}),
    "tensor": (every, FLOAT, {"block": (None, None), "suffix": "_scale", "shape": one}),
    "scalar": (every, FP8 | {"weight_block_size": None}, {"block": (None, None), "shape": none}),
    "embedding": (
        lambda name: "embed_tokens" in name,
        blocks(16, 16),
        {"block": (None, None), "suffix": "_scale", "shape": one},
    ),
    "static": (
        every,
        FP8 | {"weight_block_size": None},
        {"block": (None, None), "shape": none, "extra": ".activation_scale"},
    ),
    "input scales": (
        attention,
        FLOAT,
        {"block": (1, None), "suffix": "_scale", "extra": ".input_scale"},
    ),
    "group": (
        every,
        FLOAT | {"config_groups": {"a": {"weights": {"strategy": "group", "group_size": 8}}}},
        {"block": (1, 8), "suffix": "_scale"},
    ),
    "structure": (
        every,
        FLOAT | {"config_groups": {"a": {"weights": {"block_structure": [16, 8]}}}},
        {"block": (16, 8), "suffix": "_scale"},
    ),
    "fused blocks": (every, blocks(16, 16), {"block": (16, 16), "fused": True}),
    "fused channel": (every, FLOAT, {"block": (1, None), "suffix": "_scale", "fused": True}),
    "fused columns": (
        lambda name: "experts." in name,
        FLOAT,
        {"block": (None, 1), "suffix": "_scale", "fused": True},
    ),
    "fused matrix": (
        lambda name: "experts." in name,
        FP8 | {"weight_block_size": None},
        {"block": (None, None), "shape": lead, "fused": True, "extra": "_activation_scale"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_float8_is_what_it_means(case, plain, tmp_path):
    chosen, settings, how = CASES[case]
    low, high = twice(plain, tmp_path, chosen, settings, **how)
    ours, theirs = map(Checkpoint.open, (low, high))
    assert ours.shapes == theirs.shapes
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.headers)
    for view in walk_headers(ours.config, ours.shapes, ("attention",)).views:
        assert torch.equal(ours.read_matrix(view), theirs.read_matrix(view))
    for name in ours.low_bit:
        parts = [ours.read_slabs(name, i, i + 1) for i in range(ours.headers[name].shape[0])]
        assert torch.equal(torch.cat(parts), theirs.read(name))
    content = (low / "model.safetensors").read_bytes()
    assert ours.nbytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert same(bitknap.load(low), bitknap.load(high))
    sizes, _ = quantized(low, tmp_path / "low-out"), quantized(high, tmp_path / "plain-out")
    packed = [load_file(tmp_path / out / "bitknap.safetensors") for out in ("low-out", "plain-out")]
    assert same(*packed)
    assert sizes["decoded"] == len([n for n in ours.low_bit if n in packed[0]])
    assert (sizes["decoded_bytes"] > sizes["stored_bytes"]) == (sizes["decoded"] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["uneven blocks", "fused channel", "scalar"])
def test_large_tensors_are_decoded_piece_by_piece(case, plain, tmp_path, monkeypatch):
    chosen, settings, how = CASES[case]
    low, _ = twice(plain, tmp_path, chosen, settings, **how)
    quantized(low, tmp_path / "whole")
    monkeypatch.setattr("bitknap.quantization.packed.work_pieces.DECODE", 4 * 40 * 3)
    quantized(low, tmp_path / "cut")
    found = (load_file(tmp_path / out / "bitknap.safetensors") for out in ("whole", "cut"))
    assert same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["blocks", "channel", "input scales", "fused blocks"])
def test_every_way_of_loading_gives_the_same(case, plain, tmp_path):
    install()
    chosen, settings, how = CASES[case]
    low, high = twice(plain, tmp_path, chosen, settings, **how)
    out = tmp_path / "out"
    quantized(low, out)
    right = load_file(high / "model.safetensors")
    ids = torch.arange(3, 11).view(1, 8)
    for dtype in (torch.bfloat16, torch.float32):
        ways = {
            "load": bitknap.load(out, dtype),
            "packed": bitknap.load(out, dtype, packed=True),
            "transformers": AutoModelForCausalLM.from_pretrained(out, dtype=dtype),
        }
        for way in list(ways):
            ways[way].save_pretrained(tmp_path / way)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / way, dtype=dtype)
            ways |= {f"{way} again": again, f"{way} twice": bitknap.load(tmp_path / way, dtype)}
        for way, model in ways.items():
            found = dict(model.named_parameters())
            assert torch.equal(found[QUERY], right[QUERY].to(dtype)), way
            with torch.no_grad():
                wanted, given = (m(input_ids=ids).logits for m in (ways["load"], model))
            assert torch.allclose(given.float(), wanted.float(), atol=2e-2), way


@pytest.mark.parametrize(
    ("name", "last"), [(QUERY, (5, 3)), ("model.embed_tokens.weight", (64, 2))]
)
def test_mxfp4_of_a_linear_layer(name, last, plain, tmp_path):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (*last, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, last, generator=generator, dtype=torch.uint8)
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    wanted = torch.empty(last[0], 32 * last[1])
    for row, col in np.ndindex(*wanted.shape):
        byte = int(codes[row, col // 32, col % 32 // 2])
        power = 2.0 ** (int(scales[row, col // 32]) - 127)
        wanted[row, col] = values[byte >> 4 if col % 2 else byte & 15] * power
    source = Checkpoint.open(
        write_tensors(tmp_path / "m", {f"{name}_blocks": codes, f"{name}_scales": scales}, {})
    )
    assert source.shapes == {name: ("BF16", tuple(wanted.shape))}
    assert torch.equal(source.read(name), wanted.bfloat16())
    assert torch.equal(source.read_slabs(name, 2, 4), wanted.bfloat16()[2:4])


@pytest.mark.parametrize(
    ("settings", "scales", "message"),
    [
        (blocks(16, 16), torch.ones(1, 1), r"blocks of 16 x 16 of \[16, 40\] need F32 \[1, 3\]"),
        (blocks(16, 16), torch.ones(16, 1), r"blocks of 16 x 16 of \[16, 40\] need F32 \[1, 3\]"),
        (blocks(16, 16), torch.ones(()), r"blocks of 16 x 16 of \[16, 40\] need F32 \[1, 3\]"),
        (FP8 | {"weight_block_size": None}, torch.ones(3), r"\[16, 40\] needs F32 \[16, 1\] or"),
        (blocks(0, 16), torch.ones(1, 1), r"weight_block_size: \[0, 16\] is not two whole"),
        (blocks("a", 16), torch.ones(1, 1), r"weight_block_size: \['a', 16\] is not two whole"),
        (FP8 | {"weight_block_size": 128}, torch.ones(1, 1), "weight_block_size: 128 is not two"),
        ("fp8", torch.ones(1, 1), "quantization_config: 'fp8' is not a JSON object"),
        (None, torch.ones(1, 1).to(torch.int32), r"I32 \[1, 1\], but blocks of 128 x 128"),
    ],
)
def test_scales_that_do_not_fit(settings, scales, message, tmp_path):
    tensors = {QUERY: torch.ones(16, 40).to(E4M3), f"{QUERY}_scale_inv": scales}
    config = {} if settings is None else {"quantization_config": settings}
    with pytest.raises(FileError, match=message):
        Checkpoint.open(write_tensors(tmp_path / "m", tensors, config))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_a_nan_scale_of_a_kept_tensor_is_seen(scale, plain, tmp_path):
    low, _ = twice(plain, tmp_path, attention, blocks(16, 16), block=(16, 16), scale=scale)
    tensors = load_file(low / "model.safetensors")
    tensors[f"{QUERY}_scale_inv"] = torch.full((1, 3), math.nan).to(scale)
    write_tensors(low, tensors, json.loads((low / "config.json").read_text()))
    with pytest.raises(ModelError, match=r"q_proj\.weight: NaN or infinite weight"):
        quantized(low, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"q_proj\.weight: NaN or infinite weight"):
        check_finite(Checkpoint.open(low))


def test_a_packed_checkpoint_that_was_written_with_float8_stays_unpacked(plain, tmp_path):
    low, high = twice(plain, tmp_path, attention, blocks(128, 128), block=(128, 128))
    out = tmp_path / "out"
    quantized(low, out)
    tensors = load_file(out / "bitknap.safetensors")
    stored = load_file(low / "model.safetensors")
    tensors |= {name: stored[name] for name in stored if attention(name)}
    save_file(tensors, out / "bitknap.safetensors", metadata={"format": "pt"})
    right = load_file(high / "model.safetensors")[QUERY]
    assert torch.equal(dict(bitknap.load(out).named_parameters())[QUERY], right)
    install()
    for refuse in (AutoModelForCausalLM.from_pretrained, lambda f: bitknap.load(f, packed=True)):
        with pytest.raises(ModelError, match="outside the planned matrices"):
            refuse(out)


def test_a_kept_matrix_of_a_linear_layer_keeps_its_mxfp4(tmp_path):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, (40, 2), generator=generator, dtype=torch.uint8)
    low = {f"{QUERY}_blocks": codes, f"{QUERY}_scales": scales}
    source = Checkpoint.open(write_tensors(tmp_path / "m", low, {}))
    assert source.precision(QUERY) == "mxfp4"
    stream = source.kept(View(tensor=QUERY))
    assert torch.equal(restore(stream, "mxfp4", 40, 64), source.read(QUERY).float())
