"""The reference implementation of every kernel in plain torch; also runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitknap.kernels.experts import Activation, Experts
from bitknap.kernels.experts_table import expert_weights

OAI_LIMIT, OAI_ALPHA = 7.0, 1.702  # transformers' GptOssExperts


def activate(gate: Tensor | None, up: Tensor, activation: Activation) -> Tensor:
    """Return act(gate) · up, or act(up) where there is no gate, in their dtype."""
    if activation == "swiglu_oai":
        assert gate is not None
        gate = gate.clamp(max=OAI_LIMIT)
        up = up.clamp(-OAI_LIMIT, OAI_LIMIT)
        return (up + 1) * gate * torch.sigmoid(OAI_ALPHA * gate)
    value = up if gate is None else gate
    if activation == "silu":
        value = functional.silu(value)
    elif activation == "gelu":
        value = functional.gelu(value)
    elif activation == "gelu_tanh":
        value = functional.gelu(value, approximate="tanh")
    else:
        value = functional.relu(value)
        value = value.square() if activation == "relu2" else value
    return value if gate is None else value * up


def gate_up(x: Tensor, index: Tensor, experts: Experts) -> Tensor:
    """Return the activated intermediate of every pair of a token and one of its experts.

    Args:
        x: [T, H].
        index: expert of each pair, [T, k]; an expert that is not on this device gives zeros.
        experts: experts of the layer.

    Returns:
        [T · k, I] in the dtype of `x`; computed in float32.
    """
    k = index.shape[1]
    hidden = x.new_zeros(index.numel(), experts.intermediate)
    for expert, pairs in _pairs(index, len(experts)):
        rows = x[pairs // k].float()
        up = rows @ expert_weights(experts.up, expert).T
        if experts.up_bias is not None:
            up += experts.up_bias[expert].float()
        gate = None
        if experts.gate is not None:
            gate = rows @ expert_weights(experts.gate, expert).T
            if experts.gate_bias is not None:
                gate += experts.gate_bias[expert].float()
        hidden[pairs] = activate(gate, up, experts.activation).to(x.dtype)
    return hidden


def down(hidden: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Return each token's weighted sum of the outputs of its experts.

    Args:
        hidden: [T · k, I].
        index: expert of each pair, [T, k].
        weights: weights of each pair, [T, k].
        experts: experts of the layer.

    Returns:
        [T, H] in the dtype of `hidden`; computed in float32, experts in ascending order.
    """
    tokens, k = index.shape
    out = torch.zeros(tokens, experts.hidden, device=hidden.device)
    for expert, pairs in _pairs(index, len(experts)):
        y = hidden[pairs].float() @ expert_weights(experts.down, expert).T
        if experts.down_bias is not None:
            y += experts.down_bias[expert].float()
        out.index_add_(0, pairs // k, y * weights.reshape(-1)[pairs, None].float())
    return out.to(hidden.dtype)


def moe(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Return the result of `kernels.moe.moe`, [T, H] in the dtype of `x`."""
    return down(gate_up(x, index, experts), index, weights, experts)


def _pairs(index: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """Return (expert, its pairs) for every expert that is on this device and has pairs."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(0, experts), minlength=experts + 1)[:experts].tolist()
    parts = order[: sum(counts)].split(counts)
    return [(expert, pairs) for expert, pairs in enumerate(parts) if len(pairs)]
