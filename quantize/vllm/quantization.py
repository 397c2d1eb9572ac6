"""Packed checkpoints as a quantization method of vLLM.

`config.json` names the method "bitknap", so `LLM(folder)` and `vllm serve folder` need no option.

    routed experts on a GPU   stay packed, and run by `bitknap::moe` (`packed_experts`)
    all else                  is decoded while it is loaded (`decoded_weights`): on a CPU, and
                              attention, shared experts and dense layers anywhere
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from bitknap.errors import InputError
from bitknap.quantization.models.tensor_names import Stacks
from bitknap.quantization.packed.opened import PackedFolder, open_packed
from bitknap.quantization.source.hub import fetch
from bitknap.quantization.source.source_config import METHOD
from bitknap.quantization.vllm.decoded_weights import DecodedWeights
from bitknap.quantization.vllm.packed_experts import PackedExperts, check_layer
from bitknap.quantization.vllm.routed_layers import RoutedLayer

_LOG = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16)


@register_quantization_config(METHOD)
class BitknapQuantization(QuantizationConfig):  # type: ignore[misc]
    """What vLLM knows about a packed checkpoint.

    Attributes:
        anywhere: keep experts packed on other devices too, where they run by the kernels' reference
            implementation, which is slow.
    """

    anywhere: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path()
        self._kept_packed: set[int] = set()

    def get_name(self) -> str:
        """Return the name in `config.json`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations; float32 runs on decoded weights on a GPU."""
        return [*_DTYPES, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU: that of bfloat16 and Triton's kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: all is in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitknapQuantization:
        """Return the method; the checkpoint's own files are read by `maybe_update_config`."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the checkpoint.

        Raises:
            InputError: it cannot be downloaded.
        """
        folder = Path(model_name)
        self._folder = folder if folder.is_dir() else fetch(model_name)

    def get_checkpoint_weight_mapper(self) -> DecodedWeights:
        """Return what replaces streams by decoded tensors while vLLM loads the checkpoint."""
        return DecodedWeights(decoded=self._decoded)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return how a layer is run; None for embeddings and the like, which vLLM decides."""
        if isinstance(layer, RoutedExperts):
            return self._method_of_experts(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _method_of_experts(self, layer: Any, prefix: str) -> Any:
        place = Stacks([prefix]).split(prefix)
        routed = RoutedLayer.of(self._packed, place[1]) if place else None
        if routed is None or not (self.anywhere or current_platform.is_cuda_alike()):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        try:
            if layer.params_dtype not in _DTYPES and not self.anywhere:
                raise InputError(f"activations in {layer.params_dtype}: kernels take 16-bit ones")
            check_layer(layer, routed)
        except InputError as error:
            _tell(str(error))
            return UnquantizedFusedMoEMethod(layer.moe_config)
        self._kept_packed.add(routed.layer)
        return PackedExperts(layer.moe_config, routed)

    @property
    def _packed(self) -> PackedFolder:
        return _opened(self._folder)

    def _decoded(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that streams stand for, float32, but for those that stay packed."""
        packed = self._packed
        units, left = packed.plan.units, set[str]()
        for unit, view in enumerate(packed.layout.views):
            routed = units.row(unit).role == "routed"
            if routed and int(units.layer[unit]) in self._kept_packed:
                left.add(view.tensor)
        for name in packed.replaced:
            if name not in left:
                yield name, packed.read(name)


@cache
def _opened(folder: Path) -> PackedFolder:
    return open_packed(folder)


@cache
def _tell(reason: str) -> None:
    _LOG.warning("%s; these experts are decoded when they are loaded", reason)
