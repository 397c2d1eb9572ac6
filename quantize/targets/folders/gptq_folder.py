"""A model in the format of GPTQ, as GPTQModel writes it.

model*.safetensors    kept tensors, and for each quantized module: PATH.qweight (int32, codes of a
                      column of the weight one after another, from the lowest bit on),
                      PATH.qzeros (int32, the zeros of a group in the same way), PATH.scales (fp16,
                      one row for each group) and PATH.g_idx (int32, the group of each input)
config.json           the source's, with "quantization_config"
quantize_config.json  the same settings alone
bitknap_plan.json     the plan
everything else       the tokenizer and similar files, copied
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.kernels.layout.plain_codes import pack_bits, unpack_bits
from bitknap.quantization.packed.outline import kept_tensors
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.targets.configs.gptq_settings import quantize_config, stores_zeros
from bitknap.quantization.targets.configs.module_names import Modules, present, unit_names
from bitknap.quantization.targets.folders.folder_work import Module
from bitknap.quantization.targets.folders.tensor_folder import (
    Folder,
    stored_scales,
    whole_modules,
)
from bitknap.quantization.targets.target import Exported, ExportJob

_NAME = "gptq"


def write(job: ExportJob) -> Exported:
    """Write a folder that GPTQModel loads.

    Raises:
        ModelError: experts are stacked in one tensor, or a weight is NaN or infinite.
        MismatchError: a unit is a part of a tensor.
        InputError: the output may not be written, or the disk has no room.
    """
    modules = Modules.of(job)
    settings, matched = quantize_config(_NAME, modules)
    kept = {name: present(name) for name in kept_tensors(job.source, job.layout)}
    form = _Gptq(less=0 if stores_zeros(modules) else 1)
    folder = Folder(job=job, form=form, modules=_modules(job), kept=kept)
    config = {**job.source.config, "quantization_config": settings}
    return folder.export({"config.json": config, "quantize_config.json": settings}, [matched], ())


class _Gptq:
    """GPTQ's format: x = scale · (q - z), everything transposed.

    Args:
        less: what is subtracted from zeros before they are stored.
    """

    def __init__(self, less: int) -> None:
        self._less = less

    def shapes(
        self, format: Format, rows: int, cols: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of one matrix."""
        groups, bits = cols // format.group_size, format.bits
        return {
            "qweight": ("I32", (cols * bits // 32, rows)),
            "qzeros": ("I32", (groups, rows * bits // 32)),
            "scales": ("F16", (groups, rows)),
            "g_idx": ("I32", (cols,)),
        }

    def parts(self, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix."""
        format, grid = matrix.format, matrix.grid
        scale, rows = stored_scales(_NAME, grid), len(matrix.codes)
        zero = grid.zero
        if zero is None:
            zero = torch.full_like(scale, format.middle, dtype=torch.uint8)
        words = pack_bits(matrix.codes, format.bits).view(torch.int32).view(rows, -1)
        groups = torch.arange(grid.cols, dtype=torch.int32) // format.group_size
        return {
            "qweight": words.T,
            "qzeros": pack_bits((zero - self._less).T.contiguous(), format.bits),
            "scales": scale.T,
            "g_idx": groups,
        }

    def values(self, parts: Mapping[str, Tensor], format: Format) -> Tensor:
        """Return the weights that the tensors stand for, float32 [rows, cols]."""
        scale = parts["scales"].T.float()[..., None]
        rows, groups = scale.shape[:2]
        count = rows * groups * format.group_size
        codes = unpack_bits(_bytes(parts["qweight"].T), format.bits, count).view(rows, groups, -1)
        zeros = unpack_bits(_bytes(parts["qzeros"]), format.bits, groups * rows)
        zeros = zeros.view(groups, rows).T[..., None].float() + self._less
        return ((codes.float() - zeros) * scale).flatten(1)


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8).reshape(-1)


def _modules(job: ExportJob) -> list[Module]:
    """Return the module of each unit, by transformers 5's names, as GPTQModel calls it."""
    whole_modules(job, _NAME)  # refuses what the format does not hold
    return [Module(name=name) for name in unit_names(job.layout)]
