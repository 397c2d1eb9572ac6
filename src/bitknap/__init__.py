"""Bitknap: how many bits every expert of a Mixture-of-Experts model gets, with a proof.

Importing this loads NumPy only; whatever needs torch or transformers is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitknap.errors import BitknapError
from bitknap.transformers_hook import install as _install
from bitknap.version import __version__

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
    from bitknap.api.estimation import estimate
    from bitknap.api.quantizing import evaluate, load, quantize
    from bitknap.api.refining import refine
    from bitknap.estimators.costs.data_free import DataFree
    from bitknap.estimators.costs.fisher import Fisher
    from bitknap.estimators.costs.moments import SecondMoments
    from bitknap.estimators.costs.weight_error import WeightError
    from bitknap.estimators.group_kl.calibrated import Calibrated
    from bitknap.quantization.rounding.methods import Gptq, Hqq, Rtn

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
    "bitknap.api.estimation": ("estimate",),
    "bitknap.api.quantizing": ("evaluate", "load", "quantize"),
    "bitknap.estimators.group_kl.calibrated": ("Calibrated",),
    "bitknap.estimators.costs.data_free": ("DataFree",),
    "bitknap.estimators.costs.fisher": ("Fisher",),
    "bitknap.estimators.costs.moments": ("SecondMoments",),
    "bitknap.estimators.costs.weight_error": ("WeightError",),
    "bitknap.quantization.rounding.methods": ("Gptq", "Hqq", "Rtn"),
    "bitknap.api.refining": ("refine",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    "__version__",
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
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bitknap' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
