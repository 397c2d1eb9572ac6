"""Target `torchao`: settings with which transformers quantizes the model by torchao as a plan says.

`torchao.json` is the "quantization_config" of a configuration, for `TorchAoConfig.from_dict`: an
`FqnToConfig` whose regular expressions match whole names of parameters. Experts are one parameter a
layer for gate and up together, and one for down.
"""

from __future__ import annotations

from typing import Any

from bitknap.allocation.problem.format import Format, formats
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class TorchAo(GridTarget):
    """torchao, one format for each stacked tensor of experts.

    Its grids of other widths take matrices alone, and no stacks of experts.
    """

    name = "torchao"
    about = "torchao: 4 bits in groups with a zero point, and 8 bits with a scale a row."
    profile = "layer_gateup_down"
    rule = ShapeRule(bits=(4, 8), groups=(32, 64, 128, 256))
    reads_weights = False

    def formats(self) -> tuple[Format, ...]:
        """Return every format that the runtime has."""
        return (*formats(4, self.rule.groups, False), Format(8, 0, symmetric=True))

    def export(self, job: ExportJob) -> Exported:
        """Write the settings, after matching every parameter against them."""
        from bitknap.quantization.targets.configs import settings
        from bitknap.quantization.targets.configs.module_names import Modules

        modules = Modules.stacked(job)
        made = [one for one in settings.rules(modules) if one.format is not None]
        settings.check(self.name, modules, made, None)
        configs = {f"re:{regex}": _settings(format) for regex, format in made}
        kind = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": configs}}
        content = {"quant_method": "torchao", "quant_type": {"default": kind}}
        checks = [settings.matched(modules, len(made))]
        return settings.write(job, "torchao", {"torchao.json": settings.text(content)}, checks)


def _settings(format: Format | None) -> dict[str, Any]:
    if format is not None and format.group_size:
        data: dict[str, Any] = {"group_size": format.group_size}
        return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}
    return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
