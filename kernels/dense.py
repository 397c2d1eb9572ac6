"""The path for very many tokens: dequantize weights once, then use torch's grouped product.

Reading 16-bit weights once costs less than unpacking them for every tile of tokens. The price is
memory: the weights of gate and up at the same time, then those of down, in the dtype of the
activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bitknap.kernels.experts import Opened, Stack
from bitknap.kernels.reference import activate


def dense_moe(
    x: Tensor,
    weights: Tensor,
    pairs: Tensor,
    ends: Tensor,
    experts: Opened,
    dequantized: Callable[[Stack], Tensor],
) -> Tensor:
    """Return each pair's weighted output, [T · k, H] in the dtype of `x`.

    Rows of pairs whose expert is not on this device stay uninitialised. Nothing is copied to the
    host.

    Args:
        x: activations [T, H].
        weights: weights of each pair, [T, k].
        pairs: pairs sorted by expert, int32 [T · k]; T · k past the last one with an expert on this
            device.
        ends: one past the last pair of each expert, int32 [E].
        experts: experts of the layer.
        dequantized: returns a projection's weights [E, outputs, inputs] in the dtype of `x`.
    """
    count, k = weights.numel(), weights.shape[1]
    known = pairs.clamp(max=count - 1)
    rows = x[known // k]
    # Expert of each row; past the last pair any expert will do.
    numbers = torch.arange(count, device=x.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, numbers, right=True).clamp_(max=len(ends) - 1)

    def product(inputs: Tensor, stack: Stack, bias: Tensor | None) -> Tensor:
        y = functional.grouped_mm(inputs, dequantized(stack).transpose(1, 2), offs=ends)
        return y.float() if bias is None else y.float() + bias[expert].float()

    gate = product(rows, experts.gate, experts.gate_bias) if experts.gate else None
    hidden = activate(gate, product(rows, experts.up, experts.up_bias), experts.activation)
    y = product(hidden.to(x.dtype), experts.down, experts.down_bias)
    y *= weights.view(-1)[known, None].float()
    # One extra row takes the outputs past the last pair.
    part = torch.empty(count + 1, y.shape[1], dtype=x.dtype, device=x.device)
    return part.index_copy_(0, pairs.long(), y.to(x.dtype))[:count]
