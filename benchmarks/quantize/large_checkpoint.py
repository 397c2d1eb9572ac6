"""Time and memory to plan and quantize a made-up checkpoint in a published model's shapes.

Each command runs in its own process, whose peak resident memory is read while it runs.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitknap.benchmarks.models.random_checkpoint import generate
from bitknap.benchmarks.models.shapes import ModelShape, headers
from bitknap.benchmarks.watched import watched
from bitknap.disk.atomic import check_space
from bitknap.errors import InputError

MODEL = "OLMoE-1B-7B"
BUDGET = "3bpw"
_FORMATS = ("--formats", "2,3,4", "--group-size", "64", "--metadata", "fp16")
# Target for peak memory, bytes.
MOST_MEMORY = 3 << 30


def measured(
    folder: Path, *, model: str | ModelShape, layers: int | None, estimator: str, room: int
) -> dict[str, Any]:
    """Return seconds and peak bytes of planning and of quantizing, as JSON values.

    Args:
        folder: working folder; the files made there are removed.
        model: name or sizes of the model whose shapes are used.
        layers: number of layers; all when not given.
        estimator: an estimator that reads no text.
        room: bytes that the disk must have free.

    Raises:
        InputError: the disk has no room.
        BitknapError: a command failed.
    """
    work = folder / "large"
    if work.exists():
        raise InputError(f"{work} exists, of an earlier run; remove it")
    check_space(work, room)
    try:
        start = time.perf_counter()
        source = generate(model, work / "source", layers)
        spent = time.perf_counter() - start
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        table, plan = str(work / "table.safetensors"), str(work / "plan.json")
        out = work / "out"
        commands: dict[str, Sequence[str]] = {
            "estimate": ["--estimator", estimator, *_FORMATS, "-o", table],
            "solve": ["--budget", BUDGET, "-o", plan],
            "quantize": ["--plan", plan, "-o", str(out)],
        }
        steps = {}
        for verb, options in commands.items():
            given = table if verb == "solve" else str(source)
            steps[verb] = watched([verb, given, *options])
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    name = model if isinstance(model, str) else model.name
    facts = {"model": name, "layers": layers, "estimator": estimator, "budget": BUDGET}
    sizes = {"source_bytes": nbytes, "written_bytes": written, "generate_seconds": spent}
    return {**facts, **sizes, "steps": steps}


def small(shape: ModelShape) -> ModelShape:
    """Return a tiny shape of the same family, for a trial."""
    few = {"kind": "gqa", "heads": 4, "kv_heads": 4, "head_size": 16, "norm": "whole"}
    return replace(
        shape,
        name=f"{shape.name}, tiny",
        layers=2,
        experts=4,
        top_k=2,
        hidden=64,
        size=64,
        vocabulary=128,
        attention=few,
    )


def room(shape: ModelShape, layers: int | None) -> int:
    """Return the maximum bytes on disk of the checkpoint and the files made from it."""
    return 2 * sum(2 * math.prod(size) for _, size in headers(shape, layers).values())
