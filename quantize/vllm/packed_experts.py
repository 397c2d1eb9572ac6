"""vLLM's way of running a layer's routed experts from their packed bytes: `bitknap::moe`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bitknap.errors import InputError
from bitknap.kernels.experts import Activation, Experts
from bitknap.kernels.moe import moe
from bitknap.kernels.reference import OAI_ALPHA, OAI_LIMIT
from bitknap.quantization.vllm.routed_layers import RoutedLayer, Share

# vLLM's activations that kernels have, without the ending of those that have no gate.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu2": "relu2",
    "swigluoai": "swiglu_oai",
    "swigluoai_uninterleave": "swiglu_oai",
}
_NO_GATE = "_no_mul"
# The one whose gate and up alternate, which their biases do too.
_ALTERNATING = "swigluoai"


class PackedExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """Keeps a layer's routed experts packed, and runs them by kernels.

    Attributes:
        routed: the experts in the checkpoint.
    """

    def __init__(self, moe_config: Any, routed: RoutedLayer) -> None:
        super().__init__(moe_config)
        self.routed = routed
        self._device = torch.device("cpu")
        self._experts: Experts | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Check that this device's part can be cut, and make room for biases only."""
        self.routed.check_share(share_of(layer))
        self._device = torch.empty(0).device
        if self.moe.has_bias:
            width = intermediate_size_per_partition * (2 if self.moe.is_act_and_mul else 1)
            for name, size in (("w13_bias", width), ("w2_bias", hidden_size)):
                bias = nn.Parameter(
                    torch.zeros(num_experts, size, dtype=params_dtype), requires_grad=False
                )
                layer.register_parameter(name, bias)
                set_weight_attrs(bias, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read this device's part of the streams."""
        tables = self.routed.tables(share_of(layer), self._device)
        name = layer.activation.value.removesuffix(_NO_GATE)
        gate_bias, up_bias = _split_bias(layer, name, gated="gate" in tables)
        self._experts = Experts(
            gate=tables.get("gate"),
            up=tables["up"],
            down=tables["down"],
            activation=_ACTIVATIONS[name],
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=layer.w2_bias.detach() if self.moe.has_bias else None,
        )

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """Return vLLM's description of weights that are not quantized: ours are none of its own."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return this device's part of the experts' weighted outputs, [T, H]; vLLM adds up parts.

        Shared experts are left to vLLM, which runs them itself for methods such as this one.
        """
        assert self._experts is not None
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.long()]
            topk_ids = torch.where(local < 0, len(self._experts), local)
        if layer.apply_router_weight_on_input:  # of one expert a token
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return moe(x, topk_ids, topk_weights, self._experts)


def check_layer(layer: Any, routed: RoutedLayer) -> None:
    """Raise unless kernels can run a layer of vLLM from packed experts.

    Args:
        layer: vLLM's `RoutedExperts`.
        routed: the same experts in the checkpoint.

    Raises:
        InputError: they cannot; says why.
    """
    name = layer.activation.value
    if name.removesuffix(_NO_GATE) not in _ACTIVATIONS:
        raise InputError(f"activation {name}: kernels have {', '.join(_ACTIVATIONS)}")
    if name.endswith(_NO_GATE) == ("gate" in routed.units):
        raise InputError(
            f"activation {name}: it does not fit projections {', '.join(routed.units)}"
        )
    oai = name.startswith("swigluoai")
    known = (OAI_LIMIT, OAI_ALPHA, 1.0) if oai else ()
    actual = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    if any(value is not None and value not in known for value in actual):
        raise InputError(f"activation {name}: kernels do not have it with limits {actual}")
    if layer.apply_router_weight_on_input and layer.top_k > 1:
        raise InputError(
            f"router weights on the inputs of {layer.top_k} experts a token: kernels take them on "
            "the outputs, or on the inputs of one"
        )
    routed.check_kernels()


def share_of(layer: Any) -> Share:
    """Return what this device holds of a layer of vLLM."""
    parallel = layer.moe_config.moe_parallel_config
    places = layer.expert_map
    if places is None:
        experts = list(range(layer.global_num_experts))
    else:
        numbers = enumerate(places.tolist())
        experts = [e for _, e in sorted((place, e) for e, place in numbers if place >= 0)]
    return Share(experts=experts, rank=parallel.tp_rank, of=parallel.tp_size)


def _split_bias(layer: Any, name: str, gated: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases [E, I] of gate and of up."""
    both = getattr(layer, "w13_bias", None)
    if both is None:
        return None, None
    if not gated:
        return None, both.detach()
    if name == _ALTERNATING:
        return both.detach()[:, ::2].contiguous(), both.detach()[:, 1::2].contiguous()
    gate, up = both.detach().chunk(2, 1)
    return gate.contiguous(), up.contiguous()
