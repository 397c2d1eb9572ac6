"""GGUF plans against llama.cpp's own recipes at equal bytes, on text that calibration did not see.

    python -m bitknap.benchmarks.questions.llama_recipes -o benchmarks/results

K-quants and IQ types need rows that are multiples of 256, and the bundled Mixtral's residual stream
has 192 numbers. It is widened to 256 without changing what it computes: zeros are added, norms
scaled to the new width, and the stream is rotated, so that no number stands out as padding.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitknap.allocation import BitPlan, Budget, CostTable, Format, Units, profile
from bitknap.api.calibration import evaluation_windows, gather
from bitknap.api.planning import plan_for
from bitknap.api.quantizing import CALIBRATION_TOKENS, estimate
from bitknap.api.requests import Calibration, Formats
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.estimators.measuring.kl_replay import Losses, Replay, standard_error
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.ggml import Ggml
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.transforms.rotation import rotate_residual

MODEL, WIDTH = "mixtral", 256
TARGET, PROFILE = "gguf", "layer_proj"
# The aim: the most that a plan may lose, as a share of the recipe's loss.
WITHIN = 0.7
# Types of gate and up, and of down, that llama-quantize gives the experts of a Mixtral of four
# layers when it has an importance matrix; one for all layers, or one each. They are those of its
# source in November 2026, `src/llama-quant.cpp`.
RECIPES: Mapping[str, tuple[str, ...] | tuple[tuple[str, ...], tuple[str, ...]]] = {
    "IQ1_S": ("iq1_s", "iq1_s"),
    "IQ1_M": ("iq1_m", "iq1_m"),
    "IQ2_XXS": ("iq2_xxs", "iq2_xxs"),
    "IQ2_XS": ("iq2_xs", "iq2_xs"),
    "IQ2_M": ("iq2_s", "iq2_s"),
    "Q2_K": ("q2_k", "q3_k"),
    "IQ3_XXS": ("iq3_xxs", "iq3_xxs"),
    "IQ3_XS": (("iq3_xxs", "iq3_xxs", "iq3_xxs", "iq3_s"), ("iq3_s",) * 4),
    "IQ3_M": (("iq3_s",) * 4, ("iq3_s", "iq3_s", "q4_k", "q4_k")),
    "Q3_K_M": ("q3_k", "q4_k"),
    "Q3_K_L": ("q3_k", "q5_k"),
    "IQ4_XS": ("iq4_xs", "iq4_xs"),
    "Q4_K_S": ("q4_k", "q4_k"),
    "Q4_K_M": (("q4_k",) * 4, ("q4_k", "q4_k", "q6_k", "q6_k")),
    "Q5_K_M": (("q5_k",) * 4, ("q5_k", "q5_k", "q6_k", "q6_k")),
    "Q6_K": ("q6_k", "q6_k"),
}


def widened(name: str, width: int, out: Path) -> float:
    """Write a reference Mixtral with a wider residual stream; return the change of its logits.

    Args:
        name: name of the bundled model.
        width: the new hidden size.
        out: folder to write.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve(f"reference:{name}")
    model = load(folder, torch.float32)
    config = type(model.config).from_dict(model.config.to_dict())
    hidden = int(config.hidden_size)
    config.hidden_size, config.tie_word_embeddings = width, False
    # The mean of squares is over more numbers now, of which the new ones are 0.
    config.rms_norm_eps *= hidden / width
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = dict(model.state_dict())
    with torch.no_grad():
        for key, tensor in wide.state_dict().items():
            part = state[key]
            tensor.zero_()
            tensor[tuple(map(slice, part.shape))] = part
            if tensor.ndim == 1:
                tensor[:hidden] *= (hidden / width) ** 0.5
    tokens = torch.arange(1, 65)[None]
    before = model(tokens).logits
    rotate_residual(wide)
    after = wide(tokens).logits
    wide.save_pretrained(out)
    for file in folder.glob("tokenizer*.json"):
        shutil.copy(file, out / file.name)
    return float((after - before).abs().max().detach())


def recipe_plan(name: str, units: Units, model: str) -> BitPlan:
    """Return llama.cpp's recipe of that name as a plan."""
    outer, inner = RECIPES[name]
    by_layer = [(one,) * 4 if isinstance(one, str) else one for one in (outer, inner)]
    types = sorted({*by_layer[0], *by_layer[1]})
    down = units.projection == units.projections.index("down")
    choice = [
        types.index(by_layer[int(inside)][int(layer)])
        for layer, inside in zip(units.layer, down, strict=True)
    ]
    formats = tuple(map(Format.ggml, types))
    return BitPlan.from_choice(units, formats, np.array(choice), model=model)


