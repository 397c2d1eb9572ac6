"""A sensitivity threshold between two formats, as in mlx-lm and NVIDIA ModelOpt.

Source: the code of mlx-lm (`dynamic_quant`) and of ModelOpt (`auto_quantize`). The costs that
mlx-lm compares are computed in `bitknap.estimators.published.mlx_lm`, which needs torch; this file
does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bitknap.allocation.plans.solution import Answer
from bitknap.allocation.problem.arrays import Floats, Longs, slack
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.published.one_limit import (
    SHARE,
    bounded,
    lightest,
    single,
)
from bitknap.errors import InfeasibleError, InputError
from bitknap.names import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Choose between two formats; the rows that gain most from the better one get it.

    This is the rule of mlx-lm's dynamic quantization and of ModelOpt's `kl_div` search: a row whose
    sensitivity, cost at `low` minus cost at `high`, exceeds a threshold gets `high`. The originals
    find the threshold by bisection and silently fall back to all `low` when even that is too large;
    here the threshold gives the largest plan that fits, and too small a limit is an error. Rows of
    equal sensitivity get the same format, as with any threshold. Rows that allow only one of the
    two get it; rows that allow neither get their lightest format.

    Attributes:
        low: the format below the threshold.
        high: the format above it.
        per: divisor of the sensitivity: "weight", the weights of the row (mlx-lm, in millions);
            "byte", the amount that `high` adds to the limit; "unit", 1 (ModelOpt).

    Source: mlx-lm, `dynamic_quant`; NVIDIA ModelOpt, `auto_quantize`. They estimate the sensitivity
        by first-order gradients and by forward KL; here it comes from the table.
    """

    low: Format
    high: Format
    per: Literal["weight", "byte", "unit"] = "weight"

    def __post_init__(self) -> None:
        if self.low == self.high:
            raise InputError(f"threshold: low and high are both {self.low}; give two formats")
        check_name("per", self.per, get_args(Literal["weight", "byte", "unit"]))

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "threshold"

    def answer(self, problem: Problem) -> Answer:
        """Return the largest plan that fits among all thresholds, and a bound on all plans.

        Raises:
            InputError: not exactly one limit is finite, or a format or a shape is missing.
            InfeasibleError: no threshold's plan fits.
        """
        weight, bound = single(problem, self.name)
        low, high = self._column(problem, self.low), self._column(problem, self.high)
        allowed = np.isfinite(problem.cost)
        choice = np.where(allowed[:, high], high, lightest(problem.cost, weight))
        choice[allowed[:, low]] = low
        free = np.flatnonzero(allowed[:, low] & allowed[:, high])
        added = weight[free, high] - weight[free, low]
        gained = problem.cost[free, low] - problem.cost[free, high]
        score = gained / self._sizes(problem, free, added)
        order = np.argsort(-score, kind="stable")
        base = weight[np.arange(len(choice)), choice]
        used = base.sum() + np.concatenate([[0.0], np.cumsum(added[order])])
        # No threshold separates equal scores.
        falls = score[order][1:] < score[order][:-1]
        whole = np.concatenate([[True], falls, [True]])[: len(used)]
        fits = whole & (used <= bound + SHARE * slack(np.concatenate([base, added])))
        if not fits.any():
            raise InfeasibleError(
                f"threshold: the rows at {self.low} need {used.min():.6g}, limit is {bound:.6g}; "
                "raise the limit or take a smaller format"
            )
        choice[free[order[: int(np.flatnonzero(fits)[-1])]]] = high
        return bounded(problem, choice)

    def _column(self, problem: Problem, item: Format) -> int:
        if item not in problem.table.formats:
            names = ", ".join(str(known) for known in problem.table.formats)
            raise InputError(f"threshold: no format {item} in the table; there are {names}")
        return problem.table.formats.index(item)

    def _sizes(self, problem: Problem, rows: Longs, added: Floats) -> Floats:
        if self.per == "unit":
            return np.ones(len(rows))
        if self.per == "byte":
            if not (added > 0).all():
                raise InputError(f"threshold: {self.high} is no larger than {self.low}; swap them")
            return added
        if not problem.table.units.has_shapes:
            raise InputError('threshold: the units have no shapes; use per="byte" or "unit"')
        numel = np.bincount(problem.row_of, weights=problem.table.units.numel)
        return np.asarray(numel[rows], dtype=np.float64)
