"""Prepare packed experts for the kernels, or say why kernels cannot run them.

Kernels read streams in tiles. Streams of a tiled checkpoint are used unchanged; plain ones are
converted to tiles once, on their device, and `save_pretrained` converts them back bit for bit.
Everything else that a launch reads is in small tensors beside them, so a call costs the host
nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.kernels.experts import Activation, Experts
from bitknap.kernels.experts_table import ExpertsTable
from bitknap.kernels.layout.kinds import check_runnable, kind_of
from bitknap.kernels.reference import activate
from bitknap.quantization.packed.dequantize import KEPT
from bitknap.quantization.packed.tiled_bytes import experts_table, recipe
from bitknap.quantization.runtime.packed_weight import PackedWeight, Piece

# Test inputs for gate and up: small ones tell gelu from its approximation, large ones show a cap.
_PROBE = (-200.0, -20.0, -6.0, -2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 6.0, 20.0, 200.0)
_TOLERANCE = 1e-5


def kernel_experts(module: nn.Module, packed: Mapping[str, PackedWeight]) -> Experts:
    """Return a decorated experts module's weights for `kernels.moe`, its streams in tiles.

    Args:
        module: the experts, whose streams are on the device where they will run.
        packed: its packed parameters.

    Raises:
        InputError: kernels cannot run these experts; the message says why.
    """
    device = next(iter(packed.values())).device
    dtype = next(iter(packed.values())).dtype
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"activations in {dtype}: kernels take bfloat16 and float16")
    if getattr(module, "has_post_expert_norm", False):
        raise InputError(
            f"{_class(module)}: it normalizes the output of each expert, which kernels do not"
        )
    stacks = _projections(packed)
    gated = "gate" in stacks
    activation = activation_of(module, gated, device)
    experts = next(iter(packed.values())).shape[0]
    for pieces in stacks.values():
        _check(pieces, experts)
    for weight in packed.values():
        weight.lay("tiles")
    laid = _projections(packed)
    tables = {name: _table(pieces, experts, packed) for name, pieces in laid.items()}
    gate_bias, up_bias = _split_bias(module, gated)
    return Experts(
        gate=tables.get("gate"),
        up=tables["up"],
        down=tables["down"],
        activation=activation,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=_bias(module, "down_proj_bias"),
    )


def activation_of(module: nn.Module, gated: bool, device: torch.device) -> Activation:
    """Return the kernels' activation that gives the same values as the module's own.

    Raises:
        InputError: there is none.
    """
    values = torch.tensor(_PROBE, device=device)
    gate, up = values.repeat_interleave(len(values)), values.repeat(len(values))
    own: Any = module
    if not gated:
        actual = own.act_fn(up.clone())
    elif own.is_concatenated:
        actual = own._apply_gate(torch.cat([gate, up])[None])[0]
    else:
        actual = own._apply_gate(torch.stack([gate, up], 1).view(1, -1))[0]
    for name in get_args(Activation):
        if name == "swiglu_oai" and not gated:
            continue
        expected = activate(gate if gated else None, up, name)
        if torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            known: Activation = name
            return known
    raise InputError(
        f"{_class(module)}: kernels do not have its activation; they have "
        f"{', '.join(get_args(Activation))}"
    )


def check_formats(matrices: Collection[tuple[Format, int, int]]) -> None:
    """Raise unless kernels can run matrices of one projection.

    Args:
        matrices: format, rows and columns of each.

    Raises:
        InputError: they cannot; says why.
    """
    kept = {format.source for format, _, _ in matrices if format.kind == "keep"}
    if low := sorted(kept - KEPT.keys()):
        raise InputError(f"experts kept in {', '.join(low)}: kernels read {', '.join(KEPT)}")
    if len(kept) > 1:
        raise InputError(
            f"experts kept in {', '.join(sorted(kept))}: kernels read only one kept precision"
        )
    dtype = KEPT[kept.pop()] if kept else None
    check_runnable(tuple(kind_of(recipe(f, rows, cols), cols, dtype) for f, rows, cols in matrices))


def _projections(packed: Mapping[str, PackedWeight]) -> dict[str, list[Piece]]:
    """Return the units of each projection, ordered by expert, then by block of rows."""
    by_projection: defaultdict[str, list[Piece]] = defaultdict(list)
    for weight in packed.values():
        for expert in range(weight.shape[0]):
            for piece in sorted(weight.parts[expert], key=lambda piece: piece.start):
                # Streams are named after projections: bitknap_routed_gate.
                by_projection[piece.buffer.rpartition("_")[2]].append(piece)
    if not {"up", "down"} <= set(by_projection) <= {"gate", "up", "down"}:
        raise InputError(
            f"projections {', '.join(sorted(by_projection))}: kernels take gate, up and down"
        )
    return dict(by_projection)


def _check(pieces: Sequence[Piece], experts: int) -> None:
    """Raise unless kernels can run a projection's formats; called before streams are converted."""
    if len(pieces) % experts or len({piece.rows for piece in pieces}) > 1:
        raise InputError(
            f"{pieces[0].buffer}: its row blocks differ in length; kernels take blocks of one "
            "length"
        )
    check_formats({(piece.format, piece.rows, piece.cols) for piece in pieces})


def _table(
    pieces: Sequence[Piece], experts: int, packed: Mapping[str, PackedWeight]
) -> ExpertsTable:
    """Return the table that one launch needs to read a projection's stream."""
    first = pieces[0]
    holder = next(w.holders[first.buffer] for w in packed.values() if first.buffer in w.holders)
    stream = holder.get_buffer(first.buffer)
    at = 0
    for piece in pieces:
        if piece.start != at or (piece.rows, piece.cols) != (first.rows, first.cols):
            raise InputError(
                f"{first.buffer}: its experts are not stored one after the other, in order"
            )
        at = piece.stop
    blocks = len(pieces) // experts
    formats = [piece.format for piece in pieces]
    return experts_table(stream, formats, blocks * first.rows, first.cols, blocks)


def _split_bias(module: nn.Module, gated: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases [E, I] of gate and of up."""
    if not gated:
        return None, _bias(module, "up_proj_bias")
    both = _bias(module, "gate_up_proj_bias")
    if both is None:
        return None, None
    gate, up = both.chunk(2, 1) if module.is_concatenated else (both[:, ::2], both[:, 1::2])
    return gate.contiguous(), up.contiguous()


def _bias(module: nn.Module, name: str) -> Tensor | None:
    bias = getattr(module, name, None)
    return None if bias is None else bias.detach()


def _class(module: nn.Module) -> str:
    original: type[nn.Module] = getattr(module, "original", type(module))
    return original.__name__
