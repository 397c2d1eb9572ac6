"""Groups of settings as compressed-tensors and llm-compressor read them, one for each format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.quantization.targets.configs.patterns import Pattern


def config_groups(made: Sequence[Pattern]) -> dict[str, Any]:
    """Return "config_groups": the targets of each format, and how its weights are stored."""
    targets: defaultdict[Format, list[str]] = defaultdict(list)
    for regex, format in made:
        if format is not None:
            targets[format].append(f"re:{regex}")
    return {
        f"group_{number}": {
            "targets": found,
            "weights": _weights(format),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, (format, found) in enumerate(
            sorted(targets.items(), key=lambda item: (item[0].bits, item[0].group_size))
        )
    }


def _weights(format: Format) -> dict[str, Any]:
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "group" if format.group_size else "channel",
        "group_size": format.group_size or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
