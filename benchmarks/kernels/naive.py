"""The usual Triton matmul with 4-bit experts, as a baseline for Bitknap's kernels.

Words hold eight codes along the inputs, [E, K / 8, N]; each word is loaded eight times and shifted
by the position, codes become floats, and scales and zeros are applied to every weight. Pairs of a
token and an expert are sorted by expert, and a program takes one tile of pairs of one expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N, _BLOCK_K = 64, 64


@triton.jit
def _product(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, out_ptr, pairs_ptr, starts_ptr, counts_ptr,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
    EP: tl.constexpr, DIVISOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, EP)
    counts = tl.load(counts_ptr + experts, mask=experts < EXPERTS, other=0)
    tiles = (counts + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    before = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    place = (tile - before) * BM + tl.arange(0, BM)
    known = place < count
    pair = tl.load(pairs_ptr + tl.load(starts_ptr + expert) + place, mask=known, other=0)
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    here = n < N
    base = expert.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        at = first + k
        inside = at < K
        x = tl.load(
            x_ptr + (pair // DIVISOR)[:, None] * K + at[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        both = inside[:, None] & here[None, :]
        words = tl.load(
            words_ptr + base * (K // 8 * N) + (at // 8)[:, None] * N + n[None, :],
            mask=both,
            other=0,
        )
        group = base * (K // GROUP * N) + (at // GROUP)[:, None] * N + n[None, :]
        scale = tl.load(scales_ptr + group, mask=both, other=0.0)
        zero = tl.load(zeros_ptr + group, mask=both, other=0.0)
        code = ((words >> (at % 8 * 4)[:, None]) & 15).to(x.dtype)
        acc = tl.dot(x, ((code - zero) * scale).to(x.dtype), acc)
    out = out_ptr + pair[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=known[:, None] & here[None, :])


class Naive:
    """A layer in that layout, with random weights.

    Attributes:
        words: gate and up [E, H / 8, 2I], down [E, I / 8, H], int32.
        scales: scales of groups, in the dtype of activations.
        zeros: zero points of groups, in the dtype of activations.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        group: int,
        dtype: torch.dtype,
        device: str,
        seed: int = 0,
    ) -> None:
        random = torch.Generator(device=device).manual_seed(seed)
        self.shapes = {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
        self.group, self.experts = group, experts
        self.words, self.scales, self.zeros = {}, {}, {}
        for name, (n, k) in self.shapes.items():
            size, across = (experts, k // 8, n), (experts, k // group, n)
            words = torch.randint(-(2**31), 2**31 - 1, size, device=device, generator=random)
            self.words[name] = words.int()
            scale = torch.rand(across, device=device, generator=random) + 0.5
            self.scales[name] = (scale / (4 * k**0.5)).to(dtype)
            zero = torch.randint(6, 10, across, device=device, generator=random)
            self.zeros[name] = zero.to(dtype)

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the layer's output [T, H]; nothing is read back to the host."""
        top_k, flat = index.shape[1], index.reshape(-1)
        order = torch.argsort(flat).int()
        ones = torch.ones_like(flat, dtype=torch.int32)
        counts = torch.zeros(self.experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, flat, ones)
        starts = counts.cumsum(0, dtype=torch.int32) - counts
        routing = (order, starts, counts)
        gate, up = self._product("gate_up", x, routing, len(flat), top_k).chunk(2, 1)
        inner = torch.nn.functional.silu(gate) * up
        y = self._product("down", inner, routing, len(flat), 1)
        y = y.view(len(x), top_k, -1).float() * weights[..., None].float()
        return y.sum(1).to(x.dtype)

    def _product(
        self, name: str, x: Tensor, routing: tuple[Tensor, ...], pairs: int, divisor: int
    ) -> Tensor:
        n, k = self.shapes[name]
        out = x.new_empty(pairs, n)
        block = 16 if pairs < 32 * self.experts else 64
        tiles = min(pairs, (pairs + min(self.experts, pairs) * (block - 1)) // block)
        _product[(tiles, triton.cdiv(n, _BLOCK_N))](
            x.contiguous(), self.words[name], self.scales[name], self.zeros[name], out, *routing,
            N=n, K=k, GROUP=self.group, EXPERTS=self.experts,
            EP=triton.next_power_of_2(self.experts), DIVISOR=divisor,
            BM=block, BN=_BLOCK_N, BK=_BLOCK_K,
        )  # fmt: skip
        return out

    def weights(self, name: str) -> Tensor:
        """Return the dequantized weights, float32 [E, K, N], for tests."""
        shifts = torch.arange(8, device=self.words[name].device) * 4
        codes = (self.words[name][:, :, None] >> shifts[:, None]) & 15
        codes = codes.flatten(1, 2).float()
        scale, zero = (
            part[name].float().repeat_interleave(self.group, 1)
            for part in (self.scales, self.zeros)
        )
        return (codes - zero) * scale
