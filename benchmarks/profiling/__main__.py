"""Every estimator against dense profiling: how well it ranks, and the measured loss of its plans.

    python -m bitknap.benchmarks.profiling -o benchmarks/results

For each reference model: the true KL of every unit in every format (dense profiling, resumable),
the rank correlation of each estimator's costs with it, and the KL of each estimator's plans on
text that no estimator saw, beside the plan that dense profiling gives at the same bytes. Writes
`profiling.json` and `profiling.md`; existing results of a model are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitknap.allocation import BitPlan, Budget, CostTable, Problem
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.planning import DEFAULT_PROFILE
from bitknap.arguments import add_output
from bitknap.benchmarks.profiling.report import markdown
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.setting import BUDGETS, FORMATS, MODELS, Judge, reference
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.estimator import Estimator
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.costs.weight_error import WeightError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.group_kl.rank_check import check_plans, plans_for_check
from bitknap.estimators.group_kl.regression import rank_correlation
from bitknap.estimators.measuring.kl_replay import Losses, standard_error
from bitknap.estimators.published.alphaq import AlphaQ
from bitknap.estimators.published.autoround import AutoRoundScore
from bitknap.estimators.published.chowdhury import MaxVar, RouterNorm, router_norms
from bitknap.estimators.published.exllamav2 import Exl2Score
from bitknap.estimators.published.hawq import HessianTrace
from bitknap.estimators.published.mc_moe import Frequency, McMoe, RoutingWeight
from bitknap.estimators.published.owq import Owq
from bitknap.estimators.published.quantmoe_bench import OutlierRatio
from bitknap.estimators.published.xie import ChannelScore
from bitknap.estimators.signals.plain import Kurtosis, RandomScore, RowVariance, Uniform
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.signals.signal import Signal
from bitknap.estimators.sparse.cell_choice import AtRandom
from bitknap.estimators.sparse.fuzzy import Fuzzy, measured
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.predictors import GradientBoosting, LogLinear
from bitknap.quantization.stacks.grouping import stacks

# Number of random draws of sparse estimators.
SEEDS = 10
# Dense measurements per sparse one: including the base, at most 1/15 of the time.
SPARSITY = 20
# Number of timed measurements.
_TIMED = 32
# Number of plans that check predictions, and their budgets.
CHECKS, CHECK_BUDGETS = 12, (2.0, 2.5)


def signals(evidence: Evidence, model: Any) -> Iterator[Estimator]:
    """Yield every rank-only signal as an estimator."""
    norms = router_norms(dict(model.named_parameters()), evidence.layout)
    rank_only: list[Signal] = [
        Uniform(),
        RandomScore(),
        Frequency(),
        RoutingWeight(),
        McMoe(),
        HessianTrace(),
        Owq(),
        AutoRoundScore(),
        Exl2Score(),
        Kurtosis(),
        OutlierRatio(),
        AlphaQ(),
        MaxVar(),
        RowVariance("mean"),
        RowVariance("spread"),
        ChannelScore(),
        RouterNorm(final=norms),
    ]
    yield from (Scored(signal) for signal in rank_only)


def dense_free(evidence: Evidence, model: Any) -> Iterator[tuple[Estimator, int]]:
    """Yield every estimator that measures no single units, and its number of KL measurements."""
    groups = len({*zip(evidence.units.layer, evidence.units.projection, strict=True)})
    ladder: list[Any] = [DataFree(), WeightError(), SecondMoments(), Fisher()]
    ladder.append(Fisher(space="output"))
    yield from ((estimator, 0) for estimator in ladder)
    for base in ladder[2:]:
        yield Calibrated(base=base), groups * len(FORMATS)
    for each in (1, 2):  # readings a group, down to 1/128 of dense profiling
        few = Calibrated(base=ladder[-1], measurements=groups * each)
        yield few, groups * each
    proxies = (Kurtosis(), Frequency(), MaxVar())
    yield Calibrated(base=ladder[-1], signals=proxies), groups * (len(FORMATS) + 2)
    yield from ((estimator, 0) for estimator in signals(evidence, model))
    yield Measured(kind="layer", squared=True), 0


def drawn(dense: CostTable, seed: int) -> LossSamples:
    """Return random cells of the dense table, one in `SPARSITY` of the measured ones.

    An expert without tokens changes nothing, so neither dense nor sparse profiling measures it.
    """
    free = np.zeros(dense.cost.shape, dtype=np.bool_)
    free[np.asarray(dense.frequency) > 0] = True
    cells = AtRandom().pick(dense.units, free, None, int(free.sum()) // SPARSITY, seed)
    return LossSamples(
        units=dense.units,
        formats=dense.formats,
        unit=cells // dense.cost.shape[1],
        column=cells % dense.cost.shape[1],
        loss=dense.cost.ravel()[cells],
        provenance={"model": "", "text": "", **dense.provenance, "seed": seed},
    )


@dataclass(frozen=True, kw_only=True)
class Known:
    """An estimator whose table exists already, so that all seeds share it.

    Attributes:
        name: name of the estimator.
        needs: evidence that the estimator needs.
        table: its table.
        readings: number of KL measurements for the table.
        seconds: time for the table.
    """

    name: str
    needs: frozenset[str]
    table: CostTable
    readings: int
    seconds: float

    @classmethod
    def of(cls, estimator: Estimator, evidence: Evidence, before: float = 0.0) -> Known:
        """Run the estimator; `before` is the seconds that its own base took."""
        start = time.perf_counter()
        table = estimator.estimate(evidence, FORMATS)
        return cls(
            name=estimator.name,
            needs=estimator.needs,
            table=table,
            readings=int(table.provenance.get("measurements", 0)),
            seconds=before + time.perf_counter() - start,
        )

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the table."""
        return self.table


