"""mlx-lm's `dynamic_quant`: two widths, and a threshold on the gain of the higher one.

    cost       Σ |g ΔW| of a matrix in a format, as for AutoRound
    ties       the matrices of one projection in a layer, which is how mlx stores experts
    allocator  the largest plan of any threshold that fits; NVIDIA ModelOpt's is similar

The allocator is in `bitknap.allocation.published.mlx_lm`.

Not reproduced: mlx-lm sums g (W_low − W_high) with its sign, where g is the gradient of the KL to
the original, at the model in the lower width; here that is the difference of two sums of |g ΔW|,
with the gradients that `AutoRoundScore` describes. ModelOpt's sensitivity is a forward KL.

Source: mlx-lm, `dynamic_quant`; NVIDIA ModelOpt, `auto_quantize`. There is no paper:
`estimate_sensitivities` and `estimate_threshold` of mlx-lm's code are the rule.
"""

from __future__ import annotations

from itertools import pairwise

from bitknap.allocation import Budget, Problem, solve
from bitknap.allocation.published import (
    Threshold,
)
from bitknap.errors import InfeasibleError
from bitknap.estimators.published.autoround import first_order
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Offer,
    Rule,
    named,
    tied_to,
)
from bitknap.progress import Progress


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule, which uses the widest pair of neighbouring widths with a plan that fits."""
    tied = tied_to("mlx-lm", first_order(material.evidence, FORMATS))

    def offers(nbytes: int) -> list[Offer]:
        problem = Problem(tied, Budget.bytes(nbytes))
        for low, high in reversed(list(pairwise(FORMATS))):
            try:
                plan = solve(problem, Threshold(low=low, high=high)).plan
            except InfeasibleError:
                continue
            return [Offer(plan, f"{low.bits} and {high.bits} bits")]
        return []

    return named("mlx-lm", offers, knob="the two widths and the threshold")
