"""FP8 and MXFP4 checkpoints: read as the 16-bit ones they stand for, exactly."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import Format, formats
from bitknap.allocation.problem import format
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import View, matrix
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.low_bit_codes import restore
from bitknap.quantization.stacks.reading import read_stored
from bitknap.testing import random_plan, tiny_model

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mxfp4(experts, rows, groups, seed=0):
    """Return random codes and scales, and by the definition of MXFP4 what they mean."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (experts, rows, groups, 16), dtype=np.uint8)
    scales = draw.integers(118, 126, (experts, rows, groups), dtype=np.uint8)
    weights = np.empty((experts, rows, groups, 32))
    for place in np.ndindex(experts, rows, groups, 32):
        byte = int(blocks[*place[:3], place[3] // 2])
        code = byte >> 4 if place[3] % 2 else byte & 15
        sign = -1 if code >= 8 else 1
        weights[place] = sign * E2M1[code % 8] * 2.0 ** (int(scales[place[:3]]) - 127)
    flat = torch.from_numpy(weights.reshape(experts, rows, -1))
    return torch.from_numpy(blocks), torch.from_numpy(scales), flat


def fp8(rows, cols, seed=0, block=128):
    """Return random codes and scales, and by the definition of FP8 blocks what they mean."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
    grid = math.ceil(rows / block), math.ceil(cols / block)
    scales = torch.rand(grid, generator=generator) + 0.1
    weights = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            weights[row, col] = float(codes[row, col]) * scales[row // block, col // block]
    return codes, scales, weights.bfloat16()


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Write a tiny gpt-oss twice: with MXFP4 experts, and in 16 bits."""
    root = tmp_path_factory.mktemp("gpt_oss")
    tiny_model("gpt_oss", hidden_size=32, intermediate_size=64).bfloat16().save_pretrained(root)
    config = json.loads((root / "config.json").read_text())
    tensors = load_file(root / "model.safetensors")
    plain, packed = dict(tensors), dict(tensors)
    for seed, name in enumerate(sorted(n for n in tensors if n.endswith(("up_proj", "down_proj")))):
        experts, cols, rows = tensors[name].shape
        blocks, scales, weights = mxfp4(experts, rows, cols // 32, seed)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = weights.bfloat16().transpose(1, 2).contiguous()
    marked = config | {"quantization_config": {"quant_method": "mxfp4"}}
    return write(root / "packed", packed, marked), write(root / "plain", plain, config)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """Write a tiny DeepSeek-V3 twice: with FP8 matrices, and in 16 bits."""
    root = tmp_path_factory.mktemp("deepseek")
    sizes = {"hidden_size": 136, "intermediate_size": 160, "moe_intermediate_size": 144}
    tiny_model("deepseek_v3", num_hidden_layers=2, **sizes).bfloat16().save_pretrained(root)
    config = json.loads((root / "config.json").read_text())
    tensors = load_file(root / "model.safetensors")
    plain, packed = dict(tensors), dict(tensors)
    linear = [n for n, t in tensors.items() if t.ndim == 2 and "_proj" in n]
    for seed, name in enumerate(sorted(linear)):
        rows, cols = tensors[name].shape
        packed[name], packed[f"{name}_scale_inv"], plain[name] = fp8(rows, cols, seed)
    marked = config | {"quantization_config": FP8}
    return write(root / "packed", packed, marked), write(root / "plain", plain, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
@pytest.mark.parametrize("include", [(), ("attention", "shared", "dense")])
def test_reads_what_the_16_bit_checkpoint_holds(name, include, request):
    if name == "gpt_oss" and "shared" in include:
        include = ("attention",)
    packed, plain = map(Checkpoint.open, request.getfixturevalue(name))
    assert packed.shapes == plain.shapes
    assert all(torch.equal(packed.read(n), plain.read(n)) for n in plain.headers)
    ours = walk_headers(packed.config, packed.shapes, include)
    theirs = walk_headers(plain.config, plain.shapes, include)
    assert ours.views == theirs.views
    for view in ours.views[::4]:
        assert torch.equal(packed.read_matrix(view), plain.read_matrix(view))
    for i in range(0, len(ours.units), 5):
        which = np.array([i])
        assert torch.equal(read_stored(ours, which, packed), read_stored(theirs, which, plain))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_counts_the_bytes_on_disk(name, request):
    folder, plain = request.getfixturevalue(name)
    source = Checkpoint.open(folder)
    content = (folder / "model.safetensors").read_bytes()
    assert source.nbytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert set(source.stored(source.headers)) == set(load_file(folder / "model.safetensors"))
    assert source.nbytes < Checkpoint.open(plain).nbytes
    assert source.fingerprint != Checkpoint.open(plain).fingerprint


def test_a_changed_scale_is_another_model(gpt_oss, tmp_path):
    tensors = load_file(gpt_oss[0] / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] += 1
    other = write(tmp_path / "other", tensors, json.loads((gpt_oss[0] / "config.json").read_text()))
    assert Checkpoint.open(other).fingerprint != Checkpoint.open(gpt_oss[0]).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_a_kept_matrix_keeps_its_bits(name, request):
    source = Checkpoint.open(request.getfixturevalue(name)[0])
    layout = walk_headers(source.config, source.shapes)
    for i in range(0, len(layout.units), 3):
        view = layout.views[i]
        kind = source.precision(view.tensor)
        rows, cols = int(layout.units.rows[i]), int(layout.units.cols[i])
        stream = source.kept(view)
        blocks = math.ceil(rows / 128) * math.ceil(cols / 128)
        bits = {"mxfp4": rows * cols * 17 // 4, "fp8-block": rows * cols * 8 + 32 * blocks}
        assert 8 * len(stream) == bits[kind]
        found = restore(stream, kind, rows, cols)
        assert torch.equal(
            found, matrix(layout, i, {view.tensor: source.read(view.tensor)}).float()
        )


def test_a_16_bit_matrix_is_kept_as_it_is(gpt_oss):
    source = Checkpoint.open(gpt_oss[1])
    layout = walk_headers(source.config, source.shapes)
    view = layout.views[0]
    assert source.precision(view.tensor) == "bf16"
    assert source.precision("model.norm.weight") == "bf16"
    kept = source.kept(view).view(torch.bfloat16).view(64, 32)
    assert torch.equal(kept, view.of(source.read(view.tensor)))


def test_agrees_with_transformers_on_mxfp4(tmp_path):
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 8, 5), generator=generator, dtype=torch.uint8)
    tensors = {"x_blocks": blocks, "x_scales": scales}
    source = Checkpoint.open(write(tmp_path / "m", tensors, {"model_type": "gpt_oss"}))
    assert source.shapes == {"x": ("BF16", (3, 160, 8))}
    assert torch.equal(source.read("x"), convert(blocks, scales))


@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_agrees_with_transformers_on_fp8(shape, dtype, tmp_path):
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    scales = (torch.rand(grid, generator=generator) + 0.1).to(dtype)
    tensors = {"x": codes, "x_scale_inv": scales}
    source = Checkpoint.open(write(tmp_path / "m", tensors, {}))
    theirs = integration.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(source.read("x"), theirs)


def test_fp8_blocks_of_another_size(tmp_path):
    codes, scales, weights = fp8(40, 50, block=16)
    config = {"quantization_config": FP8 | {"weight_block_size": [16, 16]}}
    folder = write(tmp_path / "m", {"x.weight": codes, "x.weight_scale_inv": scales}, config)
    source = Checkpoint.open(folder)
    assert torch.equal(source.read("x.weight"), weights)
    assert source.precision("x.weight") == ""
    with pytest.raises(
        ModelError, match=r"x\.weight: the scales of this matrix cannot be separated"
    ):
        source.kept(View(tensor="x.weight"))


def test_fp8_without_scales_is_left_alone(tmp_path):
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    source = Checkpoint.open(write(tmp_path / "m", {"x": codes}, {}))
    assert source.shapes == {"x": ("F8_E4M3", (4, 4))}
    assert source.precision("x") == "fp8"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8)},
            "x_blocks: no x_scales in the checkpoint; is a shard missing?",
        ),
        (
            {
                "x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8),
                "x_scales": torch.zeros(1, 2, 4, dtype=torch.uint8),
            },
            "x_scales: U8 [1, 2, 4], but x_blocks needs U8 [1, 2, 3]",
        ),
        (
            {
                "w": torch.zeros(130, 4).to(torch.float8_e4m3fn),
                "w_scale_inv": torch.ones(1, 1),
            },
            "w_scale_inv: F32 [1, 1], but blocks of 128 x 128 of [130, 4] need F32 [2, 1]",
        ),
        (
            {
                "w": torch.zeros(4, 4).to(torch.float8_e4m3fn),
                "w_scale_inv": torch.ones(1, 1, dtype=torch.int32),
            },
            "w_scale_inv: I32 [1, 1], but blocks of 128 x 128 of [4, 4] need F32 [1, 1]",
        ),
    ],
)
def test_codes_and_scales_that_do_not_fit(tensors, message, tmp_path):
    folder = write(tmp_path / "m", tensors, {})
    with pytest.raises(FileError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value) == f"{folder / 'model.safetensors'}: {message}"


