"""Other quantizers behind one signature, each with its own defaults except for the format.

HQQ's package (`hqq.core.quantize.Quantizer`), the GPTQ of llm-compressor
(`modifiers.gptq.gptq_quantize`, scales by its observers) and rounding to nearest of
compressed-tensors, the storage library of llm-compressor. All are optional.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format

PACKAGES = ("hqq", "llmcompressor", "compressed_tensors")
Scales = Literal["min-max", "mse"]


def installed(package: str) -> bool:
    """Return whether a package is installed; True for ""."""
    return not package or find_spec(package) is not None


def hqq_fits(format: Format) -> bool:
    """Return whether HQQ's package has this grid: real zeros, one scale a group."""
    return not format.symmetric and format.metadata == "fp16"


def hqq_packed(weight: Tensor, format: Format, *, optimize: bool) -> Tensor:
    """Return codes [rows, cols] packed by HQQ's package; without `optimize`, on a min-max grid."""
    codes, _ = _hqq(weight, format, optimize=optimize, bitpack=True)
    return codes


def hqq_values(weights: Tensor, format: Format, *, optimize: bool) -> Tensor:
    """Return weights [n, rows, cols] rounded by HQQ's package, float32; metadata stay float32."""
    values = []
    for weight in weights.float():
        codes, meta = _hqq(weight, format, optimize=optimize, bitpack=False)
        values.append(((codes.float() - meta["zero"]) * meta["scale"]).view_as(weight))
    return torch.stack(values)


def _hqq(weight: Tensor, format: Format, *, optimize: bool, bitpack: bool) -> tuple[Tensor, Any]:
    codes, meta = import_module("hqq.core.quantize").Quantizer.quantize(
        weight,
        nbits=format.bits,
        group_size=format.group_size or weight.shape[1],
        optimize=optimize,
        axis=1,
        bitpack=bitpack,
        device=weight.device.type,
    )
    return codes, meta


def tensors_fit(format: Format) -> bool:
    """Return whether compressed-tensors has this grid; its zeros are integers among the codes."""
    return not format.compact and format.bits > 1


def tensors_packed(weight: Tensor, format: Format) -> Tensor:
    """Return codes [rows, cols] on compressed-tensors' min-max grid, packed by that library."""
    args = _arguments(format, act_order=False)
    weight = weight.float()
    scale, zero = _scales(weight, args, "min-max")
    return _packed(weight, scale, zero, args)


def llm_gptq(
    weights: Tensor, format: Format, moments: Tensor, *, act_order: bool, scales: Scales
) -> Tensor:
    """Return weights [n, rows, cols] rounded by llm-compressor's GPTQ, float32.

    Args:
        weights: weights to round.
        format: format, symmetric or with integer zeros.
        moments: E x xᵀ of each matrix, [n, cols, cols]; not modified.
        act_order: take columns by descending diagonal, with scales fixed before ("weight").
        scales: from min-max ranges, its default, or from its search for the least error.
    """
    rounded, _, _, _ = _gptq(weights, format, moments, act_order=act_order, scales=scales)
    return rounded


def llm_gptq_packed(weight: Tensor, format: Format, moments: Tensor) -> Tensor:
    """Return the codes [rows, cols] of llm-compressor's GPTQ, packed as in its checkpoints."""
    weights = weight.float().unsqueeze(0)
    rounded, scale, zero, args = _gptq(
        weights, format, moments.unsqueeze(0), act_order=True, scales="min-max"
    )
    return _packed(rounded[0], scale[0], zero[0], args)


def _gptq(
    weights: Tensor, format: Format, moments: Tensor, *, act_order: bool, scales: Scales
) -> tuple[Tensor, Tensor, Tensor, Any]:
    gptq = import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    args = _arguments(format, act_order=act_order)
    pairs = [_scales(weight, args, scales) for weight in weights]
    scale, zero = (torch.stack(part) for part in zip(*pairs, strict=True))
    # It modifies its arguments.
    rounded, _, _ = gptq.quantize_weight(
        weights.clone(), moments.clone(), scale, zero, None, args, percdamp=0.01
    )
    return rounded, scale, zero, args


def _arguments(format: Format, *, act_order: bool) -> Any:
    size = format.group_size
    return import_module("compressed_tensors.quantization").QuantizationArgs(
        num_bits=format.bits,
        symmetric=format.symmetric,
        strategy="group" if size else "channel",
        group_size=size or None,
        actorder="weight" if act_order and size else None,
    )


def _scales(weight: Tensor, args: Any, scales: Scales) -> tuple[Tensor, Tensor]:
    if scales == "mse":
        search = import_module("llmcompressor.observers.mse").MemorylessMSEObserver
        parameters = search(base_name="weight", args=args)(weight).get_qparams()
        return parameters["scale"], parameters["zero_point"]
    utils = import_module("compressed_tensors.quantization.utils")
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return scale, zero


def _packed(weight: Tensor, scale: Tensor, zero: Tensor, args: Any) -> Tensor:
    forward = import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    codes = forward.quantize(weight, scale, zero, args, dtype=torch.int8)
    packed: Tensor = helpers.pack_to_int32(codes, args.num_bits)
    return packed
