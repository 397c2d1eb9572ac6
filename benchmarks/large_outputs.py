"""Time and memory of tables, plans, views and pages at the sizes of the largest models.

    python -m bitknap.benchmarks.large_outputs -o benchmarks/results

Costs are made up, and shapes are those of DeepSeek-V3: whole matrices (44,544 units), and each
matrix cut into six runs of rows (267,264 units), in 40 formats. Writes `large_outputs.json` and
`large_outputs.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, Problem, Units, formats, profile, solve
from bitknap.allocation.plans.plan_diff import plan_diff
from bitknap.allocation.tradeoffs.frontier_path import Frontier, frontier
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.arguments import add_output
from bitknap.benchmarks.models.shapes import ModelShape, shape_of
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.estimators.tables.super_expert_floor import comparable
from bitknap.report.figure_files import write_picture
from bitknap.report.quantize_document import document_of
from bitknap.report.run_page import report
from bitknap.report.sensitivity_map import heat, heat_figure

_MODEL, _FORMATS, _BLOCKS = "DeepSeek-V3", 40, (1, 6)
_PROFILE, _BITS, _FEWER = "gate_eq_up", 2.5, 2.4
_PROJECTIONS = ("gate", "up", "down")
_FILES = ("table.safetensors", "plan.json", "fewer.json", "frontier.json", "map.png", "page.html")
_COMMANDS = (
    ("show", "table.safetensors"),
    ("show", "plan.json"),
    ("show", "plan.json", "--diff", "fewer.json"),
    ("show", "frontier.json"),
)


def units_of(shape: ModelShape, blocks: int = 1) -> Units:
    """Return the routed experts' units of a model, each matrix cut into runs of rows."""
    layers = np.array([layer for layer in range(shape.layers) if shape.is_moe(layer)])
    sizes = (len(layers), shape.experts, len(_PROJECTIONS), blocks)
    columns = np.indices(sizes).reshape(4, -1)
    layer, expert, projection, block = (column.astype(np.int32) for column in columns)
    down = projection == 2
    rows = np.where(down, shape.hidden, shape.size)
    return Units(
        layer=layers[layer],
        role=np.zeros(len(layer), dtype=np.int8),
        expert=expert,
        projection=projection.astype(np.int16),
        block=block,
        rows=(block + 1) * rows // blocks - block * rows // blocks,
        cols=np.where(down, shape.size, shape.hidden),
        projections=_PROJECTIONS,
    )


def table_of(units: Units, count: int = _FORMATS) -> CostTable:
    """Return a table of made-up costs, which fall with the width and differ between units."""
    menu = formats(range(1, 9), (32, 64, 128, "row"), (False, True), ("fp16", "compact"))
    # Nearest ranks, so that every width is among them.
    chosen = [menu[round(at)] for at in np.linspace(0, len(menu) - 1, count)]
    rng = np.random.default_rng(0)
    bits = np.array([item.bits for item in chosen])
    cost = 1e-5 * rng.lognormal(0, 1.5, (len(units), 1)) * 4.0**-bits
    cost *= rng.uniform(0.8, 1.2, cost.shape)
    said = {"tokens": 1 << 16, "text": "made up", "unit": "nats/token"}
    return CostTable.from_arrays(
        cost,
        units=units,
        formats=chosen,
        provenance=said,
        frequency=rng.beta(0.5, 16, len(units)),
    )


