"""Claims of the founding papers, rechecked on the reference models, in one table.

    python -m bitknap.benchmarks.published.founding_claims -o benchmarks/results

Adds to the claims of `published_claims` those of FRI-MxMoE (which antecedent matters; how few
measurements suffice) and MoQa (several calibration sets). Writes `founding_claims.json` and
`founding_claims.md`; existing results of a model are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.units import ROLES
from bitknap.arguments import add_output
from bitknap.benchmarks.published.__main__ import material, ours_on
from bitknap.benchmarks.published.claims import CONFIRMED, REFUTED, UNDECIDED, claims, decided
from bitknap.benchmarks.published.report import claims_table
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.setting import FORMATS, MODELS, Judge, Reference, reference
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.regression import rank_correlation
from bitknap.estimators.measuring.kl_replay import standard_error
from bitknap.estimators.published.moqa import expert_significance
from bitknap.estimators.signals.scored import Scored
from bitknap.estimators.sparse.cell_features import Antecedents
from bitknap.estimators.sparse.fuzzy import features, measured
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.quiet import silence_transformers

# Number of measured cells, half used as rules and half held out; number of random draws.
_CELLS, _DRAWS = 192, 20
_BUDGETS = (2.0, 2.25, 2.5, 3.0)
# The antecedent that FRI-MxMoE's ablation finds most important.
_ACTIVATION = "activation"
# Excess of the KL over dense profiling's in `profiling.md` that counts as parity.
_PARITY = 0.05


def antecedents_matter(evidence: Evidence) -> dict[str, Any]:
    """Check that rules without the activation's variance predict worst of all.

    Predicts by inverse distances, as published, from half of the cells; the score is the rank
    correlation with the other half, paired over draws.
    """
    units = evidence.units
    seen = np.flatnonzero([_seen(evidence, unit) for unit in range(len(units))])
    draw = np.random.default_rng(0)
    every = (seen[:, None] * len(FORMATS) + np.arange(len(FORMATS))).ravel()
    cells = draw.choice(every, min(_CELLS, len(every)), replace=False)
    loss = measured(evidence, FORMATS, cells)
    whole = features(evidence, FORMATS)
    without = {name: _dropped(whole, name) for name in whole.names}
    harm: dict[str, list[float]] = {name: [] for name in without}
    for _ in range(_DRAWS):
        order = draw.permutation(len(cells))
        rules, rest = np.sort(order[: len(cells) // 2]), order[len(cells) // 2 :]
        samples = _samples(evidence, cells[rules], loss[rules])
        full = _score(samples, whole, cells[rest], loss[rest])
        for name, some in without.items():
            harm[name].append(full - _score(samples, some, cells[rest], loss[rest]))
    means = {name: float(np.mean(values)) for name, values in harm.items()}
    others = {name: value for name, value in means.items() if name != _ACTIVATION}
    rival = max(others, key=lambda name: others[name])
    gap = np.array(harm[_ACTIVATION]) - np.array(harm[rival])
    said = ", ".join(f"{n} {v:+.3f}" for n, v in sorted(means.items(), key=lambda x: -x[1]))
    return {
        "claim": "activation variance is the antecedent that matters most",
        "source": "FRI-MxMoE",
        "verdict": decided(float(gap.mean()), float(gap.std(ddof=1))),
        "figures": {},
        "also": f"rank correlation lost without each antecedent, {len(cells) // 2} rules, mean of "
        f"{_DRAWS} draws: {said}",
    }


def _seen(evidence: Evidence, unit: int) -> bool:
    units = evidence.units
    if ROLES[units.role[unit]] != "routed":
        return True
    return bool(evidence.layers[int(units.layer[unit])].count[int(units.expert[unit])] > 0)


def _dropped(whole: Antecedents, name: str) -> Antecedents:
    keep = [at for at, other in enumerate(whole.names) if other != name]
    return Antecedents(
        names=tuple(whole.names[at] for at in keep),
        values=whole.values[:, :, keep],
        discrete=whole.discrete - {name},
        free=whole.free - {name},
    )


def _samples(evidence: Evidence, cells: np.ndarray, loss: Floats) -> LossSamples:
    return LossSamples(
        units=evidence.units,
        formats=FORMATS,
        unit=cells // len(FORMATS),
        column=cells % len(FORMATS),
        loss=loss,
        provenance={
            "model": "",
            "text": "",
            "method": evidence.rounding.name,
            **evidence.provenance,
        },
    )


def _score(samples: LossSamples, known: Antecedents, cells: np.ndarray, loss: Floats) -> float:
    mean, _ = FuzzyRules(kind="idw").fit(samples, known).predict(known)
    return rank_correlation(mean.ravel()[cells], loss)


def fewer_measurements(profiling: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Check that rules from a fifteenth of the measurements are as good as all of them.

    Read from `profiling.json`: ratio of the KL of plans to dense profiling's, at its budgets.
    """
    rows = profiling["models"][model]["rows"]
    dense = next(row for row in rows if row["estimator"] == "dense")
    over: dict[str, list[float]] = {}
    for row in rows:
        name = row["estimator"]
        if name.startswith("fuzzy"):
            ratio = [plan["kl"] / dense["plans"][at]["kl"] for at, plan in row["plans"].items()]
            over.setdefault(name, []).append(float(np.mean(ratio)) - 1)
    means = {name: float(np.mean(values)) for name, values in over.items()}
    published = means["fuzzy, as published"]
    best = min(means, key=lambda name: means[name])
    verdict = REFUTED if published > _PARITY else CONFIRMED
    return {
        "claim": "fuzzy rules reach dense profiling with 15 times fewer measurements",
        "source": "FRI-MxMoE",
        "verdict": verdict,
        "figures": {},
        "also": (
            "KL over dense profiling, mean of budgets and draws: as published "
            f"{100 * published:+.0f} %; {best} {100 * means[best]:+.1f} %, which the base "
            "of group readings already reaches"
        ),
    }


