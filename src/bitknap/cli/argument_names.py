"""Translates arguments in messages of the library into options of the command line.

Messages of the library write arguments in backquotes, as Python callers spell them: `max_memory`,
`overwrite=True`, `estimator=DataFree()`. `in_options` writes them as options.
"""

from __future__ import annotations

import re

# Arguments whose option has another name; for all others "_" becomes "-".
_OPTIONS = {
    "calibration.tokens": "tokens",
    "options": "formats",
    "protect": "protect-bits",
    "to": "to",
    "refinement.tokens": "refine-tokens",
    "rounding": "method",
}
# Arguments that have an option with the same name.
_SAME = (
    *(
        "calibrate",
        "check",
        "coarsen",
        "device",
        "device_memory",
        "dtype",
        "estimator",
        "formats",
        "gap",
        "imatrix",
        "include",
    ),
    *("journal", "keep", "max_memory", "measure_time", "model"),
    *("max_shard_size", "measurements", "overwrite", "permute", "refine", "robust", "risk"),
    *("rotate", "row_blocks", "samples", "seed", "text", "thorough", "time_limit", "tokens"),
    *("target", "uniform"),
)
_NAMES = {**_OPTIONS, **{name: name.replace("_", "-") for name in _SAME}}
# Values that are written differently at the command line.
_VALUES = {
    "DataFree()": " data-free",
    "Hqq()": " hqq",
    "True": "",
    "('attention', 'dense')": " attention,dense",
}
# Expressions that are not one option with a value.
_WHOLE = {"text=TextSets([A, B])": "--text A --text B"}
_QUOTED = re.compile(r"`([^`]+)`")


def in_options(message: str) -> str:
    """Return a message of the library with arguments written as options.

    Args:
        message: Its arguments are in backquotes; other text in backquotes is kept.
    """
    return _QUOTED.sub(lambda match: _option(match[1]) or match[0], message)


def _option(code: str) -> str | None:
    """Return the option for an argument, with its value if any; None if it is not an argument."""
    if code in _WHOLE:
        return _WHOLE[code]
    name, equals, value = code.partition("=")
    if name not in _NAMES:
        return None
    return f"--{_NAMES[name]}" + (_VALUES.get(value, f" {value}") if equals else "")
