"""Quantizers side by side in one run: throughput, losses, and a model larger than memory.

    python -m bitknap.benchmarks.quantize -o benchmarks/results

Bitknap against HQQ's package, llm-compressor's GPTQ and compressed-tensors' rounding, if
installed. All use OMP_NUM_THREADS threads. Writes `quantize.json` and `quantize.md`; parts that are
not requested are kept from the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bitknap.arguments import add_output
from bitknap.benchmarks.models.shapes import ModelShape, shape_of
from bitknap.benchmarks.quantize import large_checkpoint, quality, speed
from bitknap.benchmarks.quantize.report import markdown
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.setting import MODELS
from bitknap.names import unknown

PARTS = ("speed", "quality", "large")
_PACKAGES = ("torch", "numpy", "transformers", "hqq", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        shapes: shapes of matrices for throughput.
        seconds: approximate duration of one throughput measurement, seconds.
        rounds: number of measurements of each way.
        gptq_formats: formats in which GPTQ is timed.
        models: reference models.
        formats: formats in which losses are compared.
        tokens: number of calibration tokens.
        judged: number of held-out tokens.
        large: model whose shapes the large checkpoint has.
        layers: number of its layers; all when None.
        estimator: estimator that plans it.
        room: bytes that the disk must have free for it.
    """

    shapes: Mapping[str, tuple[int, int, int]]
    seconds: float
    rounds: int
    gptq_formats: int
    models: Sequence[str]
    formats: Sequence[str]
    tokens: int
    judged: int
    large: str | ModelShape
    layers: int | None
    estimator: str
    room: int


def toy() -> Sizes:
    """Return sizes that take seconds and say nothing about speed."""
    return Sizes(
        shapes=speed.TOY,
        seconds=0.0,
        rounds=1,
        gptq_formats=1,
        models=MODELS[:1],
        formats=quality.FORMATS[2:3],
        tokens=256,
        judged=256,
        large=large_checkpoint.small(shape_of(large_checkpoint.MODEL)),
        layers=1,
        estimator="data-free",
        room=1 << 24,
    )


def run(
    out: Path, parts: Sequence[str], sizes: Sizes, folder: Path, say: Callable[[str], None]
) -> None:
    """Measure some parts, and write the report on all results after each.

    Args:
        out: folder of the results, created if missing.
        parts: names in `PARTS`.
        sizes: how much is measured.
        folder: folder for large temporary files.
        say: called with progress messages.
    """
    path = out / "quantize.json"
    document = read_results(path)
    document["about"] = about()
    for part in parts:
        document |= _PARTS[part](sizes, folder, say)
        write_results(path, document)
        write_report(out / "quantize.md", markdown(document))


def _speed(sizes: Sizes, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    rows = speed.measured(
        sizes.shapes,
        folder,
        seconds=sizes.seconds,
        rounds=sizes.rounds,
        gptq_formats=sizes.gptq_formats,
        say=say,
    )
    return {"speed": rows, "profile": speed.profiled(sizes.shapes, folder)}


def _quality(sizes: Sizes, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    models = [
        quality.measured(
            model, tokens=sizes.tokens, judged=sizes.judged, formats=sizes.formats, say=say
        )
        for model in sizes.models
    ]
    return {"quality": models}


def _large(sizes: Sizes, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    result = large_checkpoint.measured(
        folder,
        model=sizes.large,
        layers=sizes.layers,
        estimator=sizes.estimator,
        room=sizes.room,
    )
    say(json.dumps(result))
    return {"large": result}


_PARTS = {"speed": _speed, "quality": _quality, "large": _large}


def about() -> dict[str, Any]:
    """Return the facts that the numbers depend on: versions, processor, threads."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas")
    parser.add_argument("--models", default=",".join(MODELS), help="models, with commas")
    parser.add_argument(
        "--formats", default=",".join(quality.FORMATS), help="formats to compare losses in"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--judged-on", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each method")
    parser.add_argument(
        "--gptq-formats", type=int, default=1, help="number of formats to time GPTQ in"
    )
    parser.add_argument("--layers", type=int, default=None, help="layers of the large model")
    parser.add_argument("--estimator", default="data-free", help="estimator for its plan")
    parser.add_argument("--folder", type=Path, default=None, help="folder for large files")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for a run of seconds")
    given = parser.parse_args(argv)
    parts = given.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(str(unknown("part", part, PARTS)))
    claim(parser, given.out, "quantize.json", "quantize.md")
    sizes = toy() if given.toy else _sizes(given)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run(given.out, parts, sizes, Path(folder), lambda text: print(text, flush=True))


def _sizes(given: argparse.Namespace) -> Sizes:
    shape = shape_of(large_checkpoint.MODEL)
    return Sizes(
        shapes=speed.SHAPES,
        seconds=given.seconds,
        rounds=given.rounds,
        gptq_formats=given.gptq_formats,
        models=given.models.split(","),
        formats=given.formats.split(","),
        tokens=given.tokens,
        judged=given.judged_on,
        large=shape.name,
        layers=given.layers,
        estimator=given.estimator,
        room=large_checkpoint.room(shape, given.layers),
    )


if __name__ == "__main__":
    main()