def sparse(evidence: Evidence, base: Known | None) -> Mapping[str, Callable[..., CostTable]]:
    """Return, by name, functions that make a table from samples, alone or over a base."""
    learners: dict[str, Any] = {
        "fuzzy, as published": FuzzyRules(kind="idw"),
        "fuzzy, scale and move": FuzzyRules(),
        "log-linear": LogLinear(),
        "gradient boosting": GradientBoosting(),
    }

    def way(predictor: Any) -> Callable[[LossSamples], CostTable]:
        return lambda samples: Fuzzy(samples, predictor, base).estimate(evidence, FORMATS)

    over = f", over {base.name}" if base else ""
    return {f"{name}{over}": way(learner) for name, learner in learners.items()}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One reference model and its measurements; `seconds` is None if a journal was resumed."""

    name: str
    tokens: int
    judged: int
    model: Any
    evidence: Evidence
    dense: CostTable
    judge: Judge
    seconds: float | None


def prepared(name: str, out: Path, tokens: int, judged: int) -> Setting:
    """Calibrate a reference model, and measure every unit or read earlier measurements."""
    calibrated = reference(name, tokens, judged)
    journal = out / f"profiling.{name}.journal"
    begun, start = journal.exists(), time.perf_counter()
    dense = Measured(progress=_say, journal=journal).estimate(calibrated.evidence, FORMATS)
    seconds = None if begun else time.perf_counter() - start
    return Setting(
        name=name,
        tokens=tokens,
        judged=judged,
        model=calibrated.model,
        evidence=calibrated.evidence,
        dense=dense,
        judge=calibrated.judge,
        seconds=seconds,
    )


def ranked(setting: Setting) -> dict[str, Any]:
    """Return every estimator's rank correlation and the losses of its plans, as JSON values."""
    evidence, dense, judge = setting.evidence, setting.dense, setting.judge
    best = {bits: judge.losses(dense, bits) for bits in BUDGETS}
    rows = [_row("dense", dense, dense, judge, best, BUDGETS, measurements=dense.cost.size)]
    rows[0]["seconds"] = setting.seconds
    for estimator, measurements in dense_free(evidence, setting.model):
        start = time.perf_counter()
        table = estimator.estimate(evidence, FORMATS)
        seconds = time.perf_counter() - start
        row = _row(estimator.name, table, dense, judge, best, BUDGETS, measurements)
        rows.append(row | {"seconds": seconds, "unit": table.provenance.get("unit")})
        print(json.dumps(rows[-1]), flush=True)
    rows += _sampled(setting, best)
    return {
        "model": setting.name,
        "tokens": setting.tokens,
        "judged_on": setting.judged,
        "units": len(dense.units),
        "unseen": int((np.asarray(dense.frequency) == 0).sum()),
        "rows": rows,
    }


def _sampled(
    setting: Setting, best: Mapping[float, tuple[BitPlan, Losses]]
) -> Iterator[dict[str, Any]]:
    """Yield ranks and losses of tables by seed; seconds include base and samples."""
    evidence, dense, judge = setting.evidence, setting.dense, setting.judge
    each = _seconds_a_cell(setting)
    whole = each * _cells(dense)
    plain = Known.of(Fisher(space="output"), evidence)
    # As many readings as samples, spent on groups; and one per group, as a base for rules.
    few = Calibrated(base=plain, measurements=len(drawn(dense, 0)))
    grouped = Known.of(few, evidence, plain.seconds)
    row = _row(few.name, grouped.table, dense, judge, best, BUDGETS, grouped.readings)
    yield row | {"seed": 0, "share": grouped.seconds / whole}
    one = Calibrated(base=plain, measurements=len(stacks(evidence.units)))
    for base in (None, plain, Known.of(one, evidence, plain.seconds)):
        before, readings = (base.seconds, base.readings) if base else (0.0, 0)
        for way, table_of in sparse(evidence, base).items():
            for seed in range(SEEDS):
                samples = drawn(dense, seed)
                start = time.perf_counter()
                table = table_of(samples)
                seconds = before + time.perf_counter() - start + len(samples) * each
                count = len(samples) + readings
                row = _row(way, table, dense, judge, best, BUDGETS, count)
                yield row | {"seed": seed, "share": seconds / whole}
                print(json.dumps(row), flush=True)


