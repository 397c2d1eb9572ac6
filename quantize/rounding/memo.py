"""Rounding that is done once: a matrix already rounded to a format is looked up the next time.

Estimators measure the round trips of a few matrices in many formats, and comparing plans rounds the
same matrices to the same formats again and again. Codes and grids are kept, a byte per weight plus
the scales, under a digest of the weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.quantization.rounding.rounding import Coded, Inputs, Rounding, takes_squares

# Maximum bytes of codes and grids that are kept.
KEPT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Another rounding method, with a memo.

    When `limit` is reached, new matrices are rounded each time they are asked for.

    Attributes:
        rounding: how a matrix that is not known yet is rounded.
        limit: maximum bytes that are kept.
    """

    rounding: Rounding
    limit: int = KEPT_BYTES
    _known: dict[bytes, Coded] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.rounding.name

    @property
    def needs_inputs(self) -> bool:
        """Whether it refuses to work without `Inputs`."""
        return self.rounding.needs_inputs

    @property
    def diagonal(self) -> bool:
        """Whether mean squares are all that it takes of `Inputs`."""
        return takes_squares(self.rounding)

    def quantize(
        self,
        weights: Tensor,
        format: Format,
        inputs: Inputs | None = None,
        exponents: Tensor | None = None,
    ) -> Coded:
        """Return n matrices [n, rows, cols] as n × rows quantized rows.

        Raises:
            InputError: raised by the wrapped rounding method.
        """
        if exponents is not None:  # some rows of larger matrices
            return self.rounding.quantize(weights, format, inputs, exponents)
        rows = weights.shape[1]
        keys = [_key(weights, format, inputs, at) for at in range(len(weights))]
        new = [at for at, key in enumerate(keys) if key not in self._known]
        fresh: dict[bytes, Coded] = {}
        if new:
            some, which = None, torch.tensor(new)
            if inputs is not None:
                some = Inputs(moments=inputs.moments[which], tokens=inputs.tokens[which])
            rounded = self.rounding.quantize(weights[which], format, some)
            for place, at in enumerate(new):
                fresh[keys[at]] = rounded.rows(place * rows, (place + 1) * rows)
            if len(new) == len(keys) and not self._room(rounded):
                return rounded
            self._keep(fresh)
        parts = [fresh.get(key) or self._known[key] for key in keys]
        whole: Coded = parts[0].stack(parts)
        return whole

    def _room(self, rounded: Coded) -> bool:
        return sum(self._sizes) + rounded.nbytes <= self.limit

    def _keep(self, fresh: dict[bytes, Coded]) -> None:
        size = sum(part.nbytes for part in fresh.values())
        if sum(self._sizes) + size <= self.limit:
            self._sizes.append(size)
            self._known.update(fresh)


def _key(weights: Tensor, format: Format, inputs: Inputs | None, at: int) -> bytes:
    # What was rounded on one device cannot be put together with what was on another.
    digest = hashlib.blake2b(f"{format.name} {weights.device}".encode(), digest_size=16)
    for part in (weights, *(() if inputs is None else (inputs.moments, inputs.tokens))):
        matrix = part[at].detach().contiguous().cpu().numpy()
        digest.update(np.ascontiguousarray(matrix).data)
    return digest.digest()
