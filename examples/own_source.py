"""Write your own source: a model that Bitknap reads without a folder of safetensors.

Run it with `python examples/own_source.py`. It makes up its own weights and takes seconds.

A source says what tensors there are and reads them, one matrix at a time. Estimators that need no
text work on it. The guide is the docstring of `bitknap.quantization.source.source`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

import bitknap
from bitknap.estimators.evidence.of_weights import of_weights
from bitknap.quantization.models.matrix_views import View


@dataclass(frozen=True)
class InMemory:
    """Tensors by the names that a checkpoint would have."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to (dtype, shape): experts are recognised by these."""
        return {name: ("F32", tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    @property
    def fingerprint(self) -> str:
        """Tables and plans carry this, so that they are not mixed up between models."""
        digest = sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.numpy().tobytes()[:256])
        return digest.hexdigest()[:32]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.tensors[name]

    def read_matrix(self, view: View) -> Tensor:
        """Return one matrix; a view says which part of which tensor it is."""
        return view.of(self.tensors[view.tensor])


def made_up(layers: int = 2, experts: int = 4) -> InMemory:
    """Return a source of random experts, named as Mixtral's are."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}
    tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": torch.randn(
            shape, generator=generator
        )
        * (1 + expert)
        for layer in range(layers)
        for expert in range(experts)
        for name, shape in shapes.items()
    }
    for layer in range(layers):
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[router] = torch.randn(experts, 64, generator=generator)
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    return InMemory(config=config, tensors=tensors)


def main() -> bitknap.Solution:
    """Estimate costs from the weights of the source above, and solve."""
    evidence = of_weights(made_up())
    table = bitknap.DataFree().estimate(evidence, bitknap.formats(bits=(2, 3, 4), group_size=64))
    solution = bitknap.solve(bitknap.Problem(table, bitknap.Budget.bits(3)))
    plan = solution.plan
    print(f"{len(plan.units)} units of a source in memory, {plan.bpw:.3f} bits a weight")
    return solution


if __name__ == "__main__":
    main()