def _cells(dense: CostTable) -> int:
    """Return the number of cells that dense profiling had to measure."""
    return int((np.asarray(dense.frequency) > 0).sum() * dense.cost.shape[1])


def _seconds_a_cell(setting: Setting) -> float:
    """Return the mean seconds of one measurement in this process."""
    samples = drawn(setting.dense, SEEDS)
    count = min(_TIMED, len(samples))
    start = time.perf_counter()
    cells = samples.unit[:count] * len(FORMATS) + samples.column[:count]
    measured(setting.evidence, FORMATS, cells)
    return (time.perf_counter() - start) / count


def checked(setting: Setting) -> list[dict[str, Any]]:
    """Return how well tables predict the KL of plans of equal bytes that none was fitted to."""
    evidence = setting.evidence
    tables = {"dense": setting.dense}
    bases: list[Any] = [SecondMoments(), Fisher(), Fisher(space="output")]
    for estimator in (*bases, *(Calibrated(base=base) for base in bases)):
        tables[estimator.name] = estimator.estimate(evidence, FORMATS)
    tied = under(tables["calibrated(fisher-output)"], profile(DEFAULT_PROFILE))
    rows = []
    for bits in CHECK_BUDGETS:
        plans = plans_for_check(Problem(tied, Budget.bits(bits)), CHECKS)
        kl = [float(setting.judge.of(plan).kl.mean()) for plan in plans]
        for name, table in tables.items():
            check = check_plans(table, plans, kl)
            numbers = {"spearman": check.spearman, "slope": check.slope, "scale": check.scale}
            rows.append({"estimator": name, "bits": bits, "regret": check.regret, **numbers})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(
    name: str,
    table: CostTable,
    dense: CostTable,
    judge: Judge,
    best: Mapping[float, tuple[BitPlan, Losses]],
    budgets: tuple[float, ...],
    measurements: int,
) -> dict[str, Any]:
    """Compare a table with the dense one, and its plans with the plans of the dense table."""
    seen = np.asarray(dense.frequency) > 0
    rank = [rank_correlation(table.cost[seen, f], dense.cost[seen, f]) for f in range(len(FORMATS))]
    plans = {}
    for bits in budgets:
        plan, losses = judge.losses(table, bits)
        paired = losses.kl - best[bits][1].kl
        plans[str(bits)] = {
            "kl": float(losses.kl.mean()),
            "bytes": plan.total_bytes,
            "over_dense": float(paired.mean()),
            "over_dense_se": standard_error(paired) if paired.any() else 0.0,
        }
    return {
        "estimator": name,
        "measurements": measurements,
        "spearman": dict(zip((f.name for f in FORMATS), rank, strict=True)),
        "spearman_all": rank_correlation(table.cost[seen].ravel(), dense.cost[seen].ravel()),
        "plans": plans,
    }


def _say(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--models", default=",".join(MODELS), help="models, with commas")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens to measure and calibrate on"
    )
    parser.add_argument("--judged-on", type=int, default=8192, help="held-out tokens")
    args = parser.parse_args()
    journals = [f"profiling.{name}.journal" for name in args.models.split(",")]
    claim(parser, args.out, "profiling.json", "profiling.md", *journals)
    path = args.out / "profiling.json"
    document: dict[str, Any] = {"models": {}} | read_results(path)
    for name in args.models.split(","):
        kept = document["models"].get(name, {})
        if "rows" not in kept or "checks" not in kept:
            setting = prepared(name, args.out, args.tokens, args.judged_on)
            kept = kept if "rows" in kept else ranked(setting)
            document["models"][name] = kept | {"checks": checked(setting)}
        packages = ("numpy", "torch", "transformers", "scikit-learn")
        versions = {package: version(package) for package in packages}
        threads = torch.get_num_threads()
        document["about"] = {"versions": versions, "cpu": platform.machine(), "threads": threads}
        write_results(path, document)
        write_report(args.out / "profiling.md", markdown(document))


if __name__ == "__main__":
    main()
