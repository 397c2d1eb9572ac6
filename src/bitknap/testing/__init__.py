"""For tests: tiny random models and tables, and the contracts that plug-ins must keep."""

from bitknap.testing.contracts import SolverContract
from bitknap.testing.models import (
    FAMILIES,
    SIZES,
    filled,
    packed_checkpoint,
    random_table,
    routed_units,
    tiny_model,
    write_tensors,
)

__all__ = [
    "FAMILIES",
    "SIZES",
    "SolverContract",
    "filled",
    "packed_checkpoint",
    "random_table",
    "routed_units",
    "tiny_model",
    "write_tensors",
]