@dataclass(frozen=True, slots=True)
class _Given:
    """A signal with precomputed scores."""

    values: Floats
    name: str = "given"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        return self.values


def several_sets(judge: Judge, sets: Sequence[Evidence]) -> dict[str, Any]:
    """Check that token shares from several texts make better plans than shares from one text.

    Compares exact plans for data-free cost × share at equal bytes, with each text as the one.
    """
    units, pairs = sets[0].units, []
    tables = [
        Scored(_Given(share)).estimate(sets[0], FORMATS)
        for share in (_share(sets), *(_share([one]) for one in sets))
    ]
    for bits in _BUDGETS:
        joint, *single = [judge.losses(table, bits)[1].kl for table in tables]
        paired = np.mean(single, axis=0) - joint
        pairs.append(
            {
                "budget": bits,
                "without": float(np.mean(single)),
                "with": float(joint.mean()),
                "gain": float(paired.mean()),
                "gain_se": standard_error(paired) if paired.any() else 0.0,
            }
        )
    sure = [row for row in pairs if abs(row["gain"]) > 2 * row["gain_se"]]
    better = sum(row["gain"] > 0 for row in sure)
    verdict = UNDECIDED
    if 2 * better != len(sure):
        verdict = CONFIRMED if 2 * better > len(sure) else REFUTED
    return {
        "claim": "significance over several calibration sets makes better plans than over one",
        "source": "MoQa",
        "verdict": verdict,
        "figures": {"plans": pairs},
        "also": f"{len(units)} units, {len(sets)} sets; without: mean of one set each",
    }


def _share(sets: Sequence[Evidence]) -> Floats:
    """Return the share of significance of each unit's expert, mean over sets, float64[U]."""
    units, each = sets[0].units, [expert_significance(one) for one in sets]
    return np.array(
        [
            np.mean([shares[layer][expert] for shares in each])
            for layer, expert in zip(units.layer.tolist(), units.expert.tolist(), strict=True)
        ]
    )


def checked(calibrated: Reference, profiling: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every claim for one model as JSON values."""
    known = material(calibrated)
    yield from claims(calibrated.judge, known, ours_on(calibrated.evidence), _BUDGETS)
    yield antecedents_matter(calibrated.evidence)
    yield fewer_measurements(profiling, calibrated.name)
    yield several_sets(calibrated.judge, known.sets)


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report."""
    lines = [
        "# Claims of the founding papers, at this scale",
        "",
        "Two small trained models, so this is an indication, not a law. Ranks are within layers, "
        "over experts that saw tokens; a claim on ranks is decided where the mean over layers is "
        "two standard deviations of chance from 0. A claim on plans is decided by the budgets at "
        "which paired differences on unseen text are two standard errors from 0. Formats int1 to "
        f"int4 in whole rows, rounding to nearest, {document['tokens']:,} calibration and "
        f"{document['judged']:,} other tokens.",
        "",
        *claims_table(list(document["models"].values())),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--judged-on", type=int, default=8192)
    args = parser.parse_args()
    silence_transformers()
    claim(parser, args.out, "founding_claims.json", "founding_claims.md")
    path = args.out / "founding_claims.json"
    document: dict[str, Any] = {"models": {}} | read_results(path)
    document |= {"tokens": args.tokens, "judged": args.judged_on}
    profiling = read_results(args.out / "profiling.json")
    if not profiling:
        parser.exit(2, f"{args.out / 'profiling.json'}: missing; run the profiling benchmark\n")
    for name in MODELS:
        if name not in document["models"]:
            calibrated = reference(name, args.tokens, args.judged_on)
            rows = list(checked(calibrated, profiling))
            document["models"][name] = {"model": name, "claims": rows}
            write_results(path, document)
    write_report(args.out / "founding_claims.md", markdown(document))


if __name__ == "__main__":
    main()
