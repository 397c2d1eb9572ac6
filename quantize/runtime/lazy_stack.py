"""A stack of experts' matrices that is never stacked.

transformers runs experts with the matrix of one expert at a time (`eager`), with one matrix for
each pair of token and expert (`batched_mm`), or with all of them in one grouped product
(`grouped_mm`). `Matrices` takes the place of the stack [E, ., .]. It dequantizes a matrix, or takes
it from the cache, when a product needs it. So experts that no token goes to are not touched, and
cached matrices are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# The public function, new in torch 2.10, calls the private one.
_GROUPED = tuple(
    product
    for where, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if (product := getattr(where, name, None)) is not None
)


class Matrices:
    """Behaves like a tensor [E, ., .] in everything that running experts needs.

    Attributes:
        matrix: function that returns one expert's matrix, which callers must not write to.
        shape: shape of the stack.
        dtype: dtype of the matrices.
        device: device of the matrices.
    """

    def __init__(
        self,
        matrix: Callable[[int], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        swapped: bool = False,
    ) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(shape), dtype, device
        self._swapped = swapped

    def transpose(self, one: int, other: int) -> Matrices:
        """Return the stack with each matrix transposed, as grouped products need it."""
        assert {one % 3, other % 3} == {1, 2}, "only the matrices are transposed"
        return Matrices(self.matrix, self.shape, self.dtype, self.device, not self._swapped)

    def __getitem__(self, which: Any) -> Tensor:
        ids = torch.as_tensor(which)
        if ids.dim() == 0:
            return self._one(int(ids))
        return torch.stack([self._one(i) for i in ids.tolist()])

    def _one(self, expert: int) -> Tensor:
        matrix = self.matrix(expert)
        return matrix.T if self._swapped else matrix

    def data_ptr(self) -> int:
        """Return 0, which counts as aligned: each matrix has its own memory."""
        return 0

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _GROUPED and isinstance(args[0], Tensor):
            return args[1]._grouped(args[0], given["offs"])
        # Any other operation gets what it expects, a tensor.
        return func(*(_stacked(a) for a in args), **{k: _stacked(v) for k, v in given.items()})

    def _grouped(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return rows [S, .] times their experts' matrices; expert e's rows end before ends[e]."""
        _, before, after = self.shape
        start, parts = 0, []
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                parts.append(rows[start:end] @ self._one(expert))
                start = end
        if start < len(rows) or not parts:  # rows of experts that are elsewhere
            left = len(rows) - start
            parts.append(rows.new_zeros(left, before if self._swapped else after))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _stacked(given: Any) -> Any:
    return given[range(given.shape[0])] if isinstance(given, Matrices) else given
