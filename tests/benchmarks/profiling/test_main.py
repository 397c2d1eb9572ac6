import numpy as np

from bitknap.allocation import CostTable
from bitknap.benchmarks.profiling.__main__ import SPARSITY, drawn
from bitknap.benchmarks.profiling.report import markdown
from bitknap.benchmarks.setting import FORMATS
from bitknap.testing import routed_units


def dense(count: int = 45) -> CostTable:
    units = routed_units(1, count, ("up",), rows=64, cols=64)
    cost = 4.0 ** -np.arange(4) * np.arange(1, count + 1)[:, None]
    provenance = {"method": "rtn", "tokens": 8, "seed": 0}
    seen = (np.arange(count) % 9 > 0).astype(float)
    return CostTable.from_arrays(
        cost, units=units, formats=FORMATS, frequency=seen, provenance=provenance
    )


def test_samples_are_cells_of_the_dense_table():
    table = dense()
    samples = drawn(table, 3)
    assert len(samples) == 4 * 40 // SPARSITY
    assert (samples.unit % 9 > 0).all()  # experts without tokens are not measured
    assert np.array_equal(samples.loss, table.cost[samples.unit, samples.column])
    assert not np.array_equal(samples.unit, drawn(table, 4).unit)


def row(name: str, kl: float, **more: object) -> dict[str, object]:
    plan = {"kl": kl, "bytes": 100, "over_dense": kl - 0.1, "over_dense_se": 0.01}
    rank = {"int1": 0.5, "int2": 0.75}
    facts = {"estimator": name, "measurements": 6, "spearman": rank, "spearman_all": 0.9}
    return {**facts, "plans": {"2.0": plan}, **more}


def test_the_report_marks_what_is_significant():
    model = {
        "model": "mixtral",
        "units": 45,
        "unseen": 3,
        "tokens": 4096,
        "judged_on": 8192,
        "rows": [
            row("dense", 0.1, seconds=12.0),
            row("fisher", 0.115),
            row("moments", 0.15),
            row("fuzzy", 0.12, seed=0, share=0.05),
            row("fuzzy", 0.10, seed=1, share=0.05),
        ],
        "checks": [
            {
                "estimator": "dense",
                "bits": 2.0,
                "spearman": 0.9,
                "slope": 1.1,
                "scale": 0.8,
                "regret": 1.0,
            }
        ],
    }
    about = {"cpu": "x86_64", "threads": 1, "versions": {"numpy": "2.4"}}
    text = markdown({"models": {"mixtral": model}, "about": about})
    assert "| fisher | 6 | 0.50 | 0.75 | 0.90 | 0.1150 (+15.0 ± 10.0 %) |" in text
    assert "| moments | 6 | 0.50 | 0.75 | 0.90 | 0.1500 (**+50.0 ± 10.0 %**) |" in text
    assert "| fuzzy | 6 | 1/20 | 0.900 | 0.1100 (+10.0 ± 10.0 / 10.0 %) |" in text
    assert "| dense | 2.0 | 0.90 | 1.10 | 0.80 | 1.00 |" in text
    assert "45 units, 3 of experts without tokens" in text
    assert text.endswith("x86_64, 1 thread; numpy 2.4.\n")
