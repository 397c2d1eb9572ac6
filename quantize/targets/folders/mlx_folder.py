"""A model as mlx-lm loads it.

model*.safetensors   kept tensors under their hub names, which mlx-lm renames itself; each
                     quantized module as PATH.weight (uint32, codes from the lowest bit on),
                     PATH.scales and PATH.biases (fp16, one for each group)
config.json          the source's, with hub-style keys that transformers 5 no longer writes, and
                     a "quantization" block that names the bits and group size of every module
bitknap_plan.json    the plan
everything else      the tokenizer and similar files, copied
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import MismatchError
from bitknap.kernels.layout.exponents import power
from bitknap.kernels.layout.plain_codes import pack_bits
from bitknap.quantization.packed.outline import kept_tensors
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.targets.folders.folder_work import Module
from bitknap.quantization.targets.folders.tensor_folder import (
    Folder,
    codes_of,
    times_power,
    whole_module,
)
from bitknap.quantization.targets.target import Exported, ExportJob

# Models that mlx-lm runs with scaled positions only; a factor of 1 changes nothing.
_ALWAYS_SCALED = ("deepseek_v2",)
# Models whose latent attention mlx-lm stores in another way, on other grids.
_TAKES_APART = ("deepseek_v3",)
# Keys by which configurations call the number of experts; mlx-lm asks for one or another.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def write(job: ExportJob, experts: str) -> Exported:
    """Write a folder that mlx-lm loads.

    Args:
        job: what is to be written.
        experts: mlx-lm's name of the module that stacks a layer's experts.

    Raises:
        ModelError: a weight is NaN, infinite, or beyond what 16-bit scales hold.
        MismatchError: a unit is a part of a tensor that mlx-lm keeps whole.
        InputError: the output may not be written, or the disk has no room.
    """
    modules = _modules(job, experts)
    kept, made = _others(job)
    folder = Folder(job=job, form=_Affine(), modules=modules, kept=kept, made=made)
    config = _config(job.source.config) | _quantization(job, modules)
    return folder.export({"config.json": config}, [], _warnings(job.source.config))


def _warnings(config: Mapping[str, Any]) -> tuple[str, ...]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("truncate") is False:
        return (
            "mlx-lm rounds the bounds of yarn's ramp, which this model does not (truncate: false), "
            "so its logits differ slightly from transformers'",
        )
    return ()


class _Affine:
    """MLX's affine form: x = scale · q + bias, by groups of a row."""

    def shapes(
        self, format: Format, rows: int, cols: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of one matrix."""
        groups = rows, cols // format.group_size
        words = rows, cols * format.bits // 32
        return {"weight": ("U32", words), "scales": ("F16", groups), "biases": ("F16", groups)}

    def parts(self, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix."""
        grid, bits = matrix.grid, matrix.format.bits
        scales, biases = grid.scale, grid.zero
        assert biases is not None
        if grid.exponent is not None:
            scales, biases = (
                times_power("mlx", one, power(grid.exponent)) for one in (scales, biases)
            )
        return {"weight": pack_bits(matrix.codes, bits), "scales": scales, "biases": biases}

    def values(self, parts: Mapping[str, Tensor], format: Format) -> Tensor:
        """Return the weights that the tensors stand for, float32 [rows, cols]."""
        scales, biases = (parts[name].float()[..., None] for name in ("scales", "biases"))
        codes = codes_of(parts["weight"], format, parts["scales"])
        return (codes * scales + biases).flatten(1)


def _modules(job: ExportJob, experts: str) -> list[Module]:
    """Return mlx-lm's module of each unit."""
    units, layers = job.plan.units, {layer.layer: layer for layer in job.layout.layers}
    modules = []
    for unit, view in enumerate(job.layout.views):
        key = units.row(unit)
        if key.role == ROLES[0]:
            layer = layers[key.layer]
            stack = layer.module.removesuffix("experts") + experts
            name = f"{stack}.{key.projection}_proj"
            modules.append(Module(name=name, index=key.expert, count=layer.experts))
            continue
        module = whole_module(job, unit, "mlx")
        if key.projection == "kv_b" and job.source.config["model_type"] in _TAKES_APART:
            raise MismatchError(
                f"mlx: {view.tensor} is taken apart by mlx-lm and rounded again; leave attention "
                "out of `include`"
            )
        modules.append(module)
    return modules


def _others(job: ExportJob) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the tensors that are copied, and those that are made: experts' biases, taken apart."""
    kept, made = {}, {}
    for name in kept_tensors(job.source, job.layout):
        head, dot, leaf = name.rpartition(".")
        if dot and leaf == "gate_up_proj_bias":
            bias = job.source.read(name)
            made[f"{head}.gate_proj.bias"] = bias[..., ::2].contiguous()
            made[f"{head}.up_proj.bias"] = bias[..., 1::2].contiguous()
        elif dot and leaf == "down_proj_bias":
            kept[name] = f"{head}.down_proj.bias"
        else:
            kept[name] = name
    return kept, made


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys that mlx-lm asks for."""
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    rope = made.get("rope_parameters")
    if isinstance(rope, Mapping):
        kind = rope.get("rope_type", "default")
        others = {key: value for key, value in rope.items() if key != "rope_theta"}
        made.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        scaled = None if kind == "default" else {**others, "type": kind}
        if scaled is None and made.get("model_type") in _ALWAYS_SCALED:
            scaled = {"type": "yarn", "factor": 1.0}
        if not made.get("rope_scaling"):
            made["rope_scaling"] = scaled
        if "partial_rotary_factor" in rope:
            made.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    count = next((made[key] for key in _COUNTS if made.get(key) is not None), None)
    if count is not None:
        made |= {key: count for key in _COUNTS if made.get(key) is None}
    return made


def _quantization(job: ExportJob, modules: Sequence[Module]) -> dict[str, Any]:
    """Return the "quantization" block: every module's bits and group size, and the commonest."""
    formats = {module.name: job.plan.format_of(unit) for unit, module in enumerate(modules)}
    (usual, _), *_ = Counter(formats.values()).most_common(1)
    block = _settings(usual) | {name: _settings(one) for name, one in sorted(formats.items())}
    return {"quantization": block, "quantization_config": block}


def _settings(format: Format) -> dict[str, Any]:
    return {"group_size": format.group_size, "bits": format.bits, "mode": "affine"}
