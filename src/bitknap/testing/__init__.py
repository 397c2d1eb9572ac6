"""For tests: tiny random models, tables and plans, and the contracts that plug-ins must keep."""

from bitknap.testing.contracts import SolverContract
from bitknap.testing.models import (
    FAMILIES,
    SIZES,
    filled,
    packed_checkpoint,
    tiny_model,
    write_tensors,
)
from bitknap.testing.tables import mixed_plan, random_plan, random_table, routed_units

__all__ = [
    "FAMILIES",
    "SIZES",
    "SolverContract",
    "filled",
    "mixed_plan",
    "packed_checkpoint",
    "random_plan",
    "random_table",
    "routed_units",
    "tiny_model",
    "write_tensors",
]
