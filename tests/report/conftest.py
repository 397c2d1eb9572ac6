"""Documents of made-up runs: every number is a formula or drawn with a fixed seed."""

import copy

import numpy as np
import pytest

from bitknap.allocation import BitPlan, Units, formats

WIDTHS = formats((1, 2, 3, 4, 8), (32, "row"), True)
DOMAINS = ("books", "code", "wiki", "speeches")
# Strategy, group, source, and its KL over ours.
STRATEGIES = (
    ("ours", "ours", "", 1.0),
    ("ours, unrefined", "ours", "", 1.03),
    ("best uniform", "uniform", "", 1.35),
    ("round-robin", "uniform", "", 1.52),
    ("down-high", "uniform", "arXiv 2402.12345", 1.44),
    ("random", "random", "10 seeds", 2.4),
    ("frequency", "signal", "", 1.9),
    ("weight error", "signal", "", 1.5),
    ("MC-MoE", "published", "arXiv 2410.06270", 1.67),
    ("MxMoE", "published", "arXiv 2505.05799", 1.31),
    ("GEMQ", "published", "", 2.1),
    ("fisher, greedy", "estimator", "", 1.12),
    ("fisher, ilp", "estimator", "", 1.1),
    ("calibrated, knapsack", "estimator", "", 1.001),
    ("evolutionary", "search", "arXiv 2410.14649", 1.2),
)
ABOUT = {
    "model": "reference:mixtral",
    "fingerprint": "ab12",
    "method": "rtn",
    "profile": "free",
    "seed": 0,
    "units": 96,
    "weights": 4718592,
    "formats": [item.name for item in WIDTHS],
    "calibration_tokens": 8192,
    "evaluation_tokens": 8192,
    "domains": list(DOMAINS),
    "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
    "device": "CPU, x86_64, 1 thread",
    "command": "bitknap compare reference:mixtral --budgets 2,2.5,3 --strategies all -o D",
}
PRICE = [
    {"profile": "free", "cost": 0.02, "ratio": 1.0, "bits_per_weight": 2.5, "reason": ""},
    {
        "profile": "gate_eq_up",
        "cost": 0.0213,
        "ratio": 1.065,
        "bits_per_weight": 2.5,
        "reason": "",
    },
    {
        "profile": "expert",
        "cost": 0.0248,
        "ratio": 1.24,
        "bits_per_weight": 2.49,
        "reason": "",
    },
    {
        "profile": "model",
        "cost": None,
        "ratio": None,
        "bits_per_weight": None,
        "reason": "no format fits the budget",
    },
]
CLAIMS = [
    {
        "claim": "Down-projections need more bits than up-projections",
        "source": "Xie et al., arXiv 2504.12345",
        "verdict": "confirmed",
        "figures": "down costs 1.42 × up at 2 bits (RTN, geometric mean of 4 layers)",
    },
    {
        "claim": "Fifteen times fewer measurements at parity",
        "source": "FRI-MxMoE",
        "verdict": "not decidable",
        "figures": "KL 0.0231 ± 0.0011 against 0.0224 ± 0.0010",
    },
]


def plan_of(bits, layers=4, experts=8, others=True, seed=0):
    """A plan of about so many bits per weight over made-up units."""
    keys = [
        (layer, "routed", expert, projection)
        for layer in range(layers)
        for expert in range(experts)
        for projection in ("gate", "up", "down")
    ]
    if others:
        keys += [(layer, "attention", -1, name) for layer in range(layers) for name in "qkvo"]
    layer, role, expert, projection = zip(*keys, strict=True)
    units = Units.build(
        layer=layer,
        role=role,
        expert=expert,
        projection=projection,
        rows=[64] * len(keys),
        cols=[128] * len(keys),
    )
    drawn = np.random.default_rng(seed).normal(2 * bits - 2, 2, len(keys))
    choice = np.clip(np.rint(drawn), 0, len(WIDTHS) - 1).astype(np.int32)
    return BitPlan.from_choice(units, WIDTHS, choice, model="ab12")