def compared(folder: Path, tokens: int, calibration: int) -> list[dict[str, Any]]:
    """Return one row a recipe: its loss, and that of our plan of at most its bytes."""
    asked = Calibration(tokens=calibration, rounding=Ggml(), device="cpu")
    start = time.monotonic()
    table = estimate(folder, formats=Formats(target=TARGET), calibration=asked)
    print(json.dumps({"estimate_seconds": round(time.monotonic() - start, 1)}), flush=True)
    source = Checkpoint.open(folder)
    evidence = gather(source, frozenset({"moments"}), asked)
    model = load(folder, torch.float32)
    layout = walk(model)
    replay = Replay(model, layout, evaluation_windows(folder, "builtin", tokens), cache=False)

    def losses(plan: BitPlan) -> Losses:
        with applied(model, layout, plan, Ggml(), evidence.inputs):
            return replay.measure()

    rows = []
    for name in RECIPES:
        recipe = recipe_plan(name, layout.units, source.fingerprint)
        rows.append(_row(name, recipe, table, losses))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(name: str, recipe: BitPlan, table: CostTable, losses: Any) -> dict[str, Any]:
    solution = plan_for(table, Budget.bytes(recipe.total_bytes), ties=profile(PROFILE))
    ours, theirs = losses(solution.plan), losses(recipe)
    paired = theirs.kl - ours.kl
    return {
        "recipe": name,
        "bytes": recipe.total_bytes,
        "bpw": recipe.bpw,
        "our_bytes": solution.plan.total_bytes,
        "recipe_kl": float(theirs.kl.mean()),
        "kl": float(ours.kl.mean()),
        "kl_se": standard_error(ours.kl),
        "difference": float(paired.mean()),
        "difference_se": standard_error(paired) if paired.any() else 0.0,
        "ratio": float(ours.kl.mean() / theirs.kl.mean()),
        "predicted_kl": solution.cost,
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the report."""
    within = sum(row["ratio"] <= WITHIN for row in rows)
    lines = [
        "# GGUF plans against llama.cpp's recipes",
        "",
        f"KL to the original in nats per token on {about['tokens']:,} tokens of held-out text, "
        "with the weights that the files hold; ± is the standard error over windows, of the paired "
        "difference in its own column. Both sides are rounded by ggml with the same importance "
        f"matrix, from {about['calibration_tokens']:,} calibration tokens, and only routed experts "
        "are quantized. Recipes are the types that llama-quantize gives the experts of a Mixtral "
        "of four layers; our plans have at most their bytes, one type a layer and projection, as "
        "llama.cpp needs it.",
        "",
        f"The model is the bundled Mixtral with its residual stream widened from 192 to {WIDTH} "
        "numbers and rotated, which changes its logits by at most "
        f"{about['logit_change']:.0e}. Rotation also evens weights out, so types for outliers gain "
        "less here than on models as they are trained.",
        "",
        f"{within} of {len(rows)} recipes lose so much that our plan has at most {WITHIN} of "
        "their KL.",
        "",
        "| recipe | bpw | KL recipe | KL ours | ratio | recipe − ours |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['recipe']} | {r['bpw']:.3f} | {r['recipe_kl']:.5f} | "
            f"{r['kl']:.5f} ± {r['kl_se']:.5f} | **{r['ratio']:.2f}** | "
            f"{r['difference']:.5f} ± {r['difference_se']:.5f} |"
        )
    lines += ["", f"torch {about['torch']}, {about['device']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    args = parser.parse_args()
    claim(parser, args.out, "llama_recipes.json", "llama_recipes.md")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        change = widened(MODEL, WIDTH, folder)
        rows = compared(folder, args.tokens, args.calibration_tokens)
    about = {
        "tokens": args.tokens,
        "calibration_tokens": args.calibration_tokens,
        "logit_change": change,
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}",
    }
    write_results(args.out / "llama_recipes.json", {"about": about, "rows": rows})
    write_report(args.out / "llama_recipes.md", markdown(rows, about))


if __name__ == "__main__":
    main()
