"""A comparison on the terminal: one table per budget, with the time of each strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bitknap.benchmarks.compare.run import Comparison

_RIGHT = (
    "bytes",
    "KL, nats/token",
    "− ours",
    "ratio",
    "rank",
    "perplexity",
    "top token",
    "read",
    "s",
)


def strategies_tables(document: Mapping[str, Any], run: Comparison) -> Iterator[Table]:
    """Yield the strategies of each budget, ours first, then by loss, and why some are missing.

    Args:
        document: the comparison as JSON values.
        run: the comparison itself, for the seconds that each strategy took.
    """
    for entry in document["budgets"]:
        budget = entry["budget"]
        table = Table(title=f"{budget}: KL to the original on text that no strategy saw")
        table.add_column("strategy")
        for head in _RIGHT:
            table.add_column(head, justify="right")
        for row in document["rows"]:
            if row["budget"] == budget:
                seconds = run.done[row["strategy"], float(budget.removesuffix("bpw"))].seconds
                table.add_row(*_cells(row, seconds))
        yield table


def _cells(row: Mapping[str, Any], seconds: float) -> list[str]:
    name = escape(row["strategy"])
    if row["status"] != "ok":
        return [name, f"{row['status']}: {escape(row['reason'])}"]
    difference = "–"
    if row["difference"] is not None:
        difference = f"{row['difference']:+.5f} ± {row['difference_se']:.5f}"
    ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return [
        name,
        f"{row['bytes']:,}",
        f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
        difference,
        ratio,
        f"{row['rank']:.1f}",
        f"{row['perplexity']:.2f}",
        f"{100 * row['top1']:.1f} %",
        f"{row['measurements']:,}",
        f"{seconds:.1f}",
    ]
