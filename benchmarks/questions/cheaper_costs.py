"""What do rounded rows and KL readings buy? Plans of cheaper tables, on text that nothing has seen.

    python -m bitknap.benchmarks.questions.cheaper_costs -o benchmarks/results

The thorough table rounds all rows and reads every group alone, at every width, on all tokens. Each
other table saves something; its plans are compared with the thorough table's, window by window.
Processor seconds are those of the table alone, without the calibration pass, and only of tables
that share no reading with one before. Then the whole job of the command line runs with and without
`--thorough`, one after the other. Writes `cheaper_costs.json` and `cheaper_costs.md`.

Bundled models have four layers, which are all read. What reading some of many layers loses is asked
of a model that is trained for it:

    python -m bitknap.benchmarks.reference.train deep --corpus CORPUS --tokens 1.5e6 -o build/deep
    python -m bitknap.benchmarks.questions.cheaper_costs --models build/deep -o benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bitknap.allocation import BitPlan, CostTable, Format
from bitknap.api.requests import CALIBRATION_TOKENS, default_formats
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.setting import MODELS
from bitknap.benchmarks.setting import plain as plain_setting
from bitknap.estimators.costs import sampled_rows
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl import calibrated, chosen_readings
from bitknap.estimators.group_kl.calibrated import READ_TOKENS, Calibrated
from bitknap.estimators.measuring.kl_replay import standard_error
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.tables.monotone import isotonic

BUDGETS = (2.0, 2.5, 3.0)
_ALL = 1 << 40
# Bits per weight of the whole job.
_JOB = 2.5


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a table is made.

    Attributes:
        name: what the report calls it.
        thorough: all rows, all readings alone, all tokens.
        rows: rows of each unit to round at first.
        tokens: tokens that groups are read on.
        narrow: widest grids that groups are read in alone; 0 for the narrowest only.
        alone: most groups of a kind that are all read alone.
        readings: number of readings to take, in the order of worth; None for all.
        timed: whether its processor seconds are counted; it then shares no reading.
    """

    name: str
    thorough: bool = False
    rows: int = sampled_rows.ROWS
    tokens: int = READ_TOKENS
    narrow: int = chosen_readings.NARROW
    alone: int = chosen_readings.MOST_ALONE
    readings: int | None = None
    timed: bool = False


# Both models have 12 groups of 3 kinds and 5 anchors: 15 joint readings come first.
WAYS = (
    Way(name="thorough", thorough=True, timed=True),
    Way(name="default", timed=True),
    Way(name="all rows", rows=_ALL),
    Way(name="8 rows", rows=8),
    Way(name="32 rows", rows=32),
    Way(name="512 tokens", tokens=512),
    Way(name="1,024 tokens", tokens=1024),
    Way(name="4,096 tokens", tokens=4096),
    Way(name="all tokens", tokens=CALIBRATION_TOKENS),
    Way(name="joint readings only", readings=15),
    Way(name="joint, and alone at 2 bits", readings=27),
    Way(name="joint, and alone at 1 to 4 bits", narrow=4),
)
# For models of many layers, whose groups are not read alone by default.
_EVERY = 1 << 10
DEEP_WAYS = (
    *(Way(name="thorough", thorough=True, timed=True), Way(name="default", timed=True)),
    Way(name="alone at 1 to 3 bits", alone=_EVERY),
    Way(name="8 rows", rows=8),
    Way(name="32 rows", rows=32),
    *(Way(name=f"{tokens:,} tokens", tokens=tokens) for tokens in (512, 1024, 4096)),
    Way(name="all tokens", tokens=CALIBRATION_TOKENS),
)


@dataclass(frozen=True)
class _Known:
    """An estimator that returns a table made before."""

    table: CostTable
    name = "moments"
    needs = SecondMoments().needs

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        return self.table


def table_of(way: Way, evidence: Evidence, bases: dict[int, CostTable]) -> tuple[CostTable, float]:
    """Return the table that a way makes, and the processor seconds that it took.

    Args:
        way: the way.
        evidence: its journal keeps readings that ways share.
        bases: tables before calibration by number of rows; new ones are added.
    """
    formats = default_formats(evidence.units)
    asked = replace(evidence, effort=Effort(thorough=way.thorough))
    with (
        patch.object(sampled_rows, "ROWS", way.rows),
        patch.object(calibrated, "READ_TOKENS", way.tokens),
        patch.object(chosen_readings, "NARROW", way.narrow),
        patch.object(chosen_readings, "MOST_ALONE", way.alone),
    ):
        start = time.process_time()
        rows = _ALL if way.thorough else way.rows
        if rows not in bases:
            bases[rows] = SecondMoments().estimate(asked, formats)
        estimator = Calibrated(base=_Known(bases[rows]), measurements=way.readings)
        table, _ = isotonic(estimator.estimate(asked, formats))
        return table, time.process_time() - start


