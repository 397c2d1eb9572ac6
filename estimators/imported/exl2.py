"""ExLlamaV2's `measurement.json`: relative output errors of the blocks of every layer.

    unit    attention, or the MLP with all its experts, of a layer
    option  a way to mix widths over the rows of the block's matrices, by its number in the file
    cost    (1 - accuracy)², where accuracy is 1 - ‖y_q - y‖ / ‖y‖ of the block's output y
    bytes   the file's own total bits, over 8

The tool minimizes Σ (1 - accuracy)^n with an n between 1.5 and 3.5 that it searches; with n = 2 the
costs are squared errors, which add up where errors of blocks are independent.

Source: ExLlamaV2's code, `measure_quant` and `optimize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitknap.allocation import CostTable
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError
from bitknap.estimators.imported.options import Choices, options_table

KEY = "measurement"
_OPTIONS = [{"accuracy": float, "total_bits": (int, float)}]


def read(path: Path, content: Mapping[str, Any]) -> CostTable:
    """Return the table of a measurement.

    Args:
        path: the file, for messages.
        content: its parsed JSON.

    Raises:
        FileError: it is not what ExLlamaV2 writes.
    """
    parts = [_choices(path, name, options) for name, options in _blocks(content[KEY])]
    about = {
        "source": path.name,
        "estimator": "imported(exl2)",
        "unit": "squared relative output error, by ExLlamaV2",
    }
    return options_table(parts, max((len(part.columns) for part in parts), default=0), about)


def _blocks(measured: Any) -> Iterator[tuple[str, Any]]:
    """Yield each block's name and options; layers whose blocks run in parallel hold two."""
    for name, options in measured.items() if isinstance(measured, Mapping) else ():
        if isinstance(options, Mapping):
            for part, inner in options.items():
                yield f"{name}.{part}", inner
        else:
            yield name, options


def _choices(path: Path, name: str, options: Any) -> Choices:
    if not options or not fits(options, _OPTIONS):
        raise FileError(
            f"{path}: {KEY}.{name}: must be a list of options with accuracy and total_bits; "
            "measure again with ExLlamaV2"
        )
    for option in options:
        if not (0 < option["accuracy"] <= 1 and option["total_bits"] > 0):
            raise FileError(
                f"{path}: {KEY}.{name}: accuracy {option['accuracy']} and total_bits "
                f"{option['total_bits']}: must be above 0, and accuracy at most 1"
            )
    return Choices(
        name=name,
        columns=range(len(options)),
        nbytes=[-(-int(option["total_bits"]) // 8) for option in options],
        costs=[(1 - option["accuracy"]) ** 2 for option in options],
    )
