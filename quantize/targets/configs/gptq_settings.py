"""Settings of GPTQModel: what `quantize_config.json` holds, and "quantization_config" of models.

They name the commonest format, and under "dynamic" a regular expression for every other one. The
first that matches a module's name from its start decides; "-:" before it leaves the module as it
is.
"""

from __future__ import annotations

from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.quantization.targets.configs import settings
from bitknap.quantization.targets.configs.module_names import Modules

_SKIP, _OTHER = "-:", "+:"
# Formats of checkpoints: the first stores each zero less 1, and is read by everything; GPTQModel
# takes no asymmetric grids in it.
_FIRST, _SECOND = "gptq", "gptq_v2"


def quantize_config(target: str, modules: Modules) -> tuple[dict[str, Any], str]:
    """Return the settings, and what was verified.

    Args:
        target: the target's name.
        modules: the modules, and what each of them must get.

    Raises:
        MismatchError: a module would get something else than the plan says.
    """
    usual = settings.usual(modules)
    made = settings.rules(modules, without=usual)
    settings.check(target, modules, made, usual)
    dynamic = {
        f"{_SKIP if format is None else _OTHER}{regex}": _override(format) for regex, format in made
    }
    content = {
        "bits": usual.bits,
        "group_size": usual.group_size,
        "sym": usual.symmetric,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": _SECOND if stores_zeros(modules) else _FIRST,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }
    return content, settings.matched(modules, len(made))


def stores_zeros(modules: Modules) -> bool:
    """Return whether zeros are stored as they are, and not less 1: if any grid is asymmetric."""
    return not all(format.symmetric for format in modules.formats.values())


def _override(format: Format | None) -> dict[str, Any]:
    if format is None:
        return {}
    return {"bits": format.bits, "group_size": format.group_size, "sym": format.symmetric}
