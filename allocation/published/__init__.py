"""Published allocators, reproduced to be compared with: solvers and rules, quirks included.

| here | where from |
|---|---|
| `mc_moe_cost`, `mc_moe` | MC-MoE (PMQ), arXiv 2410.06270 |
| `MxMoe`, `PerLayer` | MxMoE, arXiv 2505.05799 |
| `chowdhury_counts`, `chowdhury_bits` | Chowdhury et al., arXiv 2604.06515 |
| `Lagrangian` | FRI-MxMoE, 2026.acl-long.982 |
| `Threshold` | mlx-lm and ModelOpt |
| `Annealing` | ExLlamaV2 |
| `gemq_problem` | GEMQ, arXiv 2605.23078 |
"""

from bitknap.allocation.published.exl2_annealing import Annealing
from bitknap.allocation.published.expert_rules import (
    chowdhury_bits,
    chowdhury_counts,
    gemq_problem,
    mc_moe,
    mc_moe_cost,
)
from bitknap.allocation.published.mxmoe import MxMoe, PerLayer
from bitknap.allocation.published.one_limit_rules import Lagrangian, Threshold

__all__ = [
    "Annealing",
    "Lagrangian",
    "MxMoe",
    "PerLayer",
    "Threshold",
    "chowdhury_bits",
    "chowdhury_counts",
    "gemq_problem",
    "mc_moe",
    "mc_moe_cost",
]
