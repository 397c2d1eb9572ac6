"""Published rules with their own allocators against Bitknap at equal bytes, and papers' claims.

    python -m bitknap.benchmarks.published -o benchmarks/results

For each reference model, rule and budget: the KL, on text that no rule saw, of the largest plan
that the rule makes within the budget, and of `Calibrated(base=Fisher(space="output"))` at that
plan's bytes or less. Then the claims of the papers, with our figures. Writes `published.json` and
`published.md`; existing results of a model are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bitknap.allocation import BitPlan, Budget, CostTable, Problem, profile, solve
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.calibration import longest_of, tokenizer_of
from bitknap.api.planning import DEFAULT_PROFILE
from bitknap.arguments import add_output
from bitknap.benchmarks.published.claims import claims
from bitknap.benchmarks.published.report import markdown
from bitknap.benchmarks.published.rules import rules
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.setting import BUDGETS, FORMATS, MODELS, Judge, Reference, reference
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring.kl_replay import standard_error
from bitknap.estimators.measuring.text import BUILTIN, read_text, token_windows
from bitknap.estimators.published.chowdhury import router_norms
from bitknap.estimators.published.rule import Material, Rule
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.source.checkpoint import resolve

# Calibration sets of MoQa: quarters of the bundled text, which match its domains except at edges.
SETS = 4


def material(calibrated: Reference) -> Material:
    """Return the inputs of rules: the pass, router norms, and one pass per quarter of the text."""
    folder = resolve(f"reference:{calibrated.name}")
    layout = calibrated.evidence.layout
    text, tokenizer = read_text(BUILTIN, "calibration"), tokenizer_of(folder)
    cuts = [len(text) * part // SETS for part in range(SETS + 1)]
    sets = []
    for start, end in pairwise(cuts):
        longest = longest_of(calibrated.model.config)
        windows = token_windows(tokenizer, text[start:end], calibrated.tokens, longest)
        sets.append(calibrate(calibrated.model, layout, windows))
    routers = load_file(folder / "initial_routers.safetensors")
    return Material(
        evidence=calibrated.evidence,
        final=router_norms(dict(calibrated.model.named_parameters()), layout),
        initial=router_norms(routers, layout),
        sets=tuple(sets),
    )


def ours_on(evidence: Evidence) -> CostTable:
    """Return our costs: Fisher at the experts' output × measured group gains."""
    return Calibrated(base=Fisher(space="output")).estimate(evidence, FORMATS)


def compared(
    judge: Judge, offered: Iterable[Rule], ours: CostTable, budgets: Sequence[float] = BUDGETS
) -> list[dict[str, Any]]:
    """Return one row per rule and budget, as JSON values."""
    rows = []
    for rule in offered:
        start = time.perf_counter()
        for bits in budgets:
            rows.append(_row(judge, ours, rule, bits))
            print(json.dumps(rows[-1]), flush=True)
        print(f"{rule.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def _row(judge: Judge, ours: CostTable, rule: Rule, bits: float) -> dict[str, Any]:
    """Compare a rule's plan at a budget with our plan at the same bytes."""
    about = {"rule": rule.name, "source": rule.source, "knob": rule.knob, "ties": rule.ties}
    limit = int(Budget.bits(bits).limit(ours).bound)
    judged = [(offer, judge.of(offer.plan)) for offer in rule.offers(limit)]
    if not judged:
        return {**about, "budget": bits, "bytes": None}
    offer, theirs = min(judged, key=lambda pair: float(pair[1].kl.mean()))
    nbytes = offer.plan.total_bytes
    plan = _plan(ours, DEFAULT_PROFILE, nbytes)
    mine = judge.of(plan)
    paired = theirs.kl - mine.kl
    same = offer.plan.units.same_as(ours.units)
    row: dict[str, Any] = {
        **about,
        "budget": bits,
        "limit": limit,
        "setting": offer.setting,
        "bytes": nbytes,
        "bpw": offer.plan.bpw,
        "kl": float(theirs.kl.mean()),
        "ours_bytes": plan.total_bytes,
        "ours_kl": float(mine.kl.mean()),
        "difference": float(paired.mean()),
        "difference_se": standard_error(paired) if paired.any() else 0.0,
        "ratio": float(theirs.kl.mean() / mine.kl.mean()),
        "ours_predicted": _predicted(ours, plan),
        "predicted": _predicted(ours, offer.plan) if same else None,
    }
    if row["difference"] < 0:
        # The effect of gate = up, which our plan keeps and most rules do not.
        row["ours_free_kl"] = float(judge.of(_plan(ours, "free", nbytes)).kl.mean())
    return row


def _plan(table: CostTable, ties: str, nbytes: int) -> BitPlan:
    return solve(Problem(under(table, profile(ties)), Budget.bytes(nbytes))).plan


def _predicted(table: CostTable, plan: BitPlan) -> float | None:
    """Return the loss that a table predicts for a plan; None if the table lacks a format."""
    if not set(plan.formats) <= set(table.formats):
        return None
    columns = np.array([table.formats.index(item) for item in plan.formats])
    return float(table.cost[np.arange(len(plan.units)), columns[plan.choice]].sum())


def measured(calibrated: Reference) -> Mapping[str, Any]:
    """Return all results for one reference model as JSON values."""
    known = material(calibrated)
    ours = ours_on(calibrated.evidence)
    return {
        "model": calibrated.name,
        "tokens": calibrated.tokens,
        "judged_on": calibrated.judged,
        "units": len(ours.units),
        "measurements": ours.provenance["measurements"],
        "rows": compared(calibrated.judge, rules(known, _say), ours),
        "claims": claims(calibrated.judge, known, ours),
    }


def _say(what: str, done: int, of: int) -> None:
    if done % 100 == 0:
        print(f"{what} {done}/{of}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--models", default=",".join(MODELS), help="models, with commas")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--judged-on", type=int, default=8192, help="held-out tokens")
    args = parser.parse_args()
    claim(parser, args.out, "published.json", "published.md")
    path = args.out / "published.json"
    document: dict[str, Any] = {"models": {}} | read_results(path)
    for name in args.models.split(","):
        if name not in document["models"]:
            calibrated = reference(name, args.tokens, args.judged_on)
            document["models"][name] = measured(calibrated)
        packages = ("numpy", "torch", "transformers", "scikit-fuzzy")
        versions = {package: version(package) for package in packages}
        threads = torch.get_num_threads()
        document["about"] = {"versions": versions, "cpu": platform.machine(), "threads": threads}
        write_results(path, document)
        write_report(args.out / "published.md", markdown(document))


if __name__ == "__main__":
    main()
