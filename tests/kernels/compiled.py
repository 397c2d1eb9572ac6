"""Compiles a few variants for every target and prints what they miss as JSON.

A process of its own, without TRITON_INTERPRET. All variants: bitknap.benchmarks.kernels.variants.
"""

import json

import torch

from bitknap.benchmarks.kernels.ahead_of_time import Layer, build, problems, variants
from bitknap.kernels.layout.scale_words import Recipe


def layer(*bits, blocks=1, hidden=2048, scaled=False):
    return Layer(
        name=f"{bits} in {blocks}{' with exponents' * scaled}",
        hidden=hidden,
        intermediate=1408,
        experts=64,
        topk=6,
        recipes=tuple(Recipe(bits=b, group=128, scaled=scaled) for b in bits),
        blocks=blocks,
    )


# layer, tokens, target, which of the kernels that are launched
CASES = [
    (layer(2, 4), 1, "sm_90", "decode_gate_up"),
    (layer(3), 1, "sm_90", "decode_down"),
    (layer(4), 600, "sm_90", "grouped_down"),
    (layer(2, 4, blocks=4), 1, "sm_90", "decode_gate_up"),
    (layer(2, 4, scaled=True), 1, "sm_90", "decode_gate_up"),
    (layer(4), 600, "sm_90", "sort_pairs"),
    (layer(4), 600, "sm_90", "combine"),
    (layer(4), 1, "sm_80", "decode_down"),
    (layer(4), 1, "sm_100", "decode_down"),
    (layer(4, hidden=2112), 1, "sm_100", "decode_gate_up"),  # a tail of 64 columns
    (layer(3), 1, "gfx942", "decode_down"),
    (layer(4), 1 << 14, "sm_90", "dequantize"),
]

if __name__ == "__main__":
    found = {}
    for case, tokens, target, kernel in CASES:
        made = [v for v in variants(case, tokens, torch.bfloat16, target) if kernel in v.name]
        built = build(made[0], target)
        found[f"{target} {made[0].name}"] = {
            "problems": problems(made[0], built),
            "per_weight": built.per_weight,
            "registers": built.registers,
        }
    print(json.dumps(found))
