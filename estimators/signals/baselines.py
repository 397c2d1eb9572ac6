"""Sensitivity signals of other people, to be compared with; `Scored` makes a table of each.

| here | where from |
|---|---|
| `Uniform`, `RandomScore` | what every signal must beat |
| `Frequency`, `RoutingWeight`, `McMoe` | MC-MoE (PMQ), arXiv 2410.06270 |
| `HessianTrace` | HAWQ-V2, arXiv 1911.03852 |
| `Owq` | OWQ, arXiv 2306.02272 |
| `AutoRoundScore` | AutoRound's AutoScheme |
| `Exl2Score` | ExLlamaV2 |
| `Kurtosis` | baa.ai's study of 512 experts |
| `OutlierRatio` | QuantMoE-Bench, arXiv 2406.08155 |
| `AlphaQ` | AlphaQ, arXiv 2606.04980 |

Signals of weights alone lose their meaning on rotated weights: compute them after a rotation.
"""

from bitknap.estimators.signals.error_signals import AutoRoundScore, Exl2Score, HessianTrace, Owq
from bitknap.estimators.signals.routing_signals import (
    Frequency,
    McMoe,
    RandomScore,
    RoutingWeight,
    Uniform,
)
from bitknap.estimators.signals.weight_signals import AlphaQ, Kurtosis, OutlierRatio

__all__ = [
    "AlphaQ",
    "AutoRoundScore",
    "Exl2Score",
    "Frequency",
    "HessianTrace",
    "Kurtosis",
    "McMoe",
    "OutlierRatio",
    "Owq",
    "RandomScore",
    "RoutingWeight",
    "Uniform",
]
