"""Target `gptqmodel`: settings with which GPTQModel quantizes the model as a plan says.

`quantize_config.json` is for `QuantizeConfig.from_pretrained`. It names the commonest format, and
under "dynamic" a regular expression for every other one. The first that matches a module's name
from its start decides; "-:" before it leaves the module as it is.
"""

from __future__ import annotations

from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob

_SKIP = "-:"


class GptqModel(GridTarget):
    """GPTQModel, which packs 32 codes along the input, and zeros along the output, in words."""

    name = "gptqmodel"
    about = "GPTQModel: settings for GPTQ, each matrix its own."
    profile = "gate_eq_up"
    rule = ShapeRule(bits=(2, 3, 4, 8), groups=(32, 64, 128), rows=32, cols=32)
    symmetric = (True,)
    rounding = "midtread"
    reads_weights = False

    def export(self, job: ExportJob) -> Exported:
        """Write the settings, after matching every module against them."""
        from bitknap.quantization.targets.configs import settings
        from bitknap.quantization.targets.configs.module_names import Modules

        modules = Modules.of(job)
        usual = settings.usual(modules)
        made = settings.rules(modules, without=usual)
        settings.check(self.name, modules, made, usual)
        dynamic = {
            f"{_SKIP if format is None else '+:'}{regex}": _override(format)
            for regex, format in made
        }
        content = {
            "bits": usual.bits,
            "group_size": usual.group_size,
            "sym": usual.symmetric,
            "desc_act": False,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "dynamic": dynamic,
        }
        checks = [settings.matched(modules, len(made))]
        return settings.write(
            job, "GPTQModel", {"quantize_config.json": settings.text(content)}, checks
        )


def _override(format: Format | None) -> dict[str, Any]:
    if format is None:
        return {}
    return {"bits": format.bits, "group_size": format.group_size, "sym": format.symmetric}