def rows_for(name: str, judged: int) -> Iterator[dict[str, Any]]:
    """Yield the results of every way at every budget on one model, as JSON values."""
    evidence, judge = plain_setting(name, CALIBRATION_TOKENS, judged)
    bases: dict[int, CostTable] = {}
    first: dict[float, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        journal = Readings.open(Path(folder) / "journal", {"model": name})
        deep = len(evidence.layout.layers) > chosen_readings.MOST_ALONE
        for way in DEEP_WAYS if deep else WAYS:
            table, seconds = table_of(way, replace(evidence, readings=journal), bases)
            for bits in BUDGETS:
                plan, losses = judge.losses(table, bits)
                kl = losses.kl
                paired = kl - first.setdefault(bits, kl)
                yield {
                    "model": Path(name).name,
                    "way": way.name,
                    "budget_bpw": bits,
                    "bytes": plan.total_bytes,
                    "kl": float(kl.mean()),
                    "kl_se": standard_error(kl),
                    "difference": float(paired.mean()),
                    "difference_se": standard_error(paired),
                    "thorough_kl": float(first[bits].mean()),
                    "rows": table.provenance["rows"],
                    "readings": table.provenance["measurements"],
                    "error": table.provenance["readings"].get("error"),
                    "processor_seconds": round(seconds, 1) if way.timed else None,
                }


def jobs_for(name: str, judged: int) -> Iterator[dict[str, Any]]:
    """Yield what `bitknap quantize` takes and loses on one model, thorough and not, as JSON."""
    _, judge = plain_setting(name, CALIBRATION_TOKENS, judged)
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for words in (["--thorough"], []):
            out = Path(folder) / f"out{len(words)}"
            job = ["quantize", f"reference:{name}", "--budget", f"{_JOB}bpw", *words]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "bitknap", *job, "-o", str(out)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            kl = judge.of(BitPlan.load(out / "bitknap_plan.json")).kl
            first = kl if first is None else first
            yield {
                "model": name,
                "job": " ".join(["bitknap", *job]),
                "user_seconds": round(after.ru_utime - before.ru_utime, 1),
                "system_seconds": round(after.ru_stime - before.ru_stime, 1),
                "kl": float(kl.mean()),
                "kl_se": standard_error(kl),
                "difference": float((kl - first).mean()),
                "difference_se": standard_error(kl - first),
                "thorough_kl": float(first.mean()),
            }


def markdown(
    rows: Sequence[dict[str, Any]], jobs: Sequence[dict[str, Any]], about: dict[str, Any]
) -> str:
    """Return the report."""
    head = " | ".join(f"{bits} bpw" for bits in BUDGETS)
    lines = [
        "# What rows and readings buy",
        "",
        f"KL to the original of plans at three budgets, on {about['tokens']:,} tokens of held-out "
        "text, as the difference to the plan of the thorough table in percent; ± is the standard "
        "error of the paired difference over windows. The thorough table rounds all rows in all "
        "formats and reads every group alone at 1, 2, 3, 4 and 8 bits on all "
        f"{CALIBRATION_TOKENS:,} calibration tokens. The default rounds {sampled_rows.ROWS} rows "
        f"at first and reads on {READ_TOKENS:,} tokens: three projections in all layers together "
        "at five widths; then, in the bundled models of four layers, twelve groups alone at 1 to 3 "
        "bits, and in the deep one of sixteen a group of each projection, which only says how far "
        "groups differ. Each further line changes one thing in it. The default was chosen by "
        "figures on this same text, of which there are many here: differences below about two "
        "standard errors choose nothing.",
        "",
        f"torch {about['torch']}, {about['device']}, profile gate_eq_up, rounding to nearest. "
        "Processor seconds are those of the table, without loading and calibrating.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [
            f"## {model}",
            "",
            f"| table | rows | readings | processor seconds | {head} |",
            "|---|---:|---:|---:|" + "---|" * len(BUDGETS),
        ]
        here = [row for row in rows if row["model"] == model]
        for way in dict.fromkeys(row["way"] for row in here):
            each = [row for row in here if row["way"] == way]
            seconds = each[0]["processor_seconds"]
            lines.append(
                f"| {way} | {100 * each[0]['rows']:.0f} % | {each[0]['readings']} | "
                f"{'' if seconds is None else seconds} | {' | '.join(map(_difference, each))} |"
            )
        lines.append("")
    lines += [
        "## The whole job",
        "",
        "Loading, calibrating, the table, the plan and packing. Without `--thorough` KL is also "
        "given as the paired difference in percent.",
        "",
        "| command | user seconds | system seconds | KL | difference |",
        "|---|---:|---:|---|---|",
    ]
    for job in jobs:
        both = [100 * job[key] / job["thorough_kl"] for key in ("difference", "difference_se")]
        said = "" if "--thorough" in job["job"] else f"{both[0]:+.1f} ± {both[1]:.1f}"
        lines.append(
            f"| `{job['job']}` | {job['user_seconds']} | {job['system_seconds']} | "
            f"{job['kl']:.5f} ± {job['kl_se']:.5f} | {said} |"
        )
    return "\n".join(lines) + "\n"


def _difference(row: dict[str, Any]) -> str:
    if row["way"] == WAYS[0].name:
        return f"{row['kl']:.5f} ± {row['kl_se']:.5f}"
    whole = row["thorough_kl"]
    return f"{100 * row['difference'] / whole:+.1f} ± {100 * row['difference_se'] / whole:.1f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument(
        "--parts",
        nargs="*",
        default=["tables", "jobs"],
        help="None of them writes the report anew.",
    )
    args = parser.parse_args()
    claim(parser, args.out, "cheaper_costs.json", "cheaper_costs.md")
    path = args.out / "cheaper_costs.json"
    about = {
        "tokens": args.tokens,
        "calibration_tokens": CALIBRATION_TOKENS,
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
    }
    found = {}
    for part, measured in (("tables", rows_for), ("jobs", jobs_for)):
        known = read_results(path).get(part, [])
        again = args.models if part in args.parts else []
        names = {Path(model).name for model in again}
        found[part] = [row for row in known if row["model"] not in names]
        for row in (row for model in again for row in measured(model, args.tokens)):
            found[part].append(row)
            print(json.dumps(row), flush=True)
    write_results(path, {"about": about, **found})
    report = markdown(found["tables"], found["jobs"], about)
    write_report(args.out / "cheaper_costs.md", report)


if __name__ == "__main__":
    main()
