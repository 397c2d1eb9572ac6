"""Target `llm-compressor`: a recipe with which llm-compressor quantizes the model as a plan says.

`recipe.yaml` is JSON, which is YAML as well: one `GPTQModifier` with a group of settings for each
format. Their targets are regular expressions, matched from the start of a module's name. A module
that none of them matches is left as it is.
"""

from __future__ import annotations

from typing import Any

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class LlmCompressor(GridTarget):
    """llm-compressor, which writes compressed-tensors."""

    name = "llm-compressor"
    about = "llm-compressor: a recipe for compressed-tensors, one format a layer."
    profile = "layer"
    rule = ShapeRule(bits=tuple(range(2, 9)), groups=(32, 64, 128, 256))
    symmetric = (True,)
    rounding = "midtread"
    reads_weights = False

    def export(self, job: ExportJob) -> Exported:
        """Write the recipe, after matching every module against it."""
        from bitknap.quantization.targets.configs import groups, settings
        from bitknap.quantization.targets.configs.module_names import Modules

        modules = Modules.of(job)
        made = [one for one in settings.rules(modules) if one.format is not None]
        settings.check(self.name, modules, made, None)
        modifier: dict[str, Any] = {"config_groups": groups.config_groups(made), "ignore": []}
        content = {"quantization_stage": {"quantization_modifiers": {"GPTQModifier": modifier}}}
        checks = [settings.matched(modules, len(made))]
        return settings.write(
            job, "llm-compressor", {"recipe.yaml": settings.text(content)}, checks
        )
