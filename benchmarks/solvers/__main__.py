"""Our solvers against others on tables of real size: time, memory, objective, proven gap.

    python -m bitknap.benchmarks.solvers -o benchmarks/results

Every solver runs on every instance in a fresh process with one thread. Writes `solvers.json`,
`solvers.md` and `solvers.svg`; finished runs are kept in `solvers.partial.jsonl` and not repeated.
Each solver enforces the time limit by its own means.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitknap.allocation.plans.solution import Answer
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.solver import Solver
from bitknap.allocation.solvers.solving import solve
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import HEADER, claim, write_report, write_results
from bitknap.benchmarks.solvers.instances import INSTANCES, QUICK, Instance, instance
from bitknap.benchmarks.solvers.peers import BASELINES, GAP, Baseline
from bitknap.benchmarks.solvers.report import markdown, picture
from bitknap.errors import BitknapError, InputError
from bitknap.names import check_name

# Maps a name to module, class and settings; `time_limit` is added if the class has one.
OURS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = MappingProxyType(
    {
        "knapsack": ("bitknap.allocation.solvers.knapsack", "Knapsack", {}),
        "greedy": ("bitknap.allocation.solvers.greedy", "Greedy", {}),
        "ilp-highs": ("bitknap.allocation.solvers.ilp", "Ilp", {"backend": "highs"}),
        "ilp-cbc": ("bitknap.allocation.solvers.ilp", "Ilp", {"backend": "cbc"}),
    }
)
_LIMITED = ("ilp-highs", "ilp-cbc")
# Shorter runs are repeated, and the median counts.
_SHORT, _REPEATS = 2.0, 3
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PACKAGES = ("bitknap", "numpy", "scipy", "highspy", "pulp", "ortools")
_QUICK_SECONDS = 2.0
_PARTIAL = "solvers.partial.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A baseline as a solver that records the time to build its model."""

    name: str
    baseline: Baseline
    seconds: float
    built: list[float] = field(default_factory=list)

    def answer(self, problem: Problem) -> Answer:
        start = time.perf_counter()
        model = self.baseline.build(problem)
        self.built.append(time.perf_counter() - start)
        return self.baseline.run(model, self.seconds)


def _solver(name: str, seconds: float) -> Solver:
    if name in BASELINES:
        return _Timed(name=name, baseline=BASELINES[name], seconds=seconds)
    module, kind, settings = OURS[name]
    more = {"time_limit": seconds} if name in _LIMITED else {}
    made: Solver = getattr(import_module(module), kind)(**settings, **more)
    return made


def why_not(name: str, given: Instance) -> str:
    """Return why a solver skips an instance, or ""."""
    if name in OURS:
        return "" if find_spec(OURS[name][0]) else "not in this version"
    baseline = BASELINES[name]
    if not find_spec(baseline.needs):
        return f"{baseline.needs} is not installed"
    if given.table.cost.size > baseline.options:
        return f"{given.table.cost.size:,} options, tried up to {baseline.options:,}"
    if len(given.limits) > baseline.limits:
        return f"{len(given.limits)} limits, it takes {baseline.limits}"
    return ""


def measure(name: str, where: str, seconds: float) -> dict[str, Any]:
    """Solve one instance in this process, and return the row of the result, JSON values only."""
    given = instance(where)
    count, width = given.table.cost.shape
    row: dict[str, Any] = {
        "solver": name,
        "instance": where,
        "units": count,
        "formats": width,
        "limits": len(given.limits),
        "time_limit": seconds,
    }
    if why := why_not(name, given):
        return {**row, "status": "skipped", "note": why}
    solver = _solver(name, seconds)
    repeats = 1 if where in QUICK else _REPEATS
    if where not in QUICK:
        _warm(solver, several=len(given.limits) > 1)
    before = _forget_peak()
    start = time.perf_counter()
    problem = Problem(given.table, given.limits)
    row["problem_seconds"] = time.perf_counter() - start
    spent: list[float] = []
    start = time.perf_counter()
    try:
        while not spent or (len(spent) < repeats and max(spent) < _SHORT):
            solution = solve(problem, solver)
            spent.append(solution.seconds)
    except InputError as error:
        return {**row, "status": "skipped", "note": str(error)}
    except BitknapError as error:
        status = "no plan" if "found no plan" in str(error) else "failed"
        row |= {"status": status, "note": str(error), "seconds": time.perf_counter() - start}
        row["build_seconds"] = sum(getattr(solver, "built", [])[-1:])
        return row | _memory(before)
    return row | {
        "status": solution.status.name.lower(),
        "seconds": statistics.median(spent),
        "build_seconds": statistics.median(getattr(solver, "built", [0.0])[-len(spent) :]),
        "runs": len(spent),
        "objective": solution.cost,
        # JSON has no infinity.
        "bound": solution.bound if abs(solution.bound) < float("inf") else None,
        "gap": solution.gap if solution.gap < float("inf") else None,
        "bytes": solution.plan.total_bytes,
        **_memory(before),
    }


