"""Speed of kernels on mixed-bit experts, compared with the device's ceilings and with others.

    python -m bitknap.benchmarks.kernels -o benchmarks/results [--quick] [--cases TEXT]

On a GPU: measures peak read, copy and matmul rates, then layers of Mixtral,
Qwen3-30B-A3B and DeepSeek-V2-Lite in uniform and mixed widths, at batches of 1 to 4096. `--cpu`
measures the path of a machine without a GPU. `--toy` runs a small layer through everything, with
TRITON_INTERPRET=1 also through Triton's interpreter, and says nothing about speed. Writes
`kernels.json`, `kernels.md` and `kernels.svg`; parts not requested are kept from the last run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.errors import InputError

_PACKAGES = ("torch", "triton", "transformers", "numpy", "vllm")


def about(device: str) -> dict[str, Any]:
    """Return the facts that the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    facts = {
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        known = torch.cuda.get_device_properties(0)
        facts["device"] = known.name
        facts["processors"] = known.multi_processor_count
        facts["memory"] = known.total_memory
        facts["cache"] = known.L2_cache_size
        facts["cuda"] = torch.version.cuda
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure on a GPU.

    Attributes:
        quick: only the cases of the targets.
        only: text that the name of a case must contain.
        batches: batch sizes; all when empty.
        toy: a small case on any machine.
        runs: number of measurements per case.
        processes: number of processes that compile kernels in advance; 0 compiles on demand.
    """

    quick: bool = False
    only: str = ""
    batches: tuple[int, ...] = ()
    toy: bool = False
    runs: int = 100
    processes: int = 0


def measure(out: Path, asked: Asked, say: Callable[[str], None]) -> None:
    """Measure the kernels, and rewrite the report after each case.

    Raises:
        InputError: there is no GPU, or no such case.
    """
    device = "cpu" if asked.toy else "cuda"
    if not asked.toy and not torch.cuda.is_available():
        raise InputError(
            "kernels: torch sees no GPU; pass --cpu for the path without one, or --toy"
        )
    from bitknap.benchmarks.kernels.cases import cases, toy_cases
    from bitknap.benchmarks.kernels.peers import Setting, measured
    from bitknap.benchmarks.kernels.timing import ceilings

    chosen = [
        case
        for case in (toy_cases() if asked.toy else cases(quick=asked.quick))
        if asked.only in case.name and (not asked.batches or case.batch in asked.batches)
    ]
    if not chosen:
        raise InputError(
            f"--cases {asked.only!r}: no case of these batches has this in its name; write for "
            "example 'Mixtral-8x7B 4'"
        )
    if asked.processes:
        from bitknap.benchmarks.kernels.compile_cases import compile_all

        compile_all(chosen, asked.processes, say)
    peaks = ceilings(device)
    setting = Setting(device=device, runs=asked.runs, ceilings=peaks)
    rows: list[dict[str, Any]] = []
    for name, more in measured(chosen, setting):
        rows += more
        write(out, {"about": about(device), "toy": asked.toy, "ceilings": peaks, "rows": rows})
        say(name)


def measure_cpu(out: Path, *, toy: bool, rounds: int, say: Callable[[str], None]) -> None:
    """Measure the path without a GPU, and write the report."""
    from bitknap.benchmarks.kernels import cpu

    torch.set_num_threads(1)
    which = cpu.TOY if toy else cpu.LAYERS
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "about": about("cpu"),
            "rates": cpu.rates([(64, 96)] if toy else [(1024, 2048)], rounds),
            "layers": cpu.layers(which, rounds=rounds, prefill=8 if toy else 512, say=say),
            "models": cpu.models(Path(folder), tokens=4 if toy else 64, prefill=8 if toy else 512),
        }
    write(out, {"cpu": results})


def write(out: Path, parts: dict[str, Any]) -> None:
    """Replace the results of these parts, and write the report on all parts."""
    from bitknap.benchmarks.kernels.report import markdown, picture

    path = out / "kernels.json"
    document = read_results(path) | parts
    write_results(path, document)
    write_report(out / "kernels.md", markdown(document))
    if document.get("rows"):
        picture(document, out / "kernels.svg")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--quick", action="store_true", help="only the cases that have targets")
    parser.add_argument("--cases", default="", help="only cases with this text in their name")
    parser.add_argument("--batches", default="", help="batch sizes, such as 1,16,512")
    parser.add_argument(
        "--compile", type=int, default=0, help="number of processes that compile first"
    )
    parser.add_argument("--runs", type=int, default=100, help="measurements of each case on a GPU")
    parser.add_argument("--cpu", action="store_true", help="measure the path without a GPU")
    parser.add_argument("--rounds", type=int, default=8, help="measurements of each case on a CPU")
    parser.add_argument(
        "--toy", action="store_true", help="run everything with tiny sizes, on any machine"
    )
    given = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, flush=True)

    claim(parser, given.out, "kernels.json", "kernels.md", "kernels.svg")
    try:
        if given.toy or not given.cpu:
            runs = 1 if given.toy else given.runs
            asked = Asked(
                quick=given.quick,
                only=given.cases,
                batches=tuple(int(batch) for batch in given.batches.split(",") if batch),
                toy=given.toy,
                runs=runs,
                processes=given.compile,
            )
            measure(given.out, asked, say)
        if given.cpu or given.toy:
            rounds = 1 if given.toy else given.rounds
            measure_cpu(given.out, toy=given.toy, rounds=rounds, say=say)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
