"""Every path on a GPU against the plain torch reference; before that, the lanes of inline PTX.

None of this ever ran yet: no GPU was at hand when it was written.
"""

import pytest
import torch

from bitknap.errors import InputError
from bitknap.kernels import reference
from bitknap.kernels.launch import Launch, Tile
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.moe import moe
from bitknap.kernels.random_experts import Structure, made_up_experts, made_up_table
from bitknap.testing.recipes import GRIDS, WIDTHS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16]
EVERY = (*GRIDS, WIDTHS[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_lanes_of_inline_assembly(bits, dtype):
    """Products with unit vectors give back single weights: a wrong lane shows as a wrong column."""
    from bitknap.kernels.experts import Experts
    from bitknap.kernels.experts_table import dequantize_tiles

    random = torch.Generator().manual_seed(bits)
    recipe, cols = Recipe(bits=bits, group=128), 256 + 128 + 64 + 32
    up = made_up_table([recipe], 64, cols, random)
    down = made_up_table([Recipe(bits=16, group=1, kept=1)], cols, 64, random)
    experts = Experts(up=_moved(up), down=_moved(down), activation="relu")
    weights = dequantize_tiles(up)[0]
    for first in range(0, cols, 16):
        x = torch.zeros(min(16, cols - first), cols)
        x[torch.arange(len(x)), first + torch.arange(len(x))] = 1
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        found = moe(x.cuda().to(dtype), index.cuda(), torch.ones(len(x), 1).cuda(), experts)
        hidden = weights[:, first : first + len(x)].T.relu().to(dtype).float()
        expected = hidden @ dequantize_tiles(down)[0].T
        torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def _moved(table):
    from dataclasses import fields, replace

    tensors = {
        f.name: getattr(table, f.name).cuda()
        for f in fields(table)
        if isinstance(getattr(table, f.name), torch.Tensor)
    }
    return replace(table, **tensors)


def agrees(recipes, tokens, topk, hidden, inner, dtype, launch=None, **more):
    """Run one layer on the GPU and in float32 on the CPU, and compare."""
    on_cpu = made_up_experts(recipes, hidden, inner, Structure(**more))
    on_gpu = made_up_experts(recipes, hidden, inner, Structure(**more), device="cuda")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    index = torch.rand(tokens, len(on_cpu), generator=random).argsort(1)[:, :topk]
    index[0, 0] = len(on_cpu)  # an expert that is elsewhere
    weights = torch.rand(tokens, topk, generator=random)
    expected = reference.moe(x, index, weights, on_cpu).float()
    arguments = (x.cuda(), index.cuda(), weights.cuda(), on_gpu, launch)
    found = moe(*arguments)
    assert found.dtype == dtype
    assert torch.equal(found, moe(*arguments)), "not the same twice"
    error = (found.float().cpu() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    return arguments, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40, 200, 3000])
@pytest.mark.parametrize("recipes", [WIDTHS, EVERY], ids=["widths", "grids"])
def test_every_path_agrees_with_the_reference(recipes, tokens, dtype):
    agrees(recipes, tokens, 2, 768, 1408, dtype)


@pytest.mark.parametrize("path", ["grouped", "dense"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
def test_every_tile_agrees_with_the_reference(path, tokens):
    warps = 8 if tokens > 32 else 4
    tile = Tile(rows=64, warps=warps, stages=2)
    launch = Launch(path=path, tokens=tokens, gate_up=tile, down=tile)
    agrees(EVERY, 100, 3, 608, 352, torch.bfloat16, launch, biased=True)


@pytest.mark.parametrize("tokens", [1, 5, 40, 3000])
def test_blocks_of_rows_agree_with_the_reference(tokens):
    # Two blocks of 304 and of 176 rows: neither is whole tiles.
    recipes = (*EVERY, *EVERY[::-1])
    agrees(recipes, tokens, 2, 608, 352, torch.bfloat16, blocks=2, biased=True)


def test_other_layers_agree_with_the_reference():
    for more in (
        {"gate": EVERY[::-1]},
        {"gated": False, "activation": "relu2"},
        {"biased": True, "activation": "swiglu_oai"},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
    ):
        for tokens in (3, 50):
            agrees(EVERY, tokens, 2, 288, 224, torch.bfloat16, **more)


@pytest.mark.parametrize("tokens", [4, 100, 4000])
def test_a_cuda_graph_holds_it(tokens):
    arguments, found = agrees(WIDTHS, tokens, 2, 256, 256, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(*arguments)
    arguments[1].copy_(arguments[1].roll(1, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, moe(*arguments))
    assert not torch.equal(out, found)


def test_torch_compile_takes_it():
    arguments, found = agrees(WIDTHS, 4, 2, 256, 256, torch.bfloat16)
    compiled = torch.compile(lambda *a: moe(*a, *arguments[3:]), fullgraph=True)
    assert torch.equal(compiled(*arguments[:3]), found)


def test_bad_input_on_a_gpu():
    experts = made_up_experts([Recipe(bits=4, group=40)], 80, 80, device="cuda")
    x = torch.zeros(1, 80, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(1, 1, device="cuda", dtype=torch.int64)
    with pytest.raises(InputError, match="group size 40: kernels take"):
        moe(x, index, torch.ones(1, 1, device="cuda"), experts)
    with pytest.raises(InputError, match=r"torch.float32: a GPU takes bfloat16 or float16"):
        moe(x.float(), index, torch.ones(1, 1, device="cuda"), experts)
    good = made_up_experts([Recipe(bits=4, group=32)], 80, 80, device="cuda")
    for wild in (-5, 1 << 40):
        assert not moe(x + 1, index + wild, torch.ones(1, 1, device="cuda"), good).any()
    assert moe(x[:0], index[:0], torch.ones(0, 1, device="cuda"), good).shape == (0, 80)
