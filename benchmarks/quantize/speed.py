"""GB of bf16 weights per second that become codes: Bitknap and others, alternating.

A measurement quantizes as many rows as take the given seconds, at most one set of matrices, again
and again. Each round runs all ways in turn, so that other load on the machine affects all alike.
GPTQ, which does not work row by row, takes whole matrices.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.benchmarks.quantize import peers
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.rounding import rtn
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.methods import RTN, Gptq, Hqq
from bitknap.quantization.rounding.rounding import Inputs, Rounding

# Maps a name to the number of matrices, rows and columns.
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "Mixtral 8x7B": (1, 14336, 4096),
    "Qwen3-30B-A3B": (32, 768, 2048),
}
TOY: Mapping[str, tuple[int, int, int]] = {"toy": (2, 64, 128)}
FORMATS = ("int4-g64-asym", "int3-g64-asym", "int2-g64-asym", "int4-row-sym")
PLAIN = ("hqq package, min-max", "compressed-tensors, min-max")
OURS = "ours: rtn with search, packed"
_TOKENS = 512
_FIRST_ROWS = 64  # enough to estimate the speed of a way
_DAMPING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """The inputs of quantization.

    Attributes:
        weights: bfloat16 [n, rows, cols].
        moments: E x xᵀ of correlated inputs, float32 [cols, cols].
        folder: folder for files.
    """

    weights: Tensor
    moments: Tensor
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to quantize rows [r, cols] of `Matrices`.

    Attributes:
        name: its name in the report.
        run: the timed function.
        needs: package that it needs; "" for ours.
        whole: whether its rows are one whole matrix.
        fits: whether it supports a format.
    """

    name: str
    run: Callable[[Tensor, Format, Matrices], object]
    needs: str = ""
    whole: bool = False
    fits: Callable[[Format], bool] = lambda format: True


def _ours(rounding: Rounding) -> Callable[[Tensor, Format, Matrices], object]:
    def run(rows: Tensor, format: Format, given: Matrices) -> Tensor:
        known = None
        if rounding.needs_inputs:
            known = Inputs(moments=given.moments.unsqueeze(0), tokens=torch.tensor([_TOKENS]))
        rounded = rounding.quantize(rows.unsqueeze(0), format, known)
        assert isinstance(rounded, Quantized)
        return encode(rounded)

    return run


