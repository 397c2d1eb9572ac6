"""Rounding, packing and loading stay where the weights are: no tensor of another device slips in.

The meta device stands for an accelerator: it computes nothing, and refuses operands elsewhere. The
tests marked gpu compare a real one with the CPU.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bitknap
from bitknap.allocation import BitPlan, Format
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed.dequantize import unpacked
from bitknap.quantization.packed.plain_bytes import decode, encode
from bitknap.quantization.packed.tiled_bytes import decode_tiles, encode_tiles, to_plain, to_tiles
from bitknap.quantization.rounding import gptq, rtn
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.methods import Gptq, Hqq, Rtn
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.apply import apply
from bitknap.quantization.stacks.quantize_plan import quantize_plan
from bitknap.quantization.stacks.reading import read_units
from bitknap.testing import tiny_model

GRIDS = [
    "int1-row-sym",
    "int2-g64-asym-compact",
    "int3-g32-asym",
    "int4-row-asym-compact6",
    "int8-g128-sym-compact",
]
ROWS, COLS = 96, 200
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_stand_in_refuses_tensors_elsewhere():
    there, here = torch.empty(4, 4, device="meta"), torch.ones(4, 4)
    for mixed in (lambda: there + here, lambda: torch.where(there > 0, there, here)):
        with pytest.raises(RuntimeError, match="device"):
            mixed()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_bytes_are_where_the_weights_are(name):
    format = Format.parse(name)
    quantized = rtn.quantize(torch.empty(ROWS, COLS, device="meta"), format)
    plain, tiles = encode(quantized), encode_tiles(quantized)
    made = [
        plain,
        tiles,
        decode(plain, format, ROWS, COLS).dequantize(),
        decode_tiles(tiles, format, ROWS, COLS).dequantize(),
        to_tiles(plain, format, ROWS, COLS),
        to_plain(tiles, format, ROWS, COLS),
        unpacked(plain, format, ROWS, COLS),
        unpacked(tiles, format, ROWS, COLS, "tiles"),
    ]
    assert {tensor.device.type for tensor in made} == {"meta"}
    assert len(plain) == format.nbytes(ROWS, COLS)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_brings_what_it_needs_to_the_weights(name, act_order, monkeypatch):
    # Are the moments finite, did the factorization fail: nobody can read that off a stand-in.
    answers = [True, False]
    monkeypatch.setattr(gptq, "bool", lambda _: answers.pop(0), raising=False)
    found = gptq.quantize(
        torch.empty(2, 48, COLS, device="meta"),
        Format.parse(name),
        torch.empty(2, COLS, COLS),
        damping=torch.empty(2),
        act_order=act_order,
        wider=1.2,
    )
    assert found.codes.device.type == found.grid.scale.device.type == "meta"
    assert answers == []


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, ROWS, COLS, generator=generator) * 0.05
    x = torch.randn(3, 400, COLS, generator=generator)
    moments = x.mT @ x / 400
    return SimpleNamespace(
        weights=weights, inputs=Inputs(moments=moments, tokens=torch.tensor([400, 30, 0]))
    )


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("rounding", [Rtn(), Hqq(), Gptq()], ids=lambda way: way.name)
@pytest.mark.parametrize("name", GRIDS)
def test_an_accelerator_rounds_as_the_cpu_does(name, rounding, case):
    format = Format.parse(name)
    here = rounding.quantize(case.weights, format, case.inputs)
    there = rounding.quantize(case.weights.cuda(), format, case.inputs)
    assert there.codes.is_cuda
    flat = case.weights.flatten(0, 1)
    errors = [(q.dequantize().cpu() - flat).square().sum() for q in (here, there)]
    # Sums in another order move a few ties, and GPTQ passes each on to later columns.
    assert abs(errors[1] / errors[0] - 1) < 0.02
    same = (here.codes == there.codes.cpu()).float().mean()
    assert same > (0.9 if rounding.needs_inputs else 0.995)


def on_gpu(grid):
    moved = {
        key: None if part is None else part.cuda()
        for key, part in (("scale", grid.scale), ("share", grid.share), ("zero", grid.zero))
    }
    return replace(grid, **moved)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("name", GRIDS)
def test_an_accelerator_packs_the_very_bytes(name, case):
    format = Format.parse(name)
    here = rtn.quantize(case.weights.flatten(0, 1), format)
    there = Quantized(grid=on_gpu(here.grid), codes=here.codes.cuda())
    for pack, read in ((encode, decode), (encode_tiles, decode_tiles)):
        assert torch.equal(pack(there).cpu(), pack(here))
        back = read(pack(there), format, 3 * ROWS, COLS).dequantize()
        assert torch.equal(back.cpu(), here.dequantize())


@pytest.mark.gpu
@CUDA
def test_a_plan_is_applied_and_loaded_on_an_accelerator(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    layout = walk(model)
    plan = BitPlan.uniform(layout.units, Format.parse("int3-g8-asym"), source.fingerprint)
    bitknap.quantize(tmp_path / "model", plan, tmp_path / "out")
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bitknap.load(tmp_path / "out", torch.float32)(input_ids=tokens).logits
        for packed in (False, True):
            there = bitknap.load(tmp_path / "out", torch.float32, packed=packed).cuda()
            found = there(input_ids=tokens.cuda()).logits.cpu()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        live = model.float().cuda()
        apply(live, layout, plan)
        found = live(input_ids=tokens.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    tensors = dict(live.named_parameters())
    for _, rounded in quantize_plan(plan, lambda which: read_units(layout, which, tensors)):
        assert isinstance(rounded, Quantized)
        assert rounded.codes.is_cuda
