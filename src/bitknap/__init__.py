"""Bitknap: how many bits every expert of a Mixture-of-Experts model gets, with a proof.

Importing this loads NumPy only; whatever needs torch or transformers is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitknap.errors import BitknapError, InfeasibleError, InputError
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
        Solver,
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
    from bitknap.api.evaluation import Evaluation, evaluate
    from bitknap.api.exporting import coarsen, export
    from bitknap.api.importing import import_costs
    from bitknap.api.inspection import serving
    from bitknap.api.live import LiveModel
    from bitknap.api.quantizing import load, quantize
    from bitknap.api.refining import Outcome, refine
    from bitknap.api.requests import Calibration, Formats, Packing, Refinement, Resume, TextSets
    from bitknap.estimators.costs.data_free import DataFree
    from bitknap.estimators.costs.dense_profiling import Measured
    from bitknap.estimators.costs.estimator import Estimator
    from bitknap.estimators.costs.fisher import Fisher
    from bitknap.estimators.costs.moments import SecondMoments
    from bitknap.estimators.costs.weight_error import WeightError
    from bitknap.estimators.group_kl.calibrated import Calibrated
    from bitknap.estimators.measuring.kl_replay import Losses
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
        "Solver",
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
    "bitknap.api.importing": ("import_costs",),
    "bitknap.api.inspection": ("serving",),
    "bitknap.api.live": ("LiveModel",),
    "bitknap.api.evaluation": ("Evaluation", "evaluate"),
    "bitknap.api.exporting": ("coarsen", "export"),
    "bitknap.api.quantizing": ("load", "quantize"),
    "bitknap.api.refining": ("Outcome", "refine"),
    "bitknap.api.requests": (
        "Calibration",
        "Formats",
        "Packing",
        "Refinement",
        "Resume",
        "TextSets",
    ),
    "bitknap.estimators.costs.data_free": ("DataFree",),
    "bitknap.estimators.costs.estimator": ("Estimator",),
    "bitknap.estimators.costs.fisher": ("Fisher",),
    "bitknap.estimators.costs.moments": ("SecondMoments",),
    "bitknap.estimators.costs.weight_error": ("WeightError",),
    "bitknap.estimators.costs.dense_profiling": ("Measured",),
    "bitknap.estimators.group_kl.calibrated": ("Calibrated",),
    "bitknap.estimators.measuring.kl_replay": ("Losses",),
    "bitknap.quantization.rounding.methods": ("Gptq", "Hqq", "Rtn"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BitPlan",
    "BitknapError",
    "Budget",
    "Calibrated",
    "Calibration",
    "CostTable",
    "DataFree",
    "Estimator",
    "Evaluation",
    "Fisher",
    "Format",
    "Formats",
    "Frontier",
    "Gptq",
    "Greedy",
    "Hqq",
    "Ilp",
    "InfeasibleError",
    "InputError",
    "Knapsack",
    "Limit",
    "LiveModel",
    "Losses",
    "Measured",
    "Outcome",
    "Packing",
    "Price",
    "Problem",
    "Profile",
    "Refinement",
    "Resume",
    "Rtn",
    "Search",
    "SecondMoments",
    "Solution",
    "Solver",
    "Status",
    "TextSets",
    "Units",
    "WeightError",
    "__version__",
    "coarsen",
    "divisible",
    "estimate",
    "evaluate",
    "export",
    "formats",
    "frontier",
    "import_costs",
    "load",
    "price",
    "profile",
    "quantize",
    "refine",
    "serving",
    "solve",
]


_install()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bitknap' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
