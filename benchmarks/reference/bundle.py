"""Turn finished training runs into bundled package data: weights, texts and the model card.

    python -m bitknap.benchmarks.reference.bundle --corpus CORPUS --trained DIR/mixtral DIR/qwen3moe

Calibration text comes from the training files, evaluation text from the validation files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bitknap.benchmarks.reference.recipe import CONTEXT, DOMAINS
from bitknap.estimators.measuring.text import token_windows
from bitknap.estimators.sweep.expert_recording import recording
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime.loading import load

HERE = Path(__file__).parent
EXCERPT = 7_000  # bytes
TEXT = 560_000  # bytes, total of all domains
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "initial_routers.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)


def excerpts(text: str, size: int) -> str:
    """Return about `size` bytes of `text`: whole lines, in pieces spread evenly over it."""
    pieces = max(1, size // EXCERPT)
    taken = []
    for piece in range(pieces):
        start = text.find("\n", len(text) * piece // pieces) + 1
        end = text.rfind("\n", start, start + EXCERPT) + 1
        taken.append(text[start : max(end, start)])
    return "\n".join(taken)


def bundle_texts(corpus: Path) -> None:
    for purpose, split in (("calibration", "train"), ("evaluation", "valid")):
        parts = [
            excerpts((corpus / f"{d}.{split}.txt").read_text("utf-8"), TEXT // len(DOMAINS))
            for d in DOMAINS
        ]
        (HERE / f"{purpose}.txt").write_text("\n".join(parts), encoding="utf-8")


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, text: str, tokens: int = 50_000) -> float:
    windows = token_windows(tokenizer, text, tokens, CONTEXT)
    total = sum(model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(8))
    return math.exp(total / len(windows))


def card(name: str, folder: Path, corpus: Path) -> str:
    """Return the model's section of the card: data seen, perplexity, router load."""
    record = json.loads((folder / "training.json").read_text())
    model = load(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {d: (corpus / f"{d}.valid.txt").read_text("utf-8") for d in DOMAINS}
    lines = [
        f"## reference:{name}",
        "",
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {record['tokens']:,.0f} "
        f"training tokens, seed {record['seed']}, "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
        "",
        "Data: books, code, speeches and wiki, training files only; sources and licences in "
        "`NOTICE.md` one folder up. Weights: Apache-2.0. Own byte-level BPE of 4,096 tokens. "
        "`initial_routers.safetensors` holds the routers before the first step. To repeat it:",
        "",
        f"    python -m bitknap.benchmarks.reference.train {name} --corpus CORPUS -o DIR "
        f"--tokens {record['tokens']:.0f} --batch {record['batch_tokens']} --compile",
        "",
        "| validation text | perplexity |",
        "|---|---|",
        *(f"| {d} | {perplexity(model, tokenizer, t):.1f} |" for d, t in texts.items()),
        "",
        "Router load on the evaluation text, share of tokens that reach each expert in percent, "
        "sorted:",
        "",
    ]
    layout = walk(model)
    windows = token_windows(
        tokenizer, (HERE / "evaluation.txt").read_text("utf-8"), 50_000, CONTEXT
    )
    with recording(model, layout) as sums, torch.no_grad():
        for batch in windows.split(8):
            model(input_ids=batch)
    for number, layer in sums.items():
        shares = sorted((layer.count / layer.tokens * 100).tolist(), reverse=True)
        lines.append(f"- layer {number}: " + " ".join(f"{x:.0f}" for x in shares))
    return "\n".join([*lines, "", "Validation loss on the way (tokens: nats per token):", ""]) + (
        ", ".join(f"{e['tokens'] / 1e6:.1f}M: {e['mean']:.3f}" for e in record["log"][::4]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--trained", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    bundle_texts(args.corpus)
    for folder in args.trained:
        target = HERE / folder.name
        target.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        (target / "CARD.md").write_text(card(folder.name, target, args.corpus), encoding="utf-8")


if __name__ == "__main__":
    main()
