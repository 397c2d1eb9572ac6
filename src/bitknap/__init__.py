"""Bitknap: how many bits every expert of a Mixture-of-Experts model gets, with a proof.

Importing this loads NumPy only; whatever needs torch or transformers is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitknap.errors import BitknapError
from bitknap.transformers_hook import install as _install

if TYPE_CHECKING:
    from bitknap.allocation import (
        BitPlan,
        Budget,
        CostTable,
        Format,
        Frontier,
        Greedy,
        Ilp,
        Knapsack,
        Limit,
        Price,
        Problem,
        Profile,
        Search,
        Solution,
        Status,
        Units,
        divisible,
        formats,
        frontier,
        price,
        profile,
        solve,
    )
    from bitknap.api import estimate, evaluate, load, quantize
    from bitknap.estimators.calibrated import Calibrated
    from bitknap.estimators.data_free import DataFree
    from bitknap.estimators.fisher import Fisher
    from bitknap.estimators.moments import SecondMoments
    from bitknap.estimators.weight_error import WeightError
    from bitknap.quantize.rounding import Gptq, Hqq, Rtn
    from bitknap.refining import refine

__version__ = "0.1.0"

_HOMES = {
    "bitknap.allocation": (
        "BitPlan",
        "Budget",
        "CostTable",
        "Format",
        "Frontier",
        "Greedy",
        "Ilp",
        "Knapsack",
        "Limit",
        "Price",
        "Problem",
        "Profile",
        "Search",
        "Solution",
        "Status",
        "Units",
        "divisible",
        "formats",
        "frontier",
        "price",
        "profile",
        "solve",
    ),
    "bitknap.api": ("estimate", "evaluate", "load"),
    "bitknap.estimators.calibrated": ("Calibrated",),
    "bitknap.estimators.data_free": ("DataFree",),
    "bitknap.estimators.fisher": ("Fisher",),
    "bitknap.estimators.moments": ("SecondMoments",),
    "bitknap.estimators.weight_error": ("WeightError",),
    "bitknap.quantize.rounding": ("Gptq", "Hqq", "Rtn"),
    "bitknap.refining": ("refine",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# `quantize` is a room that can be called: see its module.
__all__ = [
    "BitPlan",
    "BitknapError",
    "Budget",
    "Calibrated",
    "CostTable",
    "DataFree",
    "Fisher",
    "Format",
    "Frontier",
    "Gptq",
    "Greedy",
    "Hqq",
    "Ilp",
    "Knapsack",
    "Limit",
    "Price",
    "Problem",
    "Profile",
    "Rtn",
    "Search",
    "SecondMoments",
    "Solution",
    "Status",
    "Units",
    "WeightError",
    "divisible",
    "estimate",
    "evaluate",
    "formats",
    "frontier",
    "load",
    "price",
    "profile",
    "quantize",
    "refine",
    "solve",
]


_install()


def __getattr__(name: str) -> Any:
    if name == "quantize":
        return import_module("bitknap.quantize")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bitknap' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
