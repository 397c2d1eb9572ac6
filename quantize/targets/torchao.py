"""Target `torchao`: settings with which torchao quantizes the model as a plan says."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class TorchAo(GridTarget):
    """torchao, one format for each stacked tensor of experts."""

    name = "torchao"
    about = "torchao: integer grids of PyTorch's own quantization."
    profile = "layer_gateup_down"
    rule = ShapeRule(bits=tuple(range(1, 9)), groups=(32, 64, 128, 256))
    symmetric = (False,)
    reads_weights = False
