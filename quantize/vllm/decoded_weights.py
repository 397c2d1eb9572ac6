"""Weights as vLLM's models expect them, in the place of a packed checkpoint's streams.

Each of vLLM's models knows by name where a checkpoint's tensors go, how they are merged and which
part of them a device holds. So decoded tensors are handed to it under the names that they had
before they were packed, and nothing about models has to be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from bitknap.quantization.packed.outline import PREFIX

Weights = Iterable[tuple[str, Tensor]]


def _nothing() -> Weights:
    return ()


@dataclass
class DecodedWeights(WeightsMapper):  # type: ignore[misc]
    """Renames a checkpoint's tensors as its base class does, and replaces streams.

    Models add renamings of their own with `|`, on either side; the result replaces streams too.

    Attributes:
        decoded: yields the tensors that streams stand for. It is called once streams have passed,
            and so not where a part of a model passes its own tensors on.
    """

    decoded: Callable[[], Weights] = _nothing

    def __or__(self, other: WeightsMapper) -> DecodedWeights:
        return self._with(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> DecodedWeights:
        return self._with(WeightsMapper.__or__(other, self))

    def _with(self, renamings: WeightsMapper) -> DecodedWeights:
        names = [field.name for field in fields(WeightsMapper)]
        return replace(self, **{name: getattr(renamings, name) for name in names})

    def apply(self, weights: Weights) -> Any:
        """Yield the tensors under the model's names."""
        return super().apply(self._replaced(weights))

    def _replaced(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        packed = False
        for name, tensor in weights:
            if name.startswith(PREFIX):
                packed = True
            else:
                yield name, tensor
        if packed:
            yield from self.decoded()