def _warm(solver: Solver, *, several: bool) -> None:
    """Make the solver load its libraries, which measured times must not include."""
    tiny = instance("tiny+5" if several else "tiny")
    with suppress(BitknapError):
        solve(Problem(tiny.table, tiny.limits), solver)


def _forget_peak() -> float:
    """Reset the peak of resident memory where the system allows it; return the current MB."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> float:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[key].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _memory(before: float) -> dict[str, float]:
    """Return the peak MB of this process or its largest child, and the MB that solving added."""
    import resource

    # A child's peak includes the image it was forked from, so it is at least our memory then.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = max(_resident("VmHWM"), children * (1 if sys.platform == "darwin" else 1024) / 1e6)
    return {"peak_mb": round(peak, 1), "over_mb": round(peak - before, 1)}


def apart(name: str, where: str, seconds: float) -> dict[str, Any]:
    """Return the result of `measure` in a fresh process with one thread."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", name, where]
    command += ["--time-limit", str(seconds)]
    most = 3 * seconds + 600
    with subprocess.Popen(
        command,
        env={**os.environ, **dict.fromkeys(_THREADS, "1")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            said, errors = child.communicate(timeout=most)
        except subprocess.TimeoutExpired:
            # With its own children, such as CBC.
            os.killpg(child.pid, signal.SIGKILL)
            said, errors = "", f"stopped after {most:.0f} s"
    if child.returncode or not said:
        last = (errors.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        row = {"solver": name, "instance": where, "time_limit": seconds}
        return {**row, "status": "failed", "note": last}
    result: dict[str, Any] = json.loads(said)
    return result


def _one(name: str, where: str, seconds: float) -> None:
    """Print only the row, as some tools write to standard output from C."""
    sys.stdout.flush()
    kept = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    text = json.dumps(measure(name, where, seconds))
    with os.fdopen(kept, "w") as out:
        out.write(text + "\n")


def _done(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The last line was cut off when the run was stopped.
            continue
        if "solver" in row:
            rows[row["solver"], row["instance"]] = row
    return rows


def run(
    out: Path,
    pairs: Sequence[tuple[str, str]],
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Run the pairs missing in `out`, then write the report on all results.

    Args:
        out: folder of results, created if missing.
        pairs: names of solver and instance.
        seconds: time limit of one solver on one instance.
        say: called with a message for every new row.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / _PARTIAL
    rows = _done(partial)
    for name, where in pairs:
        if (name, where) not in rows:
            rows[name, where] = apart(name, where, seconds)
            # An incomplete last line stays on its own line.
            torn = partial.exists() and not partial.read_text().endswith("\n")
            begun = partial.exists() and partial.stat().st_size
            with partial.open("a") as file:
                if not begun:
                    file.write(json.dumps(HEADER) + "\n")
                file.write("\n" * torn + json.dumps(rows[name, where]) + "\n")
            say(json.dumps(rows[name, where]))
    order = [(name, where) for where in INSTANCES for name in (*OURS, *BASELINES)]
    ordered = [rows[key] for key in order if key in rows]
    facts = about()
    document = {"about": facts, "rows": ordered}
    write_results(out / "solvers.json", document)
    write_report(out / "solvers.md", markdown(ordered, facts))
    picture(ordered, out / "solvers.svg")


def about() -> dict[str, Any]:
    """Return the facts that the numbers depend on: versions, processor, threads, tolerances."""
    cpu = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        names = [x for x in listed.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": 1,
        "relative_gap": GAP,
        "solvers": {name: item.about for name, item in BASELINES.items()},
    }


def quick() -> list[tuple[str, str]]:
    """Return every solver with the tiny instance that has as many limits as it supports."""
    single = [name for name, item in BASELINES.items() if item.limits == 1]
    several = [name for name in (*OURS, *BASELINES) if name not in single]
    return [(name, "tiny") for name in ("knapsack", *single)] + [
        (name, "tiny+5") for name in several
    ]


def _known(given: Sequence[str] | None, known: Sequence[str], what: str) -> Sequence[str]:
    for name in given or ():
        check_name(what, name, known)
    return given or known


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.", required=False)
    parser.add_argument("--only", help="solvers, separated by commas")
    parser.add_argument("--instances", help="separated by commas")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds")
    parser.add_argument("--quick", action="store_true", help="tiny instances only")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, where = args.one
        _one(name, where, args.time_limit)
        return
    if args.out is None:
        parser.error("-o is needed")
    try:
        solvers = _known(args.only and args.only.split(","), (*OURS, *BASELINES), "solver")
        full = tuple(name for name in INSTANCES if name not in QUICK)
        wanted = _known(args.instances and args.instances.split(","), tuple(INSTANCES), "instance")
    except InputError as error:
        parser.error(str(error))
    pairs = [(name, where) for where in (wanted if args.instances else full) for name in solvers]
    claim(parser, args.out, "solvers.json", "solvers.md", "solvers.svg", _PARTIAL)
    seconds = args.time_limit
    if args.quick:
        pairs, seconds = [pair for pair in quick() if pair[0] in solvers], _QUICK_SECONDS
    run(args.out, pairs, seconds, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
