"""A model in compressed-tensors' format pack-quantized.

model*.safetensors   kept tensors under their own names; for each quantized module
PATH.weight_packed (int32, codes from the lowest bit on),
PATH.weight_scale (fp16, one for each group) and PATH.weight_shape
config.json          the source's, with "quantization_config": a group for each format, whose
targets are regular expressions, and the modules to ignore
bitknap_plan.json    the plan
everything else      the tokenizer and similar files, copied
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.kernels.layout.plain_codes import pack_bits
from bitknap.quantization.packed.outline import kept_tensors
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.targets.configs import settings
from bitknap.quantization.targets.configs.groups import config_groups
from bitknap.quantization.targets.configs.module_names import Modules
from bitknap.quantization.targets.configs.patterns import Pattern
from bitknap.quantization.targets.folders.folder_work import Module
from bitknap.quantization.targets.folders.tensor_folder import (
    Folder,
    codes_of,
    stored_scales,
    whole_modules,
)
from bitknap.quantization.targets.target import Exported, ExportJob

_NAME = "compressed-tensors"


def write(job: ExportJob) -> Exported:
    """Write a folder that vLLM and transformers load by compressed-tensors.

    Raises:
        ModelError: experts are stacked in one tensor, or a weight is NaN or infinite.
        MismatchError: a unit is a part of a tensor.
        InputError: the output may not be written, or the disk has no room.
    """
    modules = whole_modules(job, _NAME)
    names = Modules.of(job)
    made = _rules(job)
    covered = [one for one in made if one.format is not None]
    kept = {name: name for name in kept_tensors(job.source, job.layout)}
    folder = Folder(job=job, form=_Packed(), modules=modules, kept=kept, made=_shapes(job, modules))
    config = {**job.source.config, "quantization_config": _quantization(made)}
    matched = settings.matched(names, len(covered))
    return folder.export({"config.json": config}, [matched], _warnings(job))


class _Packed:
    """The form pack-quantized: x = scale · (q - 2^(b-1)), by groups of a row."""

    def shapes(
        self, format: Format, rows: int, cols: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of one matrix."""
        groups, words = cols // format.group_size, cols * format.bits // 32
        return {"weight_packed": ("I32", (rows, words)), "weight_scale": ("F16", (rows, groups))}

    def parts(self, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix."""
        packed = pack_bits(matrix.codes, matrix.format.bits)
        return {"weight_packed": packed, "weight_scale": stored_scales(_NAME, matrix.grid)}

    def values(self, parts: Mapping[str, Tensor], format: Format) -> Tensor:
        """Return the weights that the tensors stand for, float32 [rows, cols]."""
        scale = parts["weight_scale"]
        codes = codes_of(parts["weight_packed"], format, scale)
        weights = (codes - (1 << format.bits - 1)) * scale.float()[..., None]
        return weights.flatten(1)


def _rules(job: ExportJob) -> list[Pattern]:
    """Return patterns for modules as transformers names them, and as the files do, for vLLM.

    Raises:
        MismatchError: a module would get something else than the plan says.
    """
    made: list[Pattern] = []
    both = Modules.of(job), Modules.stored(job)
    for modules in both:
        made += [one for one in settings.rules(modules) if one not in made]
    for modules in both:
        covered = [one for one in made if one.format is not None]
        settings.check(_NAME, modules, covered, None)
    return made


def _shapes(job: ExportJob, modules: Sequence[Module]) -> dict[str, Tensor]:
    units = job.plan.units
    sizes = zip(units.rows.tolist(), units.cols.tolist(), strict=True)
    return {
        f"{module.name}.weight_shape": torch.tensor(size)
        for module, size in zip(modules, sizes, strict=True)
    }


def _quantization(made: Sequence[Pattern]) -> dict[str, Any]:
    """Return "quantization_config"; names of blocks are those of transformers 5 or of the hub."""
    return {
        "quant_method": _NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups([one for one in made if one.format is not None]),
        "ignore": [f"re:{one.regex}" for one in made if one.format is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _warnings(job: ExportJob) -> tuple[str, ...]:
    routed = job.plan.units.role == 0
    formats = {job.plan.format_of(int(unit)) for unit in routed.nonzero()[0]}
    if len(formats) < 2:
        return ()
    return (
        f"experts have {len(formats)} formats, one a layer, which vLLM serves; transformers would "
        "read them all in the first one, and must not load this folder",
    )