def row_of(strategy, group, source, factor, bits):
    ours = 2.0 * 4.0**-bits
    kl, error = ours * factor, ours * 0.02
    mine = strategy == "ours"
    return {
        "strategy": strategy,
        "group": group,
        "source": source,
        "budget": f"{bits:g}bpw",
        "status": "ok",
        "reason": "",
        "setting": "" if group == "ours" else f"setting {len(strategy)}",
        "bytes": int(bits * 589824),
        "bpw": bits - 0.01 * (len(strategy) % 5),
        "kl": kl,
        "kl_se": error,
        "perplexity": 38.0 * (1 + kl),
        "top1": 1 / (1 + kl),
        "difference": None if mine else kl - ours,
        "difference_se": None if mine else error,
        "ratio": None if mine else factor,
        "rank": 1 + 10 * (factor - 1),
        "domain_kl": {name: kl * (0.8 + 0.1 * i) for i, name in enumerate(DOMAINS)},
        "measurements": 64 if mine else 0,
        "predicted": kl * 0.9 if group in ("ours", "estimator") else None,
    }


def rows_of(budgets):
    """Rows of every strategy; one failed and one is out of reach at the first budget."""
    rows = [row_of(*strategy, bits) for bits in budgets for strategy in STRATEGIES]
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    lost = dict.fromkeys([*numbers, "difference", "difference_se", "ratio", "domain_kl"])
    rows += [
        row_of("MoQa", "published", "arXiv 2503.21135", 1, budgets[0])
        | lost
        | {"status": "unreachable", "reason": "its least is 2.13 bpw; the budget is 2bpw"},
        row_of("AlphaQ", "published", "", 1, budgets[0])
        | lost
        | {"status": "failed", "reason": "ValueError: matrix is singular"},
    ]
    return rows


def refined_steps():
    """Steps of a refinement of which every third was accepted."""
    return [
        {
            "origin": "table" if i == 0 else "exchange",
            "predicted": 0.02 * 0.99**i,
            "loss": 0.0226 * (0.985 ** (i - i % 3) + 0.01 * (i % 3)),
            "gain": 0.0,
            "error": 0.0001,
            "accepted": i % 3 == 0,
        }
        for i in range(24)
    ]


def document_of(budgets=(2.0, 2.5, 3.0), layers=4, experts=8):
    """A whole document: one row failed and one out of reach at the first budget."""
    tokens = np.random.default_rng(1).lognormal(5, 1.5, (layers, experts)).astype(int)
    tokens[-1, -2:] = 0
    return {
        "format": "bitknap.compare",
        "version": "1.0",
        "about": copy.deepcopy(ABOUT),
        "budgets": [
            {"budget": f"{b:g}bpw", "bytes": int(b * 589824), "plan": f"plans/{b:g}bpw.json"}
            for b in budgets
        ],
        "rows": rows_of(budgets),
        "frontier": [
            {"bits_per_weight": b, "bytes": int(b * 589824), "cost": 1.8 * 4.0**-b}
            for b in np.linspace(1.2, 8, 60).tolist()
        ],
        "price": copy.deepcopy(PRICE),
        "coverage": {"layers": list(range(layers)), "tokens": tokens.tolist()},
        "refine": {f"{b:g}bpw": refined_steps() for b in budgets[:2]},
        "claims": copy.deepcopy(CLAIMS),
    }


@pytest.fixture
def document():
    return document_of()


@pytest.fixture
def plans():
    return {f"{bits:g}bpw": plan_of(bits) for bits in (2.0, 2.5, 3.0)}


_document_of = pytest.fixture(name="document_of", scope="session")(lambda: document_of)
_plan_of = pytest.fixture(name="plan_of", scope="session")(lambda: plan_of)
