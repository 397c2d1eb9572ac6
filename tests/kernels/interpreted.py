"""Runs cases of the kernels in Triton's interpreter and prints their errors as JSON.

A process of its own: Triton decides at import whether it interprets. Blocks are large and programs
few, since a program costs milliseconds whatever its size. Run as `python interpreted.py NAME`.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from bitknap.kernels import reference
from bitknap.kernels.experts import opened
from bitknap.kernels.launch import Launch, Tile
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.random_experts import Structure, made_up_experts
from bitknap.kernels.run_triton import Execution, run
from bitknap.testing.recipes import GRIDS, KEPT, WIDTHS

FLOAT, HALF = torch.float32, torch.float16


def decode(tokens=8, rows=64, split=1):
    gate_up, down = Tile(rows=rows), Tile(rows=128, split=split)
    return Launch(path="decode", tokens=tokens, gate_up=gate_up, down=down)


def grouped(tokens):
    return Launch(path="grouped", tokens=tokens, gate_up=Tile(rows=64), down=Tile(rows=128))


NARROW = Launch(path="decode", tokens=8, gate_up=Tile(columns=64), down=Tile(rows=128, columns=32))
DENSE = Launch(path="dense", tokens=64, gate_up=Tile(), down=Tile())

# Two of each matrix: three experts. Of 48 and 144 rows, 80 and 48, and so on: tiles have tails.
BLOCKS = {"blocks": 2, "biased": True}
SCALED = [
    Recipe(bits=3, group=32, scaled=True),
    Recipe(bits=4, group=64, symmetric=True, scaled=True),
    Recipe(bits=5, group=32, share=8, scaled=True),
    Recipe(bits=2, group=32, share=6, symmetric=True, scaled=True),
    Recipe(bits=3, group=32),
]

# recipes, tokens, experts a token, hidden, intermediate, launch, compute, more of the experts
CASES: dict[str, Any] = {
    "every width": (WIDTHS, 4, 2, 256, 64, decode(), HALF, {}),
    "every grid": (GRIDS, 4, 2, 288, 96, decode(rows=32), FLOAT, {"biased": True}),
    "tails alone": (GRIDS, 3, 3, 224, 40, decode(), FLOAT, {"activation": "gelu"}),
    "gate differs": (GRIDS[:3], 2, 2, 64, 64, decode(), FLOAT, {"gate": GRIDS[2::-1]}),
    "runs": (GRIDS[1:3], 1, 2, 64, 768, decode(16, split=2), FLOAT, {"activation": "gelu_tanh"}),
    "no gate": (GRIDS[:2], 1, 2, 64, 64, decode(), FLOAT, {"gated": False, "activation": "relu2"}),
    "gpt-oss": (
        [WIDTHS[3], KEPT],
        1,
        2,
        64,
        64,
        decode(),
        FLOAT,
        {"activation": "swiglu_oai", "biased": True},
    ),
    "sums scaled": (GRIDS[:4], 20, 2, 288, 64, grouped(16), FLOAT, {"biased": True}),
    "weights scaled": (WIDTHS[1:4], 20, 2, 256, 64, grouped(64), HALF, {}),
    "dense": ([*GRIDS[:4], KEPT], 20, 2, 96, 64, DENSE, FLOAT, {"biased": True}),
    "sums launched": (GRIDS[:4], 6, 2, 288, 160, decode(rows=32), FLOAT, {"biased": True}),
    "narrow products": (WIDTHS[1:4], 4, 2, 512, 64, NARROW, HALF, {}),
    "row blocks": ([*GRIDS[:5], KEPT], 4, 2, 288, 96, decode(rows=32), FLOAT, BLOCKS),
    "row blocks, grouped": ([*GRIDS[:5], KEPT], 20, 2, 96, 160, grouped(16), FLOAT, BLOCKS),
    "row blocks, dense": ([*GRIDS[:5], KEPT], 20, 2, 96, 64, DENSE, FLOAT, BLOCKS),
    "exponents": (SCALED, 4, 2, 288, 96, decode(rows=32), FLOAT, {"biased": True}),
    "exponents of gate": (SCALED[:1], 2, 1, 64, 64, decode(), FLOAT, {"gate": GRIDS[:1]}),
    "exponents, grouped": (SCALED, 20, 2, 96, 64, grouped(16), FLOAT, {}),
    "exponents, weights scaled": (SCALED, 20, 2, 64, 64, grouped(64), HALF, {}),
    "exponents, dense": (SCALED, 20, 2, 96, 64, DENSE, FLOAT, {}),
}
ALIKE = {HALF: 2e-3, FLOAT: 2e-6}


def inputs(experts, tokens, topk, hidden, dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    # In turn, so that a few tokens reach every expert.
    index = torch.arange(tokens * topk).view(tokens, topk) % experts
    return x, index, torch.rand(tokens, topk, generator=random)


def error(name):
    """Return the relative error, over what is alike in this precision."""
    recipes, tokens, topk, hidden, inner, launch, compute, more = CASES[name]
    experts = made_up_experts(recipes, hidden, inner, Structure(**more))
    count = len(experts)
    x, index, weights = inputs(count, tokens, topk, hidden, compute)
    if name == "every grid":
        index[0, 1], index[1, 0], index[1, 1] = index[0, 0], count, 1 << 40
    expected = index.where(index <= count, count)
    expected = reference.moe(x, expected, weights, experts).float()
    how = opened(list(experts.tensors), experts.how)
    execution = Execution(compute=compute, asm=False)
    found = run(x, index, weights, how, launch, execution)
    again = run(x, index, weights, how, launch, execution) if name == "runs" else found
    assert torch.equal(found, again)
    return float((found.float() - expected).norm() / expected.norm()) / ALIKE[compute]


if __name__ == "__main__":
    print(json.dumps({name: error(name) for name in sys.argv[1:] or CASES}))
