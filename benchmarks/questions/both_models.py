"""The comparison of both reference models that the README shows.

    python -m bitknap.benchmarks.questions.both_models -o benchmarks/results [--models …]

For each model and method: strategies at every budget with free choice, and under the profiles of
three runtimes those that depend on the profile. Writes `compare.MODEL.METHOD.json`; existing files
are kept, and a killed run continues. `compare_report` makes the table and the picture from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitknap.arguments import add_output
from bitknap.benchmarks.compare.models import Options, Setting, prepare
from bitknap.benchmarks.compare.output import document, times
from bitknap.benchmarks.compare.run import Comparison, compare
from bitknap.benchmarks.compare.strategies import names
from bitknap.benchmarks.compare.tables import SCORES, UNMEASURED
from bitknap.benchmarks.result_files import claim, write_results
from bitknap.quiet import silence_transformers

MODELS, METHODS = ("mixtral", "qwen3moe"), ("rtn", "gptq")
BUDGETS = (2.0, 2.25, 2.5, 3.0, 4.0)
PROFILES = ("expert", "layer_proj", "layer")
# Strategies run under profiles too; published rules have their own ties, so they stay the same.
_TIED = ("weight-error:knapsack", "moments:knapsack", "fisher-output:knapsack")
# All strategies run once; elsewhere only exact plans of every table, which others approximate.
_EVERY = {("mixtral", "rtn")}
_SOME = {
    "rtn": ("published", "random", *(f"{name}:knapsack" for name in (*UNMEASURED, *SCORES))),
    "gptq": ("published", "random", *_TIED, "frequency:knapsack"),
}
# Number of plans that the loop measures with free choice; under a profile, only its first plan.
_EVALUATIONS = 32


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--work", type=Path, default=Path("build/compare"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--evaluations", type=int, default=_EVALUATIONS)
    parser.add_argument(
        "--strategies", nargs="+", help="strategies to run instead of the usual ones"
    )
    args = parser.parse_args()
    silence_transformers()
    names = [f"compare.{name}.{method}.json" for name in args.models for method in args.methods]
    claim(parser, args.out, *names)
    for name in args.models:
        for method in args.methods:
            path = args.out / f"compare.{name}.{method}.json"
            if not path.exists():
                work = args.work / f"{name}.{method}"
                result = measured(name, method, work, args.evaluations, args.strategies)
                write_results(path, result)


def measured(
    name: str, method: str, work: Path, evaluations: int, strategies: Sequence[str] | None
) -> dict[str, Any]:
    """Return the comparisons of one model and method, by profile, as JSON values."""
    options = Options(model=f"reference:{name}", method=method, evaluations=evaluations)
    setting = prepare(options, _say)
    wanted = strategies or (("all",) if (name, method) in _EVERY else _SOME[method])
    first = _run(setting, names(wanted), work / "free")
    documents = {"free": _document(first)}
    for profile in PROFILES:
        other = replace(setting, options=replace(options, profile=profile, evaluations=1))
        run = _run(other, names(_TIED), work / profile, first)
        documents[profile] = _document(run)
    return documents


def _run(
    setting: Setting, wanted: Sequence[str], folder: Path, like: Comparison | None = None
) -> Comparison:
    """Return a comparison; tables do not depend on profiles, so those of another run are reused."""
    options = setting.options
    about = {
        "model": setting.source.fingerprint,
        "method": options.method,
        "profile": options.profile,
        "evaluations": options.evaluations,
        "strategies": list(wanted),
    }
    known = None if like is None else like.tables.known
    return compare(setting, wanted, BUDGETS, folder, about, tables=known)


def _document(run: Comparison) -> dict[str, Any]:
    return document(
        run, "python -m bitknap.benchmarks.questions.both_models -o benchmarks/results"
    ) | {"times": times(run)}


def _say(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", flush=True)


if __name__ == "__main__":
    main()