def _copy(rows: Tensor, format: Format, given: Matrices) -> None:
    """Copy the file that holds the rows to disk."""
    source, target = given.folder / f"{len(rows)}.bin", given.folder / "copy.bin"
    if not source.exists():
        source.write_bytes(rows.view(torch.uint8).numpy().data)
    with source.open("rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 24)
        out.flush()
        os.fsync(out.fileno())


WAYS = (
    Way(name="copy of the file", run=_copy),
    Way(name=OURS, run=_ours(RTN)),
    Way(name="ours: rtn with search", run=lambda rows, f, _: rtn.quantize(rows, f)),
    Way(
        name=PLAIN[0],
        run=lambda rows, f, _: peers.hqq_packed(rows, f, optimize=False),
        needs="hqq",
        fits=peers.hqq_fits,
    ),
    Way(
        name=PLAIN[1],
        run=lambda rows, f, _: peers.tensors_packed(rows, f),
        needs="compressed_tensors",
        fits=peers.tensors_fit,
    ),
    Way(name="ours: hqq, packed", run=_ours(Hqq()), fits=peers.hqq_fits),
    Way(
        name="hqq package",
        run=lambda rows, f, _: peers.hqq_packed(rows, f, optimize=True),
        needs="hqq",
        fits=peers.hqq_fits,
    ),
    Way(name="ours: gptq, packed", run=_ours(Gptq(damping=_DAMPING, ridge=0)), whole=True),
    Way(
        name="llm-compressor gptq",
        run=lambda rows, f, given: peers.llm_gptq_packed(rows, f, given.moments),
        needs="llmcompressor",
        whole=True,
        fits=peers.tensors_fit,
    ),
)


def measured(
    shapes: Mapping[str, tuple[int, int, int]],
    folder: Path,
    *,
    seconds: float,
    rounds: int,
    gptq_formats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return one row per shape, format and way, as JSON values.

    Args:
        shapes: shapes of the matrices.
        folder: folder for the file that is copied.
        seconds: approximate duration of one measurement, seconds.
        rounds: number of measurements of each.
        gptq_formats: how many formats GPTQ rounds to; its time hardly depends on the width.
        say: called with a message for every shape and format.
    """
    results = []
    for shape, (count, rows, cols) in shapes.items():
        given = matrices(count, rows, cols, folder)
        for place, name in enumerate(FORMATS):
            fast = place >= gptq_formats
            ways = [way for way in WAYS if not (fast and way.whole)]
            results += _turn_about(ways, given, shape, Format.parse(name), seconds, rounds)
            say(f"{shape} {name}")
        for file in folder.glob("*.bin"):
            file.unlink()
    return results


def matrices(count: int, rows: int, cols: int, folder: Path, seed: int = 0) -> Matrices:
    """Return Gaussian weights and the moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.empty(count, rows, cols, dtype=torch.bfloat16)
    weights.normal_(0, 0.02, generator=generator)
    few = torch.randn(_TOKENS, max(1, cols // 8), generator=generator)
    mixed = few @ torch.randn(few.shape[1], cols, generator=generator) / few.shape[1] ** 0.5
    inputs = mixed + 0.3 * torch.randn(_TOKENS, cols, generator=generator)
    return Matrices(weights=weights, moments=inputs.T @ inputs / _TOKENS, folder=folder)


def _turn_about(
    ways: Sequence[Way],
    given: Matrices,
    shape: str,
    format: Format,
    seconds: float,
    rounds: int,
) -> list[dict[str, Any]]:
    facts = {"shape": shape, "format": format.name, "cols": given.weights.shape[2]}
    absent = [way for way in ways if not peers.installed(way.needs)]
    known = [way for way in ways if way not in absent and way.fits(format)]
    parts = {way.name: _rows_for(way, given, format, seconds) for way in known}
    spent: dict[str, list[float]] = {way.name: [] for way in known}
    for _ in range(rounds):
        for way in known:
            if not (way.whole and spent[way.name]):  # one measurement is long enough
                spent[way.name].append(_seconds_a_run(way, parts[way.name], given, format, seconds))
    results = []
    for way in known:
        size, median = 2 * parts[way.name].numel(), statistics.median(spent[way.name])
        rate = {"gb_per_second": size / median / 1e9, "rows": len(parts[way.name])}
        results.append({**facts, "way": way.name, **rate, "seconds": spent[way.name]})
    return results + [{**facts, "way": way.name, "note": "not installed"} for way in absent]


def _rows_for(way: Way, given: Matrices, format: Format, seconds: float) -> Tensor:
    """Return as many rows as fill the time of one run, or all rows if they take less."""
    if way.whole:
        return given.weights[0]
    every = given.weights.flatten(0, 1)
    few = every[:_FIRST_ROWS]
    for _ in range(2):  # the first call loads libraries
        start = time.perf_counter()
        way.run(few, format, given)
        spent = time.perf_counter() - start
    # Small pieces are slower per row, so take a little more than the measured rate suggests.
    return every[: max(len(few), int(1.25 * len(few) * seconds / spent))]


def _seconds_a_run(
    way: Way, rows: Tensor, given: Matrices, format: Format, seconds: float
) -> float:
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        way.run(rows, format, given)
        count += 1
    return (time.perf_counter() - start) / count


def profiled(shapes: Mapping[str, tuple[int, int, int]], folder: Path) -> dict[str, float]:
    """Return the share of our time in each kind of tensor operation, largest first."""
    from torch.profiler import ProfilerActivity, profile

    _, rows, cols = next(iter(shapes.values()))
    given = matrices(1, min(rows, 512), cols, folder)
    format = Format.parse(FORMATS[0])
    run = _ours(RTN)
    run(given.weights[0], format, given)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(given.weights[0], format, given)
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    most = sorted(spent.items(), key=lambda item: -item[1])[:8]
    return {name.removeprefix("aten::"): time / total for name, time in most}
