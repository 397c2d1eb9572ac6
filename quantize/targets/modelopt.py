"""Target `modelopt`: settings with which NVIDIA ModelOpt quantizes the model as a plan says.

`quant_cfg.yaml` is the argument of `modelopt.torch.quantization.quantize`: all quantizers off, and
then a shell pattern for those of each format. The last one that matches decides, so general ones
come first. The file is JSON, but for numbers as keys.
"""

from __future__ import annotations

from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob

# The dimension of blocks: the last, a matrix's inputs.
_LAST = "-1"


class ModelOpt(GridTarget):
    """ModelOpt: W4A16 has groups of 128, NVFP4 blocks of 16; FP8 and INT8 have a scale a row."""

    name = "modelopt"
    about = "NVIDIA ModelOpt: W4A16 in groups of 128, and INT8 with a scale a row."
    profile = "layer"
    rule = ShapeRule(
        bits=(4, 8),
        groups=(128,),
        cols=16,
        full_cols=128,
        fallback="no W4A16, whose groups are 128; NVFP4 and 8 bits remain",
        fallback_bits=(4, 8),
    )
    rounding = "midtread"
    reads_weights = False

    def formats(self) -> tuple[Format, ...]:
        """Return every format that the runtime has."""
        return Format(4, 128, symmetric=True), Format(8, 0, symmetric=True)

    def export(self, job: ExportJob) -> Exported:
        """Write the settings, after matching every quantizer against them."""
        from bitknap.quantization.targets.configs import quantizers, settings
        from bitknap.quantization.targets.configs.module_names import Modules

        modules = Modules.of(job)
        made = quantizers.rules(job, modules)
        quantizers.check(self.name, job, modules, made)
        entries = [{"quantizer_name": name, "cfg": _settings(format)} for name, format in made]
        content = {
            "quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries],
            "algorithm": "max",
        }
        checks = [settings.matched(modules, len(made))]
        # A block's dimension is a number, which JSON does not have as a key and YAML does.
        text = settings.text(content).replace(f'"{_LAST}":', f"{_LAST}:")
        return settings.write(job, "ModelOpt", {"quant_cfg.yaml": text}, checks)


def _settings(format: Format) -> dict[str, Any]:
    if format.group_size:
        return {"num_bits": format.bits, "block_sizes": {_LAST: format.group_size}}
    return {"num_bits": format.bits, "axis": 0}
