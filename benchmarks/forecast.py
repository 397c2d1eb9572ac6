"""The forecast of `inspect --probe` against real runs of the main job.

    python -m bitknap.benchmarks.forecast -o benchmarks/results

Makes a checkpoint of random weights in the shapes of OLMoE, narrower and with fewer experts and
layers; probes the machine; then estimates with the default estimator with the whole model in memory
and layer by layer, packs, and evaluates. Writes `forecast.json` and `forecast.md`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation import Budget, CostTable, Format, Problem, formats, solve
from bitknap.api.estimation import estimate
from bitknap.api.evaluation import evaluate
from bitknap.api.forecasts.forecasting import STEPS, forecast
from bitknap.api.forecasts.machine import Machine, probe
from bitknap.api.quantizing import quantize
from bitknap.api.requests import Calibration
from bitknap.arguments import add_output
from bitknap.benchmarks.models.random_checkpoint import generate
from bitknap.benchmarks.models.shapes import ModelShape, shape_of
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.sweep.peak_memory import peak_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.source.checkpoint import Checkpoint

_LAYERS, _TOKENS, _WINDOW = 2, 1024, 128
_FORMATS = formats((1, 2, 3, 4, 8), (64, "row"), (False, True))
# The steps that a report compares, and which progress each begins with.
_BEGINS = {"calibrate": "calibrate", "gains": "gains", "measure groups": "group readings"}


def shape() -> ModelShape:
    """Return a model of a few hundred megabytes."""
    whole = shape_of("OLMoE-1B-7B")
    attention = {**(whole.attention or {}), "heads": 8, "kv_heads": 8}
    return replace(
        whole,
        attention=attention,
        experts=32,
        top_k=4,
        hidden=1024,
        size=512,
        vocabulary=8192,
    )


@dataclass(slots=True)
class Clock:
    """Notes when each part of an estimate begins.

    Attributes:
        marks: seconds at which parts began, by name.
        rows: seconds of rounding rows.
        share: share of the rows that were rounded.
    """

    marks: dict[str, float] = field(default_factory=dict)
    rows: float = 0.0
    share: float = 0.0

    def __call__(self, what: str, done: int, of: int) -> None:
        """Take a call of progress."""
        if what in _BEGINS:
            self.marks.setdefault(_BEGINS[what], time.perf_counter())

    def seconds(self, start: float, end: float) -> dict[str, float]:
        """Return the seconds of each part."""
        marks = {"load": start, **self.marks}
        names = list(marks)
        ends = [*list(marks.values())[1:], end]
        spent = {name: stop - marks[name] for name, stop in zip(names, ends, strict=True)}
        return {**spent, "gains": spent["gains"] - self.rows, "round rows": self.rows}


@dataclass(frozen=True, slots=True)
class TimedMoments:
    """Second moments, whose rounding is timed.

    Attributes:
        clock: takes the time.
    """

    clock: Clock
    name = "moments"
    needs = SecondMoments().needs

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token."""
        started = time.perf_counter()
        table = SecondMoments().estimate(evidence, formats)
        self.clock.rows = time.perf_counter() - started
        self.clock.share = float(table.provenance["rows"])
        return table


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measured(folder: Path, shape: ModelShape, layers: int, tokens: int) -> dict[str, Any]:
    """Return forecasts and real seconds of each step, JSON values.

    Args:
        folder: a folder for files.
        shape: sizes of the model.
        layers: number of its layers.
        tokens: number of tokens of the calibration and of the evaluation text.
    """
    source = Checkpoint.open(generate(shape, folder / "model", layers))
    layout = walk_headers(source.config, source.shapes)
    windows = torch.randint(0, shape.vocabulary, (tokens // _WINDOW, _WINDOW))
    spent, machine = timed(lambda: probe(source, layout))
    real: dict[str, dict[str, float]] = {}
    share = 0.0
    for way, limit in (("whole", None), ("by layer", _below_whole(source, layout, tokens))):
        clock = Clock()
        asked = Calibration(text=windows, tokens=tokens, max_memory=limit)
        started = time.perf_counter()
        table = estimate(
            source.folder,
            Calibrated(base=TimedMoments(clock), progress=clock),
            _FORMATS,
            calibration=asked,
            progress=clock,
        )
        real[way] = clock.seconds(started, time.perf_counter())
        share = clock.share
    plan = solve(Problem(table, Budget.bits(2.5))).plan
    packed, _ = timed(lambda: quantize(source.folder, plan, folder / "out"))
    judged, _ = timed(lambda: evaluate(folder / "out", source.folder, text=windows, tokens=tokens))
    real["whole"] |= {"pack": packed, "evaluate": judged}
    return {
        "bytes": source.nbytes,
        "units": len(layout.units),
        "tokens": tokens,
        "rows": share,
        "probe_seconds": round(spent, 1),
        "machine": asdict(machine),
        "steps": _rows(source, layout, machine, tokens, real),
        "load": os.getloadavg()[0],
    }


def _below_whole(source: Checkpoint, layout: Layout, tokens: int) -> int:
    """Return a limit of memory that the whole model does not fit."""
    return peak_bytes(source, layout, tokens, Calibrated().needs) - 1


def _rows(
    source: Checkpoint,
    layout: Layout,
    machine: Machine,
    tokens: int,
    real: dict[str, dict[str, float]],
) -> list[dict[str, Any]]:
    return [
        {
            "step": one.step,
            "residency": one.residency,
            "forecast": round(one.seconds, 1),
            "real": round(real[one.residency][one.step], 1),
        }
        for one in forecast(source, layout, machine, tokens, tokens, _FORMATS)
        if one.step in real[one.residency]
    ]


def markdown(document: dict[str, Any]) -> str:
    """Return the page of a measurement."""
    rows = document["steps"]
    lines = []
    for way in ("whole", "by layer"):
        mine = [row for row in rows if row["residency"] == way]
        for row in mine:
            lines.append((row["step"], way, row["forecast"], row["real"]))
        sums = [sum(row[key] for row in mine) for key in ("forecast", "real")]
        lines.append(("all", way, *sums))
    table = [
        f"| {step} | {way} | {wanted:.1f} s | {found:.1f} s | {wanted / max(found, 0.1):.2f} |"
        for step, way, wanted, found in lines
    ]
    return "\n".join(
        [
            "# The forecast of `inspect --probe` against real runs",
            "",
            f"A checkpoint of random weights, {document['bytes'] / 1e6:.0f} MB and "
            f"{document['units']} units; {document['tokens']:,} tokens; the default estimator with "
            f"{len(_FORMATS)} formats, which rounded {100 * document['rows']:.1f} % of the rows. "
            f"The probe took {document['probe_seconds']} s.",
            "",
            "| step | model in memory | forecast | real | ratio |",
            "|---|---|---:|---:|---:|",
            *table,
            "",
            f"Steps: {', '.join(STEPS)}. Wall time on cores that others used too (load "
            f"{document['load']:.1f}). Repeat it with `python -m bitknap.benchmarks.forecast -o "
            "benchmarks/results`.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure and write from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output(parser, "Folder to write.")
    out = parser.parse_args(argv).out
    claim(parser, out, "forecast.json", "forecast.md")
    with tempfile.TemporaryDirectory() as folder:
        document = measured(Path(folder), shape(), _LAYERS, _TOKENS)
    write_results(out / "forecast.json", document)
    write_report(out / "forecast.md", markdown(document))


if __name__ == "__main__":
    main()
