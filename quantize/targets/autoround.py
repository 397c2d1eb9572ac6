"""Target `autoround`: settings with which AutoRound quantizes the model as a plan says.

`auto_round.json` holds arguments of `AutoRound`: the commonest format, and under "layer_config" a
regular expression for every other one, which AutoRound searches in every module's name after it has
put a backslash before every dot. 16 bits leave a module as it is.
"""

from __future__ import annotations

import re
from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class AutoRound(GridTarget):
    """AutoRound, whose checkpoints are GPTQ codes in 32-bit words."""

    name = "autoround"
    about = "AutoRound: settings for signed rounding, one format a layer."
    profile = "layer"
    rule = ShapeRule(bits=(2, 3, 4, 8), groups=(32, 64, 128), rows=32, cols=32)
    symmetric = (True,)
    rounding = "midtread"
    reads_weights = False

    def export(self, job: ExportJob) -> Exported:
        """Write the settings, after matching every module against them."""
        from bitknap.quantization.targets.configs import settings
        from bitknap.quantization.targets.configs.module_names import Modules
        from bitknap.quantization.targets.configs.patterns import Pattern

        modules = Modules.of(job)
        usual = settings.usual(modules)
        made = [
            Pattern(_with_bare_dots(regex), format)
            for regex, format in settings.rules(modules, without=usual)
        ]
        read = [Pattern(_as_read(regex), format) for regex, format in made]
        settings.check(self.name, modules, read, usual)
        layers = {regex: _scheme(format) for regex, format in made}
        content = {**_scheme(usual), "layer_config": layers}
        checks = [settings.matched(modules, len(made))]
        return settings.write(job, "AutoRound", {"auto_round.json": settings.text(content)}, checks)


def _with_bare_dots(regex: str) -> str:
    """Return an expression that stays what it is when AutoRound has put backslashes before dots."""
    return regex.replace(r"\.", "[.]")


def _as_read(regex: str) -> str:
    """Return an anchored expression as AutoRound reads it: it escapes dots outside ".*"."""
    return re.sub(r"\.(?!\*)", r"\.", regex)


def _scheme(format: Format | None) -> dict[str, Any]:
    if format is None:
        return {"bits": 16, "data_type": "float"}
    return {
        "bits": format.bits,
        "group_size": format.group_size,
        "sym": format.symmetric,
        "data_type": "int",
    }
