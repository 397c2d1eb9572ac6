"""Record the inputs of a model's ordinary linear projections (attention, shared, dense)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.allocation.problem.units import ROLES
from bitknap.estimators.evidence.evidence import LinearEvidence, zeros
from bitknap.estimators.measuring.float_range import second_moments
from bitknap.quantization.models.matrix_views import Layout


class LinearSums:
    """Running sums over the tokens that one projection sees, on the device where it computes.

    Args:
        cols: number of columns of its weight.
        full: keep the whole second-moment matrix.
    """

    def __init__(self, cols: int, *, full: bool) -> None:
        self.cols, self.whole = cols, full
        self.clear()

    def clear(self) -> None:
        """Begin anew, as if nothing had been recorded."""
        self.tokens, self.square = 0, zeros(self.cols)
        self.full = torch.zeros(self.cols, self.cols) if self.whole else None

    def keep(self, module: nn.Module, args: Any) -> None:
        """Add the inputs of a call; a forward pre-hook."""
        x = args[0].detach().flatten(0, -2)
        self.tokens += len(x)
        self.square = self.square.to(x.device) + x.double().square().sum(0)
        if self.full is not None:
            moments = second_moments(x.float())
            kind = torch.promote_types(self.full.dtype, moments.dtype)
            self.full = self.full.to(x.device, kind)
            self.full += moments

    def finished(self) -> dict[str, Tensor]:
        """Return all sums by name, for `restore`."""
        whole = {} if self.full is None else {"full": self.full.cpu()}
        return {"square": self.square.cpu(), "tokens": torch.tensor(self.tokens)} | whole

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the present sums by those that `finished` returned."""
        self.tokens, self.square = int(tensors["tokens"]), tensors["square"]
        self.full = tensors.get("full")

    def evidence(self) -> LinearEvidence:
        """Return the sums as evidence."""
        full = None if self.full is None else self.full.cpu()
        return LinearEvidence(tokens=self.tokens, input_square=self.square.cpu(), input_full=full)


@contextlib.contextmanager
def recording_linears(
    model: nn.Module, layout: Layout, *, full: bool = False
) -> Iterator[dict[int, LinearSums]]:
    """Record the inputs of units that are ordinary linear layers while the block runs.

    Args:
        model: a live transformers model.
        layout: its units.
        full: keep whole second-moment matrices, not only their diagonals.

    Yields:
        The running sums of each projection, by unit.
    """
    sums, handles = {}, []
    for unit, view in enumerate(layout.views):
        if ROLES[layout.units.role[unit]] == "routed":
            continue
        sums[unit] = LinearSums(int(layout.units.cols[unit]), full=full)
        module = model.get_submodule(view.tensor.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(sums[unit].keep))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
