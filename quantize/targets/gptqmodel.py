"""Target `gptqmodel`: settings with which GPTQModel quantizes the model as a plan says.

`quantize_config.json` is for `QuantizeConfig.from_pretrained`. Target `gptq` writes weights.
"""

from __future__ import annotations

from bitknap.quantization.targets.gptq import Gptq
from bitknap.quantization.targets.target import Exported, ExportJob


class GptqModel(Gptq):
    """GPTQModel, which rounds by itself; it stores what `Gptq` says."""

    name = "gptqmodel"
    about = "GPTQModel: settings for GPTQ, each matrix its own."
    profile = "gate_eq_up"
    symmetric = (True,)
    reads_weights = False

    def export(self, job: ExportJob) -> Exported:
        """Write the settings, after matching every module against them."""
        from bitknap.quantization.targets.configs import settings
        from bitknap.quantization.targets.configs.gptq_settings import quantize_config
        from bitknap.quantization.targets.configs.module_names import Modules

        content, matched = quantize_config(self.name, Modules.of(job))
        files = {"quantize_config.json": settings.text(content)}
        return settings.write(job, "GPTQModel", files, [matched])
