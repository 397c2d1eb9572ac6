"""Compile the kernels for every target; record registers, spills and instructions per weight.

    python -m bitknap.benchmarks.kernels.variants -o benchmarks/results

Needs no GPU and measures no speed. Every line is one compilation of a kernel that the operator
launches for a layer; a mixed layer has one loop for each of its kinds, widest first. Takes ten
minutes on one idle core; kernels in Triton's cache take no time.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton

from bitknap.arguments import add_output
from bitknap.benchmarks.kernels.ahead_of_time import (
    TARGETS,
    Built,
    Layer,
    Variant,
    budget,
    build,
    problems,
    variants,
)
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.names import one_of

WIDE = (4096, 14336, 8, 2)  # Mixtral
MANY = (2048, 768, 128, 8)  # Qwen3-30B-A3B
TAILS = (2048, 1408, 64, 6)  # DeepSeek-V2-Lite
OAI = (2880, 2880, 32, 4)  # gpt-oss-20b
COMPILED = """Compiled, not run: that every variant keeps its registers, fits shared memory, and (on
sm_90) has few enough instructions not to be what keeps a program from memory's speed. What an H200
makes of some of them is in `kernels.md`."""


def layers() -> Iterator[tuple[Layer, tuple[int, ...], tuple[str, ...]]]:
    """Yield (layer, tokens, targets) to compile."""
    everywhere = tuple(TARGETS)

    def layer(name: str, shape: tuple[int, ...], *recipes: Recipe, **more: Any) -> Layer:
        hidden, inner, experts, topk = shape
        return Layer(
            name=name,
            hidden=hidden,
            intermediate=inner,
            experts=experts,
            topk=topk,
            recipes=recipes,
            **more,
        )

    def wide(bits: int, group: int = 128, **more: Any) -> Recipe:
        return Recipe(bits=bits, group=group, **more)

    for bits in (4, 2, 3, 8):
        yield layer(f"{bits} g128, Mixtral", WIDE, wide(bits)), (1,), everywhere
    yield layer("4 g128, Mixtral", WIDE, wide(4)), (64, 512), everywhere
    mixed = layer("2+3+4+8 g128, Qwen3", MANY, wide(2), wide(3), wide(4), wide(8))
    yield mixed, (1, 64, 1024), everywhere
    yield mixed, (16, 1 << 14), ("sm_90",)
    kept = (wide(4, 32), Recipe(bits=16, group=1, kept=1))
    oai = {"biased": True, "activation": "swiglu_oai"}
    yield layer("4 g32 + bf16, gpt-oss", OAI, *kept, **oai), (4,), everywhere
    for bits in (1, 5, 6, 7):
        yield layer(f"{bits} g128, Mixtral", WIDE, wide(bits)), (1,), ("sm_90",)
    compact = (wide(2, 32, share=6), wide(3, 64, share=6), wide(4, 64, share=8))
    yield layer("2+3+4 compact, DeepSeek", TAILS, *compact), (1,), ("sm_90",)
    other = tuple(wide(bits, 64) for bits in (4, 2))
    yield layer("gate differs from up", MANY, *other, gate=other[::-1]), (8,), ("sm_90",)
    grids = (wide(4, 256), wide(3, 1 << 20), wide(4, 64, symmetric=True))
    yield layer("g256, rows, symmetric", MANY, *grids), (1,), ("sm_90",)
    blocks = layer("2+4 in 4 blocks of rows", MANY, wide(2), wide(4), blocks=4)
    yield blocks, (1, 64), ("sm_90",)
    plain = layer("4 g128, no gate", MANY, wide(4), gated=False, activation="relu2")
    yield plain, (1,), ("sm_90",)
    yield layer("bf16 alone", MANY, kept[1]), (1,), ("sm_90",)


def jobs(chosen: Sequence[str]) -> Iterator[tuple[Variant, torch.dtype, str]]:
    """Yield every compilation once: a variant, its activations' dtype and its target."""
    seen = set()
    for target, (layer, tokens, targets) in product(chosen, layers()):
        # fp16 differs from bf16 in how a code becomes a float, not in the structure of the kernels.
        both = target == "sm_90" and layer.name.startswith(("4 g128, M", "8 "))
        for dtype in (torch.bfloat16, torch.float16)[: 1 + both]:
            for count in tokens if target in targets else ():
                for variant in variants(layer, count, dtype, target):
                    key = (target, dtype, variant.name.split()[-1], str(variant.constants))
                    if key not in seen:
                        seen.add(key)
                        yield variant, dtype, target


def row(variant: Variant, dtype: torch.dtype, built: Built) -> dict[str, Any]:
    return {
        "variant": variant.name,
        "dtype": str(dtype).removeprefix("torch."),
        "target": built.target,
        "tile": [variant.rows, variant.tokens, variant.tile.warps, variant.tile.stages],
        "registers": built.registers,
        "spills": built.spills,
        "shared": built.shared,
        "per_weight": list(built.per_weight),
        "budget": budget(variant),
        "problems": problems(variant, built),
    }


def report(document: dict[str, Any]) -> str:
    lines = [
        "# Kernels as compiled",
        "",
        COMPILED,
        "",
        f"{document['date']}, {document['versions']}; "
        "repeat it with `python -m bitknap.benchmarks.kernels.variants -o DIR`.",
        "",
        "Tile: rows × tokens of a program, warps, stages. A weight's lane-instructions are of each",
        "loop that multiplies, 256 columns a round (64 where weights are in source precision, so",
        "those figures are four times too small); none where the compiler unrolled it. The budget",
        "is what memory's speed leaves on an H200 (or matrix units, from 64 tokens on).",
        "",
        "| variant | dtype | target | tile | registers | spills | KiB | per weight | budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["rows"]:
        rows, tokens, warps, stages = r["tile"]
        tile = f"{rows} × {tokens}, {warps}, {stages}" if rows else f"{warps}, {stages}"
        per_weight = ", ".join(f"{w:.2f}" for w in r["per_weight"])
        lines.append(
            f"| {r['variant']} | {r['dtype']} | {r['target']} | {tile} | {r['registers']} | "
            f"{r['spills']} | {r['shared'] / 1024:.0f} | {per_weight} | {r['budget'] or ''} |"
        )
    misses = [text for r in document["rows"] for text in r["problems"]]
    done = f"{len(document['rows'])} of {document['planned']} compilations"
    lines += ["", f"{done}; {len(misses)} miss a limit.", ""]
    return "\n".join([*lines, *(f"- {text}" for text in misses), *([""] if misses else [])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output(parser, "Folder to write.")
    parser.add_argument(
        "--targets", nargs="+", default=list(TARGETS), type=one_of("target", TARGETS)
    )
    given = parser.parse_args(arguments)
    out, rows, planned = given.out, [], list(jobs(given.targets))
    claim(parser, out, "kernel_variants.json", "kernel_variants.md")
    for variant, dtype, target in planned:
        begun = time.perf_counter()
        rows.append(row(variant, dtype, build(variant, target)))
        seconds = time.perf_counter() - begun
        print(f"{target} {variant.name}: {seconds:.1f} s {rows[-1]['problems']}", file=sys.stderr)
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": f"triton {triton.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            "note": COMPILED.replace("\n", " "),
            "planned": len(planned),
            "rows": rows,
        }
        # Written after every compilation, so that an interrupted run keeps its results.
        write_results(out / "kernel_variants.json", document)
        write_report(out / "kernel_variants.md", report(document))


if __name__ == "__main__":
    main()
