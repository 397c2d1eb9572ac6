"""What the library says of arguments, in the words of the command line.

Messages of the library write arguments in backquotes, as Python callers spell them: `max_memory`,
`overwrite=True`, `estimator=DataFree()`. `in_options` writes them as options.
"""

from __future__ import annotations

import re

# Arguments whose option has another name; of all others "_" becomes "-".
_OPTIONS = {
    "calibration.tokens": "tokens",
    "options": "formats",
    "protect": "protect-bits",
    "refinement.tokens": "refine-tokens",
    "rounding": "method",
}
# Arguments that have an option of their own name.
_SAME = (
    *("calibrate", "check", "estimator", "include", "journal", "keep", "max_memory"),
    *("max_shard_size", "measurements", "overwrite", "permute", "refine", "robust", "risk"),
    *("rotate", "row_blocks", "samples", "seed", "text", "tokens", "uniform"),
)
_NAMES = {**_OPTIONS, **{name: name.replace("_", "-") for name in _SAME}}
# Values that the command line writes in another way.
_VALUES = {
    "DataFree()": " data-free",
    "Hqq()": " hqq",
    "True": "",
    "('attention', 'dense')": " attention,dense",
}
# What is no option and a value.
_WHOLE = {"text=TextSets([A, B])": "--text A --text B"}
_QUOTED = re.compile(r"`([^`]+)`")


def in_options(message: str) -> str:
    """Return a message of the library with arguments written as options.

    Args:
        message: Arguments are in backquotes; whatever else is in backquotes stays.
    """
    return _QUOTED.sub(lambda found: _option(found[1]) or found[0], message)


def _option(code: str) -> str | None:
    """Return the option of an argument, and its value if it has one; None if it is none."""
    if code in _WHOLE:
        return _WHOLE[code]
    name, equals, value = code.partition("=")
    if name not in _NAMES:
        return None
    return f"--{_NAMES[name]}" + (_VALUES.get(value, f" {value}") if equals else "")
