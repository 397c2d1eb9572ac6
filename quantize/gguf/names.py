"""llama.cpp's names of tensors, from those of units and of a checkpoint's other tensors."""

from __future__ import annotations

import re

from bitknap.allocation.problem.units import Unit

_ROUTED, _SHARED = "exps", "shexp"
_ATTENTION = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "qkv": "attn_qkv",
    "q_a": "attn_q_a",
    "q_b": "attn_q_b",
    "kv_a_with_mqa": "attn_kv_a_mqa",
    "kv_b": "attn_kv_b",
}
_MLP = {"gate", "up", "down"}
_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")
# The last part of a kept tensor's name in a layer, to its name in a block.
_KEPT = (
    (r"input_layernorm\.weight", "attn_norm.weight"),
    (r"post_attention_layernorm\.weight", "{ffn_norm}.weight"),
    (r"self_attn\.(q|k|q_a|kv_a)_(?:layer)?norm\.weight", r"attn_\1_norm.weight"),
    (r"self_attn\.(q|k|v)_proj\.bias", r"attn_\1.bias"),
    (r"self_attn\.o_proj\.bias", "attn_output.bias"),
    (r"self_attn\.sinks", "attn_sinks.weight"),
    (r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.(weight|bias)", r"ffn_gate_inp.\1"),
    (r"mlp\.gate\.e_score_correction_bias", "exp_probs_b.bias"),
    (r"mlp\.shared_expert_gate\.weight", "ffn_gate_inp_shexp.weight"),
    (r"mlp\.experts\.down_proj_bias", "ffn_down_exps.bias"),
    (r"mlp\.(gate|up|down)_proj\.bias", r"ffn_\1.bias"),
)
_OUTSIDE = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def of_unit(unit: Unit) -> str | None:
    """Return the name of the tensor that holds a unit, without ".weight"; None if it has none.

    All experts of a layer's projection are one tensor.
    """
    if unit.role == "attention":
        leaf = _ATTENTION.get(unit.projection)
    elif unit.projection not in _MLP:
        leaf = None
    else:
        kind = {"routed": f"_{_ROUTED}", "shared": f"_{_SHARED}"}.get(unit.role, "")
        leaf = f"ffn_{unit.projection}{kind}"
    return None if leaf is None else f"blk.{unit.layer}.{leaf}"


def of_kept(name: str, ffn_norm: str = "ffn_norm") -> str | None:
    """Return the name of a tensor that holds no unit; None if llama.cpp has none.

    Args:
        name: its name in the checkpoint.
        ffn_norm: the architecture's name for the norm before the MLP.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return next(
            (to for end, to in _OUTSIDE.items() if re.fullmatch(rf"(model\.)?{end}", name)), None
        )
    for regex, to in _KEPT:
        if found := re.fullmatch(regex, match["rest"]):
            leaf = found.expand(to.replace("{ffn_norm}", ffn_norm))
            return f"blk.{match['layer']}.{leaf}"
    return None
