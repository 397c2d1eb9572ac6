"""Target `mlx`: a folder that mlx-lm loads.

MLX's affine grid is x = scale · q + bias with 16-bit scales and biases: the asymmetric grid with
fp16 metadata. So weights may be rounded by any method, and are stored without a change. All experts
of a projection are one module with one format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitknap.errors import ModelError
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob

# Name of the module that stacks a layer's experts, by model type; all were run by mlx-lm. Dense
# models have none.
EXPERTS = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "phimoe"), "switch_mlp"
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), "switch_mlp"),
    "gpt_oss": "experts",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ""),
}
# Models whose heads mlx-lm makes as wide as the hidden size divided by their number.
_EVEN_HEADS = ("mixtral", "phimoe", "qwen2_moe", "qwen2")


class Mlx(GridTarget):
    """MLX, by mlx-lm.

    Its kernels compute garbage without an error for 7 bits and for other groups than these.
    """

    name = "mlx"
    about = "MLX, Apple's array framework, by mlx-lm: one format a layer and projection."
    profile = "layer_proj"
    rule = ShapeRule(bits=(2, 3, 4, 5, 6, 8), groups=(32, 64, 128), cols=32)
    symmetric = (False,)

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError unless mlx-lm is known to run such a model."""
        kind = str(config.get("model_type"))
        if kind not in EXPERTS:
            raise ModelError(
                f"mlx: model type {kind!r} was never run by mlx-lm here; known are "
                f"{', '.join(sorted(EXPERTS))}"
            )
        width, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
        size = config.get("head_dim") or width // heads
        if kind in _EVEN_HEADS and size * heads != width:
            raise ModelError(
                f"mlx: heads of {size} in {heads} are not the hidden size, {width}; mlx-lm runs no "
                f"such {kind}"
            )

    def export(self, job: ExportJob) -> Exported:
        """Write the folder: weights, configuration, tokenizer and plan."""
        from bitknap.quantization.targets.folders import mlx_folder

        return mlx_folder.write(job, EXPERTS[job.source.config["model_type"]])
