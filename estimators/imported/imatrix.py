"""llama.cpp's importance matrices: what rounding does to the outputs of every matrix.

    unit    a matrix of the model
    cost    share of tokens × Σ E[x²] ΔW², the mean squared error of the matrix's output, where x
            are its inputs, and ΔW is the error of rounding to nearest
    bytes   those of the format

Shares are counts of tokens over the largest count in the file. The weights are read and rounded; no
model is run.

Source: llama.cpp, `tools/imatrix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import CostTable, Format
from bitknap.estimators.costs.weighed_errors import Charge, weighed_table
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.float_range import weighed_squares
from bitknap.quantization.gguf import imatrix, names

MAGIC = b"GGUF"


def table(path: Path, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return the costs of a model's matrices.

    Args:
        path: the importance matrix.
        evidence: the model's weights.
        formats: the columns.

    Raises:
        FileError: it is no importance matrix, or is cut short.
        MismatchError: it is of another model.
    """
    known = imatrix.read(path)
    rows = imatrix.of_units(known, evidence.units, path)
    most = max(float(one.tokens.max(initial=1)) for one in known.values())
    share = np.ones(len(rows))
    for place in range(len(rows)):
        unit = evidence.units.row(place)
        seen = known[f"{names.of_unit(unit)}.weight"].tokens
        share[place] = seen[min(max(unit.expert, 0), len(seen) - 1)] / most

    def weigh(run: np.ndarray, weights: Tensor) -> Charge:
        squares = torch.from_numpy(np.stack([rows[unit] for unit in run.tolist()]))
        columns = (squares.double() * torch.from_numpy(share[run])[:, None])[:, None, :]
        there = columns.float().to(weights.device)
        return lambda delta: weighed_squares(delta, there).sum((1, 2)).double()

    about = {
        "source": path.name,
        "estimator": "imported(imatrix)",
        "unit": "squared output error, by llama.cpp's importance matrix",
    }
    return weighed_table(evidence, formats, weigh, about)