def test_a_matrix_that_shares_blocks_cannot_be_kept(tmp_path):
    codes, scales, _ = fp8(200, 8)
    source = Checkpoint.open(write(tmp_path / "m", {"x": codes, "x_scale_inv": scales}, {}))
    for view in (View(tensor="x", start=0, stop=100), View(tensor="x", start=100, stop=200)):
        with pytest.raises(ModelError, match="x: the scales of this matrix cannot be separated"):
            source.kept(view)
    whole = source.kept(View(tensor="x", start=128, stop=200))
    assert torch.equal(restore(whole, "fp8-block", 72, 8), source.read("x")[128:200].float())


def test_a_lone_nan_scale_is_seen(tmp_path):
    blocks, scales, _ = mxfp4(1, 2, 1)
    scales[0, 0, 0] = 255
    tensors = {"x_blocks": blocks, "x_scales": scales}
    read = Checkpoint.open(write(tmp_path / "m", tensors, {})).read("x")
    assert not torch.isfinite(read[0, :, 0]).all()
    assert torch.isfinite(read[0, :, 1]).all()


def plans(folders, options):
    """Return one plan, mixed at random, for the checkpoint in few bits and for the one in 16."""
    sources = [Checkpoint.open(folder) for folder in folders]
    units = walk_headers(sources[0].config, sources[0].shapes).units
    return [random_plan(units, options, model=source.fingerprint) for source in sources]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_quantizes_to_the_streams_of_the_16_bit_model(name, request, tmp_path):
    folders = request.getfixturevalue(name)
    options = formats((2, 4), (8, "row"))
    outs = tmp_path / "low", tmp_path / "plain"
    for folder, plan, out in zip(folders, plans(folders, options), outs, strict=True):
        sizes = bitknap.quantize(folder, plan, out)
        assert sizes["predicted"] == sizes["written"]
    low, plain = map(Checkpoint.open, outs)
    assert low.config["quantization_config"]["quant_method"] == "bitknap"
    assert low.shapes == plain.shapes
    assert all(torch.equal(low.read(n), plain.read(n)) for n in plain.headers)
    # What is not quantized is decoded: transformers reads it, too.
    assert not low.low_bit
    assert low.nbytes == plain.nbytes
    ours, theirs = (bitknap.load(out).state_dict() for out in outs)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert ours.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("gpt_oss", "mxfp4"), ("deepseek", "fp8-block")])
def test_a_plan_may_keep_what_the_source_has(name, kind, request, tmp_path):
    if kind not in str(format._KEPT_BITS):
        pytest.skip(f"Format.keep does not know {kind} yet")
    folders = request.getfixturevalue(name)
    plan, _ = plans(folders, (*formats(2, 8), Format.keep(kind)))
    sizes = bitknap.quantize(folders[0], plan, tmp_path / "out")
    assert sizes["predicted"] == sizes["written"] == plan.total_bytes
    model = bitknap.load(tmp_path / "out")
    layout = walk(model)
    source = Checkpoint.open(folders[0])
    stored = walk_headers(source.config, source.shapes)
    tensors = dict(model.named_parameters())
    for i in np.flatnonzero(plan.choice == 1):
        found = matrix(layout, int(i), tensors).float()
        assert torch.equal(found, source.read_matrix(stored.views[i]).float())
