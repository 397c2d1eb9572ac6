"""Routed experts of any bit widths as one operator, `bitknap::moe`.

On a CUDA device (torch counts AMD devices as CUDA) it launches a few Triton kernels; elsewhere it
runs the reference implementation in plain torch. On a GPU the operator copies no tensor to the host
and allocates nothing whose size depends on routing, so a CUDA graph can capture it; torch.compile
sees it as one opaque call.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.kernels import reference
from bitknap.kernels.experts import Experts, Opened, opened
from bitknap.kernels.launch import Case, Device, Launch, check, choose
from bitknap.kernels.layout.kinds import check_runnable

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def moe(
    x: Tensor, index: Tensor, weights: Tensor, experts: Experts, launch: Launch | None = None
) -> Tensor:
    """Return Σ_j weights[t, j] · down_e(act(gate_e x_t) ⊙ up_e x_t) with e = index[t, j].

    Args:
        x: activations [T, H]; bf16 or fp16, and float32 without a GPU.
        index: experts of each token, int32 or int64 [T, k]. The id E, the sentinel of expert
            parallelism, is skipped. Other ids out of range are an error on the CPU; on a GPU, where
            checking would stall the stream, they are skipped too.
        weights: weights of each token's experts, [T, k], any float dtype.
        experts: experts of the layer, on the same device.
        launch: how kernels are launched; chosen from the shapes if None. Ignored without a GPU.

    Returns:
        [T, H] in the dtype of `x`, accumulated in float32; zeros where a token has no expert.

    Raises:
        InputError: shapes, dtypes or ids do not match; on a GPU, kernels do not support a group
            size.
    """
    _check(x, index, weights, experts)
    out: Tensor = torch.ops.bitknap.moe(
        x.contiguous(),
        index.contiguous(),
        weights.contiguous(),
        experts.tensors,
        experts.how,
        launch.text() if launch else "",
    )
    return out


@torch.library.custom_op("bitknap::moe", mutates_args=())
def _moe(
    x: Tensor, index: Tensor, weights: Tensor, tensors: list[Tensor], how: str, launch: str
) -> Tensor:
    experts = opened(tensors, how)
    if x.is_cuda:
        return _by_triton(x, index, weights, experts, launch)
    count = len(experts.up)
    if index.numel() and not bool(((index >= 0) & (index <= count)).all()):
        raise InputError(
            f"expert ids {int(index.min())} to {int(index.max())}: must be 0 to {count - 1}, or "
            f"{count} for an expert on another device"
        )
    return reference.moe(x, index, weights, experts.experts())


@_moe.register_fake
def _(
    x: Tensor, index: Tensor, weights: Tensor, tensors: list[Tensor], how: str, launch: str
) -> Tensor:
    return torch.empty_like(x)


def _by_triton(x: Tensor, index: Tensor, weights: Tensor, experts: Opened, launch: str) -> Tensor:
    from bitknap.kernels.run_triton import Execution, run  # Triton exists only on Linux

    if x.dtype == torch.float32:
        raise InputError("activations in torch.float32: a GPU takes bfloat16 or float16; cast them")
    for stack in (experts.gate, experts.up, experts.down):
        check_runnable(stack.kinds if stack else ())
    case = Case(
        tokens=len(x),
        topk=index.shape[1],
        experts=len(experts.up),
        hidden=experts.up.cols,
        intermediate=experts.up.rows,
    )
    device = device_of(x.device.index)
    how = Launch.parse(launch) if launch else choose(case, device)
    check(how, case)
    return run(x, index, weights, experts, how, Execution(asm=not device.amd))


@cache
def device_of(number: int) -> Device:
    """Return the properties of a GPU that launches depend on."""
    known = torch.cuda.get_device_properties(number)
    return Device(
        name=known.name,
        processors=known.multi_processor_count,
        generation=0 if torch.version.hip is not None else known.major,
    )


def _check(x: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> None:
    if x.dim() != 2 or x.shape[1] != experts.hidden:
        raise InputError(
            f"activations {tuple(x.shape)}: must be [tokens, {experts.hidden}]; flatten the batch"
        )
    if index.shape != weights.shape or index.dim() != 2 or len(index) != len(x):
        raise InputError(
            f"expert ids {tuple(index.shape)} and weights {tuple(weights.shape)}: must both be "
            f"[{len(x)}, k], as there are {len(x)} tokens"
        )
    if x.dtype not in _FLOATS:
        raise InputError(f"activations in {x.dtype}: must be bfloat16, float16 or float32")
    if index.dtype not in (torch.int32, torch.int64):
        raise InputError(f"expert ids in {index.dtype}: must be int32 or int64")
    if not weights.dtype.is_floating_point:
        raise InputError(f"weights of experts in {weights.dtype}: must be floats")
