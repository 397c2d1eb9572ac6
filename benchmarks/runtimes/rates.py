"""How long rounding takes in the formats of targets, against rounding to nearest.

    python -m bitknap.benchmarks.runtimes.rates -o benchmarks/results

Writes `rounding_rates.json` and `rounding_rates.md`. Forecasts scale a machine's rate of rounding
to nearest by these figures (`api/forecasts/machine.py`). Times are of one processor, not by the
clock, so other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from bitknap.allocation import Format, formats
from bitknap.allocation.codecs.ggml import TYPES
from bitknap.api.requests import default_formats
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.estimators.costs.weighed_errors import stored_alike
from bitknap.quantization.rounding.ggml import Ggml
from bitknap.quantization.rounding.methods import RTN, method
from bitknap.quantization.rounding.rounding import Inputs, Rounding

COLS = 2048
# Weights of a run, and runs of which the median is taken.
_WEIGHTS, _RUNS = 1 << 18, 5


def measured() -> list[dict[str, Any]]:
    """Return a row for each format: processor seconds for a million weights, and the multiple."""
    weights = torch.randn(1, _WEIGHTS // COLS, COLS) * 0.02
    inputs = Inputs(moments=torch.rand(1, COLS) + 0.1, tokens=torch.tensor([4096]))
    grids = stored_alike(default_formats(), COLS)
    usual = statistics.fmean(_seconds(RTN, grid, weights, None) for grid in grids)
    rows = []
    for way, some in _asked().items():
        rounding = Ggml() if way == "ggml" else method(way)
        known = inputs if rounding.needs_inputs else None
        for format in some:
            seconds = _seconds(rounding, format, weights, known)
            rows.append(
                {
                    "method": way,
                    "format": format.name,
                    "seconds": seconds / _WEIGHTS * 1e6,
                    "times": seconds / usual,
                }
            )
    return rows


def _asked() -> Mapping[str, list[Format]]:
    """Return the formats of each method."""
    types = [name for name in TYPES if name != "f16"]
    return {
        "ggml": [Format.ggml(name) for name in types],
        "midtread": list(formats(range(2, 9), 64, True)),
        "rtn": list(formats((2, 3, 4, 8), 64, (True, False), "gptq")),
    }


def _seconds(rounding: Rounding, format: Format, weights: torch.Tensor, known: Any) -> float:
    spent = []
    for _ in range(_RUNS):
        started = time.process_time()
        rounding.quantize(weights, format, known)
        spent.append(time.process_time() - started)
    return statistics.median(spent)


def markdown(rows: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the report."""
    lines = [
        "# How long rounding takes in the formats of targets",
        "",
        "Processor seconds for a million weights of Gaussian rows of "
        f"{about['cols']:,}, and how many times as long that is as rounding to nearest takes in "
        "the mean of the formats that are offered where none are asked for. ggml has an importance "
        "matrix.",
        "",
        "| method | format | seconds | times |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {row['method']} | `{row['format']}` | {row['seconds']:.3f} | {row['times']:.2f} |"
        for row in rows
    ]
    lines += ["", f"torch {about['torch']}, {about['device']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    args = parser.parse_args()
    claim(parser, args.out, "rounding_rates.json", "rounding_rates.md")
    torch.set_num_threads(1)
    rows = measured()
    about = {
        "cols": COLS,
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}",
    }
    write_results(args.out / "rounding_rates.json", {"about": about, "rows": rows})
    write_report(args.out / "rounding_rates.md", markdown(rows, about))


if __name__ == "__main__":
    main()