def parts(table: CostTable, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return each part of the work with a table by name; later parts read what earlier ones wrote.

    Args:
        table: the table.
        folder: a folder for files.
    """
    file, plan, other, curve, picture, page = (folder / name for name in _FILES)
    made: dict[str, Any] = {}

    def keep(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: made.setdefault(name, make())

    def pages() -> None:
        said = {"model": _MODEL, "method": "rtn", "profile": _PROFILE, "seed": 0}
        document = document_of(f"{_BITS}bpw", made["plan"], said, made["table"])
        page.write_text(report(document, {f"{_BITS}bpw": made["plan"]}))

    return {
        "save the table": lambda: table.save(file),
        "open the table": keep("table", lambda: CostTable.load(file)),
        "Problem": keep(
            "problem",
            lambda: Problem(under(made["table"], profile(_PROFILE)), Budget.bits(_BITS)),
        ),
        "solve": keep("solution", lambda: solve(made["problem"])),
        "save the plan": lambda: made["solution"].plan.save(plan),
        "open the plan": keep("plan", lambda: BitPlan.load(plan)),
        "draw the table": lambda: write_picture(
            heat_figure(heat(comparable(made["table"])), "nats/token"), picture
        ),
        "another plan": keep(
            "fewer",
            lambda: (
                solve(Problem(under(made["table"], profile(_PROFILE)), Budget.bits(_FEWER))).plan
            ),
        ),
        "save the other plan": lambda: made["fewer"].save(other),
        "plan_diff": lambda: plan_diff(made["plan"], made["fewer"]).groups(),
        "write the page": pages,
        "frontier": keep("frontier", lambda: frontier(made["problem"].table)),
        "save the frontier": lambda: made["frontier"].save(curve),
        "open the frontier": lambda: Frontier.load(curve),
    }


def measured(shape: ModelShape, blocks: int, count: int = _FORMATS) -> dict[str, Any]:
    """Return the seconds and the peak bytes of Python's objects of every part, and file sizes.

    Each part is run twice: first timed, in the processor's time of this process, so that other
    work on the machine does not count; then with its allocations traced, which is slow.
    """
    seconds, peaks = {}, {}
    with tempfile.TemporaryDirectory() as name:
        table = table_of(units_of(shape, blocks), count)
        for key, part in parts(table, Path(name)).items():
            started = time.process_time()
            part()
            seconds[key] = time.process_time() - started
        commands = {" ".join(words): command(words, Path(name)) for words in _COMMANDS}
        sizes = {path.name: path.stat().st_size for path in sorted(Path(name).iterdir())}
    with tempfile.TemporaryDirectory() as name:
        for key, part in parts(table, Path(name)).items():
            tracemalloc.start()
            part()
            peaks[key] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    return {
        "units": len(table.units),
        "formats": count,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "peak_bytes": peaks,
        "file_bytes": sizes,
        "commands": commands,
    }


def command(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Run `bitknap` in a folder; return its processor's seconds and its peak resident bytes."""
    started = subprocess.Popen(
        [sys.executable, "-m", "bitknap", *words], cwd=folder, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise RuntimeError(f"bitknap {' '.join(words)}: exit status {started.returncode}")
    seconds = round(used.ru_utime + used.ru_stime, 3)
    return {"seconds": seconds, "peak_bytes": used.ru_maxrss * 1024}


def markdown(document: dict[str, Any]) -> str:
    """Return the page of a measurement."""
    sizes = document["sizes"]
    names = [f"{one['units']:,} units × {one['formats']}" for one in sizes]
    rows = [
        f"| {key} | "
        + " | ".join(
            f"{one['seconds'][key]:.2f} s | {one['peak_bytes'][key] / 2**20:,.0f}" for one in sizes
        )
        + " |"
        for key in sizes[0]["seconds"]
    ]
    commands = [
        f"| `bitknap {key}` | "
        + " | ".join(
            f"{one['commands'][key]['seconds']:.2f} s | "
            f"{one['commands'][key]['peak_bytes'] / 2**20:,.0f}"
            for one in sizes
        )
        + " |"
        for key in sizes[0]["commands"]
    ]
    files = [
        f"| {key} | " + " | ".join(f"{one['file_bytes'][key] / 2**20:,.1f}" for one in sizes) + " |"
        for key in sizes[0]["file_bytes"]
    ]
    heads = " | ".join(f"{name}, time | MiB" for name in names)
    return "\n".join(
        [
            "# Tables and plans of the largest models",
            "",
            f"Made-up costs in the shapes of {document['model']}: whole matrices, and each matrix "
            "cut into runs of rows. Times are the processor's; MiB are the most that a part "
            "allocates at once (tracemalloc). "
            "Repeat it with `python -m bitknap.benchmarks.large_outputs -o benchmarks/results`.",
            "",
            f"| part | {heads} |",
            "|---|" + "---:|" * 2 * len(sizes),
            *rows,
            "",
            "Whole commands, with what they import; MiB are the peak of the process.",
            "",
            f"| command | {heads} |",
            "|---|" + "---:|" * 2 * len(sizes),
            *commands,
            "",
            f"| file, MiB | {' | '.join(names)} |",
            "|---|" + "---:|" * len(sizes),
            *files,
            "",
            f"One thread, {document['cores']} cores. The page holds plotly itself, 4.6 MiB.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure and write from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output(parser, "Folder to write.")
    out = parser.parse_args(argv).out
    claim(parser, out, "large_outputs.json", "large_outputs.md")
    shape = shape_of(_MODEL)
    document = {
        "model": _MODEL,
        "sizes": [measured(shape, blocks) for blocks in _BLOCKS],
        "cores": os.cpu_count(),
    }
    write_results(out / "large_outputs.json", document)
    write_report(out / "large_outputs.md", markdown(document))


if __name__ == "__main__":
    main()
