"""ModelOpt's search state: the scores of its `auto_quantize`, as its `checkpoint` argument saves.

    unit    a group of modules that must share a recipe, such as q, k and v of a layer
    option  a recipe, such as NVFP4_DEFAULT_CFG; `provenance` says which is which
    cost    the file's own score, in the unit of the search's method
    bytes   the file's own size, which counts 16-bit weights

The file is a pickle in a zip archive. It is read without running anything that it names: objects
of other packages become lists of their attributes (`inert_pickle`).

Source: ModelOpt 0.47, `modelopt/torch/quantization/algorithms.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitknap.allocation import CostTable
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError
from bitknap.estimators.imported.inert_pickle import Inert, load
from bitknap.estimators.imported.options import Choices, options_table

_KEY = "candidate_stats"
_ENDING = re.compile(r"\.quant_recipe$")
_EFFECTIVE = re.compile(r"(.+)\(effective-bits: [\d.]+\)")


def read(path: Path) -> CostTable:
    """Return the table of a search state.

    Raises:
        FileError: it is not what ModelOpt saves.
    """
    state = load(path)
    groups = state.get(_KEY) if isinstance(state, Mapping) else None
    if not isinstance(groups, Mapping) or not groups:
        raise FileError(
            f"{path}: no {_KEY}: not a search state of ModelOpt whose scores are complete; run its "
            "search with a checkpoint to the end"
        )
    recipes: dict[str, int] = {}
    parts, left_out = [], []
    for name, group in groups.items():
        part = _choices(path, str(name), group, recipes)
        if part is None:
            left_out.append(str(name))
        else:
            parts.append(part)
    about = {
        "source": path.name,
        "estimator": "imported(modelopt)",
        "unit": f"score of ModelOpt's {state.get('method') or 'search'}",
        "options": list(recipes),
        "left_out": left_out,
    }
    return options_table(parts, len(recipes), about)


def _choices(path: Path, name: str, group: Any, recipes: dict[str, int]) -> Choices | None:
    """Return a group's choices, None if its weights do not count; number new recipes."""
    where = f"{path}: {_KEY}.{name}"
    lists = [list(group.get(key) or ()) for key in ("formats", "scores", "costs")]
    formats, scores, sizes = lists
    if not formats or len({len(one) for one in lists}) > 1:
        raise FileError(f"{where}: formats, scores and costs must be lists of one length")
    weight = group.get("cost_weight", 1.0)
    if not (fits([*scores, *sizes, weight], [float]) and min(scores) >= 0 and weight >= 0):
        raise FileError(f"{where}: scores and costs must be numbers of at least 0")
    if weight == 0:
        return None
    columns = [recipes.setdefault(_recipe(one, where), len(recipes)) for one in formats]
    return Choices(
        name=_ENDING.sub("", name),
        columns=columns,
        nbytes=[max(1, round(2 * size / weight)) for size in sizes],
        costs=[float(score) for score in scores],
    )


def _recipe(value: Any, where: str) -> str:
    """Return a recipe's name."""
    text = value.attributes.get("_str_repr") if isinstance(value, Inert) else value
    if not isinstance(text, str):
        raise FileError(f"{where}: formats: a recipe without a name")
    match = _EFFECTIVE.fullmatch(text)
    return match[1] if match else text
