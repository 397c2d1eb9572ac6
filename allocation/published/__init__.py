"""Allocators of published methods that need only NumPy, quirks included; one file per paper.

They run without torch, on any costs. The statistics that a paper computes from a model, its ties,
its citation and the parts that we could not reproduce are in `bitknap.estimators.published`, in a
file of the same name (`pmq` is MC-MoE's program); `RULES` there lists all of them.

| here | where from |
|---|---|
| `mc_moe_cost`, `mc_moe` | MC-MoE (PMQ), arXiv 2410.06270 |
| `MxMoe`, `PerLayer` | MxMoE, arXiv 2505.05799 |
| `chowdhury_order`, `chowdhury_counts`, `chowdhury_bits` | Chowdhury et al., arXiv 2604.06515 |
| `Lagrangian` | FRI-MxMoE, 2026.acl-long.982 |
| `Threshold` | mlx-lm and ModelOpt |
| `Annealing` | ExLlamaV2 |
| `gemq_problem` | GEMQ, arXiv 2605.23078 |
| `Evolution` | EvoPress, arXiv 2410.14649 |
"""

from bitknap.allocation.published.chowdhury import (
    chowdhury_bits,
    chowdhury_counts,
    chowdhury_order,
)
from bitknap.allocation.published.evopress import Evolution
from bitknap.allocation.published.exllamav2 import Annealing
from bitknap.allocation.published.fri_mxmoe import Lagrangian
from bitknap.allocation.published.gemq import gemq_problem
from bitknap.allocation.published.mlx_lm import Threshold
from bitknap.allocation.published.mxmoe import MxMoe, PerLayer
from bitknap.allocation.published.pmq import mc_moe, mc_moe_cost

__all__ = [
    "Annealing",
    "Evolution",
    "Lagrangian",
    "MxMoe",
    "PerLayer",
    "Threshold",
    "chowdhury_bits",
    "chowdhury_counts",
    "chowdhury_order",
    "gemq_problem",
    "mc_moe",
    "mc_moe_cost",
]
