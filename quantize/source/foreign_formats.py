"""Recognise tensors in unsupported quantized formats by name and dtype, and refuse them.

Codes mistaken for weights load without an error and are wrong a thousandfold. Tensors that
`low_bit_codes` does not decode are therefore refused when a checkpoint is opened, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitknap.errors import ModelError
from bitknap.quantization.source.safetensors_header import TensorInfo
from bitknap.quantization.source.source_config import METHOD, quantization_of

# Endings of tensor names, and the only format that uses them.
_ENDINGS = tuple(
    (re.compile(rf"(?:{ending})$"), format)
    for ending, format in (
        (r"[._](?:nested_)?(?:absmax|quant_map)", "bitsandbytes 4-bit"),
        (r"[._]quant_state[._].+", "bitsandbytes 4-bit"),
        (r"\.SCB|\.weight_format", "bitsandbytes 8-bit"),
        (r"[._]qweight_type", "GGUF"),
        (r"(?:^|[._])(?:qweight|qzeros|g_idx)", "GPTQ or AWQ"),
        (r"weight_scale_2", "ModelOpt NVFP4"),
        (r"[._]weight_(?:packed|shape|zero_point|global_scale)", "compressed-tensors"),
        (r"[._](?:W_q|W_q_meta|W_nbits)", "HQQ"),
        (r"\._(?:data|scale|shift|zeropoint)", "quanto"),
        (r"[._:]qdata|\._weight_(?:qdata|scale|zero_point)|[.:]tensor_impl[.:].+|:\w+", "torchao"),
        (r"\.q_(?:weight|scale|scale_max|groups|invperm|perm|group_map)", "EXL2"),
        (r"\.(?:trellis|suh|svh)", "EXL3"),
        (r"\.(?:codebooks|codes)", "AQLM"),
        (r"[._](?:weight_)?scale_inv|weight_scale|weight_scales", "scales without float8 weights"),
    )
)
_MXFP4 = re.compile(r"[._](?:blocks|scales)$")
_SMALL_FLOATS = re.compile(r"F8_|F[46]")
_INTEGERS = re.compile(r"[IU]\d+")
# Where float8 is a weight: anywhere inside a layer. Integers are masks, indices and tables as well.
_FLOAT8_WEIGHT = re.compile(r"(?:.*[._])?weight|.+\.\d+\..+")
_INTEGER_WEIGHT = re.compile(r"(?:.*[._])?weight|.+(?:_proj|_linear|\.w\d+|\.v1|\.fc\d)")


def check(
    folder: Path, config: Mapping[str, Any], headers: Mapping[str, TensorInfo], *, quantized: bool
) -> None:
    """Refuse a checkpoint with tensors that are neither plain weights nor decoded.

    Args:
        folder: named in messages.
        config: the parsed `config.json`.
        headers: the tensors; decoded ones appear as the 16-bit ones they stand for.
        quantized: whether some are decoded.

    Raises:
        ModelError: there are such tensors; the message names them and their format.
        FileError: the quantization settings of `config.json` are not an object.
    """
    method = quantization_of(config).get("quant_method", "unknown")
    foreign: dict[str, list[str]] = {}
    for name, info in headers.items():
        if format := _format_of(name, info, headers):
            foreign.setdefault(format, []).append(name)
    if foreign:
        said = "; ".join(f"{_some(names)} stored as {format}" for format, names in foreign.items())
        raise ModelError(
            f"{folder}: {said} (quantized, method {method}), which Bitknap does not read; "
            "dequantize the checkpoint to 16 bits first"
        )
    if quantization_of(config) and method != METHOD and not quantized:
        raise ModelError(
            f"{folder}: config.json says that the weights are quantized (method {method}), but no "
            "tensor is; save the model in 16 bits, or, if the weights are plain, remove "
            "quantization_config"
        )


def _format_of(name: str, info: TensorInfo, headers: Mapping[str, TensorInfo]) -> str | None:
    """Return the format that a tensor is quantized in, None for plain ones."""
    for ending, format in _ENDINGS:
        if ending.search(name):
            return format
    if name.endswith("_scale") and len(_shape_of(name.removesuffix("_scale"), headers)) > 1:
        return "scales without float8 weights"
    if _MXFP4.search(name) and info.dtype == "U8":
        return "MXFP4 in shapes that are not known"
    if _SMALL_FLOATS.match(info.dtype) and _FLOAT8_WEIGHT.fullmatch(name):
        return f"{info.dtype} without scales"
    if _INTEGERS.fullmatch(info.dtype) and _INTEGER_WEIGHT.fullmatch(name):
        return info.dtype
    return None


def _shape_of(name: str, headers: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    return headers[name].shape if name in headers else ()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
