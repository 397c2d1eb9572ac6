"""The report on targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Where the tests let a runtime's own code read what no runtime runs here (`make runtimes`).
_READ = {
    "compressed-tensors": "its own unpacking, in the tests",
    **dict.fromkeys(
        ("gptqmodel", "autoround", "llm-compressor", "modelopt", "torchao"),
        "its own matching of names, in the tests",
    ),
}


def markdown(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return the report."""
    budgets = about["budgets"]
    lines = [
        "# Targets",
        "",
        f"Plans of the bundled Mixtral for each target: KL to the original in nats per token on "
        f"{about['tokens']:,} tokens of held-out text, ± the standard error over windows, with the "
        "weights that the target's rounding gives. Costs are from "
        f"{about['calibration_tokens']:,} calibration tokens; only routed experts are quantized. "
        "“Least” is the size of the smallest plan, where a budget is out of reach. For settings "
        "of tools that round by themselves, KL is that of our rounding under the tool's "
        "restrictions; the tool's own rounding was not measured.",
        "",
        "GGUF needs rows of 256 weights, which the model has not: there its residual stream is "
        "widened to 256 numbers and rotated, which changes what it computes by 1e-5 at most, but "
        "also evens weights out.",
        "",
        f"| target | profile | written | verified | loaded by | apart | "
        f"{' | '.join(_kl(budgets))} |",
        f"|---|---|---|---|---|---|{'---|' * len(budgets)}",
    ]
    for row in rows:
        cells = _losses(row["plans"], len(budgets))
        lines.append(
            f"| `{row['target']}` | `{row['profile']}` | {_what(row)} | {_verified(row)} | "
            f"{_loaded(row)} | {_apart(row)} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "“Apart” is the largest difference between the log-probabilities that the runtime itself "
        "and transformers with the decoded weights give the tokens of a text of "
        f"{about['asked']}, in nats, for the plan of 3 bits, or the first above that a target "
        "reaches. llama.cpp rounds activations to 8 bits where weights are quantized, so it "
        "differs by more than arithmetic; the others run in float32. vLLM's build for CPUs decodes "
        "experts when it loads them.",
        "",
        "## What was checked when they were written",
        "",
    ]
    for row in rows:
        lines.append(f"* `{row['target']}`: {'; '.join(row['checks'])}.")
    lines += ["", f"torch {about['torch']}, {about['device']}."]
    return "\n".join(lines) + "\n"


def _kl(budgets: Sequence[float]) -> list[str]:
    return [f"KL, {bits:g} bpw" for bits in budgets]


def _losses(plans: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Return a cell for each of the first budgets; a further one is in the last cell."""
    cells = [_loss(plan) for plan in plans]
    more = [f"{plan['budget']:g}: {_loss(plan)}" for plan in plans[count:]]
    return [*cells[: count - 1], "; ".join([cells[count - 1], *more])]


def _loss(plan: Mapping[str, Any]) -> str:
    if "kl" not in plan:
        return f"least {plan['least']:.2f}"
    return f"{plan['kl']:.4f} ± {plan['kl_se']:.4f}"


def _what(row: Mapping[str, Any]) -> str:
    return "weights" if row["weights"] else "settings"


def _verified(row: Mapping[str, Any]) -> str:
    """Return what a target checked by itself before its files appeared."""
    rules = any("rules: each of" in check for check in row["checks"])
    return ", ".join(["read back"] * row["weights"] + ["re-matched"] * rules)


def _loaded(row: Mapping[str, Any]) -> str:
    return str(row.get("runtime") or _READ.get(row["target"], "no"))


def _apart(row: Mapping[str, Any]) -> str:
    return f"{row['apart']:.1e}" if "apart" in row else ""
